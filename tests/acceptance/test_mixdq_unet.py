"""MixDQ on text-to-image models as users run it: a U-Net with its convolutions, a PixArt, SDXL's plan."""

from __future__ import annotations

import json
from pathlib import Path

import compress
import pytest
import torch
import yaml
from compress.models.open import read_spec
from compress.models.registry import family_for
from compress.recipes.patterns import select
from compress.recipes.schema import ModelRef
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
SDXL_TURBO = REPOSITORY / "tests" / "models" / "data" / "sdxl_turbo"
UNET, PIXART = "UNet2DConditionModel", "PixArtTransformer2DModel"
SMALL = {"transformer_layers_per_block": 1}
STAGE = {
    "budget": {"mean_bits": 4.0},
    "bits": [2, 4, 8],
    "points": 3,
    "sensitivity": {"samples": 2, "steps": 1},
}
STATIC = {
    **STAGE,
    "budget": {"mean_bits": 5.0},
    "bits": [4, 8],
    "activation_scale": "static",
    "activation_range": "ema",
}


def _embeddings(path, shapes):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for prefix in ("", "negative_"):
        for name, shape in shapes.items():
            tensors[prefix + name] = torch.randn(4, *shape, generator=generator)
    save_file(tensors, path)
    return str(path)


def _run(folder, embeddings, tmp_path, *, guidance, **stage):
    fidelity = {"samples": 2, "steps": 1, "guidance_scale": guidance}
    recipe = {
        "model": str(folder),
        "calibration": {"samples": 4, "steps": 1, "guidance_scale": guidance, "embeddings": embeddings},
        "stages": [{"mixdq": {**STAGE, **stage}}],
        "evaluate": {"fidelity": fidelity, "layers": False},
        "require": {"size_ratio": "<= 0.4"},
        "export": {"path": str(tmp_path / "out")},
    }
    return compress.run(recipe, work_dir=tmp_path / "work")


def _quantized(folder):
    return json.loads((folder / "compress.json").read_text())["quantization"]


def _mean_bits(layers):
    weights = {name: layer["shape"][0] * layer["shape"][1] for name, layer in layers.items()}
    return sum(layers[name]["bits"] * count for name, count in weights.items()) / sum(weights.values())


@pytest.mark.slow
def test_a_unet_is_compressed_with_its_convolutions(make_tiny, tmp_path):
    """One step without guidance, as SDXL-Turbo; the exported folder loads with the stock class."""
    import diffusers

    embeddings = _embeddings(
        tmp_path / "e.safetensors", {"prompt_embeds": (7, 32), "pooled_prompt_embeds": (24,)}
    )
    report = _run(make_tiny(UNET, **SMALL), embeddings, tmp_path, guidance=0.0)
    layers = _quantized(tmp_path / "out")
    family = family_for(UNET)
    module = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
    sites = {site.name: site for site in family.linears(module)}
    left = {"embedder", "head"}
    assert set(layers) == {name for name, site in sites.items() if site.role not in left}
    assert 3.9 < _mean_bits(layers) <= 4.0
    assert len({layer["bits"] for layer in layers.values()}) == 3
    for name, layer in layers.items():
        assert (layer["kernel"] is not None) == (sites[name].kernel is not None)
        expected = None if sites[name].role == "adaln" else "sample" if sites[name].kernel else "token"
        assert (layer["activation"] or {}).get("scope") == expected
    groups = report["stages"][0]["details"]["allocation"]["groups"]
    content = [name for name in layers if ".attn2." in name or ".ff." in name]
    assert {group["name"]: (group["metric"], group["layers"]) for group in groups} == {
        "content": ("ssim", len(content)),
        "quality": ("sqnr_db", len(layers) - len(content)),
    }
    inputs = family.example_inputs(module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(**inputs).sample, compress.load(tmp_path / "out")(**inputs).sample)
    assert report["evaluation"]["metrics"]["max_abs_error"] == 0.0


