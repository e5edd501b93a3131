"""An exported tiny model, and the function that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

W4A8 = {"bits": 4, "symmetric": False, "activation": {"bits": 8}}
W8A8 = {"bits": 8, "activation": {"bits": 8}}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    # Every kind of tensor that the compress format knows, with shared copies among them.
    "mixed": {
        "*.attn1.*": W4A8,
        "*.ff.net.0.*": {**W4A8, "bits": 3, "rotation": {"block": 64}},
        "*.ff.net.2": {**W4A8, "bits": 8, "input_scale": True, "low_rank": 4},
        "*.timestep_embedder.linear_1": {"bits": 6, "group_size": 32},
        "*.norm1.linear": {"bits": 8},
    },
    # What torchao can express.
    "torchao": {
        "*.attn1.to_q": W8A8,
        "*.attn1.to_k": {**W4A8, "bits": 2},
        "*.attn1.*": W4A8,
        "*.ff.net.0.*": {**W8A8, "symmetric": False},
        "*.ff.net.2": {**W8A8, "input_scale": True, "activation": {"bits": 8, "symmetric": False}},
        "*.norm1.linear": {"bits": 8, "input_scale": True},
    },
    "w4a8": {"*.attn1.*": W4A8, "*.ff.*": W4A8},
    "none": {},
}


@pytest.fixture
def schemes() -> dict[str, dict[str, dict[str, Any]]]:
    """Named choices of layers and schemes for `open_quantized`."""
    return SCHEMES


@pytest.fixture
def outputs_of() -> Callable[..., Any]:
    """Return `outputs_of(module, seed=0)` -> the module's output for seeded example inputs."""

    def run(module: Any, seed: int = 0) -> Any:
        import torch
        from compress.models.registry import family_for

        family = family_for(type(module).__name__)
        inputs = family.example_inputs(module, 2, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return module(**inputs, return_dict=False)[0]

    return run


def _row(name, role, block, parameters, bits, activation=None, method="vidit_q", **more):
    return {
        "name": name, "role": role, "block": block, "parameters": parameters, "weight_bits": bits,
        "activation_bits": activation, "group_size": 64, "low_rank": 0, "bytes": parameters * bits // 8,
        "bytes_original": parameters * 2, "method": method, "decided_by": "weight_bits: 4", **more,
    }  # fmt: skip


CARD_LINEARS = [
    _row("blocks.0.ff.net.2", "ff.out", 0, 6000, 4, 8),
    _row("blocks.1.ff.net.2", "ff.out", 1, 6000, 4, 8),
    _row("blocks.0.norm1.linear", "adaln", 0, 3000, 8, group_size=None, decided_by="adaln_weight_bits: 8"),
    _row("proj_out", "head", None, 1000, 16, method=None, decided_by="left in floating point"),
]


@pytest.fixture
def document():
    """A report, as a run writes it."""
    size = {
        "parameters": 20000,
        "parameters_stored": 20000,
        "macs": 1234,
        "bytes": 40000,
        "bits_per_weight": 16.0,
    }
    return {
        "recipe": {},
        "model": {
            "id": "builtin:dit", "revision": None, "class": "DiTTransformer2DModel", "family": "dit",
            "dtype": "bfloat16", "hashes": {"model.safetensors": "ab" * 32}, "license": "apache-2.0", **size,
        },
        "stages": [{"method": "vidit_q", "seconds": 12.5, "peak_rss_bytes": 987654321, "details": {}}],
        "evaluation": {
            "metrics": {
                "sqnr_db": 21.5, "sqnr_db_worst_step": 17.25, "psnr_db": 30.0, "ssim": 0.95, "bytes": 14000,
                "size_ratio": 0.35, "bits_per_weight": 5.6, "parameters": 20000, "macs": 1234,
                "class_agreement_original": 0.93, "class_agreement": 0.92, "class_agreement_drop": 0.01,
                "fid_original": 3.4, "fid": 3.9, "linear_bytes_ratio": 0.266,
            },
            "linears": CARD_LINEARS,
            "fidelity": {"samples": 16, "steps": 20, "guidance_scale": 1.5, "seed": 1, "compared": "images"},
            "quality": {
                "samples": 500, "steps": 10, "guidance_scale": 1.5, "seed": 2,
                "classifier_test_accuracy": 0.922, "fid_floor": 0.056,
            },
        },
        "gates": [
            {"metric": "sqnr_db", "expected": ">= 12", "measured": 21.5, "passed": True},
            {"metric": "fid", "expected": "<= 3", "measured": 3.9, "passed": False},
        ],
        "export": {
            "path": "out/dit-w4a8", "format": "compress", "bytes": 14100, "verified": True,
            "max_abs_error": 0.0,
            "loads_with": ["compress.load(path)", "diffusers.DiTTransformer2DModel.from_pretrained(path)"],
        },
        "environment": {
            "versions": {"compress": "0.1.0", "torch": "2.13.0"}, "platform": "linux-x86_64", "device": "cpu",
            "threads": 2, "seed": 7, "seconds": 111.25, "cpu_seconds": 222.5, "peak_rss_bytes": 987654321,
            "finished_at": "2026-01-02T03:04:05Z",
        },
    }  # fmt: skip


@pytest.fixture
def linears():
    """The rows of linear layers in `document`."""
    return [dict(row) for row in CARD_LINEARS]


@pytest.fixture
def ways():
    """How folders of each format are loaded, as reports say it."""
    stock = "diffusers.DiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16)"
    registered = "import compress; diffusers.DiTTransformer2DModel.from_pretrained(path)"
    return {
        "compress": ["compress.load(path)", registered],
        "torchao": [stock, "compress.load(path)"],
        "sdnq": [stock],
        "dequantized": ["compress.load(path)", stock],
    }


def _member(name, block, before, after, heads=None, head_dim=None):
    return {
        "name": name, "block": block, "before": before, "after": after, "heads": heads, "head_dim": head_dim,
    }  # fmt: skip


def _histogram(removed, kept, low=0.2, high=3.0, bins=24):
    """Scores as two overlapping hills: what is removed is the lower part, cut sharply."""
    import numpy as np

    edges = np.linspace(low, high, bins + 1)
    hill = np.exp(-(((edges[:-1] - 0.9) / 0.5) ** 2))
    counts = np.round(hill / hill.sum() * (removed + kept)).astype(int)
    gone = np.where(np.cumsum(counts) <= removed, counts, 0)
    return {"edges": edges.tolist(), "kept": (counts - gone).tolist(), "removed": gone.tolist()}


@pytest.fixture
def pruning_details():
    """Return `pruning_details(blocks)` -> what a stage that removed channels of a classifier tells."""

    def make(blocks: int = 4) -> dict[str, Any]:
        ff = [_member(f"vit.layers.{i}.mlp.fc1", i, 512, 128 + 32 * (i % 6)) for i in range(blocks)]
        attention = [
            _member(f"vit.layers.{i}.attention.q_proj", i, 128, (4 - i % 2) * 24, [4, 4 - i % 2], [32, 24])
            for i in range(blocks)
        ]
        classes = [
            {"name": "width", "kind": "width", "members": [_member("vit.embeddings", None, 128, 96)]},
            {"name": "ff", "kind": "ff", "members": ff},
            {"name": "attention", "kind": "attention", "members": attention},
        ]
        for entry in classes:
            before, after = (sum(member[key] for member in entry["members"]) for key in ("before", "after"))
            entry |= {"channels": [before, after], "histogram": _histogram(before - after, after)}
        return {
            "classes": classes, "ranking": "isomorphic", "importance": "taylor", "samples": 64,
            "macs": [1_000_000, 500_000], "parameters": [20000, 9000], "paper_macs": [990_000, 495_000],
            "loss": {"name": "cross_entropy", "before": 0.5, "after": 1.25},
            "baselines": {"global": {"loss": 1.75, "macs": 501_000}}, "target": None,
            "ratios": {"width": 0.25}, "selection_file": "pruning.json",
        }  # fmt: skip

    return make


@pytest.fixture
def training_details():
    """What a stage that trained after pruning tells."""
    loss = [[step, 0.4 + 1.2 / (1 + step / 20) + 0.05 * (step % 3)] for step in range(1, 400, 2)]
    return {"steps": 400, "loss": loss, "lr": [5e-4] * len(loss), "images": 5000}
