"""What blocks put out, compared: masks, weights, and which blocks stand for each other."""

import pytest
import torch
from compress.compressors.recovery.features import (
    block_outputs,
    feature_losses,
    feature_weight,
    near_mean,
)
from compress.compressors.recovery.matching import matched_blocks
from compress.models.open import open_model
from compress.models.origins import write_origins
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef


def pair(count=64, tokens=256, channels=64, error=0.1, seed=0):
    """A teacher's features, normal, and a student's that are off by `error`."""
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.randn(count, tokens, channels, generator=generator)
    return theirs + error * torch.randn(theirs.shape, generator=generator), theirs


def dit(layers):
    return {"_class_name": "DiTTransformer2DModel", "num_layers": layers}


def removed(depth, kept, **about):
    return write_origins(None, {"transformer_blocks": kept}, {"transformer_blocks": depth}, about)


def loss(ours, theirs, mask="zero", sigmas=2.0):
    return feature_losses(ours, theirs, mask=mask, sigmas=sigmas).mean().item()


def test_features_without_outliers():
    ours, theirs = pair()
    assert loss(ours, theirs, "none") == pytest.approx(0.010, rel=0.02)
    # Values near the edge are masked in one of both alone: about one in a hundred, each 2^2 apart.
    assert loss(ours, theirs) == pytest.approx(0.042, abs=0.002)
    assert loss(ours, theirs, sigmas=4.0) == pytest.approx(0.010, abs=0.001)
    assert loss(ours, theirs, "exclude") == pytest.approx(0.010, abs=0.001)


def test_one_enormous_value_decides_a_plain_mean_square_alone():
    ours, theirs = pair(count=2, channels=1152)  # as many as a block of DiT-XL/2 puts out
    spoilt = theirs.clone()
    spoilt[:, 17, 5] = 200.0
    plain, masked = (loss(ours, spoilt, mask) / loss(ours, theirs, mask) for mask in ("none", "zero"))
    assert plain > 10 and masked < 2
    assert loss(ours, spoilt, "exclude", 4.0) == pytest.approx(0.010, abs=0.001)


def test_the_mask_is_of_each_item_and_each_model():
    values = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    values[1] = 100 * values[1] + 7
    near = near_mean(values, 1.5)
    for item, found in zip(values.double(), near, strict=True):
        expected = (item - item.mean()).abs() < 1.5 * item.var(correction=0).sqrt()
        assert torch.equal(found, expected) and 0 < found.sum() < found.numel()


def test_masked_losses_by_hand():
    theirs = torch.zeros(1, 1, 10)
    theirs[0, 0, 0] = 10.0  # mean 1, deviation 3: two deviations are 6, and it is 9 away
    ours = torch.zeros(1, 1, 10)
    ours[0, 0, 1] = 20.0  # mean 2, deviation 6: 18 away, more than 12
    ours[0, 0, 0] = 1.0
    found = {mask: feature_losses(ours, theirs, mask=mask, sigmas=2.0).item() for mask in ("none", "zero")}
    assert found["none"] == pytest.approx((81 + 400) / 10) and found["zero"] == pytest.approx(1 / 10)
    assert feature_losses(ours, theirs, mask="exclude", sigmas=2.0).item() == 0.0
    ours.requires_grad_()
    feature_losses(ours, theirs.requires_grad_(), mask="zero", sigmas=2.0).sum().backward()
    assert theirs.grad is None
    assert ours.grad[0, 0].nonzero().flatten().tolist() == [0]  # masked ones get no gradient


def test_the_weight_falls_to_nothing_with_the_steps():
    assert [feature_weight(0.01, step, 5) for step in range(5)] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025, 0.0]
    )
    assert feature_weight(0.01, 0, 1) == 0.01


def test_pairs_of_one_to_two():
    kept = [2 * index + (index % 3 == 0) for index in range(14)]
    found = matched_blocks(dit(28), removed(28, kept, groups="1:2"))
    assert found == {"transformer_blocks": [(i, 2 * i + 1) for i in range(14)]}


