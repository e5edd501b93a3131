import json
from pathlib import Path

import pytest
import torch
from compress.calibration.answers import splits_of
from compress.calibration.text import NoText
from compress.compressors.base import Workspace
from compress.compressors.pruning.eep import Eep
from compress.compressors.pruning.experts import searching
from compress.compressors.pruning.experts.judging import Judge
from compress.compressors.pruning.experts.shipping import shipped
from compress.errors import PlanError, SourceError
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.experts import EepSettings
from compress.recipes.schema import ModelRef

from ...tiny_items import make_asked_moe
from ...tiny_moe import moe_config

SMALL = {
    "keep_experts": 4, "init_random": 6, "prune_evals": 20, "total_evals": 40, "random_draws": 4,
    "fitness": {"by": "tokens"}, "splits": {"train": 20, "test": 20},
}  # fmt: skip


def settings(**changes) -> EepSettings:
    values = {**SMALL, **changes}
    return EepSettings.model_validate_json(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_asked_moe(tmp_path_factory.mktemp("moe"))


def applied(folder: Path, work: Path, asked: EepSettings, workers: int = 1):
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    (work / "folder").mkdir(parents=True, exist_ok=True)
    details = Eep().apply(
        model, asked, NoText(0), Workspace(work / "folder", work / "shared", workers), SilentProgress()
    )
    return model, details


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(1, 15)[None]).logits


def test_what_is_left_scores_as_the_search_says(folder, tmp_path) -> None:
    from compress.calibration.answer_scores import Scorer

    asked = settings()
    model, details = applied(folder, tmp_path, asked)
    rows = {row["name"]: row for row in details["scores"]}
    splits = splits_of(asked, folder, 0)
    for name, items in (("train", splits.train), ("score", splits.test)):
        assert Scorer(model, items, asked.fitness).score().points == pytest.approx(
            rows["eep"][name], abs=2e-3
        )
    assert (details["experts_before"], details["experts_after"]) == (6, 4)
    assert model.config["num_local_experts"] == 4 and model.module.config.num_local_experts == 4
    history = details["search"]["history"]
    assert len(history) == 40 and history[-1]["best"] == max(row["fitness"] for row in history)
    best = history[details["search"]["best"]]
    assert (
        rows["eep"]["train"] == pytest.approx(best["fitness"], abs=1e-3)
        and best["fitness"] == history[-1]["best"]
    )


def test_the_result_is_at_least_as_good_as_every_rule_that_seeds_it(folder, tmp_path) -> None:
    _, details = applied(folder, tmp_path, settings(total_evals=24, prune_evals=24))
    rows = {row["name"]: row for row in details["scores"]}
    assert not details["merged"] and "eep: experts chosen" not in rows
    rules = [rows[name]["train"] for name in ("frequency", "soft_activation", "naee")]
    assert rows["eep"]["train"] >= max(rules)
    assert rows["random"]["draws"] == 4 and rows["random"]["failed"] == 0


def test_a_killed_search_goes_on_with_its_archive(folder, tmp_path) -> None:
    asked = settings(total_evals=22, prune_evals=16)
    _, whole = applied(folder, tmp_path / "whole", asked)
    _, _ = applied(folder, tmp_path / "killed", asked)
    archive = tmp_path / "killed" / "folder" / "archive"
    kept = sorted(archive.glob("*.safetensors"))
    for path in kept[9:]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept[:9]}
    _, resumed = applied(folder, tmp_path / "killed", asked)
    assert resumed == whole
    assert {path: path.stat().st_mtime_ns for path in kept[:9]} == before


@pytest.mark.slow
def test_workers_find_what_one_process_finds(folder, tmp_path) -> None:
    from functools import partial

    asked = settings(total_evals=14, prune_evals=12, lag=2, random_draws=0)
    _, alone = applied(folder, tmp_path / "alone", asked)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    (tmp_path / "two").mkdir()
    opener = partial(open_model, ModelRef(id=str(folder)), progress=SilentProgress())
    workspace = Workspace(tmp_path / "two", tmp_path / "shared", 2, opener)
    assert Eep().apply(model, asked, NoText(0), workspace, SilentProgress()) == alone


def test_fewer_active_experts_alone_only_merge(folder, tmp_path) -> None:
    asked = EepSettings.model_validate_json(
        json.dumps({"active_experts": 1, "total_evals": 12, "fitness": {"by": "tokens"},
                    "splits": {"train": 20, "dev": 10, "test": 10}})
    )  # fmt: skip
    model, details = applied(folder, tmp_path, asked)
    assert (details["active_before"], details["active_after"], details["experts_after"]) == (2, 1, 6)
    assert model.module.config.num_experts_per_tok == 1
    names = [row["name"] for row in details["scores"]]
    assert names == ["original", "eep"] and details["search"]["prune_evals"] == 0
    assert all(tuple(kept) == tuple(range(6)) for kept in details["experts"].values())


