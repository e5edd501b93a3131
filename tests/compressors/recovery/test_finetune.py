"""The stage: on a checkpoint of the stock class, with images in files."""

import shutil
from dataclasses import replace

import pytest
import torch
from compress.calibration.classification import NoImages
from compress.calibration.recording import record
from compress.compressors.activations import activation_bytes
from compress.compressors.base import Workspace
from compress.compressors.recovery.details import MAX_POINTS, training_details
from compress.compressors.recovery.finetune import Finetune
from compress.compressors.recovery.loop import Trained
from compress.compressors.recovery.memory import training_bytes
from compress.errors import PlanError
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...calibration.image_folders import by_class


class _Told(SilentProgress):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def place(vit, tmp_path):
    """Return `place(dtype="float32", **vit)`: the folder of a tiny ViT."""

    def make(dtype="float32", **given):
        folder = tmp_path / "vit"
        vit(**given).to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def image_file(images, tmp_path):
    """Return `image_file(labelled=True, name="images", **images)`: a file of images as uint8."""

    def make(labelled=True, name="images", **given):
        data = images(**given)
        pixels = (data.values * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        tensors = {"pixels": pixels, **({"labels": data.labels} if labelled else {})}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return make


@pytest.fixture
def opened(tmp_path):
    """Return `opened(folder, images) -> (model, calibration, workspace)`."""

    def make(folder, images):
        def original():
            return open_model(ModelRef(id=str(folder)), progress=SilentProgress())

        model = original()
        given = CalibrationSettings(images=images, samples=4)
        calibration = record(model, given, seed=0, cache=None, progress=SilentProgress())
        (tmp_path / "stage").mkdir(exist_ok=True)
        return model, calibration, Workspace(tmp_path / "stage", tmp_path, original=original)

    return make


def _accuracy(model, images):
    return (
        (model.module(pixel_values=images.pixels(range(len(images)))).logits.argmax(-1) == images.labels)
        .float()
        .mean()
    )


def test_a_classifier_learns_its_labels(place, image_file, opened, settings):
    model, calibration, workspace = opened(place(), image_file(count=40))
    shapes = {name: item.shape for name, item in model.module.state_dict().items()}
    training = calibration.training()
    assert len(training) == 32  # a fifth is held out
    before = _accuracy(model, training)
    given = settings(epochs=15, lr=1e-2, augment=[])
    details = Finetune().apply(model, given, calibration, workspace, SilentProgress())
    assert _accuracy(model, training) > max(0.95, before)
    assert details["steps"] == 60 and details["images"] == 32
    assert set(details) == {"steps", "loss", "lr", "images", "skipped", "held_out", "seconds"}
    assert details["seconds"]["per_step"] > 0 and details["skipped"] == details["held_out"] == 0
    assert details["loss"][0][0] == 1 and details["loss"][-1][0] == 60
    assert {name: item.shape for name, item in model.module.state_dict().items()} == shapes
    assert not model.surgery and not any(item.requires_grad for item in model.module.parameters())


def test_images_of_another_place_are_trained_on(place, image_file, opened, settings):
    model, calibration, workspace = opened(place(), image_file(count=10))
    given = settings(steps=2, images=image_file(count=17, name="more", seed=1))
    assert Finetune().apply(model, given, calibration, workspace, SilentProgress())["images"] == 17


def test_images_that_are_held_out_are_counted_and_not_trained_on(place, image_file, opened, settings):
    """Noise of one seed: the first ten of the 17 are those of the calibration, of which two are held out."""
    first, more = image_file(count=10), image_file(count=17, name="more")
    one, two = (load_file(path)["pixels"] for path in (first, more))
    more_pixels = torch.cat([one, two[10:]])
    save_file({"pixels": more_pixels, "labels": torch.arange(17) % 3}, more)
    model, calibration, workspace = opened(place(), first)
    told = _Told()
    details = Finetune().apply(model, settings(steps=2, images=more), calibration, workspace, told)
    assert (details["images"], details["held_out"]) == (15, 2)
    assert told.warnings == [f"{more}: 2 images are held out for measuring and left out here"]


@pytest.fixture
def folder(tmp_path):
    """30 images below train/, two of them broken, and three below test/."""
    by_class(tmp_path / "files" / "train", ["0", "1", "2"], 10)
    by_class(tmp_path / "files" / "test", ["0", "1", "2"], 1, seed=1)
    for name in ("0/004.png", "2/007.png"):
        (tmp_path / "files" / "train" / name).write_bytes(b"broken")
    return tmp_path / "files"


def test_training_images_that_cannot_be_read_are_counted_and_told(place, opened, settings, folder):
    """The calibration looks at four images, and has told of the held-out one; the training looks at all."""
    shutil.copy(folder / "test" / "1" / "000.png", folder / "train" / "1" / "copy.png")
    model, calibration, workspace = opened(place(), folder)
    told = _Told()
    details = Finetune().apply(model, settings(steps=1), calibration, workspace, told)
    assert (details["images"], details["skipped"], details["held_out"]) == (28, 2, 1)
    [warning] = told.warnings
    assert warning.startswith(f"{folder}: 2 files cannot be read and are left out, the first is ")


def test_and_so_are_those_of_another_place(place, opened, settings, folder, image_file):
    model, calibration, workspace = opened(place(), image_file())
    told = _Told()
    given = settings(steps=1, images=folder / "train")
    details = Finetune().apply(model, given, calibration, workspace, told)
    assert (details["images"], details["skipped"]) == (28, 2)
    assert told.warnings[0].startswith(f"{folder / 'train'}: 2 files cannot be read")
    assert "cannot be compared with rows" in told.notes[-1]


def test_a_place_of_its_own_is_enough(place, opened, settings, folder):
    model, calibration, workspace = opened(place(), None)
    assert isinstance(calibration, NoImages)
    given = settings(steps=1, images=folder / "train")
    details = Finetune().apply(model, given, calibration, workspace, SilentProgress())
    assert (details["images"], details["skipped"], details["held_out"]) == (28, 2, 0)
    with pytest.raises(PlanError, match="no images to train on"):
        Finetune().apply(model, settings(steps=1), calibration, workspace, SilentProgress())


@pytest.mark.parametrize("changed", ["weights", "original", "images", "settings"])
def test_a_state_of_another_training_is_not_taken_up(changed, place, image_file, opened, settings):
    """A killed training is gone on with only where everything that it depends on is the same."""
    source, file = place(), image_file()
    given = settings(steps=3, checkpoint_every=2)

    def told_by(settings_now):
        model, calibration, workspace = opened(source, file)
        if changed == "weights" and settings_now is None:
            with torch.no_grad():
                model.module.classifier.bias.add_(1.0)
        if changed == "original" and settings_now is None:
            hashes = dict.fromkeys(model.source.hashes, "0" * 64)
            model.source = replace(model.source, hashes=hashes)
        told = _Told()
        Finetune().apply(model, settings_now or given, calibration, workspace, told)
        return told

    assert not told_by(given).notes
    assert "goes on after step 2 of 3" in told_by(given).notes[-1]
    if changed == "images":
        tensors = load_file(file)
        save_file(tensors | {"pixels": 255 - tensors["pixels"]}, file)
    told = told_by(settings(steps=3, checkpoint_every=2, lr=2e-2) if changed == "settings" else None)
    assert "the state of another training; the training starts over" in told.warnings[0]
    assert not any("goes on" in note for note in told.notes)


def test_a_model_in_bfloat16_stays_one(place, image_file, opened, settings):
    model, calibration, workspace = opened(place("bfloat16"), image_file())
    before = {name: item.clone() for name, item in model.module.state_dict().items()}
    Finetune().apply(model, settings(distill={"weight": 0.5}), calibration, workspace, SilentProgress())
    after = model.module.state_dict()
    assert {item.dtype for item in after.values()} == {torch.bfloat16}
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_the_original_is_not_changed_by_its_pupil(place, image_file, opened, settings):
    model, calibration, workspace = opened(place(), image_file(labelled=False))
    teacher = workspace.original()
    before = {name: item.clone() for name, item in teacher.module.state_dict().items()}
    given = settings(distill={"weight": 1.0})
    Finetune().apply(
        model, given, calibration, replace(workspace, original=lambda: teacher), SilentProgress()
    )
    assert all(torch.equal(item, before[name]) for name, item in teacher.module.state_dict().items())


def test_missing_labels_are_told_before_anything_changes(place, image_file, opened, settings):
    model, calibration, workspace = opened(place(), image_file(labelled=False))
    before = model.module.classifier.weight.clone()
    for given in (settings(), settings(distill={"weight": 0.9})):
        with pytest.raises(PlanError, match="no labels") as caught:
            Finetune().apply(model, given, calibration, workspace, SilentProgress())
        assert "weight: 1.0" in caught.value.hint
    assert torch.equal(model.module.classifier.weight, before)


def test_without_the_original_there_is_nothing_to_distill(place, image_file, opened, settings):
    model, calibration, workspace = opened(place(), image_file())
    with pytest.raises(PlanError, match="original is not at hand"):
        Finetune().apply(
            model, settings(distill={}), calibration, replace(workspace, original=None), SilentProgress()
        )


def test_a_quantized_model_is_refused_in_the_plan(place, settings):
    spec = read_spec(ModelRef(id=str(place())))
    with pytest.raises(PlanError, match="rounded weights cannot be trained"):
        Finetune().plan(spec.evolve(quantization={"classifier": None}), settings())


def test_the_plan_keeps_the_shapes_and_knows_the_disk(place, image_file, opened, settings):
    folder = place()
    model, calibration, workspace = opened(folder, image_file())
    given = settings(ema=0.9, steps=7, checkpoint_every=6)
    spec = read_spec(ModelRef(id=str(folder)))
    plan = Finetune().plan(spec, given)
    assert plan.after == plan.before == spec.size() and plan.spec is spec
    needed = training_bytes(spec, given)
    assert needed.weights == 4 * sum(item.numel() for item in model.module.parameters())
    assert needed.memory == 5 * needed.weights + needed.activations
    Finetune().apply(model, given, calibration, workspace, SilentProgress())
    [state] = workspace.folder.iterdir()
    with safe_open(state, framework="pt") as file:
        written = sum(file.get_tensor(name).nbytes for name in file.keys() if "/" in name)  # noqa: SIM118
    # Beside what is counted: a number per parameter, and its losses.
    assert written - 4 * len(list(model.module.parameters())) == plan.disk_bytes // 2
    assert "7 steps" in plan.notes[-1]
    with_teacher = Finetune().plan(spec, settings(ema=0.9, steps=7, distill={}))
    assert with_teacher.peak_memory_bytes - plan.peak_memory_bytes == spec.size().bytes


def test_activations_are_predicted_from_shapes(place, settings):
    spec = read_spec(ModelRef(id=str(place())))
    model = open_model(ModelRef(id=str(spec.source.folder)), progress=SilentProgress())
    module = model.module.train().requires_grad_(True)
    parameters = {item.untyped_storage().data_ptr() for item in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # the storage itself, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(pixel_values=torch.zeros(16, 3, 8, 8))
    real = sum(storage.nbytes() for storage in kept.values())
    assert output.logits.shape == (16, 3)
    found = activation_bytes(spec.meta_module().float().train(), spec.family)
    assert 16 * found == pytest.approx(real, rel=0.15)
    for precision, per_item in (("float32", found), ("bfloat16", found // 2)):
        asked = settings(precision=precision)
        items = asked.batch_size // asked.accumulate
        assert training_bytes(spec, asked).activations == items * per_item


def test_a_long_training_is_told_in_few_points():
    losses = [float(step % 2) for step in range(1001)]
    details = training_details(Trained(losses, [0.1] * 1001, 0, 0.5))
    assert details["steps"] == 1001 and len(details["loss"]) == len(details["lr"]) == MAX_POINTS
    assert details["loss"][-1][0] == 1001
    steps = [0, *(step for step, _ in details["loss"])]
    total = sum(
        value * (stop - start)
        for (_, value), start, stop in zip(details["loss"], steps, steps[1:], strict=False)
    )
    assert total == pytest.approx(sum(losses), rel=1e-3)
    assert training_details(Trained([2.0, 1.0], [0.1, 0.2], 0, 0.5))["loss"] == [[1, 2.0], [2, 1.0]]
