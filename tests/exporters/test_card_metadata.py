"""The YAML block says what the Hub reads, whatever names and licences are put into it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compress.exporters.card import render_card
from compress.exporters.card_metadata import front_matter
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

RECIPE = "model: builtin:dit\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def metadata_of(card, tmp_path):
    """Read a card as the Hub's library does, and as another YAML parser does."""
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    found = metadata_load(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == found
    assert YAML(typ="safe").load(card.split("\n---\n")[0].removeprefix("---\n")) == found
    return found


def test_a_built_in_model(document, tmp_path):
    assert metadata_of(render_card(document, [], RECIPE), tmp_path) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["compress", "vidit-q", "w4a8"],
    }


def test_a_hub_model_is_the_base_and_its_licence_and_task_are_kept(document, tmp_path):
    document["model"] |= {
        "id": "org/PixArt", "revision": COMMIT, "base_model": "org/PixArt", "license": "openrail++",
        "class": "PixArtTransformer2DModel", "pipeline_tag": "image-to-image",
    }  # fmt: skip
    metadata = metadata_of(render_card(document, [], RECIPE), tmp_path)
    assert metadata["base_model"] == "org/PixArt"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["pipeline_tag"] == "image-to-image"
    assert metadata["license"] == "openrail++"
    del document["model"]["pipeline_tag"]
    assert metadata_of(render_card(document, [], RECIPE), tmp_path)["pipeline_tag"] == "text-to-image"
    document["model"] |= {"class": "SwinForImageClassification", "family": "swin"}
    found = metadata_of(render_card(document, [], RECIPE), tmp_path)
    assert (found["pipeline_tag"], found["library_name"]) == ("image-classification", "transformers")


@pytest.mark.parametrize("identifier", ["/data/models/x", "./x", "builtin:dit", "a/b/c", "org/folder"])
def test_what_did_not_come_from_the_hub_is_no_base_model(document, tmp_path, identifier):
    document["model"]["id"] = identifier
    assert not {"base_model", "base_model_relation"} & set(
        metadata_of(render_card(document, [], RECIPE), tmp_path)
    )


def test_what_is_not_quantized_is_a_finetune(document, tmp_path):
    document["model"] |= {"id": "org/name", "base_model": "org/name"}
    document["stages"][0]["method"] = "a-pruning-method-of-another-package"
    document["evaluation"]["linears"] = []
    metadata = metadata_of(render_card(document, [], RECIPE), tmp_path)
    assert metadata["base_model_relation"] == "finetune"
    document["stages"].append({"method": "rtn"})  # its weights are stored as floats, but rounded
    metadata = metadata_of(render_card(document, [], RECIPE), tmp_path)
    assert metadata["base_model_relation"] == "quantized"


@pytest.mark.parametrize("license_", [None, "missing"])
def test_an_unknown_licence_is_not_invented(document, tmp_path, license_):
    document["model"]["license"] = license_
    if license_ == "missing":
        del document["model"]["license"]
    card = render_card(document, [], RECIPE)
    assert "license" not in metadata_of(card, tmp_path)
    assert "The licence of `builtin:dit` is not known" in card


@pytest.mark.parametrize(
    ("link", "written"),
    [
        ("https://example.org/x", "Its text: <https://example.org/x>."),
        ("LICENSE.md", "Its text: `LICENSE.md`."),
        ("https://x> <img src=y>", "Its text: `https://x> <img src=y>`."),
    ],
)
def test_a_link_to_the_licence_is_no_markup(document, link, written):
    document["model"].update(license="other", license_name="terms", license_link=link)
    assert written in render_card(document, [], RECIPE)


ODD = "ünï: \"c\" # d 'e' 許諾"
LICENCES = [
    ({"license": "other", "license_name": "stability-ai", "license_link": "LICENSE.md"}, {}),
    ({"license": ["mit", "cc-by-nc-4.0"]}, {}),
    ({"license": "no"}, {}),
    ({"license": "1e3"}, {}),
    ({"license": "2020-01-01"}, {}),
    ({"license": "other", "license_name": ODD, "license_link": "https://example.org/a?b=c&d=%20#e"}, {}),
    ({"license": "Apache-2.0"}, {"license": "apache-2.0"}),
    # The Hub takes its own identifiers only.
    ({"license": ODD}, {"license": "other", "license_name": ODD}),
    ({"license": "- x"}, {"license": "other", "license_name": "- x"}),
    ({"license": "{a: b}"}, {"license": "other", "license_name": "{a: b}"}),
    ({"license": "my own", "license_name": "mine"}, {"license": "other", "license_name": "mine"}),
    ({"license": ["mit", "my own"]}, {"license": "other", "license_name": "mit, my own"}),
]


@pytest.mark.parametrize(("model", "changes"), LICENCES)
def test_odd_licences_are_read_as_they_were_written(document, tmp_path, model, changes):
    document["model"] |= model
    expected = {**model, **changes}
    metadata = metadata_of(render_card(document, [], RECIPE), tmp_path)
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected


def test_the_hub_takes_every_card(document, hub, tmp_path):
    """The Hub library's own validation, which asks the Hub."""
    cards = [
        {"license": None},
        {"base_model": "org/na.me-1_2", "license": "openrail++"},
        # `validate` writes the block anew, in YAML 1.1, where 1e3 needs no quotes.
        *(model for model, _ in LICENCES if model["license"] != "1e3"),
    ]
    for number, model in enumerate(cards):
        card = {**document, "model": {**document["model"], **model}}
        text = render_card(card, [], RECIPE, place="org/name", revision="v1")
        (tmp_path / f"{number}.md").write_text(text, encoding="utf-8")
    (tmp_path / "bad.md").write_text("---\nbase_model_relation: pruned\n---\n")
    code = (
        "import sys\nfrom huggingface_hub import ModelCard\n"
        "for path in sys.argv[2:]: ModelCard.load(path).validate()\n"
        "try: ModelCard.load(sys.argv[1]).validate()\n"
        "except ValueError: print('refused')\n"
    )
    paths = [str(tmp_path / name) for name in ("bad.md", *(f"{number}.md" for number in range(len(cards))))]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], env=hub.environment(tmp_path / "home"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n"
    asked = [row for row in hub.requests() if row["path"] == "/api/validate-yaml"]
    assert len(asked) == len(cards) + 1


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn", "Co"]), min_size=1, max_size=80)
)
def test_any_printable_text_comes_back(text):
    card = front_matter({"license": "other", "license_name": text, "tags": [text]}) + "\n# x\n"
    data = ModelCard(card).data
    assert (data.license_name, data.tags) == (text, [text])


def test_tags_name_methods_scheme_and_package(document, tmp_path):
    document["stages"].insert(0, {"method": "smoothquant"})
    document["export"]["format"] = "torchao"
    tags = metadata_of(render_card(document, [], RECIPE), tmp_path)["tags"]
    assert tags == ["compress", "smoothquant", "vidit-q", "w4a8", "torchao"]
