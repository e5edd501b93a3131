"""Fixtures that all tests share: tiny random models as component folders, shared data, one thread.

Nothing here imports torch until a fixture needs it, so the torch-free tests stay fast.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before the first import of torch, and inherited by the processes that tests start: results do not
# depend on the machine's cores, and parallel tests do not fight over them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parents[1]

TINY: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 64,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 32,
        "use_additional_conditions": False,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    },
}


def _scheduler(class_name: str) -> Any:
    import diffusers

    if class_name.startswith("SD3"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


def _randomise(module: Any, seed: int) -> None:
    """Fill every parameter from its own generator: biases too, so that a lost bias shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            scale = 0.1 if parameter.ndim == 1 else fan_in**-0.5
            offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * values)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build each tiny model once per session; tests get copies from `make_tiny`."""
    made: dict[tuple[Any, ...], Path] = {}

    def build(class_name: str, seed: int, dtype: str, changes: tuple[tuple[str, Any], ...]) -> Path:
        key = (class_name, seed, dtype, changes)
        if key not in made:
            import diffusers
            import torch

            folder = tmp_path_factory.mktemp("tiny") / class_name
            module = getattr(diffusers, class_name)(**{**TINY[class_name], **dict(changes)})
            _randomise(module, seed)
            if dtype != "float32":
                module.to(getattr(torch, dtype))
            module.eval().save_pretrained(folder)
            _scheduler(class_name).save_pretrained(folder / "scheduler")
            made[key] = folder
        return made[key]

    return build


@pytest.fixture
def make_tiny(tiny_cache: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return `make(class_name, *, seed=0, dtype="float32", name=None, **config)` -> component folder.

    The folder (config.json, diffusion_pytorch_model.safetensors, scheduler/) is the test's own: it
    may be damaged. Weights are seeded, 64 channels wide, two blocks.
    """

    def make(
        class_name: str = "DiTTransformer2DModel",
        *,
        seed: int = 0,
        dtype: str = "float32",
        name: str | None = None,
        **config: Any,
    ) -> Path:
        source = tiny_cache(class_name, seed, dtype, tuple(sorted(config.items())))
        target = tmp_path / (name or f"tiny-{class_name.removesuffix('Transformer2DModel').lower()}")
        shutil.copytree(source, target)
        return target

    return make


@pytest.fixture
def tiny_dit(make_tiny: Callable[..., Path]) -> Path:
    """A class-conditional DiT: 64 channels, 2 blocks, 8 x 8 x 4 latents, 10 classes."""
    return make_tiny("DiTTransformer2DModel")


@pytest.fixture
def tiny_pixart(make_tiny: Callable[..., Path]) -> Path:
    """A PixArt: 64 channels, 2 blocks, 32-channel captions."""
    return make_tiny("PixArtTransformer2DModel")


@pytest.fixture
def tiny_sd3(make_tiny: Callable[..., Path]) -> Path:
    """An MMDiT: 64 channels, 2 joint blocks (the last one is context-only)."""
    return make_tiny("SD3Transformer2DModel")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Files of the checkout that git does not ignore, relative to its root.

    In a source archive without git: everything but hidden folders and what builds and runs write.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if found.returncode == 0:
        files = [Path(line) for line in found.stdout.splitlines()]
    else:
        written = re.compile(r"(^|/)(\.(?!ci/)[^/]+|build|dist|out|__pycache__|[^/]+\.egg-info)/")
        files = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*")]
        files = [path for path in files if not written.search(path.as_posix())]
    return sorted(path for path in files if (REPOSITORY / path).is_file())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared` beside the checkout: briefs and data sets; skips where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return folder


@pytest.fixture(scope="session")
def cpp_compiler() -> str:
    """The C++ compiler that torch.compile needs on a CPU; skips where there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("torch.compile needs a C++ compiler")
    return compiler
