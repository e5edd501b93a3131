"""What a stage that chose bits layer by layer says of its answer, in lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_STATES = {
    "optimal": "proven optimal",
    "gap": "proven to be within the gap asked for",
    "limit": "stopped at its limit, not proven optimal",
}


def lines(stage: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on the budget and the bits, and one on the bound; nothing where no bits were chosen.

    Args:
        stage: one of the report's `stages`.
    """
    found = stage["details"].get("allocation")
    if not found:
        return
    counted: Counter[int] = Counter()
    for group in found["groups"]:
        counted.update({int(bits): count for bits, count in group["histogram"].items()})
    layers = ", ".join(f"{count} at {bits}" for bits, count in sorted(counted.items()))
    yield f"{stage['method']}: {_budget(found)}; allocated layers at each number of bits: {layers}"
    yield f"{stage['method']}: {_proof(found)}"


def _budget(found: Mapping[str, Any]) -> str:
    asked, used = found["asked"], found["used"]
    limit = used["bytes_limit"]
    of_bytes = "" if limit is None else f" of {limit:,}"
    ratio = f" (ratio {asked['ratio']:g})" if "ratio" in asked else ""
    of_bits = f" of {asked['mean_bits']:g}" if "mean_bits" in asked else ""
    return (
        f"used {used['bytes']:,}{of_bytes} bytes{ratio} and {used['mean_bits']:.4g}{of_bits} mean bits"
        f" ({used['mean_bits_stored']:.4g} with scales)"
    )


def _proof(found: Mapping[str, Any]) -> str:
    bound = found["bound"]
    chosen = found.get("chosen", bound["point"])
    better = "" if chosen == bound["point"] else f"; taken: {chosen}, which measured better"
    return (
        f"{bound['point']}: loss {bound['loss']:.6g}, lower bound {bound['lower_bound']:.6g}"
        f" ({bound['certificate']}), gap {bound['gap_of_range']:.1e} of the range,"
        f" {_STATES[bound['stopped']]}{better}"
    )