def test_pairs_of_nineteen_blocks():
    groups = ["3:4", "3:4", "2:4", "3:4", "2:4", "3:4", "3:4"]
    kept = [4 * group + place for group, text in enumerate(groups) for place in range(int(text[0]))]
    (pairs,) = matched_blocks(dit(28), removed(28, kept, groups=groups)).values()
    assert pairs == list(zip([2, 5, 7, 10, 12, 15, 18], range(3, 28, 4), strict=True))


def test_pairs_where_no_groups_are_known():
    # What stays stands for what went after it.
    assert matched_blocks(dit(8), removed(8, [0, 3, 4, 6])) == {
        "transformer_blocks": [(0, 2), (1, 3), (2, 5), (3, 7)]
    }
    assert matched_blocks(dit(3), None) == {"transformer_blocks": [(0, 0), (1, 1), (2, 2)]}


@pytest.mark.parametrize(
    "groups", ["1:4", "3:4", "4:3", "2:3", "250:500", ["1:2", "1:4"], ["2:6", "2:2"], {"blocks": "1:2"}, {}]
)
def test_groups_that_do_not_give_what_is_kept_are_not_followed(groups):
    kept = [0, 3, 4, 6]
    assert matched_blocks(dit(8), removed(8, kept, groups=groups)) == matched_blocks(dit(8), removed(8, kept))


def test_groups_that_choose_more_of_one_and_less_of_another_are_not_followed():
    assert matched_blocks(dit(4), removed(4, [0, 1], groups="1:2")) == {
        "transformer_blocks": [(0, 0), (1, 3)]
    }


def test_groups_of_pairs_are_followed_where_they_fit():
    config = {"_class_name": "HunyuanDiT2DModel", "num_layers": 10}

    def found(kept, **about):
        return matched_blocks(config, write_origins(None, {"blocks": kept}, {"blocks": 10}, about))

    # Of the pairs (0, 9), (1, 8) and of (2, 7), (3, 6) one each stays, and the middle does.
    assert found([0, 3, 4, 5, 6, 9], groups="1:2") == {"blocks": [(0, 1), (1, 3), (4, 7), (5, 9)]}
    assert found([0, 1, 4, 5, 8, 9], groups="1:2") == found([0, 1, 4, 5, 8, 9])


def test_pairs_after_two_rounds_are_of_the_original():
    first = removed(8, [1, 2, 5, 6], groups="2:4")
    depth = {"transformer_blocks": 4}
    second = write_origins(first, {"transformer_blocks": [0, 3]}, depth, {"groups": "1:2"})
    assert matched_blocks(dit(8), second) == {"transformer_blocks": [(0, 5), (1, 7)]}


def test_a_list_that_is_whole_is_compared_block_by_block():
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 4}
    origins = write_origins(
        None, {"single_transformer_blocks": [1, 2]}, {"single_transformer_blocks": 4},
        {"groups": {"single_transformer_blocks": "1:2"}},
    )  # fmt: skip
    assert matched_blocks(config, origins) == {
        "transformer_blocks": [(0, 0), (1, 1)],
        "single_transformer_blocks": [(0, 1), (1, 3)],
    }


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3"])
def test_outputs_are_those_of_the_image_stream(request, family):
    folder = request.getfixturevalue(f"tiny_{family}")
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    call = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    class_name = model.config["_class_name"]
    with torch.no_grad(), block_outputs(model.module, class_name, {"transformer_blocks": [1]}) as found:
        expected = model.module(**call).sample
        values = found["transformer_blocks", 1]
        assert set(found) == {("transformer_blocks", 1)} and values.shape == (2, 16, 64)
        handle = model.module.transformer_blocks[1].register_forward_hook(_turned)
        assert not torch.allclose(model.module(**call).sample, expected)
        handle.remove()
    assert not model.module.transformer_blocks[1]._forward_hooks


def _turned(module, args, output):
    return (output[0], -output[1]) if isinstance(output, tuple) else -output
