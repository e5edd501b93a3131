"""Does a recipe speak of the kind of model that it names? Torch-free.

A denoiser is sampled from, a language model reads text, a classifier or a model that segments sees images.
What is only of use for one of them is refused for the others instead of being left aside without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from .calibration.inputs import OWN_TEXTS, check_table, text_file
from .errors import SourceError
from .exporters.pruning_table import recovery_advice
from .models.latent_sizes import any_size
from .models.registry import FAMILY_NAMES, task_of
from .recipes.allocation import AllocationSettings
from .recipes.decoding import MOST_ANSWER
from .recipes.gates import CLASSIFIER_ONLY, DENOISER_ONLY, LANGUAGE_ONLY, SEGMENTER_ONLY
from .recipes.pruning import IsomorphicSettings
from .recipes.stages import GridSettings, StageSettings, ViditQSettings
from .runtime.transformers_config import longest_sequence

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe
    from .recipes.tree import Location

_DENOISER_KEYS = ("steps", "guidance_scale", "size", "scheduler", "classes", "prompts", "embeddings", "data")
_LANGUAGE_KEYS = ("text", "length")
_CLASSIFIER_KEYS = ("images", "strict")
_AMOUNT_KEYS = ("samples", "batch_size")
_SAMPLING_KEYS = ("steps", "guidance_scale")


def check_kind(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse keys and gates that mean nothing for the model, and a language model without a text.

    A key that is there with the value it has anyway, as in the resolved recipe of a report, says nothing
    and is no error.

    Raises:
        RecipeError: a key or a gate; with its place in the file.
        SourceError: there is no text to calibrate and measure on, or no table of sensitivities where one
            is named.
    """
    _check_allocations(loaded)
    family = FAMILY_NAMES[checkpoint.class_name]
    task = task_of(family)
    if task == "language":
        _check_language(loaded, checkpoint, family)
    elif task == "classify":
        _check_classifier(loaded, family)
    elif task == "segment":
        _check_segmenter(loaded, family)
    else:
        _check_denoiser(loaded, checkpoint, family)
    fidelity = loaded.recipe.evaluate.fidelity
    if task != "segment" and fidelity is not None and _changed(fidelity, ("points",)):
        raise loaded.error(
            ("evaluate", "fidelity", "points"),
            f"prompts models that segment, and {family} is none",
            "leave it out",
        )
    if task != "language" and loaded.recipe.evaluate.answers is not None:
        raise loaded.error(
            ("evaluate", "answers"), f"asks language models, and {family} is none", "leave it out"
        )


def _check_denoiser(loaded: LoadedRecipe, checkpoint: Checkpoint, family: str) -> None:
    if not any_size(checkpoint.config):
        side = checkpoint.config["sample_size"]
        _refuse_keys(
            loaded, ("size",), f"is of no use: the model's own sample_size is {side}", "leave it out"
        )
    for keys, kind in ((_LANGUAGE_KEYS, "language models"), (_CLASSIFIER_KEYS, "classifiers")):
        _refuse_keys(loaded, keys, f"is of use for {kind}, and {family} is a denoiser", "leave it out")
    others = (*LANGUAGE_ONLY, *CLASSIFIER_ONLY, *SEGMENTER_ONLY, "kl")
    _check_gates(loaded, dict.fromkeys(others, f"is not measured for a denoiser such as {family}"))
    _check_losses(loaded, "denoising", reason=f"is a loss of classifiers, and {family} is a denoiser")


def _check_classifier(loaded: LoadedRecipe, family: str) -> None:
    """Refuse what is of use for others; whether there are images is the matter of `fitting_images`."""
    _check_seer(loaded, f"{family} is a classifier")
    others = (*LANGUAGE_ONLY, *DENOISER_ONLY, *SEGMENTER_ONLY)
    _check_gates(loaded, dict.fromkeys(others, f"is not measured for a classifier ({family})"))
    losses = ("cross_entropy", "pseudo_labels", "output_norm")
    _check_losses(loaded, *losses, reason=f"is a loss of denoisers, and {family} is a classifier")


