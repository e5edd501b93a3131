"""The stage on tiny models: steps, going on after a kill, previews, baselines, refusals, equal runs."""

import json

import pytest
import torch
from compress.calibration.recording import record
from compress.compressors.base import Previewing, Workspace
from compress.compressors.pruning import isomorphic as stage
from compress.compressors.pruning.deciding import readable_json
from compress.compressors.pruning.groups import Selection
from compress.compressors.pruning.isomorphic import Isomorphic
from compress.errors import PlanError, StageError
from compress.models.base import flat_shapes
from compress.progress import SilentProgress
from compress.recipes.pruning import IsomorphicSettings
from compress.recipes.schema import CalibrationSettings
from safetensors.torch import save_file

VIT = "ViTForImageClassification"


@pytest.fixture
def images(tmp_path):
    """24 random images of 10 classes; without labels where they are asked to be left out."""

    def make(labels=True):
        generator = torch.Generator().manual_seed(3)
        tensors = {"pixels": torch.randint(256, (24, 32, 32, 3), generator=generator, dtype=torch.uint8)}
        if labels:
            tensors["labels"] = torch.arange(24) % 10
        path = tmp_path / f"images-{labels}.safetensors"
        save_file(tensors, path)
        return path

    return make


@pytest.fixture
def recorded(images, tmp_path):
    """Return `record(model)` -> its calibration."""

    def run(model, **keys):
        chosen = {"images": images()} if model.family.task == "classify" else {"steps": 2}
        settings = CalibrationSettings(**{**chosen, "samples": 6, "batch_size": 4, **keys})
        return record(model, settings, seed=0, cache=tmp_path / "calibration", progress=SilentProgress())

    return run


@pytest.fixture
def workspace(tmp_path):
    def make(name="stage"):
        folder, shared = tmp_path / name, tmp_path / "measured"
        folder.mkdir(exist_ok=True)
        shared.mkdir(exist_ok=True)
        return Workspace(folder, shared)

    return make


def settings(**keys):
    if "target" not in keys:
        keys["ratios"] = {"ff": 0.5, "heads": 0.5, "head_dim": 0.25, **keys.pop("ratios", {})}
    return IsomorphicSettings(**{"round_to": 1, **keys})


def apply(model, chosen, calibration, space):
    return Isomorphic().apply(model, chosen, calibration, space, SilentProgress())


def totals(details):
    return {
        entry["name"]: [
            sum(row["after"] for row in entry["members"])
            if entry["kind"] != "attention"
            else [sum(row[key][1] for row in entry["members"]) for key in ("heads", "head_dim")]
        ]
        for entry in details["classes"]
    }


CASES = [
    (VIT, {"width": 0.25}),
    ("DiTTransformer2DModel", {}),
    ("SwinForImageClassification", {"width": 0.25}),
]


@pytest.mark.parametrize(("class_name", "more"), CASES)
def test_four_steps_remove_as_much_as_one(class_name, more, prunable, recorded, workspace, forward):
    found = []
    for steps in (1, 4):
        model = prunable(class_name)
        calibration = recorded(model)
        details = apply(model, settings(steps=steps, ratios=more), calibration, workspace(f"{steps}"))
        assert forward(model).isfinite().all() and len(details["schedule"]) == steps
        found.append((totals(details), details["parameters"], model.dense().tensors))
    assert found[0][0] == found[1][0]
    if steps == 4:
        sizes = [entry["channels"] for entry in details["schedule"]]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_two_runs_in_one_process_give_equal_bytes(prunable, recorded, workspace):
    files = []
    for name in ("one", "two"):
        model = prunable(VIT)
        apply(model, settings(ratios={"width": 0.5}), recorded(model), workspace(name))
        tensors = {key: value.clone() for key, value in model.module.state_dict().items()}
        files.append((tensors, model.surgery, model.attachments))
    one, two = files
    assert one[1:] == two[1:] and all(torch.equal(one[0][key], two[0][key]) for key in two[0])


def test_what_goes_is_written_before_a_weight_is_cut(prunable, recorded, workspace, monkeypatch):
    model, space = prunable(VIT), workspace()
    calibration = recorded(model)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}

    def killed(*args, **keys):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "cut", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(model, settings(), calibration, space)
    after = model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and model.surgery == {}
    document = json.loads((space.folder / "selection.json").read_text())
    assert document["settings"]["ratios"]["ff"] == 0.5 and document["seed"] == 0
    details = apply(model, settings(), calibration, space)
    chosen = Selection.parse(json.dumps(document["selection"]))
    for entry in details["classes"]:
        for row in entry["members"]:
            assert len(chosen.kept.get(row["name"], range(row["before"]))) == row["after"]
    assert document == json.loads(model.attachments["pruning.json"])
    assert document["macs"] == details["macs"] and document["parameters"] == details["parameters"]


