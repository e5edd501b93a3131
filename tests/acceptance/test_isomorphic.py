"""Isomorphic pruning as a user meets it: published totals, targets at real size, whole runs."""

import json
import subprocess
import sys
from pathlib import Path

import compress
import pytest
import torch
from compress.compressors.base import Workspace
from compress.compressors.pruning.classes import classes
from compress.compressors.pruning.details import widths_after
from compress.compressors.pruning.graph import find_groups
from compress.compressors.pruning.isomorphic import Isomorphic
from compress.compressors.pruning.scores import scores
from compress.compressors.pruning.selection import select
from compress.errors import CompressError
from compress.models.base import OpenModel, flat_shapes
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.pruning import IsomorphicSettings
from compress.recipes.schema import ModelRef
from safetensors.torch import save_file

DEIT = "DeiTForImageClassificationWithTeacher"
DIT_S_2 = {
    "_class_name": "DiTTransformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
    "attention_head_dim": 64, "in_channels": 4, "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero", "num_attention_heads": 6, "num_embeds_ada_norm": 1000, "num_layers": 12,
    "out_channels": 8, "patch_size": 2, "sample_size": 32,
}  # fmt: skip


class Weights:
    """What magnitude asks of a calibration: nothing but where its figures come from."""

    seed, key, samples = 0, "none", 0

    def observe(self, *args):
        raise AssertionError("magnitude looks at no data")


def stock(class_name, **keys):
    """Return the config of a classifier with the library's defaults, which are those of the base models."""
    import transformers

    kind = getattr(transformers, class_name)
    return {**kind.config_class(num_labels=1000, **keys).to_dict(), "architectures": [class_name]}


def deit(hidden, heads):
    return stock(DEIT, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)


def opened(folder, config, seed=0):
    """Return a model of real size with the stock class's random weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(ModelRef(id=str(folder), dtype="float32"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = spec.family.build(spec.config).eval().requires_grad_(False)
    return OpenModel(module, spec.family, dict(spec.config), spec.source, spec, shared=dict(spec.shared))


def prune(model, folder, **keys):
    """Prune by magnitude and return the details."""
    chosen = IsomorphicSettings(importance="magnitude", **keys)
    (folder / "stage").mkdir(parents=True)
    (folder / "measured").mkdir()
    space = Workspace(folder / "stage", folder / "measured")
    return Isomorphic().apply(model, chosen, Weights(), space, SilentProgress())


def only(details, kind):
    (entry,) = [entry for entry in details["classes"] if entry["kind"] == kind]
    return entry


PUBLISHED = [
    # Width and heads of the base; shares; width, heads, inner and head channels that stay; M, G of the paper.
    pytest.param((768, 12), (0.5, 0.5, 0.25), (384, 72, 18432, 576), 20.69, 4.16, id="DeiT-4.2G"),
    pytest.param((768, 12), (0.6, 0.6, 0.3), (306, 57, 14745, 537), 13.07, 2.615, id="DeiT-2.6G"),
    pytest.param((384, 6), (0.5, 0.5, 0.1), (192, 36, 9216, 691), 5.74, 1.21, id="DeiT-1.2G"),
    pytest.param((192, 3), (0.25, 0.3, 0.3), (144, 25, 6912, 537), 3.08, 0.62, id="DeiT-0.6G"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "shares", "totals", "millions", "paper_macs"), PUBLISHED)
def test_published_settings_of_deit(base, shares, totals, millions, paper_macs, tmp_path):
    model = opened(tmp_path / "deit", deit(*base))
    ratios = dict(zip(("width", "heads", "head_dim"), shares, strict=True))
    details = prune(model, tmp_path / "work", ratios=ratios, round_to=2)
    attention = only(details, "attention")["members"]
    assert only(details, "width")["channels"][1] == totals[0]
    assert sum(row["heads"][1] for row in attention) == totals[1]
    # Each of the 12 layers may lose one channel more, which brings it to an even width.
    inner, dims = only(details, "ff")["channels"][1], sum(row["head_dim"][1] for row in attention)
    assert totals[2] - 12 <= inner <= totals[2] and totals[3] - 12 <= dims <= totals[3]
    assert all(row["heads"][1] >= 1 and row["head_dim"][1] % 2 == 0 for row in attention)
    parameters = sum(tensor.numel() for tensor in model.module.parameters())
    assert parameters == details["parameters"][1] == pytest.approx(millions * 1e6, rel=0.01)
    # Which heads meet which head widths is up to the weights: the products of both move the operations.
    assert details["paper_macs"][1] == pytest.approx(paper_macs * 1e9, rel=0.0125)


def test_operations_of_the_dense_models(tmp_path):
    for name, config, macs in (
        ("deit", deit(768, 12), 17.657e9),
        ("vit", stock("ViTForImageClassification"), 17.56e9),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        size = read_spec(ModelRef(id=str(tmp_path / name), dtype="float32")).size()
        assert size.macs == pytest.approx(macs, rel=0.0005)


CONVNEXT_B = {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
TARGETS = [
    pytest.param(stock, "ViTForImageClassification", {}, 8, id="ViT-B"),
    pytest.param(stock, "ConvNextForImageClassification", CONVNEXT_B, 8, id="ConvNeXt-B"),
    pytest.param(stock, "SwinForImageClassification", {}, 8, id="Swin-T"),
    pytest.param(lambda *_, **keys: keys, "DiT-S/2", DIT_S_2, 8, id="DiT-S/2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name", "keys", "round_to"), TARGETS)
@pytest.mark.parametrize("share", [0.5, 0.73])
def test_targets_are_met_to_half_a_percent(config, name, keys, round_to, share, tmp_path):
    model = opened(tmp_path / "model", config(name, **keys))
    dense = model.size().macs
    details = prune(model, tmp_path / "work", target={"macs": share}, round_to=round_to)
    reached = model.family.macs(model.config, shapes=flat_shapes(model.surgery))
    assert reached == details["macs"][1] == details["target"]["macs"]["reached"]
    assert 0.995 * share * dense <= reached <= share * dense


@pytest.mark.slow
def test_several_limits_are_all_kept(tmp_path):
    model = opened(tmp_path / "model", stock("ViTForImageClassification"))
    limits = {"macs": "10G", "parameters": "40M", "bytes": "200MB"}
    details = prune(model, tmp_path / "work", target=limits)
    used = {name: entry["used"] for name, entry in details["target"].items()}
    assert 0.995 <= max(used.values()) <= 1
    assert model.size().parameters <= 40e6 and model.size().bytes <= 200e6 and model.size().macs <= 10e9


# --- on tiny models ------------------------------------------------------------------------------


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * fan_in**-0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return module


@pytest.fixture
def tiny_vit(tmp_path):
    """A ViT of 4 layers, 32 channels, 4 heads of 8, 64 inner channels, for images of 32 x 32."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    folder = tmp_path / "tiny-vit"
    randomised(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (60, 32, 32, 3), generator=generator, dtype=torch.uint8)
    path = tmp_path / "images.safetensors"
    save_file({"pixels": pixels, "labels": torch.arange(60) % 10}, path)
    return path


