"""Depth pruning of Flux and Hunyuan-DiT as a user meets it: plan, run, what is written, what is refused."""

import json
from pathlib import Path

import compress
import diffusers
import pytest
import torch
from compress.errors import CompressError
from compress.exporters.inspection import inspect
from compress.progress import SilentProgress
from compress.verification import evaluate_folder

from ..tiny_denoisers import FLUX, HUNYUAN, PIXELS, TINY, save_denoiser, save_embeddings

DOUBLE, SINGLE, BLOCKS = "transformer_blocks", "single_transformer_blocks", "blocks"
DEV = {"_class_name": FLUX, "guidance_embeds": True}
REAL_HUNYUAN = {
    "_class_name": HUNYUAN, "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40,
    "mlp_ratio": 4.3637, "sample_size": 128, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
LEARNED = {"steps": 4, "batch_size": 4, "checkpoint_every": 2}


@pytest.fixture
def recipe(tmp_path):
    """Return `recipe(class_name, stages, calibration={}, **model config)`."""

    def make(class_name: str, stages: list, calibration: dict | None = None, **config: object) -> dict:
        given: dict = {
            "samples": 2, "steps": 2, "guidance_scale": 1.5,
            "embeddings": str(save_embeddings(class_name, tmp_path / "prompts.safetensors")),
            **({"size": PIXELS} if class_name == FLUX else {}),
        }  # fmt: skip
        return {
            "model": str(save_denoiser(class_name, tmp_path / "model", **config)),
            "calibration": {**given, **(calibration or {})},
            "stages": stages,
            "evaluate": {"fidelity": {"samples": 2, "steps": 2, "guidance_scale": 1.5}},
            "export": {"path": str(tmp_path / "out")},
        }

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("class_name", "stages", "data", "config", "depths"),
    [
        (
            FLUX,
            [{"tinyfusion": {**LEARNED, "groups": {DOUBLE: "1:2", SINGLE: "2:4"}}}, {"distill": LEARNED}],
            {"generate": 6, "steps": 2},
            {"guidance_embeds": True},
            {"num_layers": 1, "num_single_layers": 2},
        ),
        (HUNYUAN, [{"depth": {"by": "indices", "keep": [1, 2, 3, 4]}}], None, {}, {"num_layers": 4}),
    ],
)
def test_a_run_writes_a_shallower_model_of_the_stock_class(
    class_name, stages, data, config, depths, recipe, tmp_path
):
    given = recipe(class_name, stages, {"data": data}, **config)
    plan = compress.plan(given)
    report = compress.run(given, work_dir=tmp_path / "work", progress=SilentProgress())
    out = tmp_path / "out"
    for planned, stage in zip(plan["stages"], report["stages"], strict=True):
        for key in ("parameters", "macs", "bytes"):
            assert planned["after"][key] == stage["after"][key]
    assert report["stages"][0]["after"]["macs"] < report["stages"][0]["before"]["macs"]
    saved = json.loads((out / "config.json").read_text())
    assert saved["_class_name"] == class_name and {key: saved[key] for key in depths} == depths
    # Verified in a fresh process, by the stock class without this package among others.
    assert report["export"]["verified"] and report["export"]["max_abs_error"] == 0.0
    stock = getattr(diffusers, class_name)
    assert any(class_name in way for way in report["export"]["loads_with"])
    module, found = stock.from_pretrained(out, output_loading_info=True)
    assert not any(found.values())
    assert sum(item.numel() for item in module.parameters()) == report["stages"][-1]["after"]["parameters"]
    kept = {name: row["kept"] for name, row in inspect(out)["depth"].items()}
    assert kept == {name: row["kept"] for name, row in report["stages"][0]["details"]["blocks"].items()}
    card = (out / "README.md").read_text()
    assert class_name in card and "text-to-image" in card and "compress" not in saved
    again = evaluate_folder(None, out, SilentProgress())["evaluation"]["metrics"]
    assert again.items() <= report["evaluation"]["metrics"].items() and "sqnr_db" in again
    layers = {row["name"] for row in report["evaluation"]["layers"]}
    assert {name.rpartition(".")[0] for name in layers} >= set(kept)