def test_a_killed_schedule_goes_on_to_equal_bytes(prunable, recorded, workspace, monkeypatch):
    chosen = settings(steps=3, ratios={"width": 0.5})
    whole = prunable(VIT)
    calibration = recorded(whole)
    wanted = apply(whole, chosen, calibration, workspace("whole"))
    broken, space = prunable(VIT), workspace("broken")
    real, calls = stage.cut, []

    def killed(*args, **keys):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "cut", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(broken, chosen, recorded(broken), space)
    again = prunable(VIT)
    calibration = recorded(again)
    with monkeypatch.context() as patched:
        counted = []
        real_scores = stage.score_groups
        patched.setattr(stage, "score_groups", lambda *args: counted.append(1) or real_scores(*args))
        found = apply(again, chosen, calibration, space)
    assert len(counted) == 1  # the third step alone was left to score
    assert found == wanted
    tensors = whole.module.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in again.module.state_dict().items())


def test_a_preview_is_what_the_stage_then_does(prunable, recorded, workspace):
    model = prunable(VIT)
    calibration = recorded(model)
    chosen = settings(target={"macs": 0.6})
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    assert isinstance(Isomorphic(), Previewing)
    seen = Isomorphic().preview(model, chosen, calibration, workspace("seen"), SilentProgress())
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert model.surgery == {} and model.attachments == {}
    done = apply(model, chosen, calibration, workspace("done"))
    for key in ("classes", "macs", "parameters", "target", "ratios", "samples"):
        assert seen.details[key] == done[key], key
    assert seen.spec.size() == model.size() and seen.spec.surgery == model.surgery
    assert seen.details["selection"] == json.loads(model.attachments["pruning.json"])["selection"]


def test_details_are_those_of_the_module(prunable, recorded, workspace):
    model = prunable(VIT)
    dense = model.size()
    details = apply(model, settings(ratios={"width": 0.25}), recorded(model), workspace())
    size = model.size()
    assert details["macs"] == [dense.macs, size.macs] and details["bytes"] == [dense.bytes, size.bytes]
    assert details["parameters"] == [dense.parameters, sum(p.numel() for p in model.module.parameters())]
    shapes = {**{name: tensor.shape for name, tensor in model.module.state_dict().items()}}
    assert all(tuple(shapes[name]) == shape for name, shape in flat_shapes(model.surgery).items())
    for entry in details["classes"]:
        for row in entry["members"]:
            assert shapes.get(f"{row['name']}.weight", shapes.get(row["name"]))[0] == row["after"]
        found = entry["histogram"]
        before, after = entry["channels"]
        assert sum(found["kept"]) == after and sum(found["kept"] + found["removed"]) == before
        assert found["edges"] == sorted(found["edges"]) and len(found["edges"]) == len(found["kept"]) + 1
    assert details["loss"]["name"] == "cross_entropy" and details["samples"] == 6
    assert details["loss"]["before"] > 0 and details["loss"]["after"] > 0


def test_baselines_cost_as_much_and_leave_the_model_alone(prunable, recorded, workspace):
    plain, measured = prunable(VIT), prunable(VIT)
    chosen = settings(ratios={"width": 0.5})
    apply(plain, chosen, recorded(plain), workspace("plain"))
    with_baselines = chosen.model_copy(update={"baselines": ("global", "local")})
    details = apply(measured, with_baselines, recorded(measured), workspace("measured"))
    tensors = plain.module.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in measured.module.state_dict().items())
    assert set(details["baselines"]) == {"global", "local"}
    for row in details["baselines"].values():
        assert 0.9 * details["macs"][1] < row["macs"] <= details["macs"][1] and row["loss"] > 0


def test_a_ranking_that_cannot_go_as_far_is_left_out(prunable, recorded, workspace):
    model = prunable("SwinForImageClassification", num_heads=(1, 2))  # one head: local leaves it alone
    notes = []
    progress = SilentProgress()
    progress.note = notes.append
    chosen = IsomorphicSettings(ratios={"heads": 0.3}, round_to=1, baselines=("local",))
    details = Isomorphic().apply(model, chosen, recorded(model), workspace(), progress)
    assert details["baselines"] == {} and any("ranking local is not measured" in note for note in notes)
    rows = [row for entry in details["classes"] for row in entry["members"] if row["heads"]]
    before, after = (sum(row["heads"][place] for row in rows) for place in (0, 1))
    assert after == int(0.7 * before)


