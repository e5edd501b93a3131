"""Training data that are made: samples of the original, images through a VAE, pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from compress.calibration.decoding import decode
from compress.calibration.diffusion import record
from compress.calibration.encoding import encoder_for, read_pixels
from compress.calibration.image_files import find_images
from compress.calibration.latent_cache import LatentCache
from compress.errors import SourceError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from PIL import Image
from safetensors.torch import load_file, save_file


class Counting(SilentProgress):
    """Counts what is done in each step."""

    def __init__(self):
        self.done, self.name = {}, ""

    def start(self, name, total):
        self.name = name
        self.done[name] = 0

    def advance(self, amount=1, note=""):
        self.done[self.name] += amount


def opened(folder):
    return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())


def recorded(model, cache, *, seed=0, **data):
    settings = CalibrationSettings.model_validate(
        {"samples": 1, "steps": 2, "batch_size": 4, "guidance_scale": 1.5, "data": data}
    )
    return record(model, settings, seed=seed, cache=cache, progress=SilentProgress())


def all_of(found):
    return found.batch(range(len(found)), torch.Generator().manual_seed(0))


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of three images, larger than what the models see."""
    rng = np.random.default_rng(0)
    for label in ("3", "7"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 256, (20 + 4 * index, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def with_vae(tiny_dit, tmp_path):
    """A pipeline folder: a tiny DiT of 8 x 8 latents, and a VAE that makes them of 16 x 16 pixels."""
    from diffusers import AutoencoderKL

    root = tmp_path / "pipeline"
    shutil.copytree(tiny_dit, root / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
            scaling_factor=0.5, shift_factor=0.25,
        )  # fmt: skip
    vae.save_pretrained(root / "vae")
    return root / "transformer"


def test_samples_are_drawn_once_and_found_again(tiny_dit, tmp_path):
    model = opened(tiny_dit)
    first, again = Counting(), Counting()
    found = recorded(model, tmp_path / "cache", generate=10, steps=3).training(model, None, first)
    assert first.done == {"drawing training samples": 3 * 3}  # three batches of four and less
    clean, conditions = all_of(found)
    assert clean.shape == (10, 4, 8, 8) and clean.isfinite().all()
    assert sorted(conditions["class_labels"].tolist()) == list(range(10))
    model = opened(tiny_dit)
    same = recorded(model, tmp_path / "cache", generate=10, steps=3).training(model, None, again)
    assert again.done == {} and same.key == found.key
    assert torch.equal(all_of(same)[0], clean)
    others = [
        {"generate": 9, "steps": 3},
        {"generate": 10, "steps": 2},
        {"generate": 10, "guidance_scale": 1},
    ]
    keys = {recorded(model, tmp_path / "cache", **one).training(model, None, again).key for one in others}
    assert len(keys | {found.key}) == 4
    by_seed = {recorded(model, tmp_path / "cache", seed=seed, generate=10).data.key for seed in (0, 1)}
    assert len(by_seed) == 2


def test_two_runs_at_once_keep_the_files_of_both_in_the_index(tmp_path):
    one, other = (LatentCache(tmp_path, "key", 600) for _ in range(2))
    (first, _), (second, _) = one.left()
    one.write(first, {"latents": torch.zeros(512, 1, 2, 2)})
    other.write(second, {"latents": torch.ones(88, 1, 2, 2)})
    other.write("conditions.safetensors", {"labels": torch.zeros(600)})
    one.write(second, {"latents": torch.ones(88, 1, 2, 2)})
    again = LatentCache(tmp_path, "key", 600)
    assert again.left() == [] and not again.missing("conditions.safetensors")


def test_an_index_that_cannot_be_read_is_written_anew(tmp_path):
    cache = LatentCache(tmp_path, "key", 600)
    (first, _), (second, _) = cache.left()
    cache.write(first, {"latents": torch.zeros(512, 1, 2, 2)})
    (tmp_path / "calibration-key" / "index.json").write_text("{")
    cache.write(second, {"latents": torch.zeros(88, 1, 2, 2)})
    assert LatentCache(tmp_path, "key", 600).left() == []


def test_what_a_recording_depends_on_is_not_the_training_data(tiny_dit, tmp_path):
    model = opened(tiny_dit)
    settings = CalibrationSettings(samples=1, steps=2, batch_size=4, guidance_scale=1.5)
    plain = record(model, settings, seed=0, cache=tmp_path, progress=SilentProgress())
    assert plain.key == recorded(model, tmp_path, generate=10).key
    with pytest.raises(SourceError, match="names nothing to train on"):
        plain.training(model, None, SilentProgress())


def test_a_damaged_file_is_drawn_again(tiny_dit, tmp_path):
    model = opened(tiny_dit)
    calibration = recorded(model, tmp_path, generate=5)
    clean, _ = all_of(calibration.training(model, None, SilentProgress()))
    (path,) = tmp_path.rglob("latents-00000.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    progress = Counting()
    assert torch.equal(all_of(calibration.training(model, None, progress))[0], clean)
    assert progress.done


def test_samples_are_of_the_original(tiny_dit, make_tiny, tmp_path):
    model, changed = opened(tiny_dit), opened(tiny_dit)
    expected, _ = all_of(recorded(model, None, generate=3).training(model, None, SilentProgress()))
    calibration = recorded(changed, tmp_path, generate=3)
    with torch.no_grad():
        changed.module.proj_out_2.weight.zero_()
    changed.history.append("a stage")
    with pytest.raises(StageError, match="samples of the original are missing"):
        calibration.training(changed, None, SilentProgress())
    found = calibration.training(changed, lambda: opened(tiny_dit), SilentProgress())
    assert torch.equal(all_of(found)[0], expected)
    again = calibration.training(changed, None, SilentProgress())  # they are there already
    assert again.key == found.key


def test_samples_are_not_those_that_figures_are_measured_on(tiny_dit, tmp_path):
    model = opened(tiny_dit)
    calibration = recorded(model, tmp_path, generate=1)
    (measured, _) = next(iter(calibration.clean()))
    clean, _ = all_of(calibration.training(model, None, SilentProgress()))
    assert not torch.allclose(clean[0], measured[0], atol=1e-2)


def test_prompts_are_kept_once_with_the_samples(tiny_sd3, tmp_path):
    generator = torch.Generator().manual_seed(0)
    embeds, pooled = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 32, generator=generator)
    save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, tmp_path / "e.safetensors")
    model = opened(tiny_sd3)
    settings = CalibrationSettings.model_validate(
        {"samples": 1, "steps": 2, "guidance_scale": 1.0, "embeddings": tmp_path / "e.safetensors",
         "data": {"generate": 5}}
    )  # fmt: skip
    calibration = record(model, settings, seed=0, cache=tmp_path, progress=SilentProgress())
    clean, conditions = all_of(calibration.training(model, None, SilentProgress()))
    assert clean.shape == (5, 4, 8, 8)
    assert torch.equal(conditions["encoder_hidden_states"], embeds[[0, 1, 0, 1, 0]])
    assert torch.equal(conditions["pooled_projections"], pooled[[0, 1, 0, 1, 0]])


def test_latents_cannot_be_mirrored_where_images_are_not_at_hand(tiny_dit):
    model = opened(tiny_dit)
    with pytest.raises(SourceError, match=r"calibration\.data\.flip"):
        recorded(model, None, generate=2, flip=True).training(model, None, SilentProgress())


def test_images_go_through_the_vae_beside_the_model(with_vae, image_folder, tmp_path):
    from diffusers import AutoencoderKL

    model = opened(with_vae)
    progress = Counting()
    found = recorded(model, tmp_path, images=image_folder).training(model, None, progress)
    assert progress.done == {"encoding images": 6} and found.mirror == "stored"
    labels = found.conditions(range(6))["class_labels"]
    assert labels.tolist() == [3, 3, 3, 7, 7, 7]
    vae = AutoencoderKL.from_pretrained(with_vae.parent / "vae")
    layout = find_images(image_folder)
    pixels = read_pixels(layout.train, range(6), encoder_for(model, 0))
    assert pixels.shape == (6, 3, 16, 16) and -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    plain = recorded(model, tmp_path, images=image_folder, flip=False).training(model, None, progress)
    with torch.no_grad():
        encoded = vae.encode(pixels).latent_dist
        mirrored = vae.encode(pixels.flip(-1)).latent_dist
    # Within what is drawn: the mean, shifted and scaled, and not more than a few deviations from it.
    apart = (all_of(plain)[0] / 0.5 + 0.25 - encoded.mean) / encoded.std
    assert apart.std().item() == pytest.approx(1.0, abs=0.1) and apart.mean().abs() < 0.1
    turned = torch.stack([found._row(0, "flipped", row) for row in range(6)])
    apart = (turned / 0.5 + 0.25 - mirrored.mean) / mirrored.std
    assert apart.std().item() == pytest.approx(1.0, abs=0.1)


def test_another_vae_encodes_anew(with_vae, image_folder, tmp_path):
    first = recorded(opened(with_vae), tmp_path, images=image_folder)
    one = first.training(opened(with_vae), None, SilentProgress())
    (path,) = (with_vae.parent / "vae").glob("*.safetensors")
    tensors = load_file(path)
    tensors["quant_conv.bias"] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    progress, model = Counting(), opened(with_vae)
    other = recorded(model, tmp_path, images=image_folder).training(model, None, progress)
    assert progress.done == {"encoding images": 6} and other.key != one.key
    assert not torch.equal(all_of(other)[0], all_of(one)[0])


def test_mirrored_images_are_encoded_where_the_others_are_kept_already(with_vae, image_folder, tmp_path):
    model = opened(with_vae)
    recorded(model, tmp_path, images=image_folder, flip=False).training(model, None, SilentProgress())
    found = recorded(model, tmp_path, images=image_folder).training(model, None, SilentProgress())
    clean, _ = found.batch([0] * 20, torch.Generator().manual_seed(0))
    assert found.mirror == "stored" and len({one.sum().item() for one in clean}) == 2


def test_images_are_cut_to_a_square_in_the_middle(image_folder, tmp_path, make_tiny):
    model = opened(make_tiny(in_channels=3, out_channels=3, sample_size=20, name="pixels"))
    found = recorded(model, tmp_path, images=image_folder, flip=False).training(model, None, SilentProgress())
    clean, _ = all_of(found)
    (path,) = [path for path in find_images(image_folder).train.paths if path.parts[-2:] == ("3", "0.png")]
    whole = decode(path, 3)  # 20 x 24: nothing to resize
    assert torch.equal(clean[0], torch.from_numpy(whole[:, :, 2:22].copy()).float() / 127.5 - 1)
    turned = recorded(model, tmp_path, images=image_folder).training(model, None, SilentProgress())
    assert turned.mirror == "pixels"
    mirrored, _ = turned.batch([0] * 20, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, clean[0]) or torch.equal(one, clean[0].flip(-1)) for one in mirrored)
    assert len({one.sum(dim=(0, 1))[0].item() for one in mirrored}) == 2


