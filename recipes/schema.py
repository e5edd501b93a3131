"""The recipe as pydantic models: what may stand in it, with defaults; importable without torch.

Reading a file, with places in every error, is `loader.load_recipe`. `model_dump(mode="json")` gives
the recipe's own form back: a stage is a one-key mapping, a gate is its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from .answers import AnswersSettings
from .data import DataSettings
from .decoding import COMPRESSES_CACHE, DecodingSettings
from .export import ROUNDING_FORMATS, Exports, ExportSettings, clash
from .gates import METRICS, NEEDS, ONE_PASS, Gate
from .kv_export import kv_clash
from .stages import PHASES, STAGES, StageSettings
from .suggest import suggestion

ENTRY_POINTS = "compress.compressors"


def refuse(location: tuple[str | int, ...], message: str, hint: str | None = None) -> NoReturn:
    """Raise a validation error at `location` below the value that is being validated."""
    kind = PydanticCustomError("recipe", "{message}", {"message": message, "hint": hint})
    raise ValidationError.from_exception_data(
        "Recipe", [InitErrorDetails(type=kind, loc=location, input=None)]
    )


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(_Settings):
    """The checkpoint to compress. A plain string is short for `{id: ...}`."""

    id: str = Field(
        min_length=1, description="A Hub id, a folder, or `builtin:NAME` for a model that is shipped."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub id; null: its default branch."
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Floating-point type to open the weights in; null: as they are stored."
    )
    subfolder: str | None = Field(
        None, description="Folder of the component inside a pipeline; null: found by its kind."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value


class CalibrationSettings(_Settings):
    """What the methods may look at: a denoiser's sampling trajectories, a text's sequences, or images."""

    samples: int = Field(
        32,
        ge=1,
        description="Samples whose trajectories are recorded; of a language model: sequences; of a "
        "classifier: images.",
    )
    steps: int = Field(20, ge=1, le=1000, description="Sampling steps of each of them.")
    guidance_scale: float = Field(
        4.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Classifier-free guidance; above 1 both branches are recorded.",
    )
    batch_size: int = Field(8, ge=1, description="Samples that are computed together.")
    size: int | None = Field(
        None,
        ge=16,
        le=8192,
        multiple_of=16,
        description="Side in pixels of the images that are sampled, also where they are compared; of models "
        "whose config names none (Flux). null: 1024.",
    )
    scheduler: Literal["ddim", "dpm++"] | None = Field(
        None, description="Sampler of the trajectories; null: the checkpoint's own."
    )
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Class labels to sample, for class-conditional models; null: all of them in turn."
    )
    prompts: Path | None = Field(
        None,
        description="Text file with one prompt per line, for text-conditional models; looked up "
        "in the current directory, then beside the recipe.",
    )
    embeddings: Path | None = Field(
        None, description="safetensors file with prompt embeddings, instead of prompts and text encoders."
    )
    text: Path | None = Field(
        None,
        description="Text for a language model: .txt, one document, or .jsonl, an object with the key "
        "`text` a line; looked up as prompts are. null: the text that comes with the model, if one does.",
    )
    length: int = Field(256, ge=8, le=2**20, description="Tokens of a sequence, for language models.")
    images: Path | None = Field(
        None,
        description="Images for a classifier: a folder with a folder per class, or with a metadata.csv or "
        "metadata.jsonl (file_name, label), perhaps below train/ and validation/ or test/; or a safetensors "
        "file (pixels uint8, labels). For a model that segments: a folder of images or an uncompressed .tar "
        "of one, perhaps with masks as SA-1B has them, in NAME.json beside NAME.jpg. Looked up as prompts "
        "are. null: those that come with the model.",
    )
    strict: bool = Field(
        False, description="Refuse a folder with images that cannot be read, instead of leaving them out."
    )
    data: DataSettings | None = Field(
        None, description="What the stages that train a denoiser learn from; null: no stage does."
    )

    @model_validator(mode="after")
    def _one_condition(self) -> CalibrationSettings:
        sources = ("classes", "prompts", "embeddings", "text", "images")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one of them")
        return self


class FidelitySettings(_Settings):
    """Closeness to the original under equal seeds."""

    samples: int = Field(
        16,
        ge=1,
        description="Samples that both models draw from equal noise; of a language model: sequences of the "
        "text that are not calibrated on; of a classifier or of a model that segments: images that nothing "
        "is calibrated or trained on.",
    )
    points: int = Field(
        4,
        ge=1,
        le=64,
        description="Random points that a model that segments is asked for the masks of, in every image.",
    )
    steps: int = Field(20, ge=1, le=1000, description="Sampling steps.")
    guidance_scale: float = Field(4.0, ge=0.0, allow_inf_nan=False, description="Classifier-free guidance.")
    batch_size: int = Field(8, ge=1, description="Samples that are computed together.")


class QualitySettings(_Settings):
    """Quality by itself: of samples, where a scorer is shipped; accuracy of classes; fit of masks."""

    samples: int = Field(
        500,
        ge=2,
        description="Samples that are scored; of a classifier: labelled images; of a model that segments: "
        "images with masks.",
    )
    steps: int = Field(10, ge=1, le=1000, description="Sampling steps.")
    guidance_scale: float = Field(1.5, ge=0.0, allow_inf_nan=False, description="Classifier-free guidance.")
    batch_size: int = Field(100, ge=1, description="Samples that are computed together.")


class SpeedSettings(_Settings):
    """Time of one forward at the model's reference input: original and result in turn, both in memory."""

    batch_size: int = Field(1, ge=1, le=65536, description="Items of a forward.")
    rounds: int = Field(7, ge=2, le=10_000, description="How often each is timed; the shortest counts.")


