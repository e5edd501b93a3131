"""The largest set of living tensors: worked out by hand, and watched where it is computed."""

from __future__ import annotations

import torch
from compress.compressors.pruning.sam.recomputing import recomputing
from compress.compressors.rehearsal import peak_bytes
from torch.profiler import ProfilerActivity, profile

from ..tiny_sam import tiny_sam

KIB = 1024


def _kibibytes(count, **options):
    return torch.zeros(count, KIB // 4, device="meta", **options)


def test_what_lives_at_the_same_time_counts_and_what_is_gone_does_not():
    def run():
        first = _kibibytes(3)
        second = first + 1  # 6
        del first
        third = torch.cat([second, second])  # 9
        third = third[:1]  # a view keeps all of it
        fourth = _kibibytes(2)  # 11
        fourth.add_(1)
        del second, third
        return _kibibytes(8) + fourth[:1].sum()  # 2 and 8 and a sum and 8

    assert 18 * KIB <= peak_bytes(run) < 19 * KIB


def test_known_tensors_and_their_views_do_not_count_and_gradients_do():
    weight = _kibibytes(4, requires_grad=True)

    def run():
        (weight[:2] * 2.0).sum().backward()

    assert peak_bytes(run, [weight]) >= 4 * KIB
    weight.grad = None
    with torch.no_grad():
        assert peak_bytes(lambda: weight[:2].t(), [weight]) == 0


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    peak_bytes(lambda: torch.randn(4, device="meta"))
    assert torch.equal(before, torch.get_rng_state())


def _watched(run):
    """Return the most bytes that the CPU's allocator gave out at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _encoder(device, recompute, grads):
    """Return what computes an encoder forth and back, and its tensors."""
    # Global layers whose matrices of scores are by far the largest tensors, as they are in the real model.
    module = tiny_sam(image_size=192, global_attn_indexes=[1, 2]).to(device)
    encoder = module.vision_encoder.requires_grad_(grads)
    pixels = torch.zeros(1, 3, 192, 192, device=device)

    def run():
        with torch.set_grad_enabled(grads):
            if recompute:
                with recomputing(encoder):
                    encoder(pixels).last_hidden_state.square().mean().backward()
            elif grads:
                encoder(pixels).last_hidden_state.square().mean().backward()
            else:
                encoder(pixels)

    return run, [*encoder.parameters(), pixels]


def test_an_encoder_takes_what_the_allocator_gives_out():
    for recompute, grads in ((True, True), (False, True), (False, False)):
        run, known = _encoder("meta", recompute, grads)
        planned = peak_bytes(run, known)
        run, tensors = _encoder("cpu", recompute, grads)
        run()  # what is set up once does not count
        for tensor in tensors:
            tensor.grad = None
        seen = _watched(run)
        assert 0.95 * seen <= planned <= 1.1 * seen, (recompute, grads, planned, seen)
