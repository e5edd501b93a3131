"""Models without some of their blocks: sizes, copies, where blocks come from, and that they come back."""

import json
from pathlib import Path

import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.exporters.formats import write
from compress.models.open import open_model, read_spec
from compress.models.origins import NAME, kept_blocks, original_name, removals, write_origins
from compress.models.registry import family_for
from compress.models.shallower import keep_blocks, shallower_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.resuming import resume

from ..small_dits import DIT, LIST, equal_embedders

PIXART, SD3 = "PixArtTransformer2DModel", "SD3Transformer2DModel"


@pytest.fixture
def opened(make_tiny):
    """Return `opened(class_name, **config)` -> open model of six blocks."""

    def build(class_name: str = DIT, **config):
        folder = make_tiny(class_name, **{"num_layers": 6, **config})
        if class_name == DIT:
            equal_embedders(folder)
        return open_model(ModelRef(id=str(folder)), progress=SilentProgress())

    return build


def _output(model, module=None):
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return (module or model.module)(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("class_name", "config"), [(DIT, {}), (PIXART, {}), (SD3, {"dual_attention_layers": (0, 1, 4)})]
)
def test_planned_removed_exported_and_resumed_models_are_one(class_name, config, opened, tmp_path):
    model = opened(class_name, **config)
    dense = model.size()
    planned = shallower_spec(model.spec, {LIST: (0, 1, 4)})
    keep_blocks(model, {LIST: (4, 0, 1)}, {"method": "test"})
    assert model.size() == planned.size() == model.dense().size()
    assert model.size().parameters < dense.parameters and model.size().macs < dense.macs
    state = model.module.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: spec.shape for name, spec in planned.tensors.items()
    }
    whole = _output(model)
    folder = tmp_path / "out"
    folder.mkdir()
    write(model, folder, "compress")
    stock = getattr(__import__("diffusers"), class_name)
    module, found = stock.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(_output(model, module), whole)
    assert not (folder / "compress.json").exists() or not json.loads(
        (folder / "compress.json").read_text()
    ).get("surgery")
    again = open_model(ModelRef(id=str(model.source.folder)), progress=SilentProgress())
    resume(again, folder)
    resume(again, folder)  # as a run does that measures after every finished stage
    assert torch.equal(_output(again), whole)
    assert (again.config, again.shared, again.attachments) == (model.config, model.shared, model.attachments)
    assert again.size() == model.size()


def test_blocks_know_where_they_come_from_through_several_removals(opened):
    model = opened()
    assert model.original_name(f"{LIST}.3.ff") == f"{LIST}.3.ff"
    keep_blocks(model, {LIST: (0, 2, 3, 5)}, {"method": "one"})
    keep_blocks(model, {LIST: (1, 3)}, {"method": "two"})
    text = model.attachments[NAME]
    assert kept_blocks(text) == {LIST: (2, 5)}
    assert [row["method"] for row in removals(text)] == ["one", "two"]
    assert removals(text)[1]["of"] == {LIST: 4}
    assert [(row["parent"], row["revision"]) for row in removals(text)] == [(model.source.id, None)] * 2
    assert model.original_name(f"{LIST}.1.ff.net.2") == f"{LIST}.5.ff.net.2"
    assert model.original_name("proj_out_1") == "proj_out_1"
    assert original_name(f"{LIST}.0", text) == f"{LIST}.2"


def test_copies_are_counted_once_after_the_first_of_them_went(opened):
    model = opened()
    copies = len(model.shared)
    assert copies == 5 * 5
    keep_blocks(model, {LIST: (2, 3, 4)}, {"method": "test"})
    assert len(model.shared) == 2 * 5
    assert set(model.shared.values()) <= {
        name for name in model.module.state_dict() if name.startswith(f"{LIST}.0.")
    }
    config = dict(model.config)
    assert model.size().parameters == sum(
        value.numel() for name, value in model.module.state_dict().items() if name not in model.shared
    )
    fresh = family_for(DIT).replicas(config)
    assert {copy for group in fresh for copy in group[1:]} == set(model.shared)


def test_what_was_cut_before_keeps_its_sizes(prunable_dit):
    model, names = prunable_dit
    before = {name: model.surgery[name] for name in names}
    whole = model.size()
    keep_blocks(model, {LIST: (1, 2)}, {"method": "test"})
    assert model.surgery == {
        name.replace(f"{LIST}.{old}.", f"{LIST}.{new}."): before[name]
        for name in names
        for old, new in ((1, 0), (2, 1))
        if name.startswith(f"{LIST}.{old}.")
    }
    assert (
        model.size().bytes
        == sum(
            value.numel() * value.element_size()
            for name, value in model.module.state_dict().items()
            if name not in model.shared
        )
        < whole.bytes
    )


@pytest.fixture
def prunable_dit(opened):
    from compress.compressors.pruning.cutting import cut
    from compress.compressors.pruning.graph import find_groups
    from compress.compressors.pruning.groups import Selection

    model = opened(num_layers=3)
    groups = [group for group in find_groups(model) if group.kind == "ff"]
    kept = {group.name: tuple(range(16 * (index + 1))) for index, group in enumerate(groups)}
    cut(
        model,
        groups,
        Selection(kept, {}, {group.name: group.size for group in groups}),
        attn_scale="preserve",
    )
    return model, sorted(model.surgery)


def test_quantized_models_keep_their_blocks(opened):
    model = opened()
    model.quantization = {"anything": None}
    with pytest.raises(PlanError, match="quantized"):
        keep_blocks(model, {LIST: (0,)}, {"method": "test"})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"removals": {}}, {"blocks": {LIST: {"of": 4, "kept": [0, 4]}}},
        {"blocks": {LIST: {"of": 4, "kept": [2, 1]}}}, {"blocks": {LIST: {"of": 4, "kept": []}}},
        {"blocks": {LIST: {"of": "4", "kept": [1]}}}, {"blocks": {LIST: [1]}}, {"blocks": 3}, {"blocks": {}},
        {"earlier": {"blocks": {}, "removals": []}, "original": {LIST: {"of": 4, "kept": [0, 2]}}},
        {"removals": ["x"]}, {"removals": [None]}, {"removals": [[]]},
        *(
            {"removals": [{"method": "tinyfusion", "groups": groups}]}
            for groups in ("abc", 5, [1, 2], [], {LIST: 5}, {LIST: ["1:2", None]}, {LIST: {}}, "-1:2", "0:2",
                           "1:2\n", "2000000:4000000", True)
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(change):
    text = write_origins(None, {LIST: (0, 2)}, {LIST: 4}, {"method": "test"})
    assert kept_blocks(text) == {LIST: (0, 2)}
    with pytest.raises(SourceError, match="does not say which blocks"):
        kept_blocks(json.dumps(json.loads(text) | change))
    with pytest.raises(SourceError, match="does not say which blocks"):
        original_name("a", "[" * 100_000)


def test_a_plan_needs_no_weights(make_tiny):
    folder = make_tiny(DIT, num_layers=6)
    Path(folder, "diffusion_pytorch_model.safetensors").unlink()
    spec = read_spec(ModelRef(id=str(folder)))
    assert shallower_spec(spec, {LIST: (0, 3)}).config["num_layers"] == 2