def load(folder) -> OpenModel:
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def magnitudes(model, normalizer="none"):
    groups = find_groups(model)
    return groups, scores(groups, model.module, None, importance="magnitude", normalizer=normalizer)


def settings(**keys):
    return IsomorphicSettings(importance="magnitude", **{"round_to": 1, **keys})


def test_a_class_of_larger_weights_changes_global_choices_alone(tiny_vit):
    groups, plain = magnitudes(load(tiny_vit))
    model = load(tiny_vit)
    members = classes(groups, "isomorphic")["ff"]
    (stream,) = (group.name for group in groups if group.kind == "width")
    with torch.no_grad():
        for group in members:
            for part in group.slices:
                if part.scored:
                    model.module.get_parameter(part.tensor).mul_(10)
    _, scaled = magnitudes(model)
    assert all(torch.allclose(scaled[group.name], 100 * plain[group.name]) for group in members)
    shares = {"width": 0.5, "heads": 0.5, "head_dim": 0.25}
    for ranking, equal in (("isomorphic", True), ("global", False)):
        chosen = settings(ratios=shares, ranking=ranking, normalizer="none")
        one, two = (select(groups, found, chosen).kept for found in (plain, scaled))
        # The residual stream reads its scores off the same tensors: there only the count can be compared.
        inside = [group.name for group in groups if group.kind != "width"]
        assert all(one.get(name) == two.get(name) for name in inside) == equal
        assert (len(one.get(stream, ())) == len(two.get(stream, ()))) == equal


def test_a_weak_layer_loses_more_and_the_total_is_exact(tiny_vit):
    model = load(tiny_vit)
    weak = "vit.layers.2.mlp.fc1"
    with torch.no_grad():
        model.module.get_parameter(f"{weak}.weight").mul_(0.01)
        model.module.get_parameter("vit.layers.2.mlp.fc2.weight").mul_(0.01)
    groups, found = magnitudes(model)
    for round_to in (1, 8):
        chosen = select(groups, found, settings(ratios={"ff": 0.3}, round_to=round_to))
        widths = widths_after(groups, chosen).channels
        inner = {name: count for name, count in widths.items() if name.endswith("fc1")}
        assert inner[weak] == min(inner.values()) == round_to
        assert all(round_to < count < 64 for name, count in inner.items() if name != weak)
        exact = int(4 * 64 * 0.7)
        assert exact - 4 * (round_to - 1) <= sum(inner.values()) <= exact
        assert all(count % round_to == 0 for count in inner.values())


@pytest.mark.parametrize("width", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.25, 0.4, 0.75])
def test_heads_are_removed_whatever_the_width(width, share, tiny_vit, tmp_path):
    model = load(tiny_vit)
    details = prune(model, tmp_path / "work", ratios={"width": width, "ff": 0.0, "heads": share}, round_to=1)
    heads = [row["heads"][1] for row in only(details, "attention")["members"]]
    assert sum(heads) == int(16 * (1 - share)) and min(heads) >= 1