def test_images_without_a_vae_or_labels_are_refused(tiny_dit, image_folder, tmp_path, make_tiny):
    model = opened(tiny_dit)
    with pytest.raises(SourceError, match="no vae/ beside the denoiser"):
        recorded(model, tmp_path, images=image_folder).training(model, None, SilentProgress())
    pixels = opened(make_tiny(in_channels=3, out_channels=3, name="pixels"))
    with pytest.raises(SourceError, match="have no labels"):
        recorded(pixels, tmp_path, images=image_folder / "3").training(pixels, None, SilentProgress())
    (image_folder / "7").rename(image_folder / "12")
    with pytest.raises(SourceError, match="label 12 is out of range"):
        recorded(pixels, tmp_path, images=image_folder).training(pixels, None, SilentProgress())


def test_a_killed_drawing_goes_on(tiny_dit, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.calibration.latent_cache._PER_FILE", 4)
    model = opened(tiny_dit)
    calibration = recorded(model, tmp_path, generate=10)

    class Killed(Counting):
        def advance(self, amount=1, note=""):
            super().advance(amount, note)
            if self.done[self.name] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.training(model, None, Killed())
    index = json.loads(next(tmp_path.rglob("conditions.safetensors")).with_name("index.json").read_text())
    assert set(index) == {"conditions.safetensors", "latents-00000.safetensors"}
    progress = Counting()
    clean, _ = all_of(calibration.training(model, None, progress))
    assert progress.done == {"drawing training samples": 4}  # two batches of the two steps that are left
    whole, _ = all_of(recorded(model, None, generate=10).training(model, None, SilentProgress()))
    assert torch.equal(clean, whole)
