"""The stage that learns which blocks stay, on tiny denoisers."""

from dataclasses import replace

import pytest
import torch
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.pruning.block_groups import groups_of
from compress.compressors.pruning.gates import Decision
from compress.compressors.pruning.tinyfusion import _tell
from compress.compressors.recovery.matching import matched_blocks
from compress.errors import PlanError, StageError
from compress.models.open import read_spec
from compress.models.origins import kept_blocks, removals
from compress.progress import SilentProgress
from compress.recipes.depth import TinyFusionSettings
from compress.recipes.schema import ModelRef
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from ...small_dits import LIST, Told, equal_embedders, opened, recorded, same_state, state_of

EMBEDDER = f"{LIST}.2.norm1.emb.timestep_embedder.linear_1.weight"


def given(**changes):
    return TinyFusionSettings.model_validate(
        {"groups": "1:2", "steps": 12, "batch_size": 8, "checkpoint_every": 5, **changes}
    )


@pytest.fixture
def folder(make_tiny):
    return equal_embedders(make_tiny(num_layers=6, name="six"))


@pytest.fixture
def prepared(folder, tmp_path):
    """Return `prepared(name="stage", path=folder) -> (model, calibration, workspace)`."""

    def make(name="stage", path=folder):
        model = opened(path)
        calibration = recorded(model, tmp_path / "cache", {"generate": 24, "steps": 2, "batch_size": 24})
        (tmp_path / name).mkdir(exist_ok=True)
        return model, calibration, Workspace(tmp_path / name, tmp_path)

    return make


def apply(model, calibration, workspace, settings, progress=None):
    return registry.get("tinyfusion").apply(
        model, settings, calibration, workspace, progress or SilentProgress()
    )


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_what_is_left_are_blocks_of_the_original_bit_for_bit(mode, prepared):
    model, calibration, workspace = prepared()
    before, plan = state_of(model), registry.get("tinyfusion").plan(model.spec, given(mode=mode))
    details = apply(model, calibration, workspace, given(mode=mode))
    kept = details["blocks"][LIST]["kept"]
    assert len(kept) == 3 and all(place // 2 == index for index, place in enumerate(kept))
    after = model.module.state_dict()
    expected = {}
    for name, value in before.items():
        if not name.startswith(f"{LIST}."):
            expected[name] = value
        elif int(name.split(".")[1]) in kept:
            place = int(name.split(".")[1])
            expected[name.replace(f"{LIST}.{place}.", f"{LIST}.{kept.index(place)}.", 1)] = value
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert model.size() == plan.after and plan.before == model.spec.size()
    assert not model.module.training and not any(item.requires_grad for item in model.module.parameters())
    assert all("forward" not in vars(module) for module in model.module.modules())
    assert len({item.data_ptr() for item in model.module.parameters()}) == len(
        list(model.module.parameters())
    )
    assert (details["learned"] == 0) == (mode == "frozen")
    assert f"{details['learned']:,} parameters learn" in plan.notes[-1]


def test_what_is_told(prepared, folder):
    model, calibration, workspace = prepared()
    details = apply(model, calibration, workspace, given(steps=40, groups=["2:4", "1:2"]))
    steps = [row[0] for row in details["decisions"]]
    assert steps == list(range(2, 41, 2))
    last = details["decisions"][-1]
    assert [choice["confidence"] for choice in details["choices"]] == last[2]
    assert details["choices"][0]["of"] == [0, 1, 2, 3] and len(details["choices"][0]["kept"]) == 2
    kept = [place for choice in details["choices"] for place in choice["kept"]]
    assert kept == details["blocks"][LIST]["kept"] and details["blocks"][LIST]["of"] == 6
    assert len(details["search"]["loss"]) == 40 and details["data"] == 24
    assert {rate for _, rate in details["search"]["lr"]} == {1e-4}
    text = model.attachments["depth.json"]
    assert kept_blocks(text) == {LIST: tuple(kept)}
    (told,) = removals(text)
    assert told["method"] == "tinyfusion" and told["confidences"] == last[2]
    assert told["parent"] == str(folder)
    # A stage that trains the result matches the ends of the groups.
    assert matched_blocks(model.spec.config, text) == {LIST: [(1, 3), (2, 5)]}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_killed_search_ends_with_the_same_numbers(mode, prepared):
    whole, calibration, workspace = prepared()
    expected = apply(whole, calibration, workspace, given(mode=mode))
    model, calibration, workspace = prepared("killed")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        apply(model, calibration, workspace, given(mode=mode), Told(stop_at=8))
    assert same_state(model, before)
    model, calibration, workspace = prepared("killed")
    details = apply(model, calibration, workspace, given(mode=mode), told := Told())
    assert any("goes on after step 5" in note for note in told.notes)
    for one in (details, expected):
        one.pop("seconds")
    assert details == expected
    assert model.attachments == whole.attachments


@pytest.mark.parametrize(
    ("seed", "changes", "goes_on"),
    [(0, {}, True), (1, {}, False), (0, {"gate_lr": 0.01}, False), (0, {"tau": [3.0, 0.1]}, False)],
)
def test_a_state_is_that_of_one_search(seed, changes, goes_on, prepared):
    model, calibration, workspace = prepared()
    with pytest.raises(KeyboardInterrupt):
        apply(model, calibration, workspace, given(mode="frozen"), Told(stop_at=8))
    calibration = replace(calibration, seed=seed)
    apply(model, calibration, workspace, given(mode="frozen", **changes), told := Told())
    assert any("goes on after step 5" in note for note in told.notes) == goes_on


def test_parts_of_a_batch_make_the_whole(prepared):
    one = apply(*prepared("one"), given())
    two = apply(*prepared("two"), given(accumulate=4))
    for whole, parts in zip(one["search"]["loss"], two["search"]["loss"], strict=True):
        assert whole == pytest.approx(parts, rel=1e-3)


def test_choices_that_are_not_settled_are_told(prepared):
    apply(*prepared(), given(steps=2), told := Told())
    (note,) = [note for note in told.notes if "the choice is not settled for 3 of 3 groups" in note]
    assert "what stays: blocks 0 to 1 (" in note
    shown = [detail for detail in told.details if "step" in detail]
    assert len(shown) == 2
    assert all("loss " in detail and ", least confidence 0.5" in detail for detail in shown)


def test_choices_that_are_not_settled_name_their_lists():
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 2}
    decision = Decision(choices=(0, 1), confidences=(0.68, 0.27))
    _tell(groups_of(config, "1:2"), decision, told := Told())
    (note,) = told.notes
    assert "transformer_blocks 0 to 1 (0.68); single_transformer_blocks 0 to 1 (0.27)" in note