def test_given_experts_are_kept_without_a_search(folder, tmp_path) -> None:
    asked = EepSettings.model_validate_json(json.dumps({"experts": {"0": [5, 1], "1": [0, 1], "2": [2, 3]}}))
    original = open_model(ModelRef(id=str(folder)), progress=SilentProgress()).module
    model, details = applied(folder, tmp_path, asked)
    assert details["experts"] == {"0": [1, 5], "1": [0, 1], "2": [2, 3]} and "scores" not in details
    gate = model.module.model.layers[0].mlp.gate.weight
    assert torch.equal(gate, original.model.layers[0].mlp.gate.weight[[1, 5]])
    text = json.loads(model.attachments["experts.json"])
    assert text["rounds"][0]["experts"] == details["experts"] and text["rounds"][0]["of"] == 6


def test_the_plan_knows_sizes_and_counts(folder) -> None:
    spec = read_spec(ModelRef(id=str(folder)))
    plan = Eep().plan(spec, settings())
    one = 24 * 32 * 3 + 32
    assert plan.before.parameters - plan.after.parameters == 3 * 2 * one
    notes = " ".join(plan.notes)
    assert "20 evaluations choose 4 of 6 experts in 3 groups" in notes and "20 evaluations merge" in notes
    assert "merge" not in " ".join(Eep().plan(spec, settings(total_evals=20)).notes)


def test_merged_experts_need_memory_beside_the_original_ones(tmp_path) -> None:
    wide = moe_config("MixtralForCausalLM", hidden_size=1024, intermediate_size=16384)
    (tmp_path / "config.json").write_text(json.dumps(wide))
    spec = read_spec(ModelRef(id=str(tmp_path), dtype="float32"))
    merging, choosing = (
        Eep().plan(spec, settings(total_evals=total)).peak_memory_bytes for total in (40, 20)
    )
    merged = 3 * 4 * 3 * 1024 * 16384 * 4
    assert spec.size().bytes < choosing < merging and merging - spec.size().bytes > merged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_experts": 7}, "keep_experts: 7 are to stay, but a layer has 6"),
        ({"keep_experts": 0.4}, "no whole number"),
        ({"keep_experts": 1}, "2 experts per token|more than"),
        ({"groups": 4}, "groups: 4 groups, but 3 layers"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_the_plan(folder, changes, message) -> None:
    with pytest.raises(PlanError, match=message):
        Eep().plan(read_spec(ModelRef(id=str(folder))), settings(**changes))


def test_uneven_groups_of_a_router_are_refused(tmp_path) -> None:
    folder = make_asked_moe(tmp_path, "DeepseekV3ForCausalLM")
    spec = read_spec(ModelRef(id=str(folder)))
    with pytest.raises(PlanError, match="2 groups of experts"):
        Eep().plan(spec, settings(keep_experts=5))
    assert Eep().plan(spec, settings(keep_experts=4)).after.parameters < spec.size().parameters


def test_too_few_items_are_refused(folder, tmp_path) -> None:
    with pytest.raises(SourceError, match="different items to draw from"):
        applied(folder, tmp_path, settings(splits={"train": 41, "test": 5}))


def free(export: str) -> EepSettings:
    # With this noise a free router soon is better than the best choice on so few items.
    return settings(
        router="free", export=export, groups=1, total_evals=60, mut_sigma=0.5, mut_entry=1.0, norm_prob=0.0
    )


def test_a_free_router_is_shipped_as_it_was_scored(folder, tmp_path) -> None:
    from compress.calibration.answer_scores import Scorer
    from compress.runtime.mapped_routing import is_mapped

    asked = free("custom")
    model, details = applied(folder, tmp_path, asked)
    rows = {row["name"]: row for row in details["scores"]}
    assert details["router"] == "free" and is_mapped(model.config)
    train = splits_of(asked, folder, 0).train
    points = Scorer(model, train, asked.fitness).score().points
    assert points == pytest.approx(rows["eep"]["train"], abs=2e-3)
    assert set(details["mapping"]) == set(details["mixing"]) == {"0", "1", "2"}


def test_a_rounded_router_is_stock_and_scored_again(folder, tmp_path) -> None:
    from compress.calibration.answer_scores import Scorer
    from compress.runtime.mapped_routing import is_mapped

    asked = free("stock-projected")
    model, details = applied(folder, tmp_path, asked)
    rows = {row["name"]: row for row in details["scores"]}
    assert details["router"] == "onehot" and not is_mapped(model.config)
    history = details["search"]["history"]
    free_row = rows["eep: router free, not shipped"]
    assert free_row["train"] == pytest.approx(history[details["search"]["best"]]["fitness"], abs=1e-3)
    train = splits_of(asked, folder, 0).train
    points = Scorer(model, train, asked.fitness).score().points
    assert points == pytest.approx(rows["eep"]["train"], abs=2e-3)
    assert rows["eep: experts chosen"]["train"] <= rows["eep"]["train"] < free_row["train"]
    assert "mapping" not in details and len(model.module.model.layers[0].mlp.gate.weight) == 4


@pytest.mark.parametrize("luck", [-5.0, 50.0])
def test_what_is_better_ships_of_a_rounded_router_and_a_choice(luck, folder, tmp_path, monkeypatch) -> None:
    measured, rounded = Judge.__call__, []

    def noted(best, export, pools):
        rounded.append(shipped(best, export, pools))
        return rounded[0]

    def judged(self, one) -> float:
        return luck if rounded and one.sha256 == rounded[0].sha256 else measured(self, one)

    monkeypatch.setattr(searching, "shipped", noted)
    monkeypatch.setattr(Judge, "__call__", judged)
    _, details = applied(folder, tmp_path, free("stock-projected"))
    rows = {row["name"]: row for row in details["scores"]}
    assert rows["eep"]["train"] == max(luck, rows["eep: experts chosen"]["train"])
    assert details["router"] == "onehot"
    wanted = rounded[0] if luck > 0 else None
    assert details["merged"] == (wanted is not None and not wanted.is_choice)


def test_a_router_that_cannot_be_mapped_is_refused_by_the_plan(tmp_path) -> None:
    folder = make_asked_moe(tmp_path, "PhimoeForCausalLM")
    with pytest.raises(PlanError, match="router: free"):
        Eep().plan(read_spec(ModelRef(id=str(folder))), free("custom"))
    with pytest.raises(PlanError, match="router: free"):
        Eep().plan(read_spec(ModelRef(id=str(folder))), free("stock-projected"))


def test_rules_and_random_choices_are_compared_layer_by_layer(folder, tmp_path) -> None:
    """Also where the search shares choices: what it is compared with is what others would do."""
    from compress.calibration.answer_scores import Scorer
    from compress.compressors.pruning.experts.baselines import measure
    from compress.compressors.pruning.experts.candidate import Candidates
    from compress.compressors.pruning.experts.field import Field
    from compress.compressors.pruning.experts.genome import Space, given_choice
    from compress.compressors.pruning.experts.layer_groups import layer_groups

    asked = settings(groups=1, total_evals=20)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    _, details = applied(folder, tmp_path, asked)
    rows = {row["name"]: row for row in details["scores"]}
    train = splits_of(asked, folder, 0).train
    scorer = Scorer(model, train, asked.fitness)
    field = Field.of(model.config, asked)
    rules = measure(
        model, scorer.prompts(), field.groups, 4, active=None, seed=0, progress=SilentProgress(), items=20
    )
    layers = layer_groups((0, 1, 2), "per_layer")
    judge = Judge(scorer, Candidates(model, layers))
    assert all(len(kept) == 3 for kept in rules.by_layer.values())
    assert all(len(kept) == 1 for kept in rules.shared.values())
    for name, kept in rules.by_layer.items():
        one = given_choice(Space(3, 4, 6), kept, name)
        assert rows[name]["train"] == pytest.approx(judge(one), abs=1e-3)
    given = [row for row in details["search"]["history"] if row["kind"] == "given"]
    assert given and rows["random"]["draws"] == 4 and len(details["groups"]) == 1


class Told(SilentProgress):
    """Remembers warnings and notes."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_items_that_say_nothing_are_warned_of_and_a_kept_search_is_told(folder, tmp_path) -> None:
    told = Told()
    model = open_model(ModelRef(id=str(folder)), progress=told)
    workspace = Workspace(tmp_path, tmp_path / "shared")
    asked = settings(total_evals=20, random_draws=0)
    Eep().apply(model, asked, NoText(0), workspace, told)
    assert any("which is little to go by" in message for message in told.warnings)
    assert not any("goes on after" in message for message in told.notes)
    Eep().apply(open_model(ModelRef(id=str(folder)), progress=told), asked, NoText(0), workspace, told)
    assert any("goes on after 20 evaluations" in message for message in told.notes)
