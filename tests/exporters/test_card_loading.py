"""The code on the card is executed as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from compress.exporters.card import render_card
from compress.exporters.formats import write

FORMATS = ["compress", "torchao", "sdnq", "dequantized"]
SAVE = """
import torch
from safetensors.torch import save_file
inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(model.dtype)
with torch.no_grad():
    output = model(inputs, timestep=torch.tensor([3, 900]), class_labels=torch.tensor([1, 10])).sample
save_file({"output": output.contiguous()}, "output.safetensors")
"""


def blocks_of(card):
    """Return the Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "part"), [("DiTTransformer2DModel", "transformer"), ("UNet2DConditionModel", "unet")]
)
def test_a_pipeline_takes_the_denoiser_by_its_own_name(document, ways, name, part):
    document["export"] |= {"format": "compress", "loads_with": ways["compress"]}
    document["model"]["class"] = name
    assert f"pass it on as `{part}=model`" in render_card(document, [], "")


@pytest.mark.parametrize("place", [None, "org/name"])
@pytest.mark.parametrize("format", FORMATS)
def test_code_for_every_format(document, ways, format, place):
    document["export"] |= {"format": format, "loads_with": ways[format]}
    blocks = blocks_of(render_card(document, [], "", place=place))
    assert len(blocks) == len(ways[format])
    for block, way in zip(blocks, ways[format], strict=True):
        compile(block, "card", "exec")
        *imports, last = block.splitlines()
        expression = way.split("; ")[-1].replace("path", json.dumps(place or "out/dit-w4a8"))
        assert last == f"model = {expression}"
        assert len(imports) <= (3 if format == "sdnq" else 2)
        assert [f"import {name}" in imports for name in ("compress", "diffusers", "torch", "sdnq")] == [
            "compress" in way, "diffusers." in way, "torch." in way, format == "sdnq",
        ]  # fmt: skip


def test_code_beside_the_weights_is_announced_and_was_not_run(document):
    trusting = "transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)"
    document["export"] |= {"format": "compress", "loads_with": ["compress.load(path)", trusting]}
    document["model"] |= {"class": "MixtralForCausalLM", "family": "moe"}
    card = render_card(document, [], "")
    assert "With stock transformers, which runs the code that lies beside the weights; read it first:" in card
    assert "reopened in a fresh process with compress: the largest difference" in card
    assert "The code beside the weights was not run." in card
    assert [block.count("trust_remote_code") for block in blocks_of(card)] == [0, 1]


def test_a_revision_is_part_of_the_code_and_of_the_commands(document):
    card = render_card(document, [], "", place="org/name", revision="v1.0")
    assert 'compress.load("org/name", revision="v1.0")' in card
    assert 'from_pretrained("org/name", revision="v1.0")' in card
    assert "    compress verify org/name@v1.0 --against builtin:dit\n" in card
    assert "    compress run --reproduce org/name@v1.0\n" in card
    assert "dit-w4a8" not in card
    assert card.split("---\n")[2].startswith("\n# name\n")


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compress", "mixed"),
        pytest.param("torchao", "torchao", marks=pytest.mark.slow),
        pytest.param("dequantized", "w4a8", marks=pytest.mark.slow),
    ],
)
def test_the_code_loads_the_model(
    document, make_tiny, open_quantized, schemes, tmp_path, outputs_of, format, scheme
):
    import compress
    import torch
    from safetensors.torch import load_file

    model = open_quantized(make_tiny(dtype="bfloat16"), schemes[scheme])
    folder = tmp_path / "out" / 'a "quoted" näme'
    folder.mkdir(parents=True)
    info = write(model, folder, format)
    document["export"] |= {"path": str(folder), "format": format, "loads_with": info.loads_with}
    blocks = blocks_of(render_card(document, [], ""))
    assert len(blocks) == 2
    outputs = []
    for block in blocks:
        command = [sys.executable, "-c", block + SAVE]
        done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.append(load_file(folder.parent / "output.safetensors")["output"])
    space: dict = {}
    loaded = compress.load(folder)
    exec(SAVE.replace("save_file(", "_ = ("), {"model": loaded}, space)
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], space["output"])
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.slow
def test_the_code_loads_the_model_from_a_repository(
    document, hub, make_tiny, open_quantized, schemes, tmp_path, outputs_of
):
    import compress
    import torch
    from safetensors.torch import load_file

    model = open_quantized(make_tiny(dtype="bfloat16"), schemes["mixed"])
    folder = tmp_path / "out"
    folder.mkdir()
    info = write(model, folder, "compress")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    commit = hub.create("org/name", files)
    hub.commit("org/name", {"config.json": b"{}"})  # main is another one by now
    document["export"] |= {"loads_with": info.loads_with}
    blocks = blocks_of(render_card(document, [], "", place="org/name", revision=commit))
    space: dict = {}
    exec(SAVE.replace("save_file(", "_ = ("), {"model": compress.load(folder)}, space)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        home = tmp_path / f"home{number}"
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", block + SAVE], cwd=home, env=hub.environment(home, hub.reader),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert torch.equal(load_file(home / "output.safetensors")["output"], space["output"])
