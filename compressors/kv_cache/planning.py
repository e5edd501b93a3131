"""Predict the stage from shapes: ranks, bytes per token, factors, memory, and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PlanError
from ...models.base import ModelSpec
from ...models.cache_bytes import cache_at_context
from ...recipes.kv_cache import CskvSettings
from ...runtime.kv import sizes
from ...runtime.kv.scheme import KvCacheScheme
from ...runtime.kv.support import Attentions, KvAttention, Skipped, layers_of, unsupported
from ..base import StagePlan
from .energies import ENERGY_BUDGET_BYTES, FLOAT64_BYTES, ROWS_AT_ONCE, portions
from .kept import COPIES_ON_DISK
from .ranks import removed_shares, scheme_of, uniform_ranks
from .rounded import ROUNDED_BUDGET_BYTES, held_bytes
from .training import INPUT_BUDGET_BYTES, STATE_BUDGET_BYTES, kept_bytes, state_bytes

FLOAT32_BYTES = 4
_WEIGHT_COPIES = 6  # [h_kv, h] in float64: the weight, its products, factors, and the decomposition's own
_SQUARE_COPIES = 8  # [h_kv, h_kv] in float64: covariance, directions, and the decomposition's own
_STEP_COPIES = 10  # [tokens, h_kv]: keys, values, states, targets, and gradients of these
_ROUNDED_COPIES = 10  # [tokens, h_kv]: what is exact and rebuilt, and states while they are rounded
_NAMES_SHOWN = 3


def attentions_of(config: Mapping[str, Any]) -> Attentions:
    """Return the attentions whose cache can be compressed, and those that keep a plain one.

    Args:
        config: completed, with `_class_name`, of a language model.

    Raises:
        PlanError: the model as a whole cannot have a compressed cache.
    """
    reason = unsupported(config)
    if reason is not None:
        raise PlanError(f"the cache of this model cannot be compressed: {reason}")
    return layers_of(config)


def plan_cskv(spec: ModelSpec, settings: CskvSettings) -> StagePlan:
    """Predict the stage. Where data deal out the channels, their sum is known, and equal ranks stand for it.

    Raises:
        PlanError: the cache is compressed already, the model cannot, or a share leaves no channel.
    """
    if spec.kv_cache is not None:
        raise PlanError(
            "the cache of this model is compressed already", hint="start from the model before that stage"
        )
    attentions = attentions_of(spec.config)
    sites = attentions.compressible
    scheme = scheme_of(sites, uniform_ranks(sites, settings), settings)
    after = spec.with_kv_cache(scheme)
    before_size, after_size = spec.size(), after.size()
    per_token = (before_size.kv_bytes_per_token, after_size.kv_bytes_per_token)
    notes = [
        *_rank_notes(sites, scheme, settings),
        *_byte_notes(scheme, spec, per_token),
        *_method_notes(settings),
        *_skipped_notes(attentions.skipped),
    ]
    return StagePlan(
        method=settings.method,
        before=before_size,
        after=after_size,
        spec=after,
        peak_memory_bytes=before_size.bytes + peak_bytes(sites, scheme, settings),
        notes=notes,
        layers=_rows(scheme),
        disk_bytes=_disk_bytes(scheme, settings),
    )


def peak_bytes(sites: Sequence[KvAttention], scheme: KvCacheScheme, settings: CskvSettings) -> int:
    """Return what the stage holds at its worst moment beside the model's weights."""
    hidden, width = max(site.hidden for site in sites), max(site.width for site in sites)
    grams = [FLOAT64_BYTES * site.hidden**2 for site in sites]
    held = max(max(grams), min(sum(grams), ENERGY_BUDGET_BYTES))
    weights = _WEIGHT_COPIES * hidden * width + _SQUARE_COPIES * width**2
    work = FLOAT64_BYTES * max(2 * ROWS_AT_ONCE * hidden, weights)
    factors = FLOAT32_BYTES * sizes.factor_parameters(scheme)
    peak = held + work + factors
    if settings.steps:
        states = [state_bytes(layer, settings) for layer in scheme.layers.values()]
        step = FLOAT32_BYTES * settings.batch_tokens * (2 * hidden + _STEP_COPIES * width)
        inputs = FLOAT32_BYTES * settings.steps * settings.batch_tokens * hidden * len(sites)
        step += min(inputs, INPUT_BUDGET_BYTES)
        peak = max(peak, held + factors + max(max(states), min(sum(states), STATE_BUDGET_BYTES)) + step)
    if settings.bits is not None:
        sets = 2 if settings.steps else 1
        layers = [held_bytes(layer, sets) for layer in scheme.layers.values()]
        rows = FLOAT32_BYTES * max(ROWS_AT_ONCE, scheme.key_group) * (hidden + _ROUNDED_COPIES * width)
        most = max(max(layers), min(sum(layers), ROUNDED_BUDGET_BYTES))
        peak = max(peak, held + sets * factors + most + rows)
    return peak


