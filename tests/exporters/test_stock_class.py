"""The class that a folder is of loads it; one without the head is refused by name."""

from __future__ import annotations

import compress
import pytest
import transformers
from compress.errors import SourceError
from compress.exporters.card import render_card
from compress.exporters.formats import write

VIT = "ViTForImageClassification"


@pytest.fixture
def folder(make_vit, open_cut, tmp_path):
    out = tmp_path / "cut"
    out.mkdir()
    write(open_cut(make_vit(), [(3, 12, 96), (2, 16, 60)]), out, "compress")
    return out


@pytest.mark.parametrize("name", ["AutoModel", "ViTModel"])
def test_a_class_without_the_classifier_is_refused_with_the_right_one(folder, name):
    with pytest.raises(SourceError, match=f"holds a {VIT}, and ViTModel was asked for") as caught:
        getattr(transformers, name).from_pretrained(folder)
    assert "transformers.AutoModelForImageClassification" in caught.value.hint


def test_the_class_itself_and_one_of_a_user_load_it(folder):
    class Own(transformers.ViTForImageClassification):
        pass

    wanted = compress.load(folder).state_dict()
    for loader in (transformers.AutoModelForImageClassification, transformers.ViTForImageClassification, Own):
        found = loader.from_pretrained(folder).state_dict()
        assert all((found[key] == value).all() for key, value in wanted.items())


def test_the_card_says_what_happens_without_the_import(document):
    document["export"]["loads_with"] = [
        "compress.load(path)",
        "import compress; diffusers.X.from_pretrained(path)",
    ]
    said = "Import `compress` before the stock class loads: without it, loading stops"
    assert said in render_card(document, [], "")
    document["export"]["loads_with"] = ["compress.load(path)", "diffusers.X.from_pretrained(path)"]
    assert said not in render_card(document, [], "")
