"""The acceptance list of MixDQ (arXiv 2405.17873); each test carries its letter.

B9 and B10, the first token and static ranges, stand with the runtime and the stage. What is shown here on
the whole stage is shown in detail in tests/compressors/test_allocation*.py and
tests/calibration/test_sensitivity*.py.
"""

import importlib.util
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from compress.calibration.diffusion import record
from compress.calibration.similarity import powers
from compress.compressors import registry
from compress.compressors.allocation import Budget, Choice, InfeasibleBudget, Item, allocate
from compress.compressors.allocation_forms import group_means
from compress.compressors.base import Workspace
from compress.compressors.quantization.mixed.baselines import at_random, evenly
from compress.compressors.quantization.mixed.problem import stored_bytes, weight_program
from compress.exporters.bits_file import bits_files
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.allocation import AllocationSettings
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.recipes.stages import MixdqSettings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..small_dits import WEIGHTS, make_embedders_equal

BITS = (2, 4, 8)


def uneven(folder, seed=0, spread=1.2):
    """Give a random model what trained ones have: tails, layers unlike each other, and equal embedders."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / WEIGHTS)
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.ndim == 2 and ".emb." not in name and "pos_embed" not in name:
            tails = torch.randn(tensor.shape, generator=generator).abs() ** 3
            tensor = tensor * (1 + tails * torch.rand((), generator=generator) ** 4)
            tensor = tensor * math.exp(spread * float(torch.randn((), generator=generator)) - 0.5)
            tensors[name] = tensor.contiguous()
    make_embedders_equal(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def settings(budget, **options):
    plain = {"budget": budget, "bits": BITS, "sensitivity": {"samples": 2, "steps": 3}}
    return MixdqSettings.model_validate({**plain, **options})


class Stage:
    """A model and what its stage has measured; each run starts from the original."""

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache

    def run(self, asked, workspace="stage", **calibration):
        model = open_model(ModelRef(id=str(self.folder)), device="cpu", progress=SilentProgress())
        wanted = CalibrationSettings(**{"samples": 4, "steps": 3, "batch_size": 2, **calibration})
        recorded = record(model, wanted, seed=0, cache=self.cache / "c", progress=SilentProgress())
        place, shared = self.cache / workspace, self.cache / "shared"
        place.mkdir(exist_ok=True)
        shared.mkdir(exist_ok=True)
        details = registry.get("mixdq").apply(
            model, asked, recorded, Workspace(place, shared), SilentProgress()
        )
        return model, json.loads(json.dumps(details))

    @property
    def tables(self):
        return sorted((self.cache / "shared").glob("sensitivity-*.jsonl"))


@pytest.fixture
def stage(make_tiny, tmp_path):
    return Stage(uneven(make_tiny(name="source")), tmp_path)


def brute_force(losses, costs, limit):
    best = math.inf
    for picks in itertools.product(*(range(len(row)) for row in losses)):
        if sum(row[j] for row, j in zip(costs, picks, strict=True)) <= limit:
            best = min(best, math.fsum(row[j] for row, j in zip(losses, picks, strict=True)))
    return best


def random_layers(count, seed):
    generator = random.Random(seed)
    sizes = [8 * generator.randint(1, 4000) for _ in range(count)]
    scales = [math.exp(generator.gauss(0, 2)) for _ in range(count)]
    losses = [
        sorted((scale * 4.0**-b * math.exp(generator.gauss(0, 0.5)) for b in BITS), reverse=True)
        for scale in scales
    ]
    items = [
        Item(
            f"blocks.{i}",
            tuple(Choice(f"w{b}", loss, {"bytes": size * b // 8}) for b, loss in zip(BITS, row, strict=True)),
        )
        for i, (size, row) in enumerate(zip(sizes, losses, strict=True))
    ]
    least, most = (sum(size * b // 8 for size in sizes) for b in (min(BITS), max(BITS)))
    return items, losses, [[size * b // 8 for b in BITS] for size in sizes], least, most


def test_b1_two_hundred_small_problems_are_solved_like_brute_force():
    for seed in range(200):
        generator = random.Random(1000 + seed)
        items, losses, costs, least, most = random_layers(generator.randint(1, 6), seed)
        limit = generator.randint(least, most)
        found = allocate(items, [Budget("bytes", limit)], mip_rel_gap=0.0)
        assert found.budgets[0].used <= limit
        assert found.loss == pytest.approx(brute_force(losses, costs, limit), rel=1e-9)
        assert found.lower_bound <= found.loss


def test_b1_eight_hundred_layers_are_proven_in_seconds():
    items, _, _, least, most = random_layers(800, 1)
    limit = least + (most - least) // 3
    found = allocate(items, [Budget("bytes", limit)])
    assert found.stopped in ("optimal", "gap")
    assert found.gap_of_range <= 1e-3
    assert 0.99 * limit <= found.budgets[0].used <= limit
    assert found.seconds < 10  # 2 on a quiet machine; this one may be shared


def test_b2_more_bytes_never_lose_more_and_the_ends_are_all_or_nothing():
    items, _, _, least, most = random_layers(60, 2)
    losses = []
    for share in np.linspace(0, 1, 9):
        losses.append(allocate(items, [Budget("bytes", least + int(share * (most - least)))]).loss)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    assert set(allocate(items, [Budget("bytes", most)]).choices.values()) == {"w8"}
    assert set(allocate(items, [Budget("bytes", least)]).choices.values()) == {"w2"}
    with pytest.raises(InfeasibleBudget) as error:
        allocate(items, [Budget("bytes", least - 1)])
    assert (error.value.smallest, error.value.largest) == (least, most)
    assert f"{least:,}" in str(error.value)


def test_b3_the_same_input_gives_the_same_bits_in_any_order(stage):
    items, *_, least, most = random_layers(80, 3)
    budget = [Budget("bytes", (least + most) // 2)]
    shuffled = items[:]
    random.Random(0).shuffle(shuffled)
    assert allocate(items, budget).loss == allocate(shuffled, budget).loss
    assert allocate(items, budget).choices == allocate(shuffled, budget).choices
    asked = settings({"mean_bits": 4.0})
    files = [bits_files(stage.run(asked, workspace=name)[0]) for name in ("one", "two")]
    assert files[0]["bits.yaml"] == files[1]["bits.yaml"]


@pytest.mark.parametrize("k", np.linspace(0.46, 1.36, 5))
@pytest.mark.parametrize("mean", [3.66, 4.0, 5.02])
def test_b5_the_means_of_two_groups_give_the_mean(k, mean):
    quotient = 2.2418
    means = group_means(mean, float(k), quotient)
    average = (quotient * means.content + means.quality) / (1 + quotient)
    assert average == pytest.approx(mean, rel=1e-9)
    assert means.content == pytest.approx(k * means.quality, rel=1e-9)
    inside = 2 <= means.content <= 8 and 4 <= means.quality <= 8
    assert (means.outside is None) is inside


@pytest.mark.slow
def test_b5_two_groups_share_a_budget_and_the_best_measured_split_is_taken(make_tiny, tmp_path):
    generator = torch.Generator().manual_seed(0)
    text = {}
    for prefix in ("", "negative_"):
        text[f"{prefix}prompt_embeds"] = torch.randn(2, 6, 32, generator=generator)
        text[f"{prefix}prompt_attention_mask"] = torch.ones(2, 6, dtype=torch.int64)
    save_file(text, tmp_path / "text.safetensors")
    stage = Stage(uneven(make_tiny("PixArtTransformer2DModel", name="source")), tmp_path)
    chosen = {}
    for objective in ("power", "mixdq"):
        asked = settings({"mean_bits": 4.0}, objective=objective, points=5)
        embeddings = str(tmp_path / "text.safetensors")
        found = stage.run(asked, workspace=objective, embeddings=embeddings)[1]["allocation"]
        assert [(group["name"], group["metric"]) for group in found["groups"]] == [
            ("content", "ssim"), ("quality", "sqnr_db")
        ]  # fmt: skip
        for row in found["layers"]:
            content = ".attn2." in row["name"] or ".ff." in row["name"]
            assert row["group"] == ("content" if content else "quality")
        tried = [point for point in found["points"] if point["eligible"]]
        chosen[objective] = next(point for point in tried if point["chosen"])
        assert len(tried) > 2
        assert chosen[objective]["sqnr_db"] == max(point["sqnr_db"] for point in tried)
        assert found["used"]["mean_bits"] <= 4.0
        equal = next(point for point in found["points"] if point["label"] == "all w4")
        assert chosen[objective]["sqnr_db"] >= equal["sqnr_db"] + 3
    assert chosen["power"]["sqnr_db"] >= chosen["mixdq"]["sqnr_db"]
    assert len(stage.tables) == 1, "another objective needs no other measurement"


def test_b6_a_row_for_every_layer_and_choice_and_a_killed_run_goes_on(stage):
    asked = settings({"mean_bits": 4.0}, activation_bits=(8, 16), activation_budget={"protect": 0.1})
    model, details = stage.run(asked)
    rows = details["sensitivity"]["rows"]
    weights = [row for row in rows if row[0] == "weight"]
    activations = [row for row in rows if row[0] == "activation"]
    chosen = details["allocation"]["layers"]
    assert len(weights) == len(chosen) * len(BITS)
    assert len(activations) == sum("norm1" not in row["name"] for row in chosen)
    (table,) = stage.tables
    whole = table.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:20]) + lines[20][:7]  # torn in the middle of a row
    table.write_bytes(kept)
    again, resumed = stage.run(asked, workspace="again")
    (table,) = stage.tables
    assert table.read_bytes().startswith(b"".join(lines[:20]))
    assert resumed["allocation"]["layers"] == chosen
    assert again.quantization == model.quantization
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_b7_more_bits_hurt_less_and_planted_outliers_rank_worst(make_tiny, tmp_path):
    folder = uneven(make_tiny(name="source"), spread=0.2)
    planted = "transformer_blocks.0.attn1.to_out.0"
    tensors = load_file(folder / WEIGHTS)
    weight = tensors[f"{planted}.weight"]
    for row in range(len(weight)):  # one in every row, so that none of its scales escapes
        weight[row, 7 * row % weight.shape[1]] *= 100
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _, details = Stage(folder, tmp_path).run(settings({"mean_bits": 4.0}))
    measured = {row["name"]: row["sensitivity"] for row in details["allocation"]["layers"]}
    rising = [values["w8"] > values["w4"] > values["w2"] for values in measured.values()]
    assert sum(rising) >= 0.95 * len(rising)
    assert min(measured, key=lambda name: measured[name]["w8"]) == planted


@pytest.fixture(scope="module")
def mixed_bench():
    path = Path(__file__).parents[2] / "benchmarks" / "_mixed.py"
    spec = importlib.util.spec_from_file_location("_mixed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_b8_power_beats_equal_random_and_decibels_and_predicts_itself(mixed_bench, make_tiny, tmp_path):
    folder = uneven(make_tiny(name="source", num_layers=8))
    asked = settings({"mean_bits": 4.0}, clip="minmax", sensitivity={"samples": 4, "steps": 4})
    calibration = CalibrationSettings(samples=8, steps=6, batch_size=8)
    with mixed_bench.prepared(str(folder), asked, calibration, tmp_path, 0, (4, 4)) as ready:
        items = weight_program(ready.layers, ready.table, "power").items
        limit = stored_bytes(ready.layers, {entry.site.name: "w4" for entry in ready.layers})
        budget = [Budget("bytes", limit)]

        def decibels(chosen):
            assert 0.99 * limit <= stored_bytes(ready.layers, chosen) <= limit
            return -10 * math.log10(ready.error(chosen))

        answer = allocate(items, budget)
        power = decibels(answer.choices)
        generator = random.Random(0)
        drawn = max(decibels(at_random(items, limit, generator)) for _ in range(20))
        paper = allocate(weight_program(ready.layers, ready.table, "mixdq").items, budget).choices
        even = evenly(items, limit)
        assert set(even.values()) == {"w4"}
        assert power >= decibels(even) + 3
        assert power >= drawn + 3
        assert power >= decibels(paper) + 3
        assert power == pytest.approx(-10 * math.log10(answer.loss), abs=2)


def test_b11_errors_are_measured_in_floating_point_on_eight_samples_or_more():
    low, high = (torch.tensor([value], dtype=torch.uint8) for value in (10, 250))
    assert powers(low, high) == (100.0, 57600.0)
    assert int((low - high).square()) == 0  # what arithmetic on bytes makes of it
    defaults = AllocationSettings.model_validate({"budget": {"mean_bits": 4}})
    assert defaults.sensitivity.samples >= 8


def test_b11_inputs_are_decided_under_the_chosen_weights(stage):
    options = {"activation_bits": (8, 16), "activation_budget": {"mean_bits": 12.0}, "points": 2}
    model, details = stage.run(settings({"mean_bits": 4.0}, **options))
    _, weights_alone = stage.run(settings({"mean_bits": 4.0}, points=2), workspace="alone")
    bits = {row["name"]: row["weight_bits"] for row in details["allocation"]["layers"]}
    assert bits == {row["name"]: row["weight_bits"] for row in weights_alone["allocation"]["layers"]}
    assert details["allocation"]["activations"]["mean_bits"] <= 12.0
    found = {name: scheme.activation for name, scheme in model.quantization.items() if "norm1" not in name}
    assert {scheme and scheme.bits for scheme in found.values()} == {8, None}


@pytest.fixture(scope="module")
def exported(tiny_cache, tmp_path_factory):
    """Run a recipe as a user does; a budget in bytes that is no round number of anything."""
    import shutil

    import compress

    folder = tmp_path_factory.mktemp("mixdq")
    source = shutil.copytree(tiny_cache("DiTTransformer2DModel", 0, "float32", ()), folder / "source")
    recipe = {
        "model": str(uneven(source)),
        "calibration": {"samples": 4, "steps": 3},
        "stages": [{"mixdq": {"budget": {"bytes": 230_001}, "bits": [2, 3, 4, 8]}}],
        "evaluate": {"fidelity": {"samples": 1, "steps": 2}},
        "export": {"path": str(folder / "out")},
    }
    report = compress.run(recipe, work_dir=folder / "work")
    return folder / "out", report


def tensor_sizes(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.mark.slow
def test_b12_the_file_is_what_the_program_says_to_the_byte(exported):
    folder, report = exported
    allocation = report["stages"][0]["details"]["allocation"]
    tensors = tensor_sizes(folder)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    on_disk = 0
    for row in allocation["layers"]:
        stored = sum(size for name, size in sizes.items() if name.rpartition(".")[0] == row["name"])
        assert stored == row["bytes"], row["name"]
        on_disk += stored
    assert on_disk == allocation["used"]["allocated_bytes"]
    assert sum(sizes.values()) == allocation["used"]["bytes"] == report["evaluation"]["metrics"]["bytes"]
    assert 0.99 * 230_001 <= sum(sizes.values()) <= 230_001
    assert report["export"]["verified"] is True
    assert report["export"]["max_abs_error"] == 0.0


@pytest.mark.slow
def test_b4_averages_are_those_of_list_manifest_and_file(exported):
    folder, report = exported
    allocation = report["stages"][0]["details"]["allocation"]
    listed = yaml.safe_load((folder / "bits.yaml").read_text())
    manifest = json.loads((folder / "compress.json").read_text())["quantization"]
    tensors = tensor_sizes(folder)
    rows = allocation["layers"]
    assert set(listed) == {row["name"] for row in rows}
    averages = []
    for source in ("list", "manifest", "file"):
        total = 0
        for row in rows:
            name, (out, columns) = row["name"], manifest[row["name"]]["shape"]
            packed = tensors[f"{name}.qweight"]
            bits = {
                "list": listed[name]["weight"],
                "manifest": manifest[name]["bits"],
                "file": 8 * packed.numel() * packed.element_size() / (out * columns),
            }[source]
            assert row["weights"] == out * columns
            total += bits * out * columns
        averages.append(total / sum(row["weights"] for row in rows))
    assert averages == pytest.approx([allocation["used"]["mean_bits"]] * 3, rel=1e-12)
    for group in allocation["groups"]:
        own = [row for row in rows if row["group"] == group["name"]]
        counted = {str(bits): sum(row["weight_bits"] == bits for row in own) for bits in (2, 3, 4, 8)}
        assert group["histogram"] == {bits: count for bits, count in counted.items() if count}
    assert len(allocation["groups"][0]["histogram"]) > 1, "the bits are mixed"


@pytest.mark.slow
def test_report_and_card_show_the_allocation(exported):
    folder, report = exported
    names = {row["name"] for row in report["export"]["files"]}
    assert {"bits.yaml", "bits.png", "sensitivity.png", "error_over_bytes.png"} <= names
    card = (folder / "README.md").read_text()
    used = report["stages"][0]["details"]["allocation"]["used"]
    assert f"| bytes of all tensors | 230,001 | {used['bytes']:,} |" in card