def _check_segmenter(loaded: LoadedRecipe, family: str) -> None:
    """Refuse what is of use for others; whether there are images is the matter of `fitting_scenes`."""
    _check_seer(loaded, f"{family} is a model that segments")
    others = (*LANGUAGE_ONLY, *DENOISER_ONLY, *CLASSIFIER_ONLY, "kl")
    _check_gates(loaded, dict.fromkeys(others, f"is not measured for a model that segments ({family})"))


def _check_seer(loaded: LoadedRecipe, kind: str) -> None:
    """Refuse keys that are of no use for a model that sees images."""
    unused = f"is of use for denoisers, and {kind}"
    _refuse_keys(loaded, _DENOISER_KEYS, unused, "leave it out; it has `images`")
    _refuse_keys(loaded, _LANGUAGE_KEYS, f"is of use for language models, and {kind}", "leave it out")
    for name, part in (
        ("fidelity", loaded.recipe.evaluate.fidelity),
        ("quality", loaded.recipe.evaluate.quality),
    ):
        for key in _changed(part, _SAMPLING_KEYS) if part is not None else ():
            raise loaded.error(("evaluate", name, key), unused, "leave it out")


def _check_losses(loaded: LoadedRecipe, *fitting: str, reason: str) -> None:
    for index, stage in enumerate(loaded.recipe.stages):
        settings = stage.settings
        if isinstance(settings, IsomorphicSettings) and settings.loss not in (None, *fitting):
            raise loaded.error(
                ("stages", index, stage.method, "loss"), f"{settings.loss} {reason}", f"use {fitting[0]}"
            )


def _refuse_keys(loaded: LoadedRecipe, keys: tuple[str, ...], reason: str, hint: str) -> None:
    for key in _changed(loaded.recipe.calibration, keys):
        raise loaded.error(("calibration", key), reason, hint)


def _check_language(loaded: LoadedRecipe, checkpoint: Checkpoint, family: str) -> None:
    recipe = loaded.recipe
    unused = f"is of use for denoisers, and {family} is a language model"
    _refuse_keys(loaded, _DENOISER_KEYS, unused, "leave it out; it has `text` and `length`")
    _refuse_keys(
        loaded,
        _CLASSIFIER_KEYS,
        f"is of use for classifiers, and {family} is a language model",
        "leave it out",
    )
    if recipe.evaluate.fidelity is not None:
        for key in _changed(recipe.evaluate.fidelity, _SAMPLING_KEYS):
            raise loaded.error(("evaluate", "fidelity", key), unused, "leave it out")
    if recipe.evaluate.quality is not None:
        raise loaded.error(
            ("evaluate", "quality"), f"judges images, and {family} is a language model", "leave it out"
        )
    others = (*DENOISER_ONLY, *CLASSIFIER_ONLY, *SEGMENTER_ONLY)
    _check_gates(loaded, dict.fromkeys(others, f"is not measured for a language model ({family})"))
    _check_settings(loaded, unused)
    reads = recipe.evaluate.fidelity is not None or not _measured_alone(recipe)
    if not reads:
        _refuse_keys(
            loaded,
            (*_LANGUAGE_KEYS, *_AMOUNT_KEYS),
            "is of no use: no stage calibrates, and no outputs are compared",
            "leave it out, or measure `evaluate.fidelity`",
        )
        return
    positions = longest_sequence(checkpoint.config)
    if recipe.calibration.length > positions:
        raise loaded.error(
            ("calibration", "length"),
            f"{recipe.calibration.length} tokens; the model takes at most {positions}",
        )
    _check_passkeys(loaded, positions)
    if text_file(recipe.calibration, checkpoint.folder) is None:
        raise SourceError(
            f"{checkpoint.id}: a language model is measured on text, and the recipe names none",
            hint=f"add `calibration: {{text: FILE.txt}}`, or put {OWN_TEXTS[0]} into the model's folder"
            + (", or `evaluate: {fidelity: null}`" if _measured_alone(recipe) else ""),
        )


def _check_passkeys(loaded: LoadedRecipe, positions: int) -> None:
    """Refuse texts with a hidden number that are longer than what the model takes, its answer included."""
    decoding = loaded.recipe.evaluate.decoding
    hidden = None if decoding is None else decoding.passkey
    for index, length in enumerate(() if hidden is None else hidden.lengths):
        if length + MOST_ANSWER > positions:
            raise loaded.error(
                ("evaluate", "decoding", "passkey", "lengths", index),
                f"{length} tokens, and {MOST_ANSWER} for the answer; the model takes at most {positions}",
                f"lower it to {positions - MOST_ANSWER} at the most"
                if positions > 256
                else "leave passkey out",
            )


