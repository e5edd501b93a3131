"""What is said of exports that store floats, and how the bytes of every format are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compress.evaluation.size import size_metrics
from compress.exporters.card import render_card
from compress.exporters.dequantized_format import layout
from compress.exporters.figures import made_of
from compress.exporters.formats import FORMATS, OF_LANGUAGE_MODELS, predict_bytes, predict_tensor_bytes, write
from compress.runtime.validate import open_folder

from ..small_dits import equal_embedders, opened

NO_SMALLER = "weights are stored as floats, and activations are not quantized: no smaller than"


def test_only_what_was_quantized_is_said_to_be_stored_as_floats(
    make_tiny, make_vit, open_quantized, open_cut, schemes
):
    quantized = open_quantized(make_tiny(), schemes["w4a8"])
    assert layout(quantized).notes == (f"{NO_SMALLER} the original",)
    cut = open_cut(make_vit(), [(3, 16, 96), (3, 16, 96)])
    assert layout(cut).notes == ()
    both = replace(quantized, spec=quantized.spec.evolve(parameters=quantized.spec.parameters + 1))
    assert layout(both).notes == (f"{NO_SMALLER} the pruned model before it was quantized",)


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - OF_LANGUAGE_MODELS))
def test_tensor_bytes_are_those_in_the_files(make_tiny, open_quantized, schemes, tmp_path, format):
    model = open_quantized(make_tiny(dtype="bfloat16"), schemes["torchao" if format == "torchao" else "w4a8"])
    info = write(model, tmp_path, format)
    tensors = open_folder(tmp_path).tensors
    stored = sum(entry.bytes for name, entry in tensors.items() if name not in model.shared)
    assert info.tensor_bytes == stored < info.bytes
    spec = model.spec.evolve(quantization=model.quantization)
    if format == "dequantized":  # its prediction does not ask how layers would be packed
        assert (predict_tensor_bytes(spec, format), predict_bytes(spec, format)) == (stored, info.bytes)


def test_copies_that_stock_loading_wants_are_counted_once_as_of_the_original(make_tiny, tmp_path):
    model = opened(equal_embedders(make_tiny()))
    assert model.shared, "blocks hold copies of one embedder"
    (tmp_path / "out").mkdir()
    info = write(model, tmp_path / "out", "compress")
    names = open_folder(tmp_path / "out").tensors
    assert set(model.shared) <= set(names), "stock classes read every copy"
    assert info.tensor_bytes == model.size().bytes == predict_tensor_bytes(model.spec, "compress")
    assert size_metrics(model, info.tensor_bytes)["size_ratio"] == 1


def _stages(document, *methods):
    return {**document, "stages": [{**document["stages"][0], "method": name} for name in methods]}


def test_samples_are_named_after_all_that_was_done(document):
    assert made_of(document) == "W4A8"
    classes = [{"name": "ff", "kind": "ff", "channels": [4, 2], "members": [], "histogram": None}]
    pruned = _stages(document, "isomorphic", "vidit_q")
    pruned["stages"][0]["details"] = {"classes": classes}
    assert made_of(pruned) == "pruned\nW4A8"
    floats = {**pruned, "evaluation": {**document["evaluation"], "linears": []}}
    assert made_of(floats) == "pruned\nquantized"  # rounded, and stored as floats
    assert made_of({**floats, "stages": pruned["stages"][:1]}) == "pruned"
    assert made_of({**floats, "stages": []}) == "compressed"


def test_the_card_says_what_a_dequantized_export_is_no_smaller_than(document):
    document["export"]["format"] = "dequantized"
    rounded = "- This format stores the rounded weights in floating point"
    assert "smaller nor faster than\n  the original," in render_card(document, [], "")
    pruned = _stages(document, "isomorphic", "finetune")
    pruned["stages"][0]["details"] = {
        "classes": [], "ranking": "isomorphic", "importance": "magnitude", "macs": [2, 1],
        "parameters": [2, 1],
    }  # fmt: skip
    pruned["stages"][1]["details"] = {}
    assert rounded not in render_card(pruned, [], "")