@pytest.mark.slow
def test_a_pixart_has_the_papers_two_groups(tiny_pixart, tmp_path):
    shapes = {"prompt_embeds": (5, 32), "prompt_attention_mask": (5,)}
    path = _embeddings(tmp_path / "e.safetensors", shapes)
    report = _run(tiny_pixart, path, tmp_path, guidance=2.0)
    layers = _quantized(tmp_path / "out")
    assert 3.9 < _mean_bits(layers) <= 4.0
    groups = report["stages"][0]["details"]["allocation"]["groups"]
    assert {group["name"]: group["metric"] for group in groups} == {"content": "ssim", "quality": "sqnr_db"}


def test_the_shipped_recipe_is_planned_from_configs_alone(shipped_turbo):
    """Of the real model: 4 bits a weight are 1.28 GB; scales and what is not quantized come on top."""
    (stage,) = compress.plan(shipped_turbo)["stages"]
    spec = read_spec(ModelRef(id=str(SDXL_TURBO), dtype="float16"))
    sites = spec.family.linears(spec.meta_module())
    left = [site for site in sites if site.role in ("embedder", "head")]
    weights = {site.name: site.shape[0] * site.shape[1] for site in sites}
    allocated = sum(weights.values()) - sum(weights[site.name] for site in left)
    assert allocated * 4 / 8 == pytest.approx(1.279e9, rel=1e-3)
    scales = 4 * sum(site.shape[0] for site in sites if site not in left)
    around = 2 * (spec.parameters - allocated)  # biases, norms and the layers that are left, in float16
    assert stage["before"]["bytes"] == 2 * 2_567_463_684
    assert 0.99 * allocated * 4 / 8 < stage["after"]["bytes"] - scales - around <= allocated * 4 / 8
    notes = " ".join(stage["notes"])
    assert "788 layers" in notes and "content (420 layers by ssim), quality (368 layers by sqnr_db)" in notes
    assert "up_blocks.2.resnets.2.conv_shortcut" in notes


def test_the_protected_inputs_are_layers_of_the_model(shipped_turbo):
    """The paper's nine: seven in the recipe, and two that a U-Net keeps in floating point by default."""
    spec = read_spec(ModelRef(id=str(SDXL_TURBO)))
    names = [site.name for site in spec.family.linears(spec.meta_module())]
    protected = shipped_turbo["stages"][0]["mixdq"]["fixed_activations"]
    assert len(protected) == 7 and set(protected) <= set(names)
    assert set(protected.values()) == {16}
    assert {"conv_in", "conv_out"} <= set(select(spec.family.default_keep(), names))


@pytest.fixture
def shipped_turbo():
    """The shipped recipe, of a folder that holds the real model's configs only."""
    folder = REPOSITORY / "recipes"
    recipe = yaml.safe_load((folder / "sdxl_turbo_mixdq.yaml").read_text())
    recipe["model"]["id"] = str(SDXL_TURBO)
    recipe["calibration"]["prompts"] = str(folder / recipe["calibration"]["prompts"])
    return recipe


@pytest.mark.slow
def test_a_pipeline_with_the_papers_static_scales(tiny_sdxl, tmp_path):
    """Prompts go through the pipeline's CLIPs, whose first token is the same for all: its keys are stored."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\ngot a cat\ntoad\n")
    recipe = {
        "model": {"id": str(tiny_sdxl), "dtype": "float16"},
        "calibration": {
            "samples": 4, "steps": 1, "guidance_scale": 0.0, "prompts": str(tmp_path / "prompts.txt"),
        },
        "stages": [{"mixdq": STATIC}],
        "evaluate": {"fidelity": {"samples": 2, "steps": 1, "guidance_scale": 0.0}, "layers": False},
        "export": {"path": str(tmp_path / "out")},
    }  # fmt: skip
    report = compress.run(recipe, work_dir=tmp_path / "work")
    layers = _quantized(tmp_path / "out")
    keys = {name for name in layers if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    assert keys and {name for name, layer in layers.items() if layer["first_token"]} == keys
    scopes = {(layer["activation"] or {}).get("scope") for layer in layers.values()}
    assert scopes == {"tensor", None}
    assert report["evaluation"]["metrics"]["max_abs_error"] == 0.0
