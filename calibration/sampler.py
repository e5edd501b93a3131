"""Diffusion sampling with classifier-free guidance, seeded per sample, watched call by call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..models.base import OpenModel
from ..models.latent_sizes import any_size, latent_shape, tokens_of
from ..progress import Progress, step
from .conditions import (
    ClassConditions,
    Conditions,
    PromptConditions,
    conditions_for,
    embeds_guidance,
    is_guided,
)
from .seeds import generator_for, normal_rows

__all__ = [
    "ClassConditions", "Conditions", "PromptConditions", "conditions_for", "denoise_batch",
    "make_scheduler", "place", "sample",
]  # fmt: skip

OnCall = Callable[[dict[str, Any], Tensor], None]
"""Called with the keyword arguments of one forward of the denoiser and its output."""

_SIZES_AND_STYLE = "use_style_cond_and_image_meta_size"
_LEARNED_VARIANCE = ("learned", "learned_range")


def sample(
    model: OpenModel,
    conditions: Conditions,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    scheduler_name: str | None = None,
    on_call: OnCall | None = None,
    progress: Progress,
) -> Tensor:
    """Draw one sample per condition.

    Sample i starts from noise that depends on `seed` and i alone. The scheduler computes in float32,
    the denoiser in its own dtype.

    Args:
        model: its module is called as it is now.
        conditions: of the n samples.
        steps: denoiser calls per sample, at least 1 (some schedulers make a few more).
        guidance_scale: above 1, each call has two rows per sample, the conditional half first.
        seed: of the run.
        batch_size: samples computed together.
        scheduler_name: "ddim", "dpm++", or None for the checkpoint's own.
        on_call: sees every call of the denoiser.
        progress: gets one step, in denoiser calls.

    Returns:
        [n, C, H, W] float32 on the CPU; for latent models, latents.
    """
    scheduler = make_scheduler(model, scheduler_name)
    samples = []
    with step(progress, "sampling", -(-len(conditions) // batch_size) * steps):
        for start in range(0, len(conditions), batch_size):
            rows = (start, min(start + batch_size, len(conditions)))
            latents = denoise_batch(
                model, scheduler, conditions, rows, steps=steps, guidance_scale=guidance_scale, seed=seed,
                on_call=on_call, progress=progress,
            )  # fmt: skip
            samples.append(latents.cpu())
    return torch.cat(samples) if samples else torch.empty(0, *_shape(model, conditions))


@torch.no_grad()
def denoise_batch(
    model: OpenModel,
    scheduler: Any,
    conditions: Conditions,
    rows: tuple[int, int],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    on_call: OnCall | None,
    progress: Progress,
) -> Tensor:
    """Draw samples `rows[0] : rows[1]` and return them, [n, C, H, W] float32 on the model's device.

    As in the stock pipelines, guidance acts on the prediction, and a learned variance (twice the
    channels) is handed on only to a scheduler that asks for it.
    """
    guided, shape = is_guided(model, guidance_scale), _shape(model, conditions)
    reference = next(model.module.parameters())
    generators = [generator_for(seed, "noise", index) for index in range(*rows)]
    inputs = place(conditions.inputs(*rows, guided=guided), model.module)
    _set_timesteps(scheduler, model, shape, steps, reference.device)
    noise = normal_rows(shape, generators)
    # Flow-matching schedulers start from plain noise and do not scale the denoiser's input.
    latents = noise.to(reference.device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    rescale = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
    randomness = _scheduler_randomness(scheduler, generators)
    for time in scheduler.timesteps:
        scaled = rescale(latents, time)
        doubled = torch.cat([scaled, scaled]) if guided else scaled
        kwargs = {
            model.family.latents: doubled.to(_dtype(model.module)),
            "timestep": time.to(reference.device).expand(len(doubled)),
            **inputs,
        }
        output = model.module(**kwargs, return_dict=False)[0]
        if on_call is not None:
            on_call(kwargs, output)
        prediction = _guide(output.float(), shape[0], guidance_scale if guided else None)
        if not _wants_variance(scheduler):
            prediction = prediction[:, : shape[0]]
        latents = scheduler.step(prediction, time, latents, **randomness, return_dict=False)[0].float()
        progress.advance()
    return latents


def make_scheduler(model: OpenModel, name: str | None) -> Any:
    """Build a fresh scheduler.

    Args:
        model: gives the checkpoint's own scheduler config, and the family's usual one where it has none.
        name: "ddim", "dpm++", or None for the checkpoint's own.

    Raises:
        UsageError: the name is unknown, or does not fit a flow-matching model.
    """
    import diffusers

    own = model.scheduler or _usual_scheduler(model)
    if name is None:
        return type(own).from_config(own.config)
    kinds = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
    if name not in kinds:
        raise UsageError(
            f"scheduler {name!r} is unknown", hint=f"use one of {', '.join(kinds)}, or leave it out"
        )
    if isinstance(own, diffusers.FlowMatchEulerDiscreteScheduler):
        raise UsageError(f"scheduler {name!r} does not fit a flow-matching model", hint="leave it out")
    # The prediction comes without its variance channels, so the solver must not look for them.
    changes = {"variance_type": None} if name == "dpm++" else {}
    return kinds[name].from_config(own.config, **changes)


def place(inputs: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Move arguments to the module's device, floating-point ones but the timestep to its dtype."""
    reference, dtype = next(module.parameters()), _dtype(module)

    def move(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(key, item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        cast = dtype if value.is_floating_point() and name != "timestep" else value.dtype
        return value.to(device=reference.device, dtype=cast)

    return {name: move(name, value) for name, value in inputs.items()}


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def _shape(model: OpenModel, conditions: Conditions) -> tuple[int, int, int]:
    """Return (channels, height, width) of a sample."""
    pixels = conditions.pixels if isinstance(conditions, PromptConditions) else None
    return latent_shape(model.config, pixels)


def _guide(output: Tensor, channels: int, scale: float | None) -> Tensor:
    """Combine both halves of a guided call; the variance stays the conditional half's."""
    if scale is None:
        return output
    conditional, unconditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def _wants_variance(scheduler: Any) -> bool:
    """Tell whether `step` splits the learned variance off by itself, as DDPM's does."""
    import diffusers

    learned = scheduler.config.get("variance_type") in _LEARNED_VARIANCE
    return learned and isinstance(scheduler, diffusers.DDPMScheduler)


def _scheduler_randomness(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """Return the argument that seeds stochastic schedulers per sample."""
    import diffusers

    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return {}  # its optional noise takes one generator for the whole batch
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _usual_scheduler(model: OpenModel) -> Any:
    """Return the scheduler of the family's published checkpoints, for those that come without one."""
    import diffusers

    family = model.family.name
    if family == "sd3":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "flux":
        # What needs few steps is not told how strong guidance is, and noises all sizes alike.
        dynamic = embeds_guidance(model)
        return diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic
        )
    if family == "hunyuan":
        return diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.03 if model.config[_SIZES_AND_STYLE] else 0.018,
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1,
            timestep_spacing="leading",
        )  # fmt: skip
    if family == "unet":
        return diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        )  # fmt: skip
    if family == "pixart":
        return diffusers.DPMSolverMultistepScheduler(solver_order=2, beta_schedule="linear")
    return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


def dynamic_shift(scheduler: Any, tokens: int) -> float:
    """Return the logarithm of what the odds of noise are multiplied by: larger images are noised more.

    Args:
        scheduler: of flow matching, with `use_dynamic_shifting`.
        tokens: that an image is cut into.
    """
    config = scheduler.config
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return float(config.base_shift + slope * (tokens - low))


def _set_timesteps(
    scheduler: Any, model: OpenModel, shape: tuple[int, int, int], steps: int, device: torch.device
) -> None:
    config = scheduler.config
    extra: dict[str, Any] = {}
    if any_size(model.config) and not config.get("use_flow_sigmas"):
        extra["sigmas"] = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()  # Flux's own
    if config.get("use_dynamic_shifting"):
        extra["mu"] = dynamic_shift(scheduler, tokens_of(model.config, shape))
    scheduler.set_timesteps(steps, device=device, **extra)
