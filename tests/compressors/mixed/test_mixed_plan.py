"""What a stage that allocates bits says and refuses before anything is measured."""

from __future__ import annotations

import json

import pytest
from compress.compressors import registry
from compress.compressors.quantization.mixed.candidates import Candidates
from compress.compressors.quantization.mixed.sensing import _depends_on
from compress.errors import PlanError
from compress.recipes.stages import MixdqSettings, ViditQSettings


def mixdq(mean_bits=4.0, **changes):
    return MixdqSettings(budget={"mean_bits": mean_bits}, **{"bits": (2, 4, 8), **changes})


def plan(model, settings):
    return registry.get(settings.method).plan(model.spec, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (mixdq(1.9), r"budget.mean_bits: 1.9 bits is less than .* from 2 bits to 8 bits"),
        (mixdq(8.1), r"budget.mean_bits: 8.1 bits is more than every layer takes"),
        (MixdqSettings(budget={"bytes": 1000}), "budget.bytes: 1,000 bytes is less than"),
        (MixdqSettings(budget={"bytes": 10**9}), "budget.bytes: 1,000,000,000 bytes is more than"),
        (MixdqSettings(budget={"ratio": 0.01}), "budget.ratio: 0.0.* is less than"),
        (mixdq(fixed={"*": 4}), "every layer has one choice"),
        (mixdq(fixed={"*.attn3.*": 4}), r"fixed: pattern '\*.attn3.\*' matches no layer"),
        (mixdq(fixed={"proj_out_1": 4}), "fixed: pattern 'proj_out_1' matches no layer"),
        (mixdq(fixed_activations={"x": 8}), "fixed_activations: pattern 'x' matches no layer"),
        (mixdq(groups={"a": {"layers": ["*.no"]}}), r"groups.a: pattern '\*.no' matches no layer"),
        (mixdq(keep=("none.*",)), r"keep: pattern 'none.\*' matches no linear layer"),
        (mixdq(group_size=48), "group_size 48 does not divide its 64 input channels"),
    ],
    ids=lambda item: str(item)[:40],
)
def test_a_plan_refuses(opened, settings, message):
    with pytest.raises(PlanError, match=message) as caught:
        plan(opened(), settings)
    assert caught.value.exit_code == 3


def test_fixed_layers_count_in_a_budget_of_bytes(opened):
    model = opened()
    free = plan(model, mixdq(3.0)).after.bytes
    budget = {"bytes": free}
    plan(model, MixdqSettings(budget=budget, bits=(2, 4, 8)))
    with pytest.raises(PlanError, match="what is fixed takes .* by itself"):
        plan(model, MixdqSettings(budget=budget, bits=(2, 4, 8), fixed={"*.ff.*": 8, "*.norm1.linear": 8}))


def test_a_plan_keeps_the_budget_and_leaves_bits_open(opened):
    model = opened()
    planned = plan(model, MixdqSettings(budget={"ratio": 0.35}))
    assert 0.99 * 0.35 < planned.after.bytes / planned.before.bytes <= 0.35
    open_rows = [row for row in planned.layers if row["bits"] is None]
    assert {tuple(row["bits_range"]) for row in open_rows} == {(2, 16)}
    assert len(open_rows) == 14
    assert planned.peak_memory_bytes > planned.before.bytes
    assert any("sensitivities are measured" in note for note in planned.notes)


def test_the_tensors_of_transforms_count_beside_their_schemes(tmp_path):
    """Scales that producers do not absorb change no weight and no scheme."""
    files = [None, tmp_path / "a", tmp_path / "b"]
    for file in files[1:]:
        file.write_bytes(file.name.encode())
    nothing = Candidates((), (), {})
    found = [_depends_on(ViditQSettings(bits="mixdq"), nothing, file, "calibration") for file in files]
    assert len({json.dumps(item, sort_keys=True) for item in found}) == 3
