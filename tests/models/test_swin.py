"""Swin: published counts, tracing, files of former releases, configs of pruned models."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from compress.errors import SourceError
from compress.models.base import flat_shapes
from compress.models.open import open_model
from compress.models.registry import family_for
from compress.models.shapes import complete_config, expected_shapes
from compress.models.swin import merges
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.hashes import file_sha256
from compress.runtime.load import load
from compress.runtime.manifest import ModuleSurgery
from compress.runtime.surgery import apply_surgery
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NAME = "SwinForImageClassification"
TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32}


def _complete(**config):
    return complete_config(NAME, {"num_labels": 5, "patch_size": 2, **config}, "config.json")


def _between(wide, narrow):
    first, second = expected_shapes(NAME, wide), expected_shapes(NAME, narrow)
    surgery: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in second.items():
        if shape != first[name]:
            module, _, leaf = name.rpartition(".")
            surgery.setdefault(module, {})[leaf] = shape
    found = {module: ModuleSurgery(shapes=changed) for module, changed in surgery.items()}
    for stage, heads in enumerate(narrow["num_heads"]):
        size = narrow["embed_dim"] * 2**stage // heads
        for block in range(narrow["depths"][stage]):
            found[f"swin.encoder.layers.{stage}.blocks.{block}.attention"] = ModuleSurgery(
                attributes={"num_attention_heads": heads, "head_dim": size, "scaling": size**-0.5}
            )
    return found


def test_a_swin_tiny_has_the_published_counts():
    config = complete_config(NAME, {"num_labels": 1000}, "config.json")
    assert round(sum(map(prod, expected_shapes(NAME, config).values())) / 1e6, 1) == 28.3  # arXiv 2103.14030
    assert round(family_for(NAME).macs(config) / 1e9, 1) == 4.5


@pytest.mark.parametrize("side", [32, 36, 30])  # 16, 18 and 15 tokens: even, padded windows, odd
def test_tracing_changes_no_bit_and_leaves_nothing(side, make_vit):
    model = open_model(ModelRef(id=str(make_vit(NAME, image_size=side))), progress=SilentProgress())
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.module(**inputs).logits
        with model.family.traceable(model.module):
            assert all("forward" in vars(child) for _, child in merges(model.module))
            assert torch.equal(model.module(**inputs).logits, before)
        with pytest.raises(ZeroDivisionError), model.family.traceable(model.module):
            raise ZeroDivisionError
        assert len(merges(model.module)) == 1
        assert not any("forward" in vars(child) for _, child in merges(model.module))
        assert torch.equal(model.module(**inputs).logits, before)


def test_tables_of_indices_in_former_files_are_skipped_as_stock_code_skips_them(make_vit):
    folder = make_vit(NAME)
    tensors = load_file(folder / "model.safetensors")
    indices = torch.zeros(16, 16, dtype=torch.int64)
    former = {
        f"swin.encoder.layers.{stage}.blocks.{block}.attention.self.relative_position_index": indices.clone()
        for stage in range(2)
        for block in range(2)
    }
    save_file({**tensors, **former}, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load(folder)(**inputs).logits, model.module(**inputs).logits)
    name = "swin.encoder.layers.0.blocks.0.attention.q_proj.weight"
    save_file({**tensors, name: torch.zeros(16, 16)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"q_proj\.weight' is stored under its former name and its name"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def test_a_skipped_tensor_may_lie_anywhere_in_a_file(make_vit):
    folder = make_vit(NAME)
    path = folder / "model.safetensors"
    before = open_model(ModelRef(id=str(folder)), progress=SilentProgress()).module.state_dict()
    tensors = {name: value.numpy().tobytes() for name, value in load_file(path).items()}
    kinds = {name: ("F32", list(value.shape)) for name, value in load_file(path).items()}
    skipped = "swin.encoder.layers.{}.blocks.0.attention.self.relative_position_index"
    middle = len(tensors) // 2
    first, *others = tensors
    order = [first, skipped.format(0), *others[:middle], skipped.format(1), *others[middle:]]
    for stage in range(2):
        tensors[skipped.format(stage)] = bytes(16 * 16 * 8)
        kinds[skipped.format(stage)] = ("I64", [16, 16])
    header, start = {}, 0
    for name in order:
        end = start + len(tensors[name])
        header[name] = {"dtype": kinds[name][0], "shape": kinds[name][1], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors[name] for name in order))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model.source.hashes == {path.name: file_sha256(path)}


def test_work_of_a_cut_model_is_what_torch_counts():
    family, config = family_for(NAME), _complete(**TINY)
    cut = _between(config, {**config, "embed_dim": 12, "num_heads": [2, 3], "mlp_ratio": 3.0})
    torch.manual_seed(0)
    module = family.build(config)
    apply_surgery(module, cut)
    for tensor in module.parameters():
        torch.nn.init.normal_(tensor)
    inputs = family.example_inputs(module, 1, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(**inputs)
    assert counter.get_total_flops() == 2 * family.macs(config, shapes=flat_shapes(cut))


@pytest.mark.parametrize(
    ("width", "heads", "ratio"),
    [(12, [2, 4], 4.0), (10, [2, 4], 2.3), (16, [1, 2], 4.0), (15, [3, 3], 1.4), (7, [1, 2], 1 / 7)],
)
def test_equal_shares_are_a_stock_config(width, heads, ratio):
    family, config = family_for(NAME), _complete(**TINY)
    narrow = {**config, "embed_dim": width, "num_heads": heads, "mlp_ratio": ratio}
    native = family.native_config(config, _between(config, narrow))
    assert native is not None and expected_shapes(NAME, native) == expected_shapes(NAME, narrow)
    assert (native["embed_dim"], native["num_heads"], native["hidden_size"]) == (width, heads, 2 * width)


def test_other_cuts_have_no_stock_config():
    family, config = family_for(NAME), _complete(**TINY)
    cut = _between(config, {**config, "embed_dim": 12})
    block = "swin.encoder.layers.1.blocks.1"
    inner = {
        f"{block}.mlp.fc1": ModuleSurgery(shapes={"weight": (80, 24), "bias": (80,)}),
        f"{block}.mlp.fc2": ModuleSurgery(shapes={"weight": (24, 80)}),
    }
    assert family.native_config(config, {**cut, **inner}) is None
    heads = {f"{block}.attention": ModuleSurgery(attributes={"num_attention_heads": 3})}
    assert family.native_config(config, {**cut, **heads}) is None
    assert family.layered_config(config, cut) is None
