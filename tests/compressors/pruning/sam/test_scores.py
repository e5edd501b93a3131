"""Disturbed Taylor scores: the gradient that the paper writes, the order that truth gives, no traces left."""

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from compress.calibration.seeds import generator_for
from compress.compressors.pruning.gradients import accumulate
from compress.compressors.pruning.sam.choosing import choose
from compress.compressors.pruning.sam.cutting import slice_bottleneck, slice_embedding
from compress.compressors.pruning.sam.scores import DisturbedTaylor, Scores, score
from compress.compressors.pruning.sam.sites import encoder_sites
from compress.errors import StageError
from compress.recipes.slimsam import SlimSamSettings

from ....tiny_sam import tiny_sam
from .encoders import QUIET, embed, heavy_tailed, opened, shown, spearman

WEIGHTS = [
    "vision_encoder.patch_embed.projection.weight", "vision_encoder.layers.0.attn.qkv.weight",
    "vision_encoder.layers.1.attn.proj.weight", "vision_encoder.layers.1.mlp.lin1.weight",
    "vision_encoder.layers.2.mlp.lin2.weight", "vision_encoder.neck.conv1.weight",
]  # fmt: skip


def scored(module, scenes, sigma=0.01, seed=3, **options):
    options = {
        "embedding": True, "bottleneck": True, "gradients": "summed", "recompute": False, "folder": None,
        **options,
    }  # fmt: skip
    return score(opened(module), DisturbedTaylor(scenes, sigma, seed), progress=QUIET, **options)


def equal(one: Scores, other: Scores) -> bool:
    ours, theirs = ([each.embedding, *each.attention, *each.inner] for each in (one, other))
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def literal_gradients(module, scenes, sigma=0.01, seed=3):
    """Name -> per image the gradient of MSE(t + n, t') with t of a pass of its own, in float64."""
    exact = copy.deepcopy(module).double()
    parameters = {name: p for name, p in exact.named_parameters() if name.startswith("vision_encoder")}
    found = {name: [] for name in parameters}
    for index in range(len(scenes)):
        pixels = scenes.pixels([index]).double()
        target = embed(exact, pixels)
        noise = torch.randn(tuple(target.shape), generator=generator_for(seed, "noise", index))
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        output = exact.vision_encoder(pixels).last_hidden_state
        loss = torch.nn.functional.mse_loss(output, target + sigma * noise.double())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            found[name].append(gradient)
            parameters[name].requires_grad_(False)
    return exact, found


def by_hand(exact, worth):
    """Scores channel by channel, with queries, keys and values as three matrices."""
    encoder = exact.vision_encoder
    width, heads = encoder.patch_embed.projection.out_channels, encoder.layers[0].attn.num_attention_heads
    stream = [worth("patch_embed.projection").sum((1, 2, 3)), worth("neck.conv1").sum((0, 2, 3))]
    attention, inner = [], []
    for index, layer in enumerate(encoder.layers):
        name, head_dim = f"layers.{index}", layer.attn.qkv.out_features // 3 // heads
        thirds = worth(f"{name}.attn.qkv").chunk(3)
        proj, lin1, lin2 = (worth(f"{name}.{part}") for part in ("attn.proj", "mlp.lin1", "mlp.lin2"))
        stream += [third.sum(0) for third in thirds] + [proj.sum(1), lin1.sum(0), lin2.sum(1)]
        per_channel = []
        for channel in range(head_dim):
            of_heads = [head * head_dim + channel for head in range(heads)]
            parts = [third[of_heads].sum() for third in thirds] + [proj[:, of_heads].sum()]
            per_channel.append(sum(parts) / 4)
        attention.append(torch.stack(per_channel))
        inner.append((lin1.sum(1) + lin2.sum(0)) / 2)
    assert all(part.shape == (width,) for part in stream)
    return torch.stack(stream).mean(0), attention, inner


@pytest.mark.parametrize("mode", ["summed", "per_image"])
def test_scores_are_those_worked_out_channel_by_channel(mode):
    module, scenes = tiny_sam(), shown(3)
    exact, gradients = literal_gradients(module, scenes)

    def worth(name):
        weight = exact.get_parameter(f"vision_encoder.{name}.weight")
        parts = gradients[f"vision_encoder.{name}.weight"]
        if mode == "summed":
            return (weight * sum(parts)).abs()
        return sum((weight * part).abs() for part in parts)

    embedding, attention, inner = by_hand(exact, worth)
    found = scored(module, scenes, gradients=mode)
    assert found.embedding.dtype == torch.float64
    assert torch.allclose(found.embedding, embedding, rtol=1e-4)
    for ours, theirs in zip((*found.attention, *found.inner), (*attention, *inner), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-3)


