"""Features inside an encoder: which they are, how far apart, and that nothing of them stays behind."""

import copy
import weakref

import pytest
import torch
from compress.compressors.pruning.sam.features import compare, squared_distance, teach
from torch import nn

from ....tiny_sam import tiny_sam
from .learners import MemoryScenes, models, narrower, slimmer

PIXELS = MemoryScenes(2, seed=5).values


def _recorded(module, watched):
    """Return (output, group -> features), read by hooks that hold everything, as a reference."""
    encoder, found, handles = module.vision_encoder, {}, []

    def keep(group, tensor):
        found.setdefault(group, []).append(tensor)

    for index, layer in enumerate(encoder.layers):
        kind = "global" if index == 2 else "windowed"
        if watched == "inside":
            handles += [
                layer.attn.qkv.register_forward_hook(lambda _, __, out, kind=kind: keep(kind, out)),
                layer.mlp.act.register_forward_hook(lambda _, __, out: keep("inner", out)),
            ]
        else:
            handles += [
                layer.layer_norm2.register_forward_pre_hook(lambda _, given: keep("stream", given[0])),
                layer.register_forward_hook(lambda _, __, out: keep("stream", out)),
            ]
    if watched == "stream":
        handles.append(encoder.patch_embed.register_forward_hook(
            lambda _, __, out: keep("stream", out + encoder.pos_embed)
        ))  # fmt: skip
    output = encoder(PIXELS).last_hidden_state
    for handle in handles:
        handle.remove()
    return output, found


def _pair(watched):
    original, first, second = models()
    return (first, original) if watched == "inside" else (second, first)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("watched", ["inside", "stream"])