def test_steps_that_are_too_small_for_any_layer_wait_for_the_next(prunable, recorded, workspace):
    found = []
    for steps in (1, 7):  # of few heads, fewer go than there are steps
        model = prunable(VIT)
        chosen = IsomorphicSettings(ratios={"heads": 0.4}, round_to=1, steps=steps)
        found.append(totals(apply(model, chosen, recorded(model), workspace(str(steps)))))
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", [2, 4])
def test_targets_are_met_in_several_steps(steps, prunable, recorded, workspace):
    model = prunable(VIT, hidden_size=64, intermediate_size=32)
    chosen = IsomorphicSettings(target={"macs": 0.55}, round_to=16, steps=steps, importance="magnitude")
    once = prunable(VIT, hidden_size=64, intermediate_size=32)
    apply(once, chosen.model_copy(update={"steps": 1}), recorded(once), workspace("once"))
    details = apply(model, chosen, recorded(model), workspace("several"))
    reached = details["target"]["macs"]
    assert reached["limit"] == 0.55 * details["macs"][0]  # a share of the original, in every step
    assert 0.95 * once.size().macs <= details["macs"][1] == reached["reached"] <= reached["limit"]


def test_a_schedule_that_removes_nothing_is_refused_at_once(prunable, recorded, workspace):
    model = prunable(VIT)
    chosen = IsomorphicSettings(ratios={"ff": 0.01}, round_to=8, rounding="nearest", steps=3)
    with pytest.raises(PlanError, match="nothing would be removed"):
        apply(model, chosen, recorded(model), workspace())
    assert model.surgery == {}


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_magnitude_needs_no_labels_and_taylor_says_what_to_do(
    importance, prunable, recorded, workspace, images
):
    model = prunable(VIT)
    calibration = recorded(model, images=images(labels=False))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    if importance == "taylor":
        with pytest.raises(StageError, match="no labels"):
            apply(model, settings(), calibration, workspace())
        assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
        details = apply(model, settings(loss="pseudo_labels"), calibration, workspace())
        assert details["loss"]["name"] == "pseudo_labels" and details["loss"]["after"] is not None
    else:
        details = apply(model, settings(importance="magnitude"), calibration, workspace())
        assert details["loss"] is None and details["samples"] == 0


@pytest.mark.parametrize(
    ("class_name", "chosen", "message"),
    [
        (VIT, settings(ratios={"modules": {"vit.layers.9.*": 0.5}}), "matches no layer"),
        (VIT, settings(keep=("vit.layer.*",)), "matches no layer"),
        (VIT, settings(keep=("*",), ratios={"width": 0.5}), "match all .* nothing would be removed"),
        (VIT, settings(round_to=16), "no layer of attention can lose head channels"),
        (VIT, settings(target={"macs": 0.0005}), "cannot be reached.*now"),
        (VIT, settings(target={"macs": "5G"}), "keeps it already"),
        ("ConvNextForImageClassification", settings(), "attention heads"),
        ("DiTTransformer2DModel", settings(ratios={"width": 0.5}), "residual channels"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_plan_and_before_a_cut(
    class_name, chosen, message, prunable, recorded, workspace
):
    model = prunable(class_name)
    with pytest.raises(PlanError, match=message):
        Isomorphic().plan(model.spec, chosen)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    magnitude = chosen.model_copy(update={"importance": "magnitude"})
    with pytest.raises(PlanError, match=message):
        apply(model, magnitude, recorded(model), workspace())
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize(("class_name", "more"), CASES)
def test_the_plan_knows_the_totals(class_name, more, prunable, recorded, workspace):
    model = prunable(class_name)
    chosen = settings(ratios=more)
    plan = Isomorphic().plan(model.spec, chosen)
    details = apply(model, chosen, recorded(model), workspace())
    assert plan.before == model.spec.size()
    # Attention's parameters depend on which layer loses what; all the rest on totals.
    assert plan.after.parameters == pytest.approx(model.size().parameters, rel=0.03)
    assert plan.spec.family is model.spec.family and details["parameters"][1] == model.size().parameters
    assert plan.peak_memory_bytes > plan.before.bytes and plan.disk_bytes > 0
    with_target = Isomorphic().plan(prunable(class_name).spec, settings(target={"macs": 0.6}))
    assert 0.5 < with_target.after.macs / with_target.before.macs <= 0.6


def test_lists_of_numbers_take_one_line():
    value = {"a": [1, 2, 3], "b": {"c": [0.5, -1e-7], "d": []}, "e": ["x", "y"]}
    text = readable_json(value)
    assert json.loads(text) == value and '"a": [1, 2, 3]' in text and '"c": [0.5, -1e-07]' in text