def test_heads_drop_their_own_channels_and_queries_those_of_keys(tiny_vit, tmp_path):
    model = load(tiny_vit)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    details = prune(
        model, tmp_path / "work", ratios={"ff": 0.0, "head_dim": 0.3}, round_to=2, attn_scale="reset"
    )
    document = json.loads(model.attachments["pruning.json"])
    different = 0
    for row in only(details, "attention")["members"]:
        kept = torch.tensor(document["selection"]["kept"][row["name"]])
        head_dim = row["head_dim"][1]
        assert head_dim % 2 == 0 and row["heads"] == [4, 4]
        layer = row["name"].rpartition(".")[0]
        for part in "qkv":
            weight = model.module.get_parameter(f"{layer}.{part}_proj.weight")
            assert torch.equal(weight, before[f"{layer}.{part}_proj.weight"][kept])
        positions = (kept % 8).reshape(4, head_dim)
        different += len({tuple(line) for line in positions.tolist()}) > 1
        assert model.module.get_submodule(layer).scaling == pytest.approx(head_dim**-0.5)
    assert different == 4


@pytest.mark.parametrize(
    ("stage", "code", "message"),
    [
        ({"ratios": {"width": 1.0}}, 2, "ratios.width"),
        ({"ratios": {"width": 0.5}, "global_pruning": False}, 2, "ranking: local"),
        ({"ratios": {"width": 0.5, "modules": {"vit.layers.7.mlp.fc1": 0.5}}}, 3, "vit.layers.3.mlp.fc1"),
        ({"ratios": {"ff": 0.5}, "keep": ["vit.layer.*"]}, 3, "keep: the pattern"),
        ({"target": {"parameters": 1000}}, 3, "cannot be reached"),
        ({"target": {"parameters": 10}}, 2, "neither a share"),
        ({"ratios": {"head_dim": 0.5}, "round_to": 8}, 3, "lower round_to"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(stage, code, message, tiny_vit, images, tmp_path):
    for weights in tiny_vit.glob("*.safetensors"):
        weights.unlink()
    recipe = write_recipe(tmp_path, tiny_vit, stage, {"images": str(images), "samples": 4})
    with pytest.raises(CompressError) as refused:
        compress.plan(recipe)
    assert refused.value.exit_code == code and message in f"{refused.value} {refused.value.hint}"


def write_recipe(folder: Path, model: Path, stage, calibration) -> Path:
    recipe = {
        "model": str(model),
        "seed": 1,
        "calibration": calibration,
        "stages": [{"isomorphic": stage}],
        "evaluate": {"fidelity": {"samples": 2}},
        "export": {"path": str(folder / "out")},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def command(*words) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "compress", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_recipes_on_the_command_line(tiny_vit, tiny_dit, images, tmp_path):
    cases = {
        "vit": (tiny_vit, {"images": str(images), "samples": 8, "batch_size": 4}),
        "dit": (tiny_dit, {"samples": 3, "steps": 2}),
    }
    for name, (model, calibration) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, model, {"target": {"macs": 0.6}, "round_to": 4}, calibration)
        seen = command("plan", recipe, "--with-scores", "--json")
        assert seen.returncode == 0, seen.stderr
        assert not (folder / "out").exists() and not (folder / "work").exists()
        done = command("run", recipe, "--work-dir", folder / "work")
        assert done.returncode == 0, done.stderr
        text = " ".join(done.stdout.split())
        for wanted in ("feed-forward", "attention", "heads", "parameters", "multiply-accumulates"):
            assert wanted in text, text
        assert f"scored on {calibration['samples']} calibration samples" in text
        assert "fine-tuning required" in text
        report = json.loads((folder / "out" / "report.json").read_text())
        preview = json.loads(seen.stdout)["stages"][0]["details"]
        details = report["stages"][0]["details"]
        assert preview["classes"] == details["classes"] and preview["macs"] == details["macs"]
        written = json.loads((folder / "out" / "pruning.json").read_text())
        assert written["selection"] == preview["selection"]
        assert report["export"]["verified"] and report["export"]["max_abs_error"] == 0
        assert details["target"]["macs"]["used"] <= 1


@pytest.mark.slow
def test_two_runs_export_equal_manifests(tiny_vit, images, tmp_path):
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        stage = {"ratios": {"width": 0.5, "heads": 0.5, "head_dim": 0.25}, "round_to": 2, "steps": 2}
        recipe = json.loads(
            write_recipe(folder, tiny_vit, stage, {"images": str(images), "samples": 8}).read_text()
        )
        compress.run(recipe, work_dir=folder / "work")
        files.append(
            {
                path.name: path.read_bytes()
                for path in (folder / "out").iterdir()
                if path.name in ("compress.json", "pruning.json", "model.safetensors", "config.json")
            }
        )
    assert len(files[0]) == 4 and files[0] == files[1]