def test_the_gradient_is_the_slope_of_the_loss():
    """Finite differences of MSE(t + n, t') in float64, along random directions: no autograd in the check."""
    module, scenes = tiny_sam(), shown(1)
    exact = copy.deepcopy(module).double()
    pixels = scenes.pixels([0]).double()
    target = embed(exact, pixels)
    noise = 0.5 * torch.randn(tuple(target.shape), generator=generator_for(3, "noise", 0)).double()
    sums = accumulate(
        opened(module), DisturbedTaylor(scenes, 0.5, 3), WEIGHTS, folder=None, progress=QUIET
    ).sums
    for name in WEIGHTS:
        weight = exact.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).double()
        losses = []
        for step in (1e-4, -2e-4):
            weight.add_(step * direction)
            losses.append((embed(exact, pixels) - target - noise).square().mean())
        weight.add_(1e-4 * direction)
        slope = (losses[0] - losses[1]) / 2e-4
        assert float((sums[name] * direction).sum()) == pytest.approx(float(slope), rel=1e-3)


def test_without_noise_nothing_may_be_removed():
    for module in (tiny_sam(), heavy_tailed()):
        with pytest.raises(StageError, match="zero") as caught:
            scored(module, shown(2), sigma=0.0)
        assert "sigma" in caught.value.hint


