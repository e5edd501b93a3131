"""Fixtures that all tests share: tiny random models as component folders, shared data, one thread.

Nothing here imports torch until a fixture needs it, so the torch-free tests stay fast.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the first import of torch, and inherited by the processes that tests start: results do not
# depend on the machine's cores, and parallel tests do not fight over them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nor on the terminal, the CI service or the account of whoever starts them.
os.environ["TERM"] = "xterm-256color"
for _name in [
    *("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "CI"),
    *("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME"),
]:
    os.environ.pop(_name, None)

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
    "UNet2DConditionModel": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
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


@pytest.fixture
def tiny_unet(make_tiny: Callable[..., Path]) -> Path:
    """A U-Net as SDXL's: stages of 32 and 64 channels, text of 32, pooled text of 24 and sizes."""
    return make_tiny("UNet2DConditionModel")


@pytest.fixture
def tiny_sdxl(tiny_unet: Path, tmp_path: Path) -> Path:
    """A pipeline folder as SDXL-Turbo's: tokenizers, two CLIPs, U-Net, scheduler; the vae is left out."""
    import json

    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    root = tmp_path / "sdxl"
    turbo = REPOSITORY / "tests" / "models" / "data" / "sdxl_turbo"
    shutil.copytree(turbo / "scheduler", root / "scheduler")
    shutil.copytree(tiny_unet, root / "unet", ignore=shutil.ignore_patterns("scheduler"))
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdegot", *(f"{letter}</w>" for letter in "abcdegot")]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=77)
    config = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, suffix in zip(kinds, ("", "_2"), strict=True):
            tokenizer.save_pretrained(root / f"tokenizer{suffix}")
            kind(CLIPTextConfig(**config, projection_dim=24)).eval().save_pretrained(
                root / f"text_encoder{suffix}"
            )
    index = json.loads((turbo / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": diffusers.__version__}))
    return root


LLM: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral"},
    "Qwen2ForCausalLM": {"model_type": "qwen2"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 16},
}


@pytest.fixture(scope="session")
def llm_config() -> Callable[..., dict[str, Any]]:
    """Return `config(class_name, **changes)`: 48 channels, 4 heads on 2, 2 layers, 60 ids, 32 positions."""

    def make(class_name: str, **changes: Any) -> dict[str, Any]:
        common = {
            "architectures": [class_name], "vocab_size": 60, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32, "tie_word_embeddings": False,
        }  # fmt: skip
        return {**common, **LLM[class_name], **changes}

    return make


@pytest.fixture
def make_llm(llm_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Return `make(class_name, *, seed=0, dtype="float32", name=None, **config)` -> a tiny model's folder."""

    def make(
        class_name: str, *, seed: int = 0, dtype: str = "float32", name: str | None = None, **config: Any
    ) -> Path:
        import torch
        import transformers

        keys = llm_config(class_name, **config)
        arguments = {key: value for key, value in keys.items() if key != "architectures"}
        stock = getattr(transformers, class_name)(transformers.AutoConfig.for_model(**arguments))
        _randomise(stock, seed)
        folder = tmp_path / (name or f"tiny-{keys['model_type']}")
        stock.to(getattr(torch, dtype)).eval().save_pretrained(folder)
        return folder

    return make


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
    """The folder `shared` beside the checkout: data sets; skips where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return folder


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The process behind the fixture `hub`."""
    # Loaded by path: the tests are no package, and the folder `tests` is not on the path of modules.
    folder = Path(__file__).parent / "hub_server"
    spec = importlib.util.spec_from_file_location("hub_server", folder / "__init__.py")
    assert spec and spec.loader
    sys.modules["hub_server"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hub = module.Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture
def hub(hub_process: Any) -> Any:
    """A model hub on loopback, empty: a process that speaks the Hub's protocol (`hub_server/client.py`)."""
    hub_process.reset()
    return hub_process


@pytest.fixture
def at_hub(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The hub, and this process set to it as the writer; waiting between attempts is short."""
    from compress.exporters import hub_transfer
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(hub_transfer, "_FIRST_WAIT_SECONDS", 0.01)
    return hub


@pytest.fixture(scope="session")
def exported_cache(tiny_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a run wrote, once per session; tests get copies from `exported`."""
    import compress

    folder = tmp_path_factory.mktemp("exported")
    recipe = {
        "model": str(tiny_cache("DiTTransformer2DModel", 0, "float32", ())),
        "calibration": {"samples": 1, "steps": 1},
        "stages": [{"rtn": {"weight_bits": 8}}],
        "evaluate": {"fidelity": {"samples": 1, "steps": 1}},
        "require": {"size_ratio": "<= 0.9"},
        "export": {"path": str(folder / "dit-w8")},
    }
    compress.run(recipe, work_dir=folder / "work")
    return folder / "dit-w8"


@pytest.fixture
def exported(exported_cache: Path, tmp_path: Path) -> Path:
    """A folder that a run wrote, with a gate that holds; the test's own, alone in its parent."""
    return Path(shutil.copytree(exported_cache, tmp_path / "exported" / exported_cache.name))


@pytest.fixture(scope="session")
def cpp_compiler() -> str:
    """The C++ compiler that torch.compile needs on a CPU; skips where there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("torch.compile needs a C++ compiler")
    return compiler


def _quantized_layer(linear: Any, scheme: Any, dtype: Any, generator: Any) -> Any:
    """Round a linear layer to nearest on the grid of `scheme`; exercises every kind of tensor."""
    import torch
    from compress.runtime.linear import QuantizedLinear
    from compress.runtime.packing import pack
    from compress.runtime.rotation import Rotation, random_signs

    rows, columns = scheme.shape
    weight, tensors = linear.weight.detach().float(), {}
    if scheme.low_rank:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        tensors["low_rank_up"] = (left * values)[:, : scheme.low_rank].to(dtype).contiguous()
        tensors["low_rank_down"] = right[: scheme.low_rank].to(dtype).contiguous()
        weight = weight - tensors["low_rank_up"].float() @ tensors["low_rank_down"].float()
    if scheme.input_scale:
        tensors["input_scale"] = 0.5 + torch.rand(columns, generator=generator)
        weight = weight / tensors["input_scale"]
    if scheme.rotation:
        tensors["rotation_sign"] = random_signs(columns, generator)
        weight = Rotation(tensors["rotation_sign"], scheme.rotation.block)(weight)
    half = 2 ** (scheme.bits - 1)
    grouped = weight.reshape(rows, columns // (scheme.group_size or columns), -1)
    high, low = grouped.amax(-1).clamp_min(0), grouped.amin(-1).clamp_max(0)
    if scheme.symmetric:
        scale, zero = torch.maximum(high, -low) / (half - 0.5), torch.zeros_like(high)
    else:
        scale = (high - low) / (2 * half - 1)
        zero = torch.round(low / scale) + half
        tensors["zero_point"] = zero.to(torch.int16 if scheme.bits == 8 else torch.int8)
    tensors["scale"] = scale.to(torch.float16 if scheme.group_size else torch.float32)
    level = torch.round(grouped / tensors["scale"].float()[..., None]) - zero[..., None]
    level = level.clamp(-half, half - 1).to(torch.int8).reshape(rows, columns)
    tensors["qweight"] = level if scheme.bits == 8 else pack(level, scheme.bits)
    if scheme.bias:
        tensors["bias"] = linear.bias.detach().to(dtype)
    return QuantizedLinear.from_tensors(scheme, dtype, tensors)


@pytest.fixture
def open_quantized() -> Callable[..., Any]:
    """Return `open_quantized(folder, {pattern: fields of QuantizedModule}, dtype, sizes)` -> OpenModel.

    The first pattern (of `fnmatch`) that fits a linear decides; `activation` and `rotation` are
    given as dicts. No calibration: what is tested is storage, not accuracy. The embedder copies in
    `folder` are made equal first. With `sizes` the model is cut before it is quantized; see `open_cut`.
    """

    def build(
        folder: Path,
        fields: dict[str, dict[str, Any]],
        dtype: str | None = None,
        sizes: list[tuple[int, int, int]] | None = None,
    ) -> Any:
        from fnmatch import fnmatch

        import torch
        from compress.models.open import open_model
        from compress.progress import SilentProgress
        from compress.recipes.schema import ModelRef
        from compress.runtime.manifest import HistoryEntry, QuantizedModule

        from .cut_models import cut_by_hand
        from .small_dits import equal_embedders

        equal_embedders(folder)
        model = open_model(ModelRef(id=str(folder), dtype=dtype), progress=SilentProgress())
        if sizes is not None:
            cut_by_hand(model, sizes)
        for site in model.linears():
            pattern = next((pattern for pattern in fields if fnmatch(site.name, pattern)), None)
            if pattern is None:
                continue
            linear = model.module.get_submodule(site.name)
            scheme = QuantizedModule.model_validate(
                {
                    "shape": site.shape, "bits": 8, "symmetric": True, "bias": linear.bias is not None,
                    "method": "test", "decided_by": pattern, **fields[pattern],
                }
            )  # fmt: skip
            # The same draw for every layer, so that equal copies stay equal.
            layer = _quantized_layer(linear, scheme, model.spec.dtype, torch.Generator().manual_seed(1))
            owner, _, attribute = site.name.rpartition(".")
            setattr(model.module.get_submodule(owner), attribute, layer)
            model.quantization[site.name] = scheme
        entry = HistoryEntry(method="test", settings={}, seed=0, input_hash="0" * 64, versions={})
        model.history.append(entry)
        return model

    return build


@pytest.fixture
def open_cut() -> Callable[..., Any]:
    """Return `open_cut(folder, sizes, dtype=None)` -> OpenModel cut by `cut_models.cut_by_hand`."""

    def build(folder: Path, sizes: list[tuple[int, int, int]], dtype: str | None = None) -> Any:
        from compress.models.open import open_model
        from compress.progress import SilentProgress
        from compress.recipes.schema import ModelRef

        from .cut_models import cut_by_hand

        model = open_model(ModelRef(id=str(folder), dtype=dtype), progress=SilentProgress())
        return cut_by_hand(model, sizes)

    return build


@pytest.fixture
def make_vit(tmp_path: Path) -> Callable[..., Path]:
    """Return `make_vit(class_name)` -> folder of a tiny random classifier, as the library saves it."""
    from .tiny_classifiers import save_classifier

    return lambda class_name="ViTForImageClassification", **changes: save_classifier(
        class_name, tmp_path / f"{class_name}-{len(list(tmp_path.iterdir()))}", **changes
    )