class EvaluateSettings(_Settings):
    """What is measured before the result is written."""

    fidelity: FidelitySettings | None = Field(
        FidelitySettings.model_validate({}), description="Closeness to the original; null: not measured."
    )
    quality: QualitySettings | None = Field(
        None,
        description="Class agreement and Frechet distance, a classifier's accuracy, or the fit of masks; "
        "null: not measured.",
    )
    answers: AnswersSettings | None = Field(
        None,
        description="Questions with known answers, of a language model; null: not measured.",
    )
    decoding: DecodingSettings | None = Field(
        None,
        description="What a language model with a compressed key-value cache says token by token. Without the"
        " key: measured where a stage compresses the cache and fidelity is; null: not measured.",
    )
    layers: bool = Field(True, description="Measure the error of every compressed layer for the report.")
    speed: SpeedSettings | None = Field(
        None, description="Time of one forward before and after, on this machine; null: not measured."
    )


def settings_class(method: str) -> type[StageSettings] | None:
    """Return the settings model of a method, or None where no such method is known.

    A method of another package is an entry point of the group `compress.compressors`; its settings
    model is the attribute `settings` of what the entry point names.
    """
    if method in STAGES:
        return STAGES[method]
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=method):
        found = getattr(entry.load(), "settings", None)
        if isinstance(found, type) and issubclass(found, StageSettings):
            return found
    return None


def settings_schema(model: type[StageSettings]) -> dict[str, Any]:
    """Return the JSON Schema of a method's settings, in one piece: without references to definitions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            described = {key: item for key, item in value.items() if key != "$ref"}
            return {**whole(definitions[value["$ref"].rpartition("/")[2]]), **described}
        return {key: whole(item) for key, item in value.items()}

    found: dict[str, Any] = whole(schema)
    return found


def method_names() -> list[str]:
    """Return the names of all methods, those of other packages last."""
    return [
        *STAGES,
        *sorted({entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)} - set(STAGES)),
    ]


@dataclass(frozen=True)
class Stage:
    """One stage: a method and its settings. In a recipe: the one-key mapping `method: settings`."""

    method: str
    settings: StageSettings

    @classmethod
    def _validate(cls, value: Any) -> Stage:
        if isinstance(value, Stage):
            return value
        if not isinstance(value, Mapping) or len(value) != 1:
            found = f"{len(value)} keys" if isinstance(value, Mapping) else json.dumps(value)
            refuse((), f"a stage is a mapping with one key, its method; found {found}", "write `- rtn: {}`")
        method, settings = next(iter(value.items()))
        model = settings_class(method)
        if model is None:
            refuse((method,), f"unknown method {method!r}", suggestion(method, method_names()))
        # One field named after the method, so that errors below carry its name in their location.
        wrapper = create_model("StageMapping", **{method: (model, ...)})  # type: ignore[call-overload]
        text = json.dumps({method: {} if settings is None else settings})
        return cls(method, getattr(wrapper.model_validate_json(text, strict=True), method))

    def to_json(self) -> dict[str, Any]:
        """Return the recipe's form."""
        return {self.method: self.settings.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(cls.to_json)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices = {}
        for method, model in STAGES.items():
            choices[method] = {**settings_schema(model), "type": ["object", "null"]}
        return {
            "type": "object",
            "description": "One stage: a method and its settings.",
            "properties": choices,
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }


_GATE_PROPERTIES = {
    name: {"description": text, **Gate.__get_pydantic_json_schema__(None, None)}  # type: ignore[arg-type]
    for name, text in METRICS.items()
}


DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?)$"
"""Pattern of the names of devices."""