def test_a_cut_model_is_its_own_target():
    module = tiny_sam()
    slice_embedding(module, torch.arange(0, 48, 2), rel_pos="slice")
    with pytest.raises(StageError, match="zero"):
        scored(module, shown(2), sigma=0.0)
    found = scored(module, shown(2))
    assert found.embedding.shape == (24,)
    assert [values.shape for values in found.attention] == [(12,)] * 3
    slice_bottleneck(
        module, [torch.arange(6)] * 3, [torch.arange(8)] * 3, attn_scale="preserve", rel_pos="slice"
    )
    assert [values.shape for values in scored(module, shown(2)).inner] == [(8,)] * 3


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_the_choice_does_not_depend_on_the_deviation_of_the_noise(ranking):
    module, scenes = heavy_tailed(), shown(4)
    settings = SlimSamSettings(ratio=0.5, ranking=ranking)
    reference = scored(module, scenes)
    kept = choose(reference, encoder_sites(module), settings)
    for sigma in (0.1, 1.0, 1e-6, 1e3):
        found = scored(module, scenes, sigma=sigma)
        assert torch.allclose(found.embedding * (0.01 / sigma), reference.embedding, rtol=1e-4)
        again = choose(found, encoder_sites(module), settings)
        for ours, theirs in zip(
            (kept.embedding, *kept.attention, *kept.inner),
            (again.embedding, *again.attention, *again.inner),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_noise_is_drawn_anew_for_every_image():
    module, scenes = tiny_sam(), shown(1)
    twice = shown(1)
    twice._pixels = torch.cat([twice._pixels] * 2)
    one = accumulate(opened(module), DisturbedTaylor(scenes, 0.01, 3), WEIGHTS, folder=None, progress=QUIET)
    two = accumulate(opened(module), DisturbedTaylor(twice, 0.01, 3), WEIGHTS, folder=None, progress=QUIET)
    for name in WEIGHTS:
        assert not torch.allclose(two.of(name), 2 * one.of(name), rtol=0.1)
    assert not equal(scored(module, scenes, seed=3), scored(module, scenes, seed=4))


def true_errors(module, layer, pixels):
    """Mean square of what the output changes by when an inner channel is taken away, channel by channel."""
    reference = embed(module, pixels)
    lin2 = module.vision_encoder.layers[layer].mlp.lin2.weight
    errors = []
    for channel in range(lin2.shape[1]):
        before = lin2[:, channel].clone()
        lin2[:, channel] = 0
        errors.append((embed(module, pixels) - reference).double().square().mean())
        lin2[:, channel] = before
    return torch.stack(errors)


@pytest.mark.parametrize(("layer", "seed"), [(0, 0), (1, 1), (2, 2)])
@torch.no_grad()
def test_the_order_is_that_of_the_error_which_a_removal_makes(layer, seed):
    module, scenes = heavy_tailed(seed), shown(16, seed)
    lin1, lin2 = (module.vision_encoder.layers[layer].mlp.get_submodule(name) for name in ("lin1", "lin2"))
    lin2.weight[:, [7, 40]] = 0
    truth = true_errors(module, layer, scenes._pixels)
    found = scored(module, scenes, embedding=False).inner[layer]
    magnitude = lin1.weight.abs().sum(1) + lin2.weight.abs().sum(0)
    assert spearman(found, truth) >= 0.9
    assert spearman(found, truth) > spearman(magnitude, truth)
    assert set(found.argsort()[:2].tolist()) == {7, 40}
    assert found[[7, 40]].eq(0).all()
    kept = choose(scored(module, scenes), encoder_sites(module), SlimSamSettings(ratio=0.05)).inner[layer]
    assert not {7, 40} & set(kept.tolist())


def test_a_channel_of_the_stream_and_of_heads_that_does_nothing_goes_first():
    module = heavy_tailed()
    with torch.no_grad():
        layer = module.vision_encoder.layers[1]
        layer.attn.proj.weight[:, 5::12] = 0  # within every head of 12
        layer.attn.qkv.weight[5::12] = 0
    found = scored(module, shown(4))
    assert float(found.attention[1][5]) == 0
    assert int(found.attention[1].argmin()) == 5
    kept = choose(found, encoder_sites(module), SlimSamSettings(ratio=0.05))
    assert 5 not in kept.attention[1].tolist()


def test_a_killed_run_goes_on_to_equal_scores(tmp_path):
    module = tiny_sam()
    whole = scored(module, shown(6))
    broken = shown(6, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        scored(module, broken, folder=tmp_path, save_every_seconds=0.0)
    assert broken.seen == [0, 1, 2, 3]
    again = shown(6)
    assert equal(scored(module, again, folder=tmp_path), whole)
    assert again.seen == list(range(again.seen[0], 6))
    assert again.seen[0] > 0
    third = shown(6)
    assert equal(scored(module, third, folder=tmp_path), whole)
    assert third.seen == []


@pytest.mark.parametrize("change", ["mode", "sigma", "seed", "images", "weights"])
def test_sums_of_something_else_are_not_gone_on_with(tmp_path, change):
    scored(tiny_sam(), shown(2), folder=tmp_path)
    scenes = shown(2, seed=1 if change == "images" else 0)
    scored(
        tiny_sam(1 if change == "weights" else 0), scenes, folder=tmp_path,
        sigma=0.02 if change == "sigma" else 0.01, seed=4 if change == "seed" else 3,
        gradients="per_image" if change == "mode" else "summed",
    )  # fmt: skip
    assert scenes.seen == [0, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_computing_layers_again_changes_no_bit_and_holds_less(attention):
    module, scenes = tiny_sam(attention=attention), shown(2)
    plain = scored(module, scenes)
    again = scored(module, scenes, recompute=True)
    assert equal(plain, again)
    assert not any("forward" in vars(layer) for layer in module.vision_encoder.layers)
    held = {}
    for recompute in (False, True):
        with keeping_account(module.vision_encoder) as found:
            scored(module, scenes, recompute=recompute)
        held[recompute] = max(found)
    assert held[True] < held[False] / 4


@contextmanager
def keeping_account(encoder):
    """Yield the bytes that autograd holds whenever it takes another tensor, parameters aside."""
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    storages, held = weakref.WeakValueDictionary(), []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor
        held.append(sum(each.untyped_storage().nbytes() for each in storages.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield held


def test_layers_are_as_they_were_after_an_error():
    module = tiny_sam()
    with pytest.raises(KeyboardInterrupt):
        scored(module, shown(2, stop_at=1), recompute=True)
    assert not any("forward" in vars(layer) for layer in module.vision_encoder.layers)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_model_is_as_it_was():
    module = tiny_sam()
    module.vision_encoder.layers[0].train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    objects = [id(parameter) for parameter in module.parameters()]
    state = torch.get_rng_state()
    scored(module, shown(2), recompute=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert objects == [id(parameter) for parameter in module.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert module.vision_encoder.layers[0].training
    assert not module.vision_encoder.layers[1].training


def test_half_precision_is_scored_in_float32():
    module = tiny_sam().to(torch.bfloat16)
    exact = copy.deepcopy(module).float()
    assert equal(scored(module, shown(2)), scored(exact, shown(2)))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_what_is_not_finite_is_refused_by_place():
    module = tiny_sam()
    with torch.no_grad():
        module.vision_encoder.layers[1].mlp.lin1.weight[0, 0] = float("nan")
    with pytest.raises(StageError, match=r"part 1 of 2 .* nan"):
        scored(module, shown(2))
    scenes = shown(3)
    scenes._pixels[2, 0, 0, 0] = float("inf")
    with pytest.raises(StageError, match=r"part 3 of 3"):
        scored(tiny_sam(), scenes)


def test_no_images_and_dead_kinds_are_refused():
    scenes = shown(1)
    scenes._pixels = scenes._pixels[:0]
    with pytest.raises(StageError, match="no calibration samples"):
        scored(tiny_sam(), scenes)
    module = tiny_sam()
    with torch.no_grad():
        for layer in module.vision_encoder.layers:
            layer.mlp.lin2.weight.zero_()
            layer.mlp.lin1.weight.zero_()
    with pytest.raises(StageError, match="inner layers are 0") as caught:
        scored(module, shown(1))
    assert "sigma" in caught.value.hint


def test_only_what_is_asked_for_is_scored():
    module = tiny_sam()
    first = scored(module, shown(1), bottleneck=False)
    assert first.embedding is not None
    assert first.attention == first.inner == ()
    second = scored(module, shown(1), embedding=False)
    assert second.embedding is None
    assert len(second.attention) == len(second.inner) == 3
    both = scored(module, shown(1))
    assert equal(Scores(first.embedding, second.attention, second.inner), both)
