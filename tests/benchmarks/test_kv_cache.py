"""The benchmark of caches: absorbed values, bytes of every kind of cache, and what it complains of."""

import copy
import importlib.util
import sys

import pytest
import torch
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef


@pytest.fixture(scope="module")
def bench(repository):
    """The benchmark as a module."""
    folder = repository / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("kv_bench", folder / "kv_cache.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "kv_bench", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def stories():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress()).module


def logits(candidate, ids, prompt):
    candidate.read(ids[:, :prompt])
    with torch.no_grad():
        found = [
            candidate.module(input_ids=part, past_key_values=candidate.cache, use_cache=True).logits[:, -1]
            for part in ids[:, prompt:].split(1, dim=1)
        ]
    return torch.stack(found)


def ours(bench, module, **scheme):
    return bench.compressed(copy.deepcopy(module), (6, 10), None, window=8, **scheme)


@pytest.mark.parametrize("scheme", [{}, {"bits": 4}, {"mode": "block"}])
def test_absorbed_values_change_no_logit(bench, stories, scheme):
    ids = torch.randint(3, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    plain = bench.Candidate("plain", ours(bench, stories, **scheme), bench.new_cache)
    module = bench.absorbing(ours(bench, stories, **scheme))
    absorbed = bench.Candidate("absorbed", module, bench.absorbing_cache)
    one, other = logits(plain, ids, 20), logits(absorbed, ids, 20)
    assert (one - other).abs().max() < 1e-4
    original = logits(bench.Candidate("original", stories, bench.plain_cache), ids, 20)
    assert (one - original).abs().max() > 1e-2, "nothing was compressed"
    assert absorbed.stored_bytes == plain.stored_bytes


def test_bytes_are_those_of_all_tensors(bench, stories):
    ids = torch.randint(3, 500, (1, 50), generator=torch.Generator().manual_seed(0))
    plain = bench.Candidate("plain", stories, bench.plain_cache)
    plain.read(ids)
    assert plain.stored_bytes == 50 * 1280
    small = bench.Candidate("CSKV", ours(bench, stories), bench.new_cache)
    small.read(ids)
    assert small.stored_bytes == 50 * (5 * 16 * 4 + 4) + 8 * 1280
    assert bench.unequal(small, small.stored_bytes, 50) == []
    assert "by the formula" in bench.unequal(small, small.stored_bytes + 1, 50)[0]
    assert bench.unequal(plain, 1, 50) == []
    assert bench.factor_bytes(small.module) == 5 * 96 * 16 * 4 and bench.factor_bytes(stories) == 0


def test_a_difference_of_logits_is_complained_of(bench, stories, monkeypatch):
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    found = bench.candidates(stories, None, 6)
    assert bench.different(found, ids, 39) == []
    monkeypatch.setattr(bench, "MOST_DIFFERENCE", -1.0)
    assert "a logit differs" in bench.different(found, ids, 39)[0]


GOOD = {
    "base": 1.0, "by_rank": (3.0, 2.0, 1.005), "by_window": (2.0, 1.5), "split": (1.3, 1.2, 1.25, 2.0, 3.0),
    "packed": 0.001,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by_rank": (3.0, 3.1, 1.0)}, "rises with the rank"),
        ({"by_window": (1.5, 1.6)}, "rises with the window"),
        ({"by_rank": (3.0, 2.0, 1.2)}, "at full rank"),
        ({"split": (1.1, 1.2, 1.3, 2.0, 3.0)}, "are not the best"),
        ({"packed": 0.02}, "4 bits cost 0.0200"),
    ],
)
def test_each_shortcoming_is_told(bench, change, message):
    assert bench.shortcomings(**GOOD) == []
    (found,) = bench.shortcomings(**{**GOOD, **change})
    assert message in found
