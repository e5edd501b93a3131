"""What the tests of the adapters share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def open_tiny(make_tiny):
    """Return `open_tiny(class_name, **config)` -> OpenModel with float32 weights."""

    def build(class_name, **config):
        from compress.models.open import open_model
        from compress.progress import SilentProgress
        from compress.recipes.schema import ModelRef

        return open_model(ModelRef(id=str(make_tiny(class_name, **config))), progress=SilentProgress())

    return build


@pytest.fixture
def check_forward_order():
    """Return a check that `linears` lists the linears in the order in which a forward calls them."""

    def check(model):
        order = []
        sites = model.linears()
        handles = [
            model.module.get_submodule(site.name).register_forward_pre_hook(
                lambda _, __, name=site.name: None if name in order else order.append(name)
            )
            for site in sites
        ]
        with torch.no_grad():
            model.module(**model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0)))
        for handle in handles:
            handle.remove()
        assert [site.name for site in sites] == order
        linears = {n: m for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {site.name: site.shape for site in sites} == {
            n: tuple(m.weight.shape) for n, m in linears.items()
        }
        blocks = [name for name, _ in model.family.blocks(model.module)]
        for site in sites:
            inside = None if site.block is None else f"{blocks[site.block]}."
            assert site.name.startswith(inside or "") and (inside or "transformer_blocks" not in site.name)

    return check


@pytest.fixture
def check_macs():
    """Return a check of the analytic MACs against torch's own counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def check(model):
        inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
        # Other attention kernels hide their products from the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.module(**inputs)
        assert counter.get_total_flops() == 2 * model.family.macs(model.config)
        products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
        without = model.family.macs(model.config, attention_products=False)
        assert counter.get_total_flops() - products == 2 * without

    return check


@pytest.fixture
def check_folds():
    """Return a check that absorbing m and dividing the targets' columns changes nothing."""

    def check(model, groups):
        generator = torch.Generator().manual_seed(1)
        inputs = model.family.example_inputs(model.module, 2, generator)
        with torch.no_grad():
            before = model.module(**inputs).sample
            folds = model.family.folds(model.module)
            assert len(folds) == groups
            targets = [name for group in folds for name in group.targets]
            assert len(targets) == len(set(targets))
            for group in folds:
                linears = [model.module.get_submodule(name) for name in group.targets]
                m = 0.5 + 1.5 * torch.rand(linears[0].in_features, generator=generator)
                seen = [_input_of(model, group.targets[0], inputs)]
                group.absorb(model.module, m)
                seen.append(_input_of(model, group.targets[0], inputs))
                torch.testing.assert_close(seen[1], seen[0] * m, rtol=1e-4, atol=1e-4)
                for linear in linears:
                    linear.weight /= m
            after = model.module(**inputs).sample
        assert (after - before).abs().max() / before.abs().max() < 1e-5

    return check


def _input_of(model, name, inputs):
    seen = []
    handle = model.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.module(**inputs)
    handle.remove()
    return seen[0]
