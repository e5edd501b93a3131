"""Whom a denoiser learns from: what is refused, and that nothing is drawn or read before it is."""

import json
import shutil

import pytest
from compress.calibration.diffusion import DiffusionCalibration
from compress.compressors.base import Workspace
from compress.compressors.recovery.distill import Distill
from compress.compressors.recovery.teacher import named_teacher
from compress.errors import PlanError
from compress.models.open import read_spec
from compress.models.origins import NAME
from compress.models.shallower import keep_blocks, shallower_spec
from compress.progress import SilentProgress
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import ModelRef

from ...small_dits import DIT, LIST, opened
from ...tiny_denoisers import FLUX, HUNYUAN, save_denoiser

PIXART, SD3 = "PixArtTransformer2DModel", "SD3Transformer2DModel"


class DataAsked(Exception):
    """Data were asked for."""


class Undrawn(DiffusionCalibration):
    """A calibration whose data take too long."""

    def training(self, model, original, progress):
        raise DataAsked


def given(teacher=None, **changes):
    named = {} if teacher is None else {"teacher": str(teacher)}
    return MaskedDistillSettings.model_validate({"steps": 2, "batch_size": 4, **named, **changes})


def apply(model, settings, tmp_path, original=None):
    """Begin the stage; `DataAsked` says that nothing was refused before the data."""
    calibration = Undrawn(seed=0, key="", files=(), guided=False, samples=0)
    workspace = Workspace(tmp_path, tmp_path, original=original)
    return Distill().apply(model, settings, calibration, workspace, SilentProgress())


def plan(folder, settings):
    return Distill().plan(read_spec(ModelRef(id=str(folder))), settings)


def with_scheduler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("class_name", "change", "message"),
    [
        (DIT, {"num_embeds_ada_norm": 7}, "has num_embeds_ada_norm 7, the model has 10"),
        (PIXART, {"caption_channels": 24}, "has caption_channels 24, the model has 32"),
        (PIXART, {"use_additional_conditions": True}, "has use_additional_conditions True, the model has"),
        (SD3, {"joint_attention_dim": 48}, "has joint_attention_dim 48, the model has 32"),
        (SD3, {"pooled_projection_dim": 48}, "has pooled_projection_dim 48, the model has 32"),
    ],
)
def test_a_teacher_that_is_conditioned_on_something_else(class_name, change, message, make_tiny, tmp_path):
    folder, teacher = make_tiny(class_name), make_tiny(class_name, name="teacher", **change)
    with pytest.raises(PlanError, match=message):
        plan(folder, given(teacher))
    with pytest.raises(PlanError, match=message):
        apply(opened(folder), given(teacher), tmp_path)


@pytest.mark.parametrize(
    ("class_name", "change", "message"),
    [
        (DIT, {"prediction_type": "v_prediction"}, "predicts v_prediction, the model epsilon"),
        (
            DIT,
            {"beta_schedule": "squaredcos_cap_v2"},
            "was trained on another schedule of noise: at timestep",
        ),
        (DIT, {"beta_end": 0.012}, "was trained on another schedule of noise: at timestep 999"),
        (DIT, {"num_train_timesteps": 500}, "was trained with 500 timesteps, the model with 1000"),
        (SD3, {"shift": 1.0}, "has another shift of the noise: 1, the model 3"),
        (SD3, {"num_train_timesteps": 500}, "has another number of timesteps: 500, the model 1000"),
    ],
)
def test_a_teacher_of_other_noise(class_name, change, message, make_tiny, tmp_path):
    folder = make_tiny(class_name)
    teacher = make_tiny(class_name, name="teacher", seed=1)
    with pytest.raises(DataAsked):
        apply(opened(folder), given(teacher), tmp_path)
    with_scheduler(teacher, **change)
    with pytest.raises(PlanError, match=message):
        plan(folder, given(teacher))
    with pytest.raises(PlanError, match=message):
        apply(opened(folder), given(teacher), tmp_path)


@pytest.mark.parametrize(
    ("class_name", "config", "scheduler", "message"),
    [
        (FLUX, {"pooled_projection_dim": 48}, {}, "has pooled_projection_dim 48, the model has 20"),
        (FLUX, {}, {"base_shift": 0.6}, "has another shift of the noise: "),
        (FLUX, {}, {"max_shift": 1.3}, "has another shift of the noise: "),
        (HUNYUAN, {"cross_attention_dim": 48}, {}, "has cross_attention_dim 48, the model has 12"),
        (HUNYUAN, {"text_len": 9}, {}, "has text_len 9, the model has 3"),
        (HUNYUAN, {}, {"beta_end": 0.03}, "was trained on another schedule of noise"),
    ],
)
def test_teachers_of_large_models(class_name, config, scheduler, message, tmp_path):
    folder = save_denoiser(class_name, tmp_path / "model")
    teacher = save_denoiser(class_name, tmp_path / "teacher", seed=1)
    assert plan(folder, given(teacher)).notes
    shutil.rmtree(teacher)
    with_scheduler(save_denoiser(class_name, teacher, seed=1, **config), **scheduler)
    with pytest.raises(PlanError, match=message):
        plan(folder, given(teacher))