@pytest.mark.parametrize(
    ("config", "keep", "wanted"),
    [
        (DEV, {DOUBLE: list(range(0, 19, 2)), SINGLE: list(range(19))},
         {"num_layers": 10, "num_single_layers": 19}),
        (DEV, {SINGLE: list(range(10, 38))}, {"num_single_layers": 28}),
        (REAL_HUNYUAN, [*range(10, 30)], {"num_layers": 20}),
    ],
)  # fmt: skip
def test_a_plan_of_the_real_size_needs_the_config_alone(config, keep, wanted, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    stages = [{"depth": {"by": "indices", "keep": keep}}]
    (tmp_path / "prompts.safetensors").write_bytes(b"")
    plan = compress.plan(
        {
            "model": str(model), "stages": stages, "export": {"path": str(tmp_path / "out")},
            "calibration": {"embeddings": str(tmp_path / "prompts.safetensors")},
        }
    )  # fmt: skip
    keys = {key: value for key, value in config.items() if key != "_class_name"}
    with torch.device("meta"):
        stock = [getattr(diffusers, config["_class_name"])(**changed) for changed in (keys, keys | wanted)]
    sizes = [plan["stages"][0][when]["parameters"] for when in ("before", "after")]
    assert sizes == [sum(item.numel() for item in module.parameters()) for module in stock]
    assert plan["export"]["bytes"] >= 2 * sizes[1]


def refusal(recipe: dict, tmp_path: Path) -> CompressError:
    with pytest.raises(CompressError) as caught:
        compress.run(recipe, work_dir=tmp_path / "work")
    assert not (tmp_path / "out").exists()
    kept = list((tmp_path / "work").rglob("*.safetensors")) if (tmp_path / "work").exists() else []
    assert not kept, "nothing was computed"
    return caught.value


@pytest.mark.parametrize("class_name", [FLUX, HUNYUAN])
@pytest.mark.parametrize(
    "stage", [{"rtn": {}}, {"vidit_q": {}}, {"smoothquant": {}}, {"mixdq": {"budget": {"mean_bits": 6}}},
              {"isomorphic": {"ratios": {"width": 0.5}}}]
)  # fmt: skip
def test_stages_that_are_not_offered_say_for_what_they_are(class_name, stage, recipe, tmp_path):
    error = refusal(recipe(class_name, [stage]), tmp_path)
    family = {FLUX: "flux", HUNYUAN: "hunyuan"}[class_name]
    assert error.exit_code == 3 and f"does not fit the family {family} ({class_name})" in error.message
    assert "fits the families" in error.hint and family not in error.hint


@pytest.mark.parametrize(
    ("class_name", "stage", "exit_code", "message"),
    [
        (FLUX, {"depth": {"by": "indices", "keep": [0]}}, 3, "2 lists of blocks, and one count"),
        (FLUX, {"depth": {"by": "indices", "keep": {DOUBLE: [0, 2]}}}, 3, "0 to 1"),
        (FLUX, {"depth": {"by": "flux_lite", "keep": {BLOCKS: 1}}}, 3, "the model has no blocks"),
        (HUNYUAN, {"depth": {"by": "indices", "keep": [1, 2, 3]}}, 3, "block 1 would stay without block 4"),
        (HUNYUAN, {"depth": {"by": "shortgpt", "keep": 3}}, 3, "they go in pairs"),
        (HUNYUAN, {"depth": {"by": "oracle", "keep": 2}}, 3, "half of an even number"),
    ],
)
def test_what_cannot_be_left_is_refused_before_anything_is_computed(
    class_name, stage, exit_code, message, recipe, tmp_path
):
    error = refusal(recipe(class_name, [stage]), tmp_path)
    assert error.exit_code == exit_code and message in error.message


def test_an_odd_depth_is_refused_by_the_config(recipe, tmp_path):
    given = recipe(HUNYUAN, [{"depth": {"by": "shortgpt", "keep": 4}}])
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 5}))
    error = refusal(given, tmp_path)
    assert error.exit_code == 4 and "num_layers 5 is odd" in error.message


@pytest.mark.parametrize(
    ("class_name", "changes", "exit_code", "message"),
    [
        (HUNYUAN, {"size": 512}, 2, "the model's own sample_size is 8"),
        (FLUX, {"size": 500}, 2, "multiple of 16"),
        (FLUX, {"embeddings": None}, 4, "needs prompts to sample from"),
        (FLUX, {"embeddings": None, "classes": [1]}, 4, "conditioned on prompts, not on classes"),
        (HUNYUAN, {"text": "words.txt", "embeddings": None}, 2, "is of use for language models"),
    ],
)
def test_what_is_sampled_is_said_in_the_model_s_own_words(
    class_name, changes, exit_code, message, recipe, tmp_path
):
    (tmp_path / "words.txt").write_text("words")
    changes = {key: str(tmp_path / value) if key == "text" else value for key, value in changes.items()}
    keep: object = {SINGLE: [0]} if class_name == FLUX else [2, 3]
    error = refusal(recipe(class_name, [{"depth": {"by": "indices", "keep": keep}}], changes), tmp_path)
    assert error.exit_code == exit_code and message in error.message


def test_latents_of_another_kind_are_refused(recipe, tmp_path):
    from safetensors.torch import save_file

    wrong = tmp_path / "wrong.safetensors"
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, wrong)
    stage = {"tinyfusion": {**LEARNED, "groups": {SINGLE: "2:4"}}}
    given = recipe(FLUX, [stage], {"data": {"latents": str(wrong)}})
    error = refusal(given, tmp_path)
    channels = TINY[FLUX]["in_channels"] // 4
    assert error.exit_code == 4 and f"takes [{channels}, 8, 8]" in error.message