def _measured_alone(recipe: Recipe) -> bool:
    """Tell whether no stage calibrates, so that the text would be measured on and no more."""
    return not any(stage.settings.calibrates for stage in recipe.stages)


def _check_settings(loaded: LoadedRecipe, unused: str) -> None:
    """Refuse what a stage says about layers or timesteps that a language model does not have."""
    for index, stage in enumerate(loaded.recipe.stages):
        location: Location = ("stages", index, stage.method)
        settings = stage.settings
        if isinstance(settings, GridSettings) and _changed(settings, ("adaln_weight_bits",)):
            raise loaded.error((*location, "adaln_weight_bits"), unused, "leave it out")
        if isinstance(settings, ViditQSettings) and settings.timestep_ranges:
            raise loaded.error((*location, "timestep_ranges"), unused, "leave it out")
        for place, allocation in _allocations(location, settings):
            if _changed(allocation.sensitivity, ("steps",)):
                raise loaded.error((*place, "sensitivity", "steps"), unused, "leave it out")
            for name, group in (allocation.groups or {}).items():
                if group.metric == "ssim":
                    raise loaded.error(
                        (*place, "groups", name, "metric"), "ssim compares images, not logits", "use sqnr_db"
                    )


def _check_allocations(loaded: LoadedRecipe) -> None:
    """Refuse an allocation with one sample, or with a table that is not there."""
    for _, allocation in allocations(loaded.recipe):
        samples = loaded.recipe.calibration.samples
        if samples < 2:
            raise loaded.error(
                ("calibration", "samples"),
                f"{samples} sample; bits are measured on one half of the samples and compared on the other",
                "write 2 at least, better twice sensitivity.samples",
            )
        if allocation.sensitivity.table is not None:
            check_table(allocation.sensitivity.table)


def sample_notes(recipe: Recipe, index: int) -> list[str]:
    """Say where a stage's sensitivities are measured on fewer samples than it asks for.

    Args:
        recipe: that fits its model.
        index: of the stage.
    """
    have = recipe.calibration.samples
    return [
        f"of {have} calibration samples, {have // 2} are measured on instead of {asked}: allocations are"
        " compared on the others"
        for place, allocation in allocations(recipe)
        if place[1] == index and (asked := allocation.sensitivity.samples) > have // 2
    ]


def recovery_notes(recipe: Recipe, index: int, family: str) -> list[str]:
    """Say of the last pruning stage that nothing trains the model afterwards.

    Args:
        recipe: that fits its model.
        index: of the stage.
        family: of the model.
    """
    phases = [stage.settings.phase for stage in recipe.stages]
    if phases[index] != "prune" or "prune" in phases[index + 1 :]:
        return []
    advice = recovery_advice([stage.method for stage in recipe.stages], family)
    return [] if advice is None else [advice]


def allocations(recipe: Recipe) -> Iterator[tuple[Location, AllocationSettings]]:
    """Yield the settings of every bit allocation of a recipe, with their place."""
    for index, stage in enumerate(recipe.stages):
        yield from _allocations(("stages", index, stage.method), stage.settings)


def _allocations(
    location: Location, settings: StageSettings
) -> Iterator[tuple[Location, AllocationSettings]]:
    """Yield the settings of a bit allocation, with their place: the stage itself, or its `bits`."""
    if isinstance(settings, AllocationSettings):
        yield location, settings
    if isinstance(settings, ViditQSettings) and settings.allocation is not None:
        yield (*location, "bits"), settings.allocation


def _check_gates(loaded: LoadedRecipe, reasons: Mapping[str, str]) -> None:
    for name in loaded.recipe.require:
        if name in reasons:
            raise loaded.error(("require", name), reasons[name], "remove the gate")


def _changed(settings: BaseModel, keys: tuple[str, ...]) -> list[str]:
    """Return those of the keys that were set to something else than their defaults."""
    fields: Mapping[str, Any] = type(settings).model_fields
    return [
        key
        for key in keys
        if key in settings.model_fields_set and getattr(settings, key) != fields[key].default
    ]
