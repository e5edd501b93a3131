"""Recording and replay: complete, cached, resumable, and without traces in the model."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.diffusion import record, recording_key
from compress.calibration.sampler import conditions_for, sample
from compress.calibration.statistics import ChannelAbsMax
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

QUIET = SilentProgress()
SETTINGS = CalibrationSettings(samples=4, steps=3, guidance_scale=3.0, batch_size=2)


@pytest.fixture
def model(tiny_dit):
    return open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)


def channel_maxima(calibration, model, names):
    found = {name: ChannelAbsMax(per_timestep=True) for name in names}
    calibration.observe(model, names, lambda name, x, t: found[name].update(x, t), QUIET)
    return {name: statistic.maximum for name, statistic in found.items()}


def hooks_of(module):
    return sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules())


class Counting(SilentProgress):
    def __init__(self):
        self.units = 0

    def advance(self, units=1, detail=""):
        self.units += units


def test_channel_maxima_cover_all_steps_and_both_halves(model, tmp_path):
    """Acceptance A8 of ViDiT-Q: against inputs that an independent run of the sampler shows."""
    names = [site.name for site in model.linears()]
    seen = {name: [] for name in names}
    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).abs().amax(0))
        )
        for name in names
    ]
    rows = []
    sample(
        model, conditions_for(model, SETTINGS, 4, 7), steps=3, guidance_scale=3.0, seed=7, batch_size=2,
        on_call=lambda kwargs, _: rows.append(len(kwargs["hidden_states"])), progress=QUIET,
    )  # fmt: skip
    for handle in handles:
        handle.remove()
    assert rows == [4] * 6  # two batches of three steps, both halves
    calibration = record(model, SETTINGS, seed=7, cache=tmp_path, progress=QUIET)
    found = channel_maxima(calibration, model, names)
    for name in names:
        assert torch.equal(found[name], torch.stack(seen[name]).amax(0)), name


def test_every_step_matters(model, tmp_path):
    calibration = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    name = "transformer_blocks.1.attn1.to_q"
    statistic = ChannelAbsMax(per_timestep=True)
    calibration.observe(model, [name], lambda _, x, t: statistic.update(x, t), QUIET)
    assert len(statistic.by_timestep) == 3
    assert torch.equal(torch.stack(list(statistic.by_timestep.values())).amax(0), statistic.maximum)


def test_replayed_calls_are_the_recorded_ones(model, tmp_path):
    original = []
    sample(
        model, conditions_for(model, SETTINGS, 4, 0), steps=3, guidance_scale=3.0, seed=0, batch_size=2,
        on_call=lambda kwargs, _: original.append(kwargs), progress=QUIET,
    )  # fmt: skip
    calibration = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    replayed = list(calibration.calls())
    assert len(replayed) == len(original) == calibration.count() == 6
    for mine, theirs in zip(replayed, original, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), name


def test_observers_see_batch_tokens_channels(model, tmp_path):
    calibration = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    shapes = {}
    names = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.norm1.linear", "proj_out_1"]
    calibration.observe(
        model, names, lambda name, x, t: shapes.setdefault(name, (x.shape, t.shape, t.dtype)), QUIET
    )
    assert shapes[names[0]] == ((4, 16, 64), (4,), torch.float32)
    assert shapes[names[1]] == ((4, 1, 64), (4,), torch.float32)
    assert shapes[names[2]] == ((4, 1, 64), (4,), torch.float32)


def test_a_hit_computes_nothing(model, tmp_path):
    first, second = Counting(), Counting()
    one = record(model, SETTINGS, seed=0, cache=tmp_path, progress=first)
    before = {path: path.stat().st_mtime_ns for path in one.files}
    two = record(model, SETTINGS, seed=0, cache=tmp_path, progress=second)
    assert (first.units, second.units) == (6, 0)
    assert one.key == two.key
    assert {path: path.stat().st_mtime_ns for path in two.files} == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "one byte", "partial name"])
def test_a_stopped_recording_resumes_with_the_same_vectors(model, tmp_path, damage):
    names = ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_out.0"]
    whole = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    bytes_before = [path.read_bytes() for path in whole.files]
    expected = channel_maxima(whole, model, names)
    last = whole.files[-1]
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:-10])
    elif damage == "one byte":
        last.write_bytes(last.read_bytes()[:-1] + bytes([last.read_bytes()[-1] ^ 1]))
    else:
        last.unlink()
    if damage == "partial name":
        (last.parent / f".{last.name}.partial-999999999-0123abcd").write_bytes(b"half")
    counting = Counting()
    again = record(model, SETTINGS, seed=0, cache=tmp_path, progress=counting)
    assert counting.units == 3  # one batch of the two
    assert [path.read_bytes() for path in again.files] == bytes_before
    left = sorted(path.name for path in last.parent.iterdir())
    assert left == [*(path.name for path in again.files), "index.json"]
    found = channel_maxima(again, model, names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_an_interrupted_recording_leaves_whole_batches(model, tmp_path):
    class Stop(SilentProgress):
        units = 0

        def advance(self, units=1, detail=""):
            self.units += 1
            if self.units == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, SETTINGS, seed=0, cache=tmp_path / "cache", progress=Stop())
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["batch-00000.safetensors", "index.json"]
    counting = Counting()
    record(model, SETTINGS, seed=0, cache=tmp_path / "cache", progress=counting)
    assert counting.units == 3


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_without_an_index_nothing_is_trusted(model, tmp_path, text):
    kept = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    (kept.files[0].parent / "index.json").write_text(text)
    counting = Counting()
    record(model, SETTINGS, seed=0, cache=tmp_path, progress=counting)
    assert counting.units == 6


def test_a_fresh_recording_reuses_nothing_and_replaces(model, tmp_path):
    kept = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in kept.files}
    counting = Counting()
    again = record(model, SETTINGS, seed=0, cache=tmp_path, progress=counting, fresh=True)
    assert (again.key, again.files, counting.units) == (kept.key, kept.files, 6)
    for path in again.files:
        inode, content = before[path]
        assert path.stat().st_ino != inode
        assert path.read_bytes() == content


def test_the_key_depends_on_what_matters(model, make_tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    other = open_model(ModelRef(id=str(make_tiny(seed=1, name="other"))), progress=QUIET)
    keys = [
        recording_key(model, SETTINGS, 0),
        recording_key(model, SETTINGS, 1),
        recording_key(other, SETTINGS, 0),
        *(
            recording_key(model, SETTINGS.model_copy(update=change), 0)
            for change in (
                {"steps": 4},
                {"samples": 5},
                {"guidance_scale": 1.0},
                {"scheduler": "ddim"},
                {"prompts": prompts},
            )
        ),
    ]
    prompts.write_text("a dog")
    keys.append(recording_key(model, SETTINGS.model_copy(update={"prompts": prompts}), 0))
    assert len(set(keys)) == len(keys)
    assert keys[0] == recording_key(model, SETTINGS, 0)
    moved = tmp_path / "moved.txt"
    prompts.rename(moved)
    assert keys[-1] == recording_key(model, SETTINGS.model_copy(update={"prompts": moved}), 0)


def test_no_hook_remains(model, tmp_path):
    calibration = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    before = hooks_of(model.module)

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibration.observe(model, ["proj_out_1"], fail, QUIET)
    with pytest.raises(StageError, match=r"no\.such: the model has no such layer"):
        calibration.observe(model, ["proj_out_1", "no.such"], lambda *_: None, QUIET)
    with pytest.raises(StageError, match="no recorded call reaches this layer"):
        calibration.observe(model, ["transformer_blocks"], lambda *_: None, QUIET)
    assert hooks_of(model.module) == before == 0


def test_a_changed_model_is_not_recorded(model):
    model.quantization["proj_out_1"] = None
    with pytest.raises(StageError, match="original model"):
        record(model, SETTINGS, seed=0, cache=None, progress=QUIET)


def test_without_a_cache_nothing_is_left_behind(model):
    calibration = record(model, SETTINGS, seed=0, cache=None, progress=QUIET)
    folder = calibration.files[0].parents[1]
    assert calibration.count() == 6
    assert folder.is_dir()
    del calibration
    assert not folder.exists()


def test_an_uneven_last_batch_and_one_step(model, tmp_path):
    settings = CalibrationSettings(samples=3, steps=1, guidance_scale=1.0, batch_size=2)
    calibration = record(model, settings, seed=0, cache=tmp_path, progress=QUIET)
    assert [len(call["hidden_states"]) for call in calibration.calls()] == [2, 1]


def test_the_recording_follows_the_models_dtype(model, tmp_path):
    calibration = record(model, SETTINGS, seed=0, cache=tmp_path, progress=QUIET)
    model.module.to(torch.bfloat16)
    dtypes = set()
    calibration.observe(
        model, ["transformer_blocks.0.ff.net.2"], lambda _, x, t: dtypes.add((x.dtype, t.dtype)), QUIET
    )
    assert dtypes == {(torch.bfloat16, torch.float32)}


def test_text_conditional_models(make_tiny, tmp_path):
    model = open_model(ModelRef(id=str(make_tiny("SD3Transformer2DModel"))), progress=QUIET)
    path = tmp_path / "embeddings.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeds": torch.randn(2, 5, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
    }
    save_file(tensors | {f"negative_{name}": tensor[:1].clone() for name, tensor in tensors.items()}, path)
    settings = SETTINGS.model_copy(update={"embeddings": path})
    calibration = record(model, settings, seed=0, cache=tmp_path / "cache", progress=QUIET)
    names = [site.name for site in model.linears()]
    reached = channel_maxima(calibration, model, names)
    assert all(reached[name] is not None for name in names)