def test_other_samplers_of_the_same_noise_are_no_difference(make_tiny, tmp_path):
    folder, teacher = make_tiny(), make_tiny(name="teacher", seed=1)
    with_scheduler(teacher, _class_name="DDPMScheduler", timestep_spacing="trailing", clip_sample=True)
    assert plan(folder, given(teacher)).peak_memory_bytes
    with pytest.raises(DataAsked):
        apply(opened(folder), given(teacher), tmp_path)


def test_a_teacher_without_a_scheduler_has_the_usual_one(make_tiny):
    folder, teacher = make_tiny(), make_tiny(name="teacher", seed=1)
    shutil.rmtree(teacher / "scheduler")
    plan(folder, given(teacher))
    with pytest.raises(PlanError, match="predicts epsilon.*it comes without a scheduler: the usual one"):
        plan(with_scheduler(folder, prediction_type="v_prediction"), given(teacher))


def test_the_model_itself_is_no_teacher(make_tiny, tmp_path):
    folder = make_tiny(num_layers=4)
    copy = shutil.copytree(folder, tmp_path / "copy")
    message = "is the model itself, and no stage has changed it"
    with pytest.raises(PlanError, match=message):
        apply(opened(folder), given(f"{folder}/../{folder.name}"), tmp_path)
    with pytest.raises(PlanError, match="it is its own original"):
        apply(opened(folder), given(), tmp_path, lambda: opened(folder))
    model = opened(folder)
    keep_blocks(model, {LIST: (0, 2)}, {"method": "test"})
    for teacher in (folder, copy):
        with pytest.raises(DataAsked):
            apply(model, given(teacher), tmp_path)


def test_a_copy_of_the_model_is_no_teacher_either(make_tiny, tmp_path):
    folder = make_tiny()
    copy, other = shutil.copytree(folder, tmp_path / "copy"), make_tiny(name="other", seed=1)
    with pytest.raises(PlanError, match="copy is the model itself"):
        named_teacher(opened(folder), given(copy), SilentProgress())
    assert named_teacher(opened(folder), given(other), SilentProgress()).source.folder == other


@pytest.fixture
def shallow(make_tiny, tmp_path):
    """(folder of a DiT of two blocks, that of the four it comes from)."""
    folder = make_tiny(num_layers=4, name="four")
    model = opened(folder)
    keep_blocks(model, {LIST: (0, 2)}, {"method": "test"})
    path = tmp_path / "two"
    model.module.save_pretrained(path)
    shutil.copytree(folder / "scheduler", path / "scheduler")
    (path / NAME).write_text(model.attachments[NAME])
    return path, folder


def test_unknown_blocks_are_refused_before_data_are_drawn(shallow, tmp_path):
    path, teacher = shallow
    with pytest.raises(DataAsked):
        apply(opened(path), given(teacher), tmp_path)
    assert plan(path, given(teacher)).notes
    (path / NAME).unlink()
    with pytest.raises(PlanError, match=r"has 4 transformer_blocks, and nothing says .* the model's 2 "):
        apply(opened(path), given(teacher), tmp_path)
    with pytest.raises(PlanError, match="nothing says which of these blocks") as caught:
        plan(path, given(teacher))
    assert NAME in caught.value.hint
    assert plan(path, given(teacher, features=0)).notes
    with pytest.raises(DataAsked):
        apply(opened(path), given(teacher, features=0), tmp_path)


def test_a_plan_knows_what_stages_before_it_remove(shallow, make_tiny):
    path, four = shallow
    spec = read_spec(ModelRef(id=str(path)))
    one = shallower_spec(spec, {LIST: (1,)})
    for teacher in (path, four, make_tiny(num_layers=1, name="one")):
        assert Distill().plan(one, given(teacher)).notes
    with pytest.raises(PlanError, match="nothing says which of these blocks the model's 1 "):
        Distill().plan(one, given(make_tiny(num_layers=3, name="three")))


def test_an_original_that_is_not_at_hand_is_told_before_data_are_drawn(make_tiny, tmp_path):
    model = opened(make_tiny(num_layers=4))
    keep_blocks(model, {LIST: (0, 2)}, {"method": "test"})
    with pytest.raises(PlanError, match="the original is not at hand"):
        apply(model, given(), tmp_path)
