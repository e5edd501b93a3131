"""Specs from headers, models from bytes: equal to the stock loader, counted once, never mapped."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from compress.errors import SourceError, UsageError
from compress.models.checkpoint import preflight
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.hashes import file_sha256
from safetensors.torch import load_file, save_file

from ..small_dits import WEIGHTS, equal_embedders

QUIET = SilentProgress()
CLASSES = ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"]


class Recording(SilentProgress):
    def __init__(self):
        self.warnings, self.units, self.total = [], 0, None

    def start(self, label, total):
        self.total = total

    def advance(self, units=1, detail=""):
        self.units += units

    def warn(self, message):
        self.warnings.append(message)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_to_the_stock_loader(make_tiny, class_name, dtype):
    folder = make_tiny(class_name, dtype=dtype)
    model = open_model(ModelRef(id=str(folder)), progress=QUIET)
    stock = getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    mine, theirs = model.module.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    for (name, mine), (_, theirs) in zip(model.module.named_buffers(), stock.named_buffers(), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), name
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.module(**inputs).sample, stock(**inputs).sample)
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("class_name", CLASSES)
def test_spec_describes_what_is_opened(make_tiny, class_name):
    folder = make_tiny(class_name, dtype="bfloat16")
    spec = read_spec(ModelRef(id=str(folder)))
    state = open_model(ModelRef(id=str(folder)), progress=QUIET).module.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in spec.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()
    }
    meta = spec.meta_module()
    assert spec.parameters_stored == sum(parameter.numel() for parameter in meta.parameters())
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_copies_count_once(tiny_dit):
    model = open_model(ModelRef(id=str(equal_embedders(tiny_dit))), progress=QUIET)
    embedder = sum(p.numel() for p in model.module.transformer_blocks[0].norm1.emb.parameters())
    assert model.spec.parameters == model.spec.parameters_stored - embedder
    assert len(model.spec.shared) == 5
    assert set(model.spec.shared.values()) == {
        name.replace("blocks.1", "blocks.0") for name in model.spec.shared
    }
    size = model.spec.size()
    assert size.bytes == 4 * model.spec.parameters
    assert size.bits_per_weight == 32


def test_copies_that_differ_are_told_and_counted(tiny_dit):
    progress = Recording()
    tensors = load_file(equal_embedders(tiny_dit) / WEIGHTS)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tiny_dit / WEIGHTS)
    assert name in read_spec(ModelRef(id=str(tiny_dit))).shared
    model = open_model(ModelRef(id=str(tiny_dit)), progress=progress)
    assert name not in model.spec.shared
    assert len(model.spec.shared) == 4
    assert model.spec.parameters == read_spec(ModelRef(id=str(tiny_dit))).parameters + tensors[name].numel()
    (warning,) = progress.warnings
    assert name in warning


def test_progress_and_hashes(tiny_dit):
    progress = Recording()
    model = open_model(ModelRef(id=str(tiny_dit)), progress=progress)
    assert progress.units == progress.total == preflight(ModelRef(id=str(tiny_dit))).bytes
    assert dict(model.source.hashes) == {WEIGHTS: file_sha256(tiny_dit / WEIGHTS)}
    assert model.spec.source == model.source


def test_shards_are_hashed_one_by_one(tiny_dit):
    stock = diffusers.DiTTransformer2DModel.from_pretrained(tiny_dit)
    shutil.rmtree(tiny_dit)
    stock.save_pretrained(tiny_dit, max_shard_size="100KB")
    model = open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)
    files = sorted(tiny_dit.glob("*.safetensors"))
    assert len(files) > 1
    assert dict(model.source.hashes) == {path.name: file_sha256(path) for path in files}
    assert model.scheduler is None
    for name, tensor in stock.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor)


def test_another_dtype_on_request(tiny_dit):
    reference = ModelRef(id=str(tiny_dit), dtype="bfloat16")
    model = open_model(reference, progress=QUIET)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    assert model.spec.dtype == torch.bfloat16
    assert read_spec(reference).size().bytes * 2 == read_spec(ModelRef(id=str(tiny_dit))).size().bytes


def test_a_mixed_checkpoint_opens_in_the_type_that_holds_most(tiny_dit):
    tensors = load_file(tiny_dit / WEIGHTS)
    save_file(
        {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in tensors.items()},
        tiny_dit / WEIGHTS,
    )
    model = open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_integer_weights_are_refused(tiny_dit, dtype):
    tensors = load_file(tiny_dit / WEIGHTS)
    save_file(
        tensors | {"proj_out_1.weight": tensors["proj_out_1.weight"].to(torch.int8)}, tiny_dit / WEIGHTS
    )
    ref = ModelRef(id=str(tiny_dit), dtype=dtype)
    for read in (read_spec, lambda ref: open_model(ref, progress=QUIET)):
        with pytest.raises(SourceError, match=r"'proj_out_1\.weight' is stored as I8"):
            read(ref)


def test_configs_alone(tiny_dit):
    (tiny_dit / WEIGHTS).unlink()
    assert read_spec(ModelRef(id=str(tiny_dit))).dtype == torch.bfloat16
    assert read_spec(ModelRef(id=str(tiny_dit), dtype="float32")).dtype == torch.float32


def test_weights_that_are_not_finite(tiny_dit):
    tensors = load_file(tiny_dit / WEIGHTS)
    tensors["proj_out_2.bias"] = torch.full_like(tensors["proj_out_2.bias"], float("nan"))
    save_file(tensors, tiny_dit / WEIGHTS)
    with pytest.raises(SourceError, match=r"'proj_out_2\.bias' \(F32\) holds 32 NaN or Inf"):
        open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)


def test_opening_leaves_the_global_generator_alone(make_tiny):
    folder = make_tiny("PixArtTransformer2DModel")
    state = torch.random.get_rng_state()
    open_model(ModelRef(id=str(folder)), progress=QUIET)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_weights_survive_their_file(tiny_dit):
    model = open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    (tiny_dit / WEIGHTS).write_bytes(b"\xff" * (tiny_dit / WEIGHTS).stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert all(parameter.data_ptr() % 16 == 0 for parameter in model.module.parameters())


def test_the_scheduler_is_the_checkpoints_own(tiny_dit, tiny_sd3):
    assert isinstance(
        open_model(ModelRef(id=str(tiny_dit)), progress=QUIET).scheduler, diffusers.DDIMScheduler
    )
    flow = open_model(ModelRef(id=str(tiny_sd3)), progress=QUIET).scheduler
    assert isinstance(flow, diffusers.FlowMatchEulerDiscreteScheduler)
    path = tiny_dit / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(SourceError, match="'AutoencoderKL' is not a scheduler"):
        open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)


def test_unknown_devices(tiny_dit):
    with pytest.raises(UsageError, match="device 'abacus'"):
        open_model(ModelRef(id=str(tiny_dit)), device="abacus", progress=QUIET)
    assert open_model(ModelRef(id=str(tiny_dit)), device="auto", progress=QUIET).module is not None


def test_a_preflight_is_reused(tiny_dit):
    reference = ModelRef(id=str(tiny_dit))
    found = preflight(reference)
    (tiny_dit / "config.json").write_text("broken since")
    assert open_model(reference, progress=QUIET, checkpoint=found).spec.parameters > 0
