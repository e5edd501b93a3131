"""What is measured is what the exported folder computes, in every format."""

from __future__ import annotations

import compress
import pytest
import torch
from compress.evaluation.evaluator import Evaluator
from compress.exporters.formats import FORMATS, OF_LANGUAGE_MODELS, as_shipped, write
from compress.progress import SilentProgress
from compress.recipes.schema import EvaluateSettings

BLOCK = "transformer_blocks.0"
FIDELITY = {"samples": 2, "steps": 2, "batch_size": 2}


@pytest.fixture
def built(make_tiny, open_quantized, schemes):
    def build(name, dtype="bfloat16"):
        return open_quantized(make_tiny(dtype=dtype), schemes[name])

    return build


@pytest.mark.parametrize(
    ("name", "format"), [("mixed", "compress"), ("torchao", "torchao"), ("mixed", "dequantized")]
)
def test_it_computes_what_the_folder_computes(built, outputs_of, tmp_path, name, format):
    model = built(name)
    write(model, tmp_path, format)
    shipped = as_shipped(model, format)
    assert torch.equal(outputs_of(shipped.module), outputs_of(compress.load(tmp_path)))
    assert (shipped is model) == (format == "compress")


def test_sdnq_ships_the_integers_of_the_model_itself(built):
    model = built("w4a8")
    assert as_shipped(model, "sdnq") is model


def test_a_model_without_quantized_layers_is_itself(built):
    model = built("none")
    assert as_shipped(model, "dequantized") is model


def test_only_the_quantized_layers_are_copied(built):
    model = built("torchao")
    shipped = as_shipped(model, "torchao").module
    assert shipped is not model.module
    own = dict(model.module.named_parameters())
    assert all(p is own[name] for name, p in shipped.named_parameters() if name in own)
    assert len(own) > 10


def test_the_schemes_are_those_of_the_file(built):
    model = built("torchao")
    before = dict(model.quantization)
    schemes = as_shipped(model, "torchao").quantization
    assert {(scheme.bits, scheme.symmetric) for scheme in schemes.values()} == {(8, True)}
    assert schemes[f"{BLOCK}.attn1.to_k"].decided_by.endswith("in an int8 container")
    assert "container" not in schemes[f"{BLOCK}.attn1.to_q"].decided_by
    assert as_shipped(model, "dequantized").quantization == {}
    assert model.quantization == before


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - OF_LANGUAGE_MODELS))
def test_the_evaluator_measures_it(make_tiny, open_quantized, schemes, format):
    progress = SilentProgress()
    name = "torchao" if format == "torchao" else "w4a8"
    evaluator = Evaluator(EvaluateSettings(fidelity=FIDELITY, quality=None), 0)
    folder = make_tiny(dtype="bfloat16")
    reference = evaluator.reference(open_quantized(folder, {}), None, progress)
    model = open_quantized(folder, schemes[name])
    ours = evaluator.compare(model, reference, progress)
    theirs = evaluator.compare(as_shipped(model, format), reference, progress)
    assert [row["name"] for row in theirs.details["layers"]] == [
        row["name"] for row in ours.details["layers"]
    ]
    assert (theirs.metrics == ours.metrics) == (format in ("compress", "sdnq"))
    kinds = {row["weight_bits"] for row in theirs.details["linears"] if row["name"].endswith("to_v")}
    assert kinds == {{"torchao": 8, "dequantized": 16}.get(format, 4)}
