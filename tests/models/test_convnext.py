"""ConvNeXt: published counts, work of cut models, configs of pruned models."""

from __future__ import annotations

from math import prod

import pytest
import torch
from compress.models.base import flat_shapes
from compress.models.registry import family_for
from compress.models.shapes import complete_config, expected_shapes
from compress.runtime.manifest import ModuleSurgery
from compress.runtime.surgery import apply_surgery
from torch.utils.flop_counter import FlopCounterMode

NAME = "ConvNextForImageClassification"
BASE = {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3], "num_labels": 1000}


def _between(wide, narrow, inner=None):
    """Return the surgery from one config to another; the inner width of single blocks may differ more."""
    first, second = expected_shapes(NAME, wide), expected_shapes(NAME, narrow)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in second.items():
        module, _, leaf = name.rpartition(".")
        block, _, layer = module.rpartition(".")
        width = (inner or {}).get(block)
        if width is not None and layer == "pwconv1":
            shape = (width, *shape[1:])
        elif width is not None and layer == "pwconv2" and leaf == "weight":
            shape = (shape[0], width)
        if shape != first[name]:
            shapes.setdefault(module, {})[leaf] = shape
    return {module: ModuleSurgery(shapes=changed) for module, changed in shapes.items()}


def _complete(**config):
    return complete_config(NAME, config, "config.json")


def test_a_convnext_base_has_the_published_counts():
    config, family = _complete(**BASE), family_for(NAME)
    sizes = expected_shapes(NAME, config)
    assert round(sum(map(prod, sizes.values())) / 1e6, 1) == 88.6  # arXiv 2201.03545, table 1
    assert round(family.macs(config) / 1e9, 1) == 15.4
    assert family.paper_macs(config) is None


def test_work_of_a_cut_model_is_what_torch_counts():
    family = family_for(NAME)
    config = _complete(hidden_sizes=[16, 24], depths=[1, 2], num_stages=2, image_size=36, num_labels=5)
    cut = _between(config, {**config, "hidden_sizes": [10, 20]}, {"convnext.encoder.stages.1.layers.1": 33})
    torch.manual_seed(0)
    module = family.build(config)
    apply_surgery(module, cut)
    for tensor in module.parameters():
        torch.nn.init.normal_(tensor)
    inputs = family.example_inputs(module, 1, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    assert counter.get_total_flops() == 2 * family.macs(config, shapes=flat_shapes(cut))


def test_widths_of_stages_are_a_stock_config():
    family, config = family_for(NAME), _complete(**BASE)
    narrow = {**config, "hidden_sizes": [96, 192, 384, 768]}
    assert family.native_config(config, _between(config, narrow)) == narrow
    assert family.native_config(config, {}) == {**config, "hidden_sizes": BASE["hidden_sizes"]}


@pytest.mark.parametrize("inner", [380, 388])
def test_an_inner_width_of_its_own_is_none(inner):
    family, config = family_for(NAME), _complete(**BASE)
    narrow = {**config, "hidden_sizes": [96, 192, 384, 768]}
    cut = _between(config, narrow, {"convnext.encoder.stages.0.layers.2": inner})
    assert family.native_config(config, cut) is None
    assert family.layered_config(config, cut) is None