class Recipe(_Settings):
    """A run: the model, what to calibrate on, the stages, what the result must satisfy, where it goes."""

    model: Annotated[
        ModelRef,
        WithJsonSchema({"anyOf": [{"type": "string"}, ModelRef.model_json_schema()]}),
    ] = Field(description="The checkpoint to compress: a Hub id, a folder, `builtin:dit`, or a mapping.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of everything random in the run.")
    device: str = Field(
        "auto",
        pattern=DEVICE,
        description="auto: a GPU where there is one; cpu, cuda, cuda:N.",
    )
    calibration: CalibrationSettings = Field(
        CalibrationSettings.model_validate({}), description="What the methods may look at."
    )
    stages: tuple[Stage, ...] = Field(
        description="The methods, in the order prune, recover, quantize, plan; [] where the format of every "
        "export rounds the weights by itself."
    )
    evaluate: EvaluateSettings = Field(EvaluateSettings.model_validate({}), description="What is measured.")
    require: Annotated[
        dict[str, Gate],
        WithJsonSchema({"type": "object", "properties": _GATE_PROPERTIES, "additionalProperties": False}),
    ] = Field(default_factory=dict, description="Metric -> comparison that the result must satisfy.")
    export: Annotated[tuple[ExportSettings, ...], Exports] = Field(
        description="Where the result goes, and in which form; a list for several variants of one result."
    )

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_order()
        self._decide_decoding()
        self._check_gates()
        found = clash(self.export) or kv_clash([stage.method for stage in self.stages], self.export)
        if found is not None:
            location, message, hint = found
            refuse(("export", *location), message, hint)
        return self

    def _check_order(self) -> None:
        if not self.stages and any(export.format not in ROUNDING_FORMATS for export in self.export):
            refuse(
                ("stages",),
                "[] is not a list of at least 1 entry: nothing would change",
                f"add a method, or use a format that rounds by itself: {', '.join(sorted(ROUNDING_FORMATS))}",
            )
        latest = 0
        for index, stage in enumerate(self.stages):
            rank = PHASES.index(stage.settings.phase)
            if rank < latest:
                before = self.stages[index - 1].method
                refuse(
                    ("stages", index, stage.method),
                    f"a {PHASES[rank]} stage cannot follow a {PHASES[latest]} stage ({before})",
                    f"order the stages as {' -> '.join(PHASES)}: move {stage.method} up",
                )
            latest = rank

    def _decide_decoding(self) -> None:
        """Measure decoding where it says something, unless the recipe decides; check what it decides."""
        compresses = any(stage.method in COMPRESSES_CACHE for stage in self.stages)
        evaluate = self.evaluate
        if "decoding" not in evaluate.model_fields_set:
            if compresses and evaluate.fidelity is not None:
                # Written down, so that the resolved recipe of a report says what was measured.
                resolved = evaluate.model_copy(update={"decoding": DecodingSettings.model_validate({})})
                self.__dict__["evaluate"] = resolved
        elif evaluate.decoding is not None:
            self._check_decoding(evaluate.decoding, compresses)

    def _check_decoding(self, asked: DecodingSettings, compresses: bool) -> None:
        if not compresses:
            refuse(
                ("evaluate", "decoding"),
                "nothing is decoded: no stage compresses the key-value cache",
                "add a stage `cskv`, or leave decoding out",
            )
        fidelity, length = self.evaluate.fidelity, self.calibration.length
        if fidelity is None:
            refuse(
                ("evaluate", "decoding"),
                "decoding is measured on the sequences of evaluate.fidelity, which is off",
                "add `fidelity: {}` to evaluate, or leave decoding out",
            )
        if asked.samples is not None and asked.samples > fidelity.samples:
            refuse(
                ("evaluate", "decoding", "samples"),
                f"{asked.samples} sequences; evaluate.fidelity has {fidelity.samples}",
                "raise fidelity.samples, or lower this",
            )
        if asked.prompt_tokens(length) + 2 > length:
            refuse(
                ("evaluate", "decoding", "prompt"),
                f"{asked.prompt} tokens; a sequence has {length}, and 2 at least must be left to decode",
                "lower prompt, or raise calibration.length",
            )

    def _check_gates(self) -> None:
        for name in self.require:
            if name not in METRICS:
                refuse(("require", name), f"unknown metric {name!r}", suggestion(name, METRICS))
            needed = NEEDS.get(name)
            if needed and not _is_on(self.evaluate, needed):
                refuse(
                    ("require", name),
                    f"{name} is not measured, because evaluate.{needed} is off",
                    f"{self._to_measure(needed)}, or remove the gate",
                )
            if name in ONE_PASS and self._compresses_cache_alone():
                refuse(
                    ("require", name),
                    f"{name} cannot fail: it reads every text in one pass, which a compressed cache leaves"
                    " as it is",
                    "write decode_perplexity_increase or decode_kl, which are measured through the cache",
                )

    def _compresses_cache_alone(self) -> bool:
        """Tell whether nothing changes what the model computes in one pass."""
        rounds = any(export.format in ROUNDING_FORMATS for export in self.export)
        return not rounds and all(stage.method in COMPRESSES_CACHE for stage in self.stages)

    def _to_measure(self, needed: str) -> str:
        key, _, below = needed.partition(".")
        if key == "decoding" and not any(stage.method in COMPRESSES_CACHE for stage in self.stages):
            return "add a stage `cskv`"
        return f"add `{key}: {f'{{{below}: {{}}}}' if below else '{}'}` to evaluate"


def _is_on(settings: BaseModel, path: str) -> bool:
    """Tell whether something is measured: a key, or one below another, joined by a dot."""
    found: Any = settings
    for key in path.split("."):
        found = None if found is None else getattr(found, key)
    return found is not None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, as editors and `compress schema` use it."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }
