"""Named experts from disk to disk: planned, refused, carried out, compared, published and made again."""

from __future__ import annotations

import json

import pytest
import torch
from compress import execution, pipeline, streaming, variants
from compress.cli import _render
from compress.cli._tables import Table
from compress.errors import PlanError, RecipeError, SourceError, UsageError, VerifyError
from compress.exporters.fresh_process import Verification
from compress.exporters.tensors_seen import compared_tensors
from compress.exporters.verify import FolderError, verify_folder
from compress.pipeline import plan, reproduce, run, verify
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.streamed import is_streamed, needs_memory
from compress.report import TOP_KEYS, without_timings
from compress.runtime.hashes import file_sha256
from safetensors.torch import load_file, save_file

from .tiny_moe import make_moe, moe_config, moe_module

KEPT = {0: [4, 0, 2], 1: [1, 2, 3], 2: [5, 4, 0]}
STAGE = {"experts": {str(layer): experts for layer, experts in KEPT.items()}}
SHARD_BYTES = 1_000_000


def _licensed(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def _recipe(model, out, *, stage=None, evaluate=None, **changes):
    return {
        "model": str(model),
        "stages": [{"eep": STAGE if stage is None else stage}],
        "evaluate": {"fidelity": None} if evaluate is None else evaluate,
        "export": {"path": str(out), "max_shard_size": SHARD_BYTES},
        **changes,
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a Mixtral of three layers and six experts in bfloat16, in several shards."""
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    module = moe_module("MixtralForCausalLM", hidden_size=256, intermediate_size=64).to(torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="700KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return _licensed(folder)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """Return the folder of a run and its report."""
    root = tmp_path_factory.mktemp("made")
    gates = {"size_ratio": "<= 0.8", "parameters": "< 1.1e6", "macs": "> 0", "bits_per_weight": "== 16"}
    recipe = _recipe(source, root / "out", require=gates, stage={**STAGE, "active_experts": 1})
    return root / "out", run(recipe, work_dir=root / "work")


def _stored(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


class Notes(SilentProgress):
    """Remembers the labels of all steps."""

    def __init__(self):
        self.labels = []

    def start(self, label, total):
        self.labels.append(label)


def test_what_stays_is_what_the_source_holds_under_the_names_of_the_hub(made, source):
    folder, _ = made
    before, after = _stored(source), _stored(folder)
    expert = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    for layer, kept in KEPT.items():
        for place, old in enumerate(sorted(kept)):
            for name in ("w1", "w2", "w3"):
                assert torch.equal(
                    after.pop(expert.format(layer, place, name)), before[expert.format(layer, old, name)]
                )
        gate = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        assert torch.equal(after.pop(gate), before[gate][sorted(kept)])
    assert after and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
    assert len(list(folder.glob("model-*.safetensors"))) >= 2


def test_the_report_has_the_keys_of_every_report_and_says_how_it_was_verified(made):
    folder, document = made
    assert tuple(document) == TOP_KEYS
    assert json.loads((folder / "report.json").read_text()) == document
    (stage,) = document["stages"]
    assert list(stage) == [
        "method", "seconds", "peak_rss_bytes", "resumed", "before", "after", "details",
    ]  # fmt: skip
    assert stage["method"] == "eep" and stage["resumed"] is False
    assert stage["details"]["experts"] == {str(layer): sorted(kept) for layer, kept in KEPT.items()}
    assert stage["before"]["bytes"] == document["model"]["bytes"]
    export, metrics = document["export"], document["evaluation"]["metrics"]
    assert set(export) == {
        "path", "format", "bytes", "verified", "max_abs_error", "loads_with", "notes", "files",
    }  # fmt: skip
    assert export["verified"] is True and export["max_abs_error"] == 0.0 and compared_tensors(export)
    assert "no outputs were computed" in export["notes"][0]
    assert "max_abs_error" not in metrics and metrics["bytes"] == stage["after"]["bytes"]
    assert all(row["passed"] for row in document["gates"]) and len(document["gates"]) == 4
    assert len(document["model"]["hashes"]) >= 3 and document["environment"]["device"] == "cpu"
    (entry,) = json.loads((folder / "compress.json").read_text())["history"]
    assert entry["method"] == "eep" and entry["details"] == stage["details"]


def test_card_and_terminal_claim_no_outputs(made):
    folder, document = made
    card = (folder / "README.md").read_text()
    assert "compared it with its source, tensor by tensor" in card and "No outputs were computed" in card
    assert "difference to the outputs" not in card
    lines = [line for line in _render.report(document) if not isinstance(line, Table)]
    (line,) = [text for text in lines if str(text).startswith(str(folder))]
    assert "equal tensors; no outputs were computed" in line and "equal outputs" not in line


def test_the_folder_verifies_by_itself_and_against_its_source(made, source, monkeypatch, tmp_path):
    monkeypatch.setattr("compress.verification.open_model", None)  # nothing opens the weights
    folder, _ = made
    verify_folder(folder)
    found = verify(folder, against=str(source))
    checks = {check["name"]: check["detail"] for check in found["checks"]}
    assert found["verified"] and compared_tensors({"notes": [checks["tensors now"]]})
    assert {row["metric"] for row in found["metrics"]} == {
        "size_ratio", "bytes", "bits_per_weight", "parameters", "macs", "kv_bytes_per_token",
        "kv_bytes_ratio",
    }  # fmt: skip
    again = pipeline.evaluate(folder)
    assert "max_abs_error" not in again["evaluation"]["metrics"]
    assert all(row["passed"] for row in again["gates"])


def test_the_run_is_made_again_byte_for_byte(made, tmp_path):
    assert reproduce(made[0], work_dir=tmp_path / "work")["reproduced"]


def test_a_second_run_replaces_the_first_only_where_it_may(source, tmp_path):
    recipe, work = _recipe(source, tmp_path / "out"), tmp_path / "work"
    run(recipe, work_dir=work)
    with pytest.raises(UsageError, match="the output folder exists"):
        run(recipe, work_dir=work)
    other = _recipe(source, tmp_path / "out", stage={"experts": dict.fromkeys("012", [0, 1])})
    run(other, work_dir=work, overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    assert not list((work / "stages").glob("*")), "no second copy of the model is kept"


def test_several_exports_are_cut_one_by_one(source, tmp_path):
    exports = [
        {"path": str(tmp_path / "one")},
        {"path": str(tmp_path / "two"), "max_shard_size": SHARD_BYTES},
    ]
    progress = Notes()
    document = run({**_recipe(source, ""), "export": exports}, work_dir=tmp_path / "work", progress=progress)
    assert [part["verified"] for part in document["export"]] == [True, True]
    assert progress.labels.count("eep") == 2 and progress.labels.count(f"checking {source}") == 1
    one, two = _stored(tmp_path / "one"), _stored(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_wrong_tensors_are_found_and_kept_aside(source, tmp_path, monkeypatch):
    right = streaming.cut_on_disk

    def wrong(ref, kept, *rest, **more):
        return right(ref, {**kept, 1: (0, 2, 3)}, *rest, **more)

    monkeypatch.setattr(streaming, "cut_on_disk", wrong)
    with pytest.raises(VerifyError, match=r"'model\.layers\.1\.mlp\..*differs from the source"):
        run(_recipe(source, tmp_path / "out"), work_dir=tmp_path / "work")
    assert not (tmp_path / "out").exists()
    export = json.loads((tmp_path / "out.rejected" / "report.json").read_text())["export"]
    assert export["verified"] is False and export["max_abs_error"] is None and export["rejected"]
    assert "The verification failed" in (tmp_path / "out.rejected" / "README.md").read_text()


def test_a_changed_tensor_does_not_verify_against_the_source(source, tmp_path):
    folder = tmp_path / "out"
    run(_recipe(source, folder, export={"path": str(folder)}), work_dir=tmp_path / "work")
    name, path = "model.layers.2.input_layernorm.weight", folder / "model.safetensors"
    report = json.loads((folder / "report.json").read_text())
    old = next(row for row in report["export"]["files"] if row["name"] == path.name)
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name] * 2}, path, metadata={"format": "pt"})
    old |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}  # whoever changed it covers it up
    (folder / "report.json").write_text(json.dumps(report))
    verify_folder(folder)
    with pytest.raises(FolderError, match=rf"tensors now: .*'{name}' differs from the source"):
        verify(folder, against=str(source))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"experts": {"0": [0, 1], "1": [0, 1]}}, "nothing is said of the experts of layer 2"),
        ({"experts": dict.fromkeys("0123", [0, 1])}, "layer 3 has no experts"),
        ({"experts": dict.fromkeys("012", [0, 6])}, "goes beyond the experts, which are 0 to 5"),
        ({"experts": dict.fromkeys("012", [0])}, "2 experts per token, of 1 experts"),
        ({"experts": dict.fromkeys("012", [0, 1, 2, 3, 4, 5])}, "all of them stay"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(source, tmp_path, stage, message, monkeypatch):
    for name in ("locate", "file_sha256", "cut_on_disk"):
        monkeypatch.setattr(streaming, name, None)
    with pytest.raises(PlanError, match=message):
        run(_recipe(source, tmp_path / "out", stage=stage), work_dir=tmp_path / "work")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"experts": dict.fromkeys("0123", [0, 1])}, "layer 3 has no experts"),
        ({"keep_experts": 0.25}, "0.25 of 6 experts is 1.5, no whole number"),
        ({"keep_experts": 7}, "7 are to stay, but a layer has 6 experts"),
        ({"active_experts": 3}, "3 experts per token; the model was trained with 2"),
    ],
)
def test_the_way_through_memory_refuses_before_weights_are_read_as_well(
    source, tmp_path, stage, message, monkeypatch
):
    monkeypatch.setattr("compress.models.checkpoint.scan_finite", None)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 50)
    recipe = _recipe(
        source, tmp_path / "out", stage=stage, evaluate={"fidelity": {"samples": 1}},
        calibration={"text": str(text), "length": 16},
    )  # fmt: skip
    with pytest.raises(PlanError, match=rf"stages\[0\]\.eep.*{message}"):
        run(recipe, work_dir=tmp_path / "work")


def test_uneven_groups_of_a_router_are_refused_by_the_config_alone(tmp_path):
    folder = make_moe(tmp_path / "m", "DeepseekV3ForCausalLM")
    (folder / "model.safetensors").unlink()
    stage = {"experts": {"1": [0, 1, 4, 5], "2": [0, 1, 2, 4]}}
    with pytest.raises(PlanError, match=r"layer 2 keeps \[3, 1\] experts of its 2 groups"):
        plan(_recipe(folder, tmp_path / "out", stage=stage))


def test_what_is_not_finite_is_named_and_leaves_nothing(tmp_path):
    folder = _licensed(make_moe(tmp_path / "m", "MixtralForCausalLM"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"experts\.3\.down_proj.*NaN or Inf"):
        run(_recipe(folder, tmp_path / "out"), work_dir=tmp_path / "work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "work"]


def test_keys_that_nothing_uses_are_refused(source, tmp_path):
    with pytest.raises(RecipeError, match=r"calibration\.samples.*no outputs are compared"):
        run(_recipe(source, tmp_path / "out", calibration={"samples": 4}), work_dir=tmp_path / "work")


def _loaded(**changes):
    return load_recipe(_recipe("builtin:dit", "out", **changes)).recipe


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, None),
        ({"evaluate": {"fidelity": None, "layers": False}}, None),
        ({"evaluate": {}}, "evaluate.fidelity"),
        ({"evaluate": {"fidelity": None, "speed": {}}}, "evaluate.speed"),
        ({"evaluate": {"fidelity": None, "answers": {}}}, "evaluate.answers"),
        ({"require": {"max_abs_error": "<= 0"}}, "require.max_abs_error"),
        ({"export": {"path": "out", "format": "dequantized"}}, "export.format: dequantized"),
        ({"export": [{"path": "out"}, {"path": "other", "padded": True}]}, "export.padded"),
    ],
)
def test_which_recipes_go_from_disk_to_disk(changes, key):
    recipe = _loaded(**changes)
    assert needs_memory(recipe) == key and is_streamed(recipe) is (key is None)


def test_searches_and_further_stages_are_carried_out_in_memory():
    assert not is_streamed(_loaded(stage={"keep_experts": 4}))
    assert not is_streamed(_loaded(stages=[{"eep": STAGE}, {"eep": STAGE}]))
    assert not is_streamed(_loaded(stages=[{"eep": STAGE}, {"rtn": {}}]))


def _planned(model, tmp_path, **changes):
    document = plan(_recipe(model, tmp_path / "out", **changes))
    (stage,) = document["stages"]
    return document, stage["peak_memory_bytes"], " ".join(stage["notes"])


def test_the_plan_says_which_way_it_goes_and_what_memory_that_takes(source, made, tmp_path):
    gates = {"stage": {**STAGE, "active_experts": 1}}
    document, small, notes = _planned(source, tmp_path, **gates)
    assert "from disk to disk" in notes and "in memory" not in notes.replace("no memory holds", "")
    assert document["export"]["bytes"] == made[1]["export"]["bytes"]
    assert document["stages"][0]["after"] == made[1]["stages"][0]["after"]
    (source / "calibration.txt").write_text("x" * 5000)
    try:
        _, large, notes = _planned(
            source, tmp_path, evaluate={"fidelity": {"samples": 1}},
            calibration={"text": str(source / "calibration.txt"), "length": 16},
        )  # fmt: skip
    finally:
        (source / "calibration.txt").unlink()
    assert "opens the model in memory, because of evaluate.fidelity" in notes
    assert f"with {small - 600 * 2**20:,} bytes beside the process" in notes and large != small


def test_the_memory_of_a_large_model_is_planned_from_its_config(tmp_path):
    """Mixtral-8x7B: 13 GB lie in a layer of experts, 262 MB in its embeddings, the largest single tensor."""

    def peak(class_name, layers, of, **sizes):
        config = moe_config(class_name, num_hidden_layers=layers, num_local_experts=of, **sizes)
        folder = tmp_path / class_name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        kept = {"experts": {str(layer): list(range(of // 2)) for layer in range(layers)}}
        return _planned(folder, tmp_path, stage=kept)[1]

    mixtral = peak(
        "MixtralForCausalLM", 32, 8, vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert 32000 * 4096 * 2 < mixtral < 32000 * 4096 * 2 + 10**9
    fused = peak(
        "GptOssForCausalLM", 36, 128, vocab_size=201088, hidden_size=2880, intermediate_size=2880,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    whole = 128 * 2880 * 2 * 2880 * 2  # one tensor of all gates and ups of a layer: no shard is smaller
    assert whole // 2 < fused < whole + 10**9


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"])
def test_files_and_report_are_those_of_the_way_through_memory(class_name, tmp_path, monkeypatch):
    folder = _licensed(make_moe(tmp_path / "m", class_name, dtype="bfloat16"))
    even = dict.fromkeys("12", [0, 1, 4, 5])
    stage = {"experts": even} if class_name.startswith("Deepseek") else STAGE
    recipe = _recipe(folder, tmp_path / "out", stage=stage)
    first = run(recipe, work_dir=tmp_path / "work")
    (tmp_path / "out").rename(tmp_path / "streamed")
    for module in (execution, pipeline):
        monkeypatch.setattr(module, "is_streamed", lambda recipe: False)
    # Whether outputs are equal is tested elsewhere, and takes a process with all of transformers.
    seen = Verification(verified=True, executed=True, max_abs_error=0.0, ways={}, loads_with=[])
    monkeypatch.setattr(variants, "verify_export", lambda *given, **more: seen)
    second = run(recipe, work_dir=tmp_path / "work")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    for name in names - {"README.md", "report.json"}:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert second["evaluation"]["metrics"].pop("max_abs_error") == 0.0
    one, two = without_timings(first), without_timings(second)
    for document in (one, two):
        del document["export"]["notes"]
        document["export"]["files"] = [
            row for row in document["export"]["files"] if row["name"] != "README.md"
        ]
    assert one == two