def test_distances_are_one_mean_over_the_features_of_a_group(watched, recompute):
    student, teacher = _pair(watched)
    student.requires_grad_(True)
    reference, theirs = teach(teacher.vision_encoder, PIXELS, watched)
    output, squares = compare(student.vision_encoder, PIXELS, watched, theirs, recompute=recompute)
    wanted, ours = _recorded(student, watched), _recorded(teacher, watched)
    assert torch.equal(output, wanted[0]) and torch.equal(reference, ours[0])
    means = squares.means()
    assert set(means) == ({"windowed", "global", "inner"} if watched == "inside" else {"stream"})
    for group, mean in means.items():
        one, other = (torch.cat([item.flatten() for item in found[1][group]]) for found in (wanted, ours))
        assert mean.item() == pytest.approx((one - other).square().mean().item(), rel=1e-5)
        assert mean.item() > 1e-4
    if watched == "inside":  # 9 windows of 3 x 3 tokens cover the 8 x 8, filled up
        assert squares.counts["windowed"] == 2 * 2 * 81 * 144
        assert squares.counts["global"] == 2 * 64 * 144
        assert squares.counts["inner"] == 3 * 2 * 64 * 96
    else:
        assert squares.counts["stream"] == 7 * 2 * 64 * 24


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("watched", ["inside", "stream"])
def test_computing_again_changes_no_gradient(watched, attention):
    original = tiny_sam(attention=attention)
    teacher = original if watched == "inside" else narrower(original)
    gradients = []
    for recompute in (True, False):
        student = narrower(original) if watched == "inside" else slimmer(narrower(original))
        student.vision_encoder.requires_grad_(True)
        _, targets = teach(teacher.vision_encoder, PIXELS, watched)
        output, squares = compare(student.vision_encoder, PIXELS, watched, targets, recompute=recompute)
        (output.square().mean() + sum(squares.means().values())).backward()
        gradients.append([item.grad for item in student.vision_encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(float(item.abs().max()) > 0 for item in gradients[0])


@pytest.mark.parametrize("group", ["global", "windowed", "inner"])
def test_every_term_alone_teaches(group):
    """The released code compares the student's global layers with themselves, which teaches nothing."""
    student, teacher = _pair("inside")
    student.vision_encoder.requires_grad_(True)
    _, targets = teach(teacher.vision_encoder, PIXELS, "inside")
    _, squares = compare(student.vision_encoder, PIXELS, "inside", targets, recompute=True)
    squares.means()[group].backward()
    layers = student.vision_encoder.layers
    linear = layers[2].mlp.lin1 if group == "inner" else layers[2 if group == "global" else 0].attn.qkv
    assert float(linear.weight.grad.abs().max()) > 1e-6
    if group == "global":
        assert not layers[2].mlp.lin1.weight.grad.any()


def test_the_same_encoder_is_at_distance_0():
    original = tiny_sam()
    for watched in ("inside", "stream"):
        _, targets = teach(original.vision_encoder, PIXELS, watched)
        _, squares = compare(original.vision_encoder, PIXELS, watched, targets, recompute=False)
        assert {float(mean) for mean in squares.means().values()} == {0.0}


@pytest.mark.parametrize(
    ("places", "wanted"),
    [([0, 1, 2], {"global", "inner"}), ([], {"windowed", "inner"})],
)
def test_layers_of_one_kind_make_no_empty_mean(places, wanted):
    original, first, _ = models(global_attn_indexes=places)
    _, targets = teach(original.vision_encoder, PIXELS, "inside")
    _, squares = compare(first.vision_encoder, PIXELS, "inside", targets, recompute=True)
    assert set(squares.means()) == wanted


def test_layers_of_different_widths_are_compared_by_their_stream():
    """As global ranking leaves them."""
    first = narrower(tiny_sam())
    second = slimmer(first, head_dims=(2, 12, 5))
    _, targets = teach(first.vision_encoder, PIXELS, "stream")
    _, squares = compare(second.vision_encoder, PIXELS, "stream", targets, recompute=True)
    assert float(squares.means()["stream"]) > 1e-3


def test_models_without_positions_and_biases_are_compared():
    original, first, second = models(use_abs_pos=False, use_rel_pos=False, qkv_bias=False)
    for teacher, student, watched in ((original, first, "inside"), (first, second, "stream")):
        _, targets = teach(teacher.vision_encoder, PIXELS, watched)
        _, squares = compare(student.vision_encoder, PIXELS, watched, targets, recompute=True)
        assert all(float(mean) > 0 for mean in squares.means().values())


def _untouched(module: nn.Module) -> bool:
    return not any(
        item._forward_hooks or item._forward_pre_hooks or "forward" in vars(item) for item in module.modules()
    )


class _Failing(nn.Module):
    def forward(self, _):
        raise RuntimeError("no memory left")


@pytest.mark.parametrize("watched", ["inside", "stream"])
def test_no_hook_stays(watched):
    student, teacher = _pair(watched)
    student.vision_encoder.requires_grad_(True)
    _, targets = teach(teacher.vision_encoder, PIXELS, watched)
    output, _ = compare(student.vision_encoder, PIXELS, watched, targets, recompute=True)
    output.sum().backward()
    assert _untouched(student) and _untouched(teacher)
    broken = copy.deepcopy(student)
    broken.vision_encoder.layers[1].mlp.lin2 = _Failing()
    with pytest.raises(RuntimeError, match="no memory left"):
        teach(broken.vision_encoder, PIXELS, watched)
    with pytest.raises(RuntimeError, match="no memory left"):
        compare(broken.vision_encoder, PIXELS, watched, targets, recompute=True)
    assert _untouched(broken)


def test_the_way_back_frees_the_features():
    """Also while the loss is still there, as in a loop that computes the next part."""
    student, teacher = _pair("inside")
    student.vision_encoder.requires_grad_(True)
    teacher.requires_grad_(True)  # even so
    _, targets = teach(teacher.vision_encoder, PIXELS, "inside")
    alive = [weakref.ref(item) for found in targets for item in found]
    assert not any(item.requires_grad for found in targets for item in found)
    output, squares = compare(student.vision_encoder, PIXELS, "inside", targets, recompute=True)
    loss = output.square().mean() + sum(squares.means().values())
    del targets, squares, output
    assert all(item() is not None for item in alive)  # they are needed on the way back
    loss.backward()
    assert not any(item() is not None for item in alive)


def test_computing_again_keeps_little():
    """What the graph holds between the ways there and back: with `recompute` the stream before each layer."""
    kept = {}
    student, teacher = _pair("inside")
    student.vision_encoder.requires_grad_(True)
    own = {item.data_ptr() for item in student.parameters()}
    for recompute in (True, False):
        _, targets = teach(teacher.vision_encoder, PIXELS, "inside")
        sizes = {}

        def pack(tensor, sizes=sizes):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept[recompute] = compare(student.vision_encoder, PIXELS, "inside", targets, recompute=recompute)
        kept[recompute] = sum(sizes.values())
    assert kept[True] < 0.3 * kept[False]


def test_distances_are_summed_in_float32():
    ours = torch.full((3, 50_000), 2.0, dtype=torch.bfloat16)
    theirs = torch.full((3, 50_000), 1.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(squared_distance(ours, theirs)) == 150_000.0