def _disk_bytes(scheme: KvCacheScheme, settings: CskvSettings) -> int:
    """Return what a training keeps: the factors of finished attentions, and the state of those under way."""
    if not settings.steps:
        return 0
    needed = {name: state_bytes(layer, settings) for name, layer in scheme.layers.items()}
    kept = {name: kept_bytes(layer, settings) for name, layer in scheme.layers.items()}
    state = max(sum(kept[name] for name in part) for part in portions(needed, STATE_BUDGET_BYTES))
    return FLOAT32_BYTES * sizes.factor_parameters(scheme) + COPIES_ON_DISK * state


def _rows(scheme: KvCacheScheme) -> list[dict[str, Any]]:
    return [
        {"name": name, "width": layer.width, "rank_k": layer.rank_k, "rank_v": layer.rank_v}
        for name, layer in scheme.layers.items()
    ]


def _rank_notes(sites: Sequence[KvAttention], scheme: KvCacheScheme, settings: CskvSettings) -> list[str]:
    layer = scheme.layers[sites[0].name]
    shares = removed_shares(scheme)
    both = (shares["k"] + shares["v"]) / 2
    if settings.allocate == "energy":
        return [
            f"{100 * shares['k']:.2f} % of the channels of keys are removed and {100 * shares['v']:.2f} % of"
            f" those of values, {100 * both:.2f} % of both; how many stay in which of {len(scheme.layers)}"
            f" attentions is decided on calibration data ({layer.rank_k} and {layer.rank_v} of {layer.width}"
            " on average)"
        ]
    return [
        f"of {layer.width} channels of keys {layer.rank_k} stay ({100 * shares['k']:.2f} % removed), of"
        f" values {layer.rank_v} ({100 * shares['v']:.2f} % removed); {100 * both:.2f} % of both are removed,"
        f" in {len(scheme.layers)} attentions"
    ]


def _byte_notes(
    scheme: KvCacheScheme, spec: ModelSpec, per_token: tuple[float | None, float | None]
) -> list[str]:
    item = spec.dtype.itemsize
    notes = []
    before, after = per_token
    if before is not None and after is not None:
        notes.append(
            f"cache: {before:,.0f} -> {after:,.0f} bytes per token ({100 * (1 - after / before):.2f} % less),"
            f" and {sizes.window_bytes(scheme, item):,} bytes per sequence for the window of {scheme.window}"
        )
    if scheme.bits is not None:
        stored = sizes.bytes_per_token(scheme, item)
        metadata = sizes.metadata_bytes_per_token(scheme)
        whole = sizes.full_bytes_per_token(scheme, item)
        notes.append(
            f"{scheme.bits} bits, packed: {metadata:,.0f} of the {stored:,.0f} bytes of a compressed token"
            f" are scales and offsets; with them {100 * (1 - stored / whole):.2f} % of these layers' cache"
            " are saved"
        )
    whole_cache = cache_at_context(spec.config, item, scheme)
    notes += _whole_notes(scheme, item, whole_cache)
    tokens = whole_cache["tokens"]
    notes.append(
        f"rebuilding keys and values costs {sizes.operations(sizes.rebuild_flops(scheme, tokens))} per"
        f" decoded token at {tokens:,} cached tokens"
    )
    return notes


def _whole_notes(scheme: KvCacheScheme, item: int, whole: Mapping[str, int]) -> list[str]:
    """Say what one sequence takes in full, and when what is added pays off."""
    tokens, before = whole["tokens"], whole["before"]
    one, many = sizes.break_even_tokens_one(scheme, item), sizes.break_even_tokens(scheme, item)
    if one is None or many is None:
        pays = "they never pay off: a token takes no less"
    else:
        beyond = f", beyond the {tokens:,} of its context" if one > tokens else ""
        pays = (
            f"with the window they pay off from {one:,} cached tokens of one sequence on{beyond}; alone,"
            f" over all sequences together, from {many:,} cached tokens on"
        )
    factors = sizes.factor_parameters(scheme)
    return [
        f"one sequence of {tokens:,} tokens, the model's context: {before:,} -> {whole['after']:,} bytes of"
        f" cache, window counted ({100 * whole['after'] / before:.2f} %); {whole['with_factors']:,} with the"
        f" factors ({100 * whole['with_factors'] / before:.2f} %)",
        f"factors: {factors:,} parameters, {factors * item:,} bytes beside the model's weights; {pays}",
    ]


def _method_notes(settings: CskvSettings) -> list[str]:
    if not settings.steps:
        return []
    through = ", through the rounding of the cache" if settings.trains_through_rounding else ""
    notes = [
        f"training: {settings.steps:,} steps of {settings.batch_tokens:,} tokens for the factors of every"
        f" attention, on its own error{through}"
    ]
    if settings.init == "whiten" and not settings.trains_through_rounding:
        notes.append(
            "init: whiten is the optimum of what is trained for already; steps can only come near it"
        )
    return notes


def _skipped_notes(skipped: Sequence[Skipped]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.why, []).append(layer.name)
    return [f"keep a plain cache ({why}): {_few(names)}" for why, names in by_reason.items()]


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
