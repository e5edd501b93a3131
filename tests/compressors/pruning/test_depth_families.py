"""Blocks of Flux and of Hunyuan-DiT that go by a rule, or by what is learned, and training afterwards."""

import pytest
import torch
from compress.calibration.diffusion_loss import task_for
from compress.calibration.objectives import objective_for
from compress.calibration.recording import record
from compress.calibration.sampler import place
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.pruning.block_scores import change_scores, choice_losses
from compress.compressors.pruning.lora import low_rank, low_rank_parameters
from compress.errors import PlanError
from compress.exporters.formats import write
from compress.models.open import open_model
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.depth import DepthSettings, TinyFusionSettings
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.resuming import resume
from safetensors.torch import load_file, save_file

from ...tiny_denoisers import FLUX, HUNYUAN, PIXELS, embeddings_of, save_denoiser, save_embeddings

DOUBLE, SINGLE, BLOCKS = "transformer_blocks", "single_transformer_blocks", "blocks"
QUIET = SilentProgress()
SEARCH = {"steps": 4, "batch_size": 4, "checkpoint_every": 2}
IDLE = ((DOUBLE, 1, (2, 5)), (SINGLE, 0, (2,)), (SINGLE, 3, (2,)))


@pytest.fixture
def prepared(tmp_path):
    """Return `prepared(class_name, data=None, **config) -> (model, calibration, workspace)`."""

    def make(class_name, data=None, **config):
        folder = tmp_path / "model"
        if not folder.exists():
            save_denoiser(class_name, folder, **config)
        model = open_model(ModelRef(id=str(folder)), progress=QUIET)
        settings = CalibrationSettings.model_validate(
            {
                "samples": 2, "steps": 2, "guidance_scale": 1.5, "data": data,
                "embeddings": save_embeddings(class_name, tmp_path / "prompts.safetensors"),
                "size": PIXELS if class_name == FLUX else None,
            }
        )  # fmt: skip
        calibration = record(model, settings, seed=0, cache=tmp_path / "cache", progress=QUIET)
        (tmp_path / "stage").mkdir(exist_ok=True)

        def again():
            return open_model(ModelRef(id=str(folder)), progress=QUIET)

        return model, calibration, Workspace(tmp_path / "stage", tmp_path, original=again)

    return make


def apply(method, settings, model, calibration, workspace):
    plan = registry.get(method).plan(model.dense(), settings)
    details = registry.get(method).apply(model, settings, calibration, workspace, QUIET)
    assert plan.after == model.size()
    return details


def depth(prepared, **keys):
    return apply("depth", DepthSettings.model_validate(keys), *prepared)


@pytest.mark.parametrize("by", ["shortgpt", "flux_lite", "sensitivity"])
def test_blocks_of_flux_that_do_next_to_nothing_go_first(by, prepared, tmp_path):
    path = save_denoiser(FLUX, tmp_path / "model", num_layers=3, num_single_layers=5)
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, place_, gates in IDLE:
        for norm in ("norm1", "norm1_context") if name == DOUBLE else ("norm",):
            for part in ("weight", "bias"):
                chunks = tensors[f"{name}.{place_}.{norm}.linear.{part}"].chunk(6 if name == DOUBLE else 3)
                for gate in gates:
                    chunks[gate].mul_(0.01)
    save_file(tensors, file)
    details = depth(prepared(FLUX), by=by, keep={DOUBLE: 2, SINGLE: 3})
    idle = {(name, place_) for name, place_, _ in IDLE}
    scores = {(name, index): abs(score) for name, row in details["scores"].items()
              for index, score in enumerate(row)}  # fmt: skip
    assert max(scores[one] for one in idle) < 0.2 * min(scores[one] for one in set(scores) - idle)
    if by != "sensitivity":  # of random weights some raise the loss
        assert details["blocks"] == {
            DOUBLE: {"of": 3, "kept": [0, 2]}, SINGLE: {"of": 5, "kept": [1, 2, 4]},
        }  # fmt: skip


