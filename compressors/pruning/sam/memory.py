"""What slimming takes at its worst moments, from shapes alone: the steps themselves, rehearsed on `meta`.

Beside a step's tensors there are weights (the original for the choice images and as a teacher, the model
itself, whose encoder is float32 while it is scored or trained, the model after the first aligning), float32
sums of gradients or the two moments of Adam, and what is kept of images. A teacher that has no share in the
loss any more stays in memory, so the first step counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ....calibration.mask_files import MASKS_OF_AN_IMAGE
from ....models.base import ModelSpec
from ....recipes.slimsam import SlimSamSettings
from ....runtime.sam_sizes import SamEncoder, sam_encoder
from ...recovery.keeping import BUDGET_BYTES, KeptPixels
from ...rehearsal import peak_bytes
from .features import encoder_of
from .judging import KEPT_BYTES
from .learning import Aligning, Teachers
from .losses import Phase
from .recomputing import recomputing
from .scores import scored
from .sites import ENCODER, encoder_sites

FLOAT32_BYTES = 4
_ENLARGED_BYTES = 2 * 2**27
"""Of masks that are brought to the size of an image, before and after; see `calibration.segmenting`."""


@dataclass(frozen=True)
class PhaseBytes:
    """One of the worst moments.

    Attributes:
        name: of the phase, as the report has it.
        memory: bytes of everything that is alive then.
    """

    name: str
    memory: int


def scoring_bytes(spec: ModelSpec, settings: SlimSamSettings, *, embedding: bool, beside: int) -> int:
    """Return what scoring takes: the model, its sums, and one image forth and back.

    Args:
        spec: of the model that is scored.
        settings: `recompute`.
        embedding: whether the residual stream is scored.
        beside: bytes of what else is in memory.
    """
    module = spec.meta_module().float().eval().requires_grad_(False)
    names = [f"{name}.weight" for name in scored(encoder_sites(module), embedding=embedding)]
    sums = FLOAT32_BYTES * sum(prod(spec.tensors[name].shape) for name in names)
    parameters = dict(module.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True).register_post_accumulate_grad_hook(_drop)
    encoder, pixels = encoder_of(module), _pixels(sam_encoder(spec.config), 1)

    def run() -> None:
        with recomputing(encoder) if settings.recompute else nullcontext():
            output = encoder(pixels).last_hidden_state
            torch.square(torch.randn_like(output) - (output - output.detach())).mean().backward()

    return beside + widened_bytes(spec) + sums + peak_bytes(run, [*module.parameters(), pixels])


def aligning_bytes(
    student: ModelSpec,
    teachers: Sequence[ModelSpec],
    phase: Phase,
    settings: SlimSamSettings,
    *,
    beside: int,
) -> int:
    """Return what an aligning takes: moments, gradients, and a step or the choice images.

    Args:
        student: the cut model.
        teachers: the original and, in the second aligning, the model before it.
        phase: see `losses.Phase`.
        settings: of the stage.
        beside: bytes of what else is in memory, teachers included.
    """
    encoder = sam_encoder(student.config)
    moments = 2 * FLOAT32_BYTES * encoder_elements(student)
    images = settings.batch_size // settings.parts
    pixels = FLOAT32_BYTES * encoder.channels * encoder.image_size**2
    read = settings.batch_size * settings.steps * pixels if settings.steps is not None else BUDGET_BYTES
    step = _step_bytes(student, teachers, phase, settings, images)
    judged = _judging_bytes(student)
    kept = min(BUDGET_BYTES, read) + 2 * images * pixels  # one part is read ahead
    return beside + widened_bytes(student) + moments + kept + max(step, judged)


def choice_bytes(spec: ModelSpec, settings: SlimSamSettings) -> int:
    """Return what is kept of the choice images: the original's embeddings, as far as there is room."""
    encoder = sam_encoder(spec.config)
    one = FLOAT32_BYTES * encoder.out_channels * encoder.side**2
    return min(KEPT_BYTES, settings.choice_images * one)


def encoder_elements(spec: ModelSpec) -> int:
    """Return how many parameters the image encoder has."""
    return sum(prod(tensor.shape) for name, tensor in spec.tensors.items() if name.startswith(f"{ENCODER}."))


def widened_bytes(spec: ModelSpec) -> int:
    """Return the bytes of a model whose encoder is float32."""
    more = FLOAT32_BYTES - spec.dtype.itemsize
    return spec.size().bytes + more * encoder_elements(spec)


def _step_bytes(
    student: ModelSpec, teachers: Sequence[ModelSpec], phase: Phase, settings: SlimSamSettings, images: int
) -> int:
    """Return the bytes of a step's tensors, gradients included."""
    module = student.meta_module().float().eval()
    originals = [one.meta_module().to(one.dtype).eval().requires_grad_(False) for one in teachers]
    pictures = _Pictures(sam_encoder(student.config))
    learner = Aligning(
        encoder_of(module), Teachers(originals[0], *originals[1:]), phase, KeptPixels(pictures), settings, 0
    )
    encoder_of(module).requires_grad_(True)
    pixels = pictures.pixels(range(images))

    def run() -> None:
        loss, _ = learner.loss((0, pixels))
        loss.backward()

    gradients = FLOAT32_BYTES * encoder_elements(student)
    known = [pixels, *(item for one in (module, *originals) for item in one.parameters())]
    if settings.parts > 1:  # the second part finds the gradients of the first
        for parameter in encoder_of(module).parameters():
            parameter.grad = torch.empty_like(parameter)
            known.append(parameter.grad)
    peak = peak_bytes(run, known) + (gradients if settings.parts > 1 else 0)
    if settings.precision == "float32":
        return peak
    # Half as wide, with weights that autocast keeps in that width; norms and losses stay in float32.
    return gradients + max(0, peak - gradients) // 2 + gradients // 2


def _judging_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the tensors with which one choice image and all its masks are looked at."""
    module = spec.meta_module().float().eval().requires_grad_(False)
    encoder = sam_encoder(spec.config)
    pixels, points = _pixels(encoder, 1), torch.empty(1, MASKS_OF_AN_IMAGE, 1, 2, device="meta")

    @torch.no_grad()
    def run() -> None:
        embedding = encoder_of(module)(pixels).last_hidden_state
        module(image_embeddings=embedding, input_points=points, multimask_output=True, return_dict=False)

    masks = MASKS_OF_AN_IMAGE * encoder.image_size**2
    known = [*module.parameters(), *module.buffers(), pixels, points]
    enlarged = min(_ENLARGED_BYTES, 2 * FLOAT32_BYTES * masks)
    return max(peak_bytes(run, known), enlarged + 2 * masks)


class _Pictures:
    """One image on `meta`."""

    def __init__(self, encoder: SamEncoder) -> None:
        self._encoder = encoder

    def __len__(self) -> int:
        return 1

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return _pixels(self._encoder, len(indices))


def _pixels(encoder: SamEncoder, images: int) -> Tensor:
    side = encoder.image_size
    return torch.empty(images, encoder.channels, side, side, device="meta")


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