def test_weights_of_half_size_come_back_as_they_were(make_tiny, prepared):
    path = equal_embedders(make_tiny(num_layers=4, dtype="bfloat16", name="half"))
    for mode in ("lora", "full"):
        model, calibration, workspace = prepared(mode, path)
        before = state_of(model)
        details = apply(model, calibration, workspace, given(mode=mode, precision="bfloat16"))
        first = details["blocks"][LIST]["kept"][0]
        after = state_of(model)
        assert all(value.dtype == torch.bfloat16 for value in after.values())
        name = f"{LIST}.{{}}.attn1.to_q.weight"
        assert torch.equal(after[name.format(0)], before[name.format(first)])


def test_other_embedders_keep_block_0(folder, prepared):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[EMBEDDER] += 0.5
    save_file(tensors, file)
    details = apply(*prepared(), given(steps=6), told := Told())
    assert details["blocks"][LIST]["kept"][0] == 0 and details["choices"][0]["confidence"] == 1.0
    assert any(note.startswith("block 0 stays") for note in told.notes)


@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_other_families(class_name, make_tiny, tmp_path):
    model = opened(make_tiny(class_name, num_layers=4))
    inputs = model.family.example_inputs(model.module, 6, torch.Generator().manual_seed(0))
    conditions = {
        name: value for name, value in inputs.items()
        if name not in ("timestep", model.family.latents) and torch.is_tensor(value)
    }  # fmt: skip
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask",
             "pooled_projections": "pooled_prompt_embeds"}  # fmt: skip
    stored = {names.get(name, name): value.contiguous() for name, value in conditions.items()}
    side = model.config["sample_size"]
    latents = torch.randn(6, model.config["in_channels"], side, side)
    save_file({"latents": latents, **stored}, tmp_path / "mine.safetensors")
    mine = tmp_path / "mine.safetensors"
    calibration = recorded(model, tmp_path / "cache", {"latents": mine}, embeddings=mine)
    (tmp_path / "stage").mkdir()
    before = state_of(model)
    details = apply(model, calibration, Workspace(tmp_path / "stage", tmp_path), given(batch_size=4, steps=4))
    (last,) = details["blocks"][LIST]["kept"][1:]
    after = state_of(model)
    assert sum(name.endswith("attn.to_q.weight") or ".attn1.to_q.weight" in name for name in after) == 2
    for name in after:
        if name.startswith(f"{LIST}.1.") and name.endswith("to_q.weight"):
            assert torch.equal(after[name], before[name.replace(".1.", f".{last}.", 1)])


def test_what_cannot_be_learned_is_refused(prepared, folder):
    spec = read_spec(ModelRef(id=str(folder)))
    plan = registry.get("tinyfusion").plan
    with pytest.raises(PlanError, match="3:4 repeated does not fill them"):
        plan(spec, given(groups="3:4"))
    with pytest.raises(PlanError, match="every block stays"):
        plan(spec, given(groups="2:2"))
    with pytest.raises(PlanError, match="a search needs gradients"):
        plan(spec.evolve(quantization={"proj_out_1": None}), given())
    model, calibration, workspace = prepared()
    calibration.training(model, None, SilentProgress())
    with torch.no_grad():
        model.module.proj_out_2.weight[0] = float("nan")
    with pytest.raises(StageError, match=r"tinyfusion: the loss of step 1 of 12 is not finite"):
        apply(model, calibration, workspace, given())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "frozen", "lr": 1e-3}, "lr has no effect with mode: frozen"),
        ({"mode": "full", "lora": {"rank": 4}}, "lora has no effect with mode: full"),
        ({"batch_size": 8, "accumulate": 3}, "does not divide"),
        ({"tau": [1.0, 0.0]}, "above 0"),
        ({"tau": [float("nan"), float("nan")]}, r"tau\.0\n.*finite number"),
        ({"scaling": [float("inf"), 100.0]}, r"scaling\.0\n.*finite number"),
        ({"lora": {"alpha": float("inf")}}, r"lora\.alpha\n.*finite number"),
        ({"clip_norm": float("inf")}, r"clip_norm\n.*finite number"),
    ],
)
def test_keys_without_effect_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        given(**keys)


@pytest.mark.parametrize(
    ("steps", "decay"), [(300, 1 - 10 / 300), (10_000, 0.999), (20_000, 0.999), (10, 0.0), (11, 1 / 11)]
)
def test_a_short_search_looks_back_less_far(steps, decay):
    assert given(steps=steps).decay == pytest.approx(decay, rel=1e-12)
    assert given(steps=steps, ema=0.5).decay == 0.5
