"""Gates of `require`: a metric, a comparison, a number; what the run must satisfy to be published."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

SPEEDUP = "speedup"
"""The one metric that another run of the same recipe does not give again."""
METRICS: Mapping[str, str] = MappingProxyType(
    {
        "size_ratio": "tensor bytes of the result / tensor bytes of the original",
        "bytes": "tensor bytes of the result, copies counted once",
        "bits_per_weight": "8 * bytes / parameters of the result",
        "linear_bytes_ratio": "bytes of the blocks' quantized layers / their bytes in bfloat16",
        "parameters": "parameters of the result, identical copies counted once",
        "macs": "multiply-accumulates of one forward at the reference input",
        "sqnr_db": "signal to error of the model's output (of a denoiser over all steps; of a model that "
        "segments, the embedding of an image), decibels",
        "sqnr_db_worst_step": "the same for the worst step, decibels",
        "kl": "mean divergence of the predicted distribution (next token, class) from the original's, nats",
        "perplexity": "of the result, on text that was not calibrated on",
        "perplexity_original": "the same of the original",
        "perplexity_increase": "perplexity / perplexity_original - 1",
        "psnr_db": "peak signal to noise of final images under equal seeds, decibels",
        "ssim": "structural similarity of final images under equal seeds, at most 1",
        "class_agreement": "share of the result's samples that the classifier gives their class, 0 to 1",
        "class_agreement_original": "the same share for the original's samples",
        "class_agreement_drop": "class_agreement_original - class_agreement",
        "fid": "Frechet distance of the result's samples to the reference data's features",
        "fid_original": "the same distance for the original's samples",
        "accuracy": "share of the images of which the result names the class, 0 to 1",
        "accuracy_original": "the same share of the original",
        "accuracy_drop": "accuracy_original - accuracy",
        "top1_agreement": "share of the images that the result and the original give the same class, 0 to 1",
        "mask_agreement": "mean intersection over union of the result's masks with the original's at equal "
        "points, 0 to 1",
        "miou": "mean intersection over union of the result's masks with the true ones, a point each, 0 to 1",
        "miou_original": "the same mean of the original",
        "miou_drop": "miou_original - miou",
        "answers": "share of the questions of evaluate.answers that the result answers rightly, 0 to 1",
        "answers_original": "the same share of the original",
        "answers_drop": "answers_original - answers",
        "kv_bytes_per_token": "bytes of the key-value cache per token of a text, all layers, scales counted",
        "kv_bytes_ratio": "kv_bytes_per_token / the same of the original",
        "decode_perplexity": "of the result that reads the text token by token, through its compressed cache",
        "decode_perplexity_original": "of the original on the same tokens",
        "decode_perplexity_one_pass": "of the result in one pass: what the stages before its cache cost",
        "decode_perplexity_increase": "decode_perplexity / decode_perplexity_original - 1",
        "cache_perplexity_increase": "decode_perplexity / decode_perplexity_one_pass - 1, of the cache alone",
        "decode_kl": "mean divergence of the next token's distribution from the original's so, nats",
        "passkey": "share of the hidden numbers that the result finds through its compressed cache, 0 to 1",
        "passkey_original": "the same share of the original",
        "passkey_drop": "passkey_original - passkey",
        SPEEDUP: "shortest time of one forward of the original / that of the result, on the run's machine",
        "max_abs_error": "largest difference between the reopened folder's outputs and the model's in memory",
    }
)

_TEXT = ("perplexity", "perplexity_original", "perplexity_increase")
_ANSWERS = ("answers", "answers_original", "answers_drop")
_DECODING = (
    "decode_perplexity", "decode_perplexity_original", "decode_perplexity_one_pass",
    "decode_perplexity_increase", "cache_perplexity_increase", "decode_kl",
)  # fmt: skip
_PASSKEY = ("passkey", "passkey_original", "passkey_drop")
_CACHE = ("kv_bytes_per_token", "kv_bytes_ratio")
LANGUAGE_ONLY = (*_TEXT, *_ANSWERS, *_CACHE, *_DECODING, *_PASSKEY)
"""Metrics of language models alone; `kl` is measured of classifiers as well."""
_ACCURACY = ("accuracy", "accuracy_original", "accuracy_drop")
CLASSIFIER_ONLY = (*_ACCURACY, "top1_agreement")
_MIOU = ("miou", "miou_original", "miou_drop")
SEGMENTER_ONLY = ("mask_agreement", *_MIOU)
_IMAGES_ONLY = ("sqnr_db_worst_step", "psnr_db", "ssim")
_FIDELITY = ("sqnr_db", "kl", *_IMAGES_ONLY, *_TEXT, "top1_agreement", "mask_agreement")
ONE_PASS = ("sqnr_db", "kl", "perplexity", "perplexity_increase")
"""Metrics of the result of a language model that reads every text in one pass."""
_SAMPLES = ("class_agreement", "class_agreement_original", "class_agreement_drop", "fid", "fid_original")
_QUALITY = (*_SAMPLES, *_ACCURACY, *_MIOU)
DENOISER_ONLY = (*_IMAGES_ONLY, *_SAMPLES)
NEEDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(_FIDELITY, "fidelity"),
        **dict.fromkeys(_QUALITY, "quality"),
        **dict.fromkeys(_ANSWERS, "answers"),
        **dict.fromkeys(_DECODING, "decoding"),
        **dict.fromkeys(_PASSKEY, "decoding.passkey"),
        SPEEDUP: "speed",
    }
)
"""Metric -> the key of `evaluate`, perhaps one below another, without which it is not measured; the others
always are, where the model has what they count."""

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
)
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_SYNTAX = rf"^\s*(<=|>=|==|<|>)\s*({_NUMBER})\s*$"


@dataclass(frozen=True)
class Gate:
    """A comparison such as `<= 0.35`.

    Attributes:
        operator: one of `<=`, `>=`, `==`, `<`, `>`.
        value: the number on its right.
    """

    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a comparison from text.

        Raises:
            ValueError: when it is none.
        """
        found = re.match(_SYNTAX, text)
        if found is None or not math.isfinite(float(found[2])):
            raise ValueError(f"{text!r} is not a comparison; write one such as '<= 0.35' or '>= 12'")
        return cls(found[1], float(found[2]))

    def holds(self, measured: float) -> bool:
        """Tell whether `measured` satisfies the gate; NaN never does."""
        return _COMPARISONS[self.operator](measured, self.value)

    def __str__(self) -> str:
        return f"{self.operator} {self.value:.12g}"

    @classmethod
    def _validate(cls, value: Any) -> Gate:
        if isinstance(value, Gate):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if value is None:
            raise ValueError(
                "null is not a comparison; leave the gate out of the recipe to require nothing of it"
                " (`--set require={}` leaves all of them out)"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        example = f"{value:g}" if isinstance(value, float) else str(value) if is_number else "0.35"
        raise ValueError(f"{value!r} is not a comparison; write one such as '<= {example}' or '>= {example}'")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": _SYNTAX, "examples": ["<= 0.35", ">= 12"]}


def judge(gates: Mapping[str, Gate], metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Hold measured metrics against `require`; a metric that was not measured fails its gate.

    Returns:
        The report's rows: `metric`, `expected`, `measured`, `passed`.
    """
    rows: list[dict[str, Any]] = []
    for name, gate in gates.items():
        value = metrics.get(name)
        passed = value is not None and gate.holds(value)
        rows.append({"metric": name, "expected": str(gate), "measured": value, "passed": passed})
    return rows


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of every row of `judge` that did not pass what was measured and what is required."""
    return [
        f"{row['metric']} is {row['measured']}, required {row['expected']}"
        for row in rows
        if not row["passed"]
    ]
