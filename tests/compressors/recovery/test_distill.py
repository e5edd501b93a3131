"""The stage that trains denoisers, on tiny ones from which blocks were removed."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from compress.calibration.diffusion_loss import task_for
from compress.calibration.sampler import place
from compress.compressors.base import Workspace
from compress.compressors.recovery.denoising import Distillation, watched
from compress.compressors.recovery.distill import Distill
from compress.compressors.recovery.matching import matched_blocks
from compress.compressors.recovery.noised import NoisedBatches
from compress.compressors.recovery.tied import tied_embedders
from compress.errors import PlanError, SourceError
from compress.models.open import read_spec
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import ModelRef
from pydantic import ValidationError
from safetensors.torch import save_file

from ...small_dits import Told, equal_embedders, opened, recorded, same_state, state_of

DATA = {"generate": 48, "steps": 2, "guidance_scale": 1.0, "batch_size": 48}
EMBEDDER = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"


def given(**changes):
    return MaskedDistillSettings.model_validate(
        {"steps": 12, "batch_size": 8, "lr": 2e-3, "checkpoint_every": 5, "ema": 0.9, **changes}
    )


@pytest.fixture
def folder(make_tiny):
    """A DiT of six blocks whose copies of the embedder are equal, as trained ones are."""
    return equal_embedders(make_tiny(num_layers=6, name="six"))


@pytest.fixture
def prepared(folder, tmp_path):
    """Return `prepared(data=DATA, groups="1:2") -> (pruned model, calibration, workspace)`."""

    def make(data=DATA, path=folder, kept=(0, 3, 4), name="stage"):
        model = opened(path)
        calibration = recorded(model, tmp_path / "cache", data)
        calibration.training(model, None, SilentProgress()) if data else None
        if kept:
            keep_blocks(model, {"transformer_blocks": kept}, {"method": "test", "groups": "1:2"})
        (tmp_path / name).mkdir(exist_ok=True)
        return model, calibration, Workspace(tmp_path / name, tmp_path, original=lambda: opened(path))

    return make


def apply(model, calibration, workspace, settings, progress=None):
    return Distill().apply(model, settings, calibration, workspace, progress or SilentProgress())


def distance(model, path):
    """Mean square between a model's and the original's predictions, on noise that is not trained on."""
    original, task = opened(path), task_for(model)
    latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(77))
    noised = task.draw(latents, {"class_labels": torch.arange(32) % 10}, torch.Generator().manual_seed(78))
    with torch.no_grad():
        ours, theirs = (one.module(**place(noised.call, one.module)).sample for one in (model, original))
    return (ours[:, :4] - theirs[:, :4]).square().mean().item()


def test_the_pruned_model_comes_nearer_to_the_original(prepared, folder, tmp_path):
    values = torch.randn(48, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    save_file({"latents": values, "labels": torch.arange(48) % 10}, tmp_path / "mine.safetensors")
    model, calibration, workspace = prepared({"latents": tmp_path / "mine.safetensors"})
    before, names = distance(model, folder), list(model.module.state_dict())
    details = apply(model, calibration, workspace, given(steps=60, batch_size=16, ema=None))
    assert distance(model, folder) < 0.8 * before
    assert set(details) == {"steps", "loss", "lr", "seconds", "data", "matched"}
    assert details["data"] == 48 and details["steps"] == 60
    assert details["matched"] == {"transformer_blocks": [[0, 1], [1, 3], [2, 5]]}
    assert list(model.module.state_dict()) == names
    assert not model.module.training and not any(item.requires_grad for item in model.module.parameters())
    rates = [rate for _, rate in details["lr"]]
    assert rates[0] == pytest.approx(2e-3) and rates[-1] == pytest.approx(1e-4, rel=0.05)


def test_the_teacher_answers_the_very_same_call(prepared):
    model, calibration, workspace = prepared()
    task, teacher = task_for(model), workspace.original().module
    data = calibration.training(model, workspace.original, SilentProgress())
    batches = NoisedBatches(data, task, 40, 3)
    learner = Distillation(model.module, given(answers=1, denoising=0, features=0), batches, task, 1, teacher)
    calls = {"ours": [], "theirs": []}
    for name, module in (("ours", model.module), ("theirs", teacher)):
        module.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: calls[name].append(kwargs), with_kwargs=True
        )
    loss, shown = learner.loss(learner.batch(0, 0, 1))
    (ours,), (theirs,) = calls["ours"], calls["theirs"]
    assert ours.keys() == theirs.keys() == {"hidden_states", "timestep", "class_labels", "return_dict"}
    assert all(
        torch.equal(ours[name], theirs[name]) for name in ("hidden_states", "timestep", "class_labels")
    )
    assert (ours["class_labels"] == 10).any() and shown == {}
    _, noised = learner.batch(0, 0, 1)
    with torch.no_grad():
        expected = task.distillation_loss(
            *(one(**place(noised.call, one)).sample for one in (model.module, teacher)), noised
        )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_module_drops_no_label_of_its_own(prepared, monkeypatch):
    from diffusers.models.embeddings import LabelEmbedding

    def token_drop(self, labels, force_drop_ids=None):
        raise AssertionError("the module dropped labels")

    monkeypatch.setattr(LabelEmbedding, "token_drop", token_drop)
    model, calibration, workspace = prepared()
    apply(model, calibration, workspace, given(steps=2))
    with pytest.raises(AssertionError, match="dropped labels"):
        example = model.family.example_inputs(model.module, 1, torch.Generator())
        model.module.train()(**example)


def test_the_loss_is_the_weighted_sum_of_its_terms(prepared):
    details = {
        name: apply(*prepared(name=name), given(steps=1, **weights))
        for name, weights in {
            "answers": {"answers": 2.0, "denoising": 0, "features": 0},
            "denoising": {"answers": 0, "denoising": 0.5, "features": 0},
            "features": {"answers": 0, "denoising": 0, "features": 0.25},
            "all": {"answers": 2.0, "denoising": 0.5, "features": 0.25},
        }.items()
    }
    losses = {name: one["loss"][0][1] for name, one in details.items()}
    assert all(value > 0 for value in losses.values())
    assert losses["all"] == pytest.approx(sum(losses.values()) - losses["all"], rel=1e-4)


def test_features_count_less_from_step_to_step(prepared):
    model, calibration, workspace = prepared()
    data = calibration.training(model, workspace.original, SilentProgress())
    task, teacher = task_for(model), workspace.original().module
    pairs = matched_blocks(model.spec.config, model.attachments["depth.json"])
    settings = given(answers=0.5, denoising=0, features=0.4)
    learner = Distillation(
        model.module, settings, NoisedBatches(data, task, 8, 3), task, 5, teacher, pairs=pairs
    )
    with watched(model.module, teacher, model.config["_class_name"], pairs) as (ours, theirs):
        learner.ours, learner.theirs = ours, theirs
        for step, weight in enumerate((0.4, 0.3, 0.2, 0.1, 0.0)):
            loss, shown = learner.loss(learner.batch(step, 0, 1))
            expected = 0.5 * shown["answers"] + weight * shown["features"]
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and shown["features"] > 0


def test_what_is_drawn_does_not_depend_on_parts_or_steps_before(prepared):
    model, calibration, workspace = prepared()
    data = calibration.training(model, workspace.original, SilentProgress())
    batches = NoisedBatches(data, task_for(model), 8, 3)
    whole, parts = batches(5, 0, 1), [NoisedBatches(data, task_for(model), 8, 3)(5, i, 4) for i in range(4)]
    assert torch.equal(torch.cat([part.noisy for part in parts]), whole.noisy)
    labels = torch.cat([part.call["class_labels"] for part in parts])
    assert torch.equal(labels, whole.call["class_labels"])
    assert not torch.equal(batches(6, 0, 1).noise, whole.noise)
    assert not torch.equal(NoisedBatches(data, task_for(model), 8, 4)(5, 0, 1).noise, whole.noise)


def test_a_killed_training_ends_with_the_same_bytes(prepared):
    whole, calibration, workspace = prepared()
    apply(whole, calibration, workspace, given())
    model, calibration, workspace = prepared(name="killed")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        apply(model, calibration, workspace, given(), Told(stop_at=8))
    model, calibration, workspace = prepared(name="killed")
    assert same_state(model, before)
    apply(model, calibration, workspace, given(), told := Told())
    assert any("goes on after step 5" in note for note in told.notes)
    assert same_state(model, whole.module.state_dict())


def test_a_training_does_not_go_on_with_the_state_of_another_seed(prepared):
    model, calibration, workspace = prepared(name="killed")
    with pytest.raises(KeyboardInterrupt):
        apply(model, calibration, workspace, given(), Told(stop_at=8))
    model, calibration, workspace = prepared(name="killed")
    apply(model, replace(calibration, seed=calibration.seed + 1), workspace, given(), told := Told())
    assert not any("goes on" in note for note in told.notes)


def test_copies_of_the_embedder_stay_equal_and_their_own(prepared, folder, tmp_path):
    model, calibration, workspace = prepared()
    before = model.module.get_parameter(EMBEDDER.format(0)).clone()
    apply(model, calibration, workspace, given(steps=3))
    copies = [model.module.get_parameter(EMBEDDER.format(index)) for index in range(3)]
    assert not torch.equal(copies[0], before)
    assert all(torch.equal(copy, copies[0]) for copy in copies[1:])
    assert len({copy.data_ptr() for copy in copies}) == 3
    model.module.save_pretrained(tmp_path / "saved")  # refuses tensors under two names
    assert model.size().parameters < model.size().parameters_stored


def test_copies_that_differ_are_not_tied(make_tiny):
    model = opened(make_tiny(name="untied"))
    first, second = (model.module.get_parameter(EMBEDDER.format(index)) for index in range(2))
    assert not torch.equal(first, second)
    expected = second.clone()
    with tied_embedders(model.module, model.config["_class_name"]):
        assert len(dict(model.module.named_parameters())) == len(model.module.state_dict()) - _buffers(model)
    assert torch.equal(model.module.get_parameter(EMBEDDER.format(1)), expected)


def _buffers(model):
    return sum(1 for name in model.module.state_dict() if name not in dict(model.module.named_parameters()))


def test_data_of_one_s_own(prepared, tmp_path):
    values = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10)
    save_file({"latents": values, "labels": labels}, tmp_path / "mine.safetensors")
    model, calibration, workspace = prepared({"latents": tmp_path / "mine.safetensors"})
    assert apply(model, calibration, workspace, given(steps=None, epochs=2.0))["steps"] == 3
    model, calibration, workspace = prepared(None)
    with pytest.raises(SourceError, match="names nothing to train on"):
        apply(model, calibration, workspace, given())


def test_one_pass_over_the_data_is_finite(prepared):
    """The weight of the features falls with the steps: with the passes it would be divided by nothing."""
    model, calibration, workspace = prepared()
    details = apply(model, calibration, workspace, given(steps=None, epochs=1.0))
    assert details["steps"] >= 2 and len(details["loss"]) == details["steps"]
    assert all(math.isfinite(loss) for _, loss in details["loss"])
    assert all(bool(item.isfinite().all()) for item in model.module.parameters())


def test_weights_of_half_size_are_trained_in_full_size(prepared, make_tiny):
    path = make_tiny(num_layers=4, dtype="bfloat16", name="half")
    model, calibration, workspace = prepared(path=path, kept=(0, 2))
    before = state_of(model)
    details = apply(model, calibration, workspace, given(steps=3, precision="bfloat16", mask="exclude"))
    after = state_of(model)
    assert all(value.dtype == before[name].dtype for name, value in after.items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.tensor(loss).isfinite() for _, loss in details["loss"])


def test_plain_fine_tuning_needs_no_original(prepared):
    model, calibration, workspace = prepared()
    alone = Workspace(workspace.folder, workspace.shared)
    plain = given(steps=3, answers=0, denoising=1, features=0)
    assert "matched" not in apply(model, calibration, alone, plain)
    with pytest.raises(PlanError, match="the original is not at hand"):
        apply(model, calibration, alone, given())


def test_a_pruned_checkpoint_learns_from_another_one(prepared, folder, tmp_path):
    pruned, _, _ = prepared()
    path = tmp_path / "pruned"
    pruned.module.save_pretrained(path)
    shutil.copytree(folder / "scheduler", path / "scheduler")
    named = given(steps=2, teacher=str(folder))
    with pytest.raises(PlanError, match="it is its own original"):
        apply(*prepared(path=path, kept=()), given(steps=2))
    with pytest.raises(PlanError, match="nothing says which of these blocks"):
        apply(*prepared(path=path, kept=()), named)
    assert "matched" not in apply(
        *prepared(path=path, kept=()), given(steps=2, teacher=str(folder), features=0)
    )
    (path / "depth.json").write_text(pruned.attachments["depth.json"])
    model, calibration, workspace = prepared(path=path, kept=())
    details = apply(model, calibration, workspace, named, told := Told())
    (warning,) = told.warnings
    assert f"are drawn by {path}, which has lost blocks, and not by {folder}" in warning
    assert details["matched"] == {"transformer_blocks": [[0, 1], [1, 3], [2, 5]]}
    pruned, calibration, workspace = prepared(name="other")
    expected = apply(pruned, calibration, workspace, given(steps=2), told := Told())
    assert told.warnings == []
    assert details["loss"][0] != expected["loss"][0]  # what is drawn as data is of another original
    spec = read_spec(ModelRef(id=str(path)))
    assert any(str(folder) in note for note in Distill().plan(spec, named).notes)


def test_a_teacher_of_another_kind_is_refused(prepared, make_tiny):
    wide = make_tiny(num_attention_heads=2, num_layers=3, name="narrow")
    large = make_tiny(sample_size=16, num_layers=3, name="large")
    model, calibration, workspace = prepared()
    with pytest.raises(PlanError, match="has sample_size 16, the model has 8"):
        apply(model, calibration, workspace, given(teacher=str(large)))
    with pytest.raises(PlanError, match="has num_attention_heads 2, the model has 4"):
        apply(model, calibration, workspace, given(teacher=str(wide)))
    apply(model, calibration, workspace, given(steps=2, teacher=str(wide), features=0))


@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_other_denoisers_learn_as_well(prepared, make_tiny, tmp_path, class_name):
    path = make_tiny(class_name, num_layers=3, name="other")
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(8, 6, 32, generator=generator)
    tensors = {"latents": torch.randn(8, 4, 8, 8, generator=generator), "prompt_embeds": embeds}
    prompt = {"prompt_embeds": embeds[:1].clone()}
    if class_name.startswith("PixArt"):
        tensors["prompt_attention_mask"] = torch.ones(8, 6)
        prompt["prompt_attention_mask"] = torch.ones(1, 6)
    else:
        tensors["pooled_prompt_embeds"] = torch.randn(8, 32, generator=generator)
        prompt["pooled_prompt_embeds"] = torch.randn(1, 32, generator=generator)
    save_file(tensors, tmp_path / "mine.safetensors")
    save_file(prompt, tmp_path / "prompt.safetensors")
    model = opened(path)
    data, prompts = {"latents": tmp_path / "mine.safetensors"}, tmp_path / "prompt.safetensors"
    calibration = recorded(model, tmp_path / "cache", data, embeddings=prompts)
    keep_blocks(model, {"transformer_blocks": (0, 2)}, {"method": "test"})
    (tmp_path / "stage").mkdir()
    workspace = Workspace(tmp_path / "stage", tmp_path, original=lambda: opened(path))
    details = apply(model, calibration, workspace, given(steps=40, lr=1e-3))
    assert details["matched"] == {"transformer_blocks": [[0, 1], [1, 2]]}
    losses = [loss for _, loss in details["loss"]]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_plan_counts_the_original_beside_it(folder):
    spec = read_spec(ModelRef(id=str(folder)))
    whole = Distill().plan(spec, given())
    plain = Distill().plan(spec, given(answers=0, denoising=1, features=0))
    assert whole.peak_memory_bytes - plain.peak_memory_bytes == spec.size().bytes
    assert whole.spec is spec and whole.disk_bytes > 0
    assert any("the original answers beside it" in note for note in whole.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": 0, "denoising": 0, "features": 0}, "nothing to learn"),
        ({"features": 0, "mask": "none"}, "mask has no effect with features: 0"),
        ({"answers": 0, "features": 0, "teacher": "x"}, "teacher has no effect"),
        ({"mask": "none", "sigmas": 3.0}, "sigmas has no effect with mask: none"),
        ({"epochs": 1.0}, "steps or epochs"),
        ({"min_lr": 1.0}, "above lr"),
    ],
)
def test_settings_that_have_no_effect_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        given(**changes)


@pytest.mark.parametrize("changes", [{}, {"features": 0}, {"mask": "none"}, {"answers": 0, "features": 0}])
def test_settings_as_a_report_has_them_are_valid(changes):
    settings = given(**changes)
    assert MaskedDistillSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_a_quantized_model_is_refused(tiny_dit, open_quantized, prepared):
    model = open_quantized(tiny_dit, {"*.attn1.to_q": {}})
    _, calibration, workspace = prepared()
    with pytest.raises(PlanError, match="rounded weights cannot be trained"):
        apply(model, calibration, workspace, given())