@pytest.mark.parametrize("by", ["shortgpt", "flux_lite", "sensitivity"])
def test_pairs_of_hunyuan_go_by_the_sum_of_their_scores(by, prepared):
    model, calibration, workspace = prepared(HUNYUAN, num_layers=8)
    details = depth((model, calibration, workspace), by=by, keep=4)
    scores = details["scores"][BLOCKS]
    sums = {first: scores[first] + scores[7 - first] for first in range(3)}
    if by == "shortgpt":
        del sums[0]  # its partner is the last block, which never goes
    gone = sorted(sums, key=sums.__getitem__)[:2]
    kept = [place_ for place_ in range(8) if min(place_, 7 - place_) not in gone]
    assert details["blocks"] == {BLOCKS: {"of": 8, "kept": kept}} and {3, 4} < set(kept)
    assert model.module.config.num_layers == len(model.module.blocks) == 4


def test_what_a_block_of_hunyuan_changes_is_measured_on_its_image(prepared):
    model, calibration, _ = prepared(HUNYUAN)
    objective = objective_for(model, calibration, None)
    found = change_scores(model, objective, "flux_lite", QUIET)[BLOCKS]
    seen = []
    model.module.blocks[4].register_forward_hook(
        lambda _, args, output: seen.append((output - args[0]).square().mean())
    )
    list(objective.losses(model))
    assert found[4] == pytest.approx(float(torch.stack(seen).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("class_name", "kept"), [(FLUX, {DOUBLE: (1,), SINGLE: (0, 2)}), (HUNYUAN, {BLOCKS: (1, 2, 3, 4)})]
)
def test_the_loss_of_a_choice_is_that_of_the_model_that_is_left(class_name, kept, prepared):
    model, calibration, _ = prepared(class_name)
    objective = objective_for(model, calibration, None)
    (gated,) = choice_losses(model, objective, [kept], QUIET)
    keep_blocks(model, kept, {"method": "test"})
    with torch.no_grad():
        left = sum(float(loss) for loss, _ in objective.losses(model)) / objective.samples
    assert gated == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize(
    ("class_name", "keep"), [(FLUX, 0.5), (FLUX, {SINGLE: 1}), (HUNYUAN, 2), (HUNYUAN, 4)]
)
def test_random_choices_are_of_every_list(class_name, keep, prepared):
    details = depth(prepared(class_name), by="random", keep=keep, draws=3, pick="middle")
    found = {name: len(row["kept"]) for name, row in details["blocks"].items()}
    assert found == (
        {DOUBLE: 1, SINGLE: 2} if keep == 0.5 else keep if isinstance(keep, dict) else {BLOCKS: keep}
    )


def test_the_oracle_halves_both_lists_of_flux_and_none_of_hunyuan(prepared, tmp_path):
    details = depth(prepared(FLUX), by="oracle")
    assert {name: row["kept"] for name, row in details["blocks"].items()} == {DOUBLE: [0], SINGLE: [0, 3]}
    hunyuan = open_model(ModelRef(id=str(save_denoiser(HUNYUAN, tmp_path / "other"))), progress=QUIET)
    settings = DepthSettings.model_validate({"by": "oracle", "keep": 2})
    with pytest.raises(PlanError, match="oracle keeps half of an even number"):
        registry.get("depth").plan(hunyuan.spec, settings)


@pytest.mark.parametrize(
    ("class_name", "keys", "message"),
    [
        (FLUX, {"by": "indices", "keep": [0]}, "2 lists of blocks, and one count"),
        (FLUX, {"by": "indices", "keep": {DOUBLE: [2]}}, "0 to 1"),
        (FLUX, {"by": "indices", "keep": {BLOCKS: [0]}}, "the model has no blocks"),
        (
            FLUX,
            {"by": "shortgpt", "keep": {SINGLE: 5}},
            "5 blocks of single_transformer_blocks are asked for",
        ),
        (HUNYUAN, {"by": "indices", "keep": [0, 2, 3]}, "block 0 would stay without block 5"),
        (HUNYUAN, {"by": "indices", "keep": [0, 5]}, "the middle of the model"),
        (HUNYUAN, {"by": "shortgpt", "keep": 3}, "they go in pairs"),
    ],
)
def test_what_cannot_stay_is_refused_by_the_plan(class_name, keys, message, tmp_path):
    model = open_model(ModelRef(id=str(save_denoiser(class_name, tmp_path / "model"))), progress=QUIET)
    with pytest.raises(PlanError, match=message):
        registry.get("depth").plan(model.spec, DepthSettings.model_validate(keys))


@pytest.mark.parametrize(
    ("class_name", "groups", "message"),
    [
        (FLUX, {DOUBLE: "1:2", SINGLE: "2:3"}, r"single_transformer_blocks.*4"),
        (FLUX, {DOUBLE: ["1:2", "1:2"], SINGLE: "1:2"}, r"transformer_blocks.*2 blocks.*4 together"),
        (HUNYUAN, "2:3", "blocks has 2 pairs of blocks that may go, and 2:3 repeated"),
    ],
)
def test_groups_that_do_not_add_up_are_refused_list_by_list(class_name, groups, message, tmp_path):
    model = open_model(ModelRef(id=str(save_denoiser(class_name, tmp_path / "model"))), progress=QUIET)
    settings = TinyFusionSettings.model_validate({**SEARCH, "groups": groups})
    with pytest.raises(PlanError, match=message):
        registry.get("tinyfusion").plan(model.spec, settings)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(
    ("class_name", "groups", "config"),
    [
        (FLUX, {DOUBLE: "1:2", SINGLE: "2:4"}, {"guidance_embeds": True}),
        (HUNYUAN, "1:2", {"num_layers": 10}),
    ],
)
def test_the_choice_is_learned_and_the_rest_trained(mode, class_name, groups, config, prepared, tmp_path):
    data = {"generate": 6, "steps": 1, "guidance_scale": 2.0}
    model, calibration, workspace = prepared(class_name, data, **config)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    settings = TinyFusionSettings.model_validate({**SEARCH, "groups": groups, "mode": mode})
    details = apply("tinyfusion", settings, model, calibration, workspace)
    kept = {name: row["kept"] for name, row in details["blocks"].items()}
    if class_name == FLUX:
        assert (len(kept[DOUBLE]), len(kept[SINGLE])) == (1, 2)
    else:
        assert {4, 5} < set(kept[BLOCKS]) and all(9 - place_ in kept[BLOCKS] for place_ in kept[BLOCKS])
    for name, value in model.module.state_dict().items():
        assert torch.equal(before[model.original_name(name)], value), "blocks of the original, bit for bit"
    again = workspace.original()
    settings = MaskedDistillSettings.model_validate(
        {"steps": 3, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 2, "ema": 0.5}
    )
    (tmp_path / "distill").mkdir()
    workspace = Workspace(tmp_path / "distill", tmp_path, original=lambda: again)
    trained = apply("distill", settings, model, calibration, workspace)
    assert set(trained["matched"]) == set(kept)
    assert all(bool(value.isfinite().all()) for value in model.module.state_dict().values())
    changed = [
        name for name, value in model.module.state_dict().items()
        if not torch.equal(before[model.original_name(name)], value)
    ]  # fmt: skip
    assert len(changed) > 0.9 * len(model.module.state_dict())
    folder = tmp_path / "written"
    folder.mkdir()
    write(model, folder, "compress")
    resume(again, folder)
    calls = next(calibration.calls())
    with torch.no_grad():
        ours, theirs = (one.module(**place(calls, one.module)).sample for one in (model, again))
    assert torch.equal(ours, theirs) and ours.shape[-2:] == (8, 8), "a resumed model takes images too"


def test_low_rank_changes_are_of_layers_that_are_called(tmp_path):
    model = open_model(ModelRef(id=str(save_denoiser(HUNYUAN, tmp_path / "model"))), progress=QUIET)
    task = task_for(model)
    texts = {name: value for name, value in embeddings_of(HUNYUAN).items() if not name.startswith("neg")}
    conditions = {
        "encoder_hidden_states": texts["prompt_embeds"],
        "text_embedding_mask": texts["prompt_attention_mask"],
        "encoder_hidden_states_t5": texts["prompt_embeds_2"],
        "text_embedding_mask_t5": texts["prompt_attention_mask_2"],
    }
    noised = task.draw(torch.randn(2, 4, 8, 8), conditions, torch.Generator().manual_seed(0))
    with low_rank(model.module, rank=2, alpha=None, seed=0) as learned:
        output = model.module(**place(noised.call, model.module), return_dict=False)[0]
        task.loss(output, noised).backward()
        assert all(item.grad is not None for item in learned.values())
        assert not any(".pooler." in name for name in learned)
        assert sum(item.numel() for item in learned.values()) == low_rank_parameters(model.module, 2)
