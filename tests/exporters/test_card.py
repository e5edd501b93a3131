"""The card says what the report says, in a form that a reader and the Hub can use."""

import copy

import pytest
from compress.exporters.card import render_card, write_card
from compress.exporters.fresh_process import NOT_EXECUTED
from compress.exporters.layer_table import average_bits, exceptions, grouped, label_of, pattern_of
from ruamel.yaml import YAML

RECIPE = "model: builtin:dit\nstages:\n  - vidit_q: {weight_bits: 4}\nexport: {path: out/x}\n"


def _row(name, role, block, parameters, bits, activation=None, method="vidit_q", **more):
    return {
        "name": name, "role": role, "block": block, "parameters": parameters, "weight_bits": bits,
        "activation_bits": activation, "group_size": 64, "low_rank": 0, "bytes": parameters * bits // 8,
        "bytes_original": parameters * 2, "method": method, "decided_by": "weight_bits: 4", **more,
    }  # fmt: skip


LINEARS = [
    _row("blocks.0.ff.net.2", "ff.out", 0, 6000, 4, 8),
    _row("blocks.1.ff.net.2", "ff.out", 1, 6000, 4, 8),
    _row("blocks.0.norm1.linear", "adaln", 0, 3000, 8, group_size=None, decided_by="adaln_weight_bits: 8"),
    _row("proj_out", "head", None, 1000, 16, method=None, decided_by="left in floating point"),
]


@pytest.fixture
def document():
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
            "dtype": "bfloat16", "hashes": {"model.safetensors": "ab" * 32}, **size,
        },
        "stages": [{"method": "vidit_q", "seconds": 12.5, "peak_rss_bytes": 987654321, "details": {}}],
        "evaluation": {
            "metrics": {
                "sqnr_db": 21.5, "sqnr_db_worst_step": 17.25, "psnr_db": 30.0, "ssim": 0.95, "bytes": 14000,
                "size_ratio": 0.35, "bits_per_weight": 5.6, "parameters": 20000, "macs": 1234,
                "class_agreement_original": 0.93, "class_agreement": 0.92, "class_agreement_drop": 0.01,
                "fid_original": 3.4, "fid": 3.9, "linear_bytes_ratio": 0.266,
            },
            "linears": LINEARS,
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


def _metadata(card):
    return YAML(typ="safe").load(card.split("---\n")[1])


def test_metadata_is_yaml_that_the_hub_reads(document):
    assert _metadata(render_card(document, [], RECIPE)) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "tags": ["compress", "vidit-q", "w4a8"],
    }


def test_a_hub_model_is_named_as_the_base_and_its_licence_is_kept(document):
    document["model"] |= {"id": "org/PixArt", "class": "PixArtTransformer2DModel", "license": "openrail++"}
    metadata = _metadata(render_card(document, [], RECIPE))
    assert metadata["base_model"] == "org/PixArt"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert metadata["license"] == "openrail++"


def test_an_unknown_licence_is_not_invented(document):
    document["model"]["id"] = "org/name"
    assert "license" not in _metadata(render_card(document, [], RECIPE))


@pytest.mark.parametrize("identifier", ["/data/models/x", "./x", "builtin:dit", "a/b/c"])
def test_what_is_no_hub_id_is_no_base_model(document, identifier):
    document["model"]["id"] = identifier
    assert "base_model" not in _metadata(render_card(document, [], RECIPE))


def test_the_label_never_stands_alone(document):
    card = render_card(document, [], RECIPE)
    # (12000 * 4 + 3000 * 8 + 1000 * 16) / 16000
    assert "**W4A8**: averaged over all linear layers\n**5.50 bits per weight**" in card
    assert "- 8-bit weights: `blocks.*.norm1.linear`" in card
    assert "- 16-bit floating point: `proj_out`" in card


def test_the_recipe_is_verbatim(document):
    assert f"```yaml\n{RECIPE}```" in render_card(document, [], RECIPE)


STOCK = "diffusers.DiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16)"
WAYS = {
    "compress": [
        "compress.load(path)",
        "import compress; diffusers.DiTTransformer2DModel.from_pretrained(path)",
    ],
    "torchao": [STOCK, "compress.load(path)"],
    "sdnq": [STOCK],
    "dequantized": ["compress.load(path)", STOCK],
}


def _blocks(card):
    """Return the Python blocks of a card."""
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


@pytest.mark.parametrize("format", WAYS)
def test_loading_code_for_every_format(document, format):
    document["export"] |= {"format": format, "loads_with": WAYS[format]}
    blocks = _blocks(render_card(document, [], RECIPE))
    assert len(blocks) == len(WAYS[format])
    for block, way in zip(blocks, WAYS[format], strict=True):
        compile(block, "card", "exec")
        expression = way.split("; ")[-1].replace("path", '"out/dit-w4a8"')
        *imports, last = block.splitlines()
        assert last == f"model = {expression}"
        assert [f"import {name}" in imports for name in ("compress", "diffusers", "torch", "sdnq")] == [
            "compress" in way, "diffusers." in way, "torch." in way, format == "sdnq",
        ]  # fmt: skip


def test_what_a_format_changes_is_listed(document):
    notes = ["activations follow another rule", "2 layers were rounded to a symmetric one"]
    document["export"] |= {"format": "torchao", "loads_with": WAYS["torchao"], "notes": notes}
    card = render_card(document, [], RECIPE)
    section = card.split("## What the format changes\n\n")[1].split("\n\n")[0]
    assert section == "- Activations follow another rule.\n- 2 layers were rounded to a symmetric one."


def test_a_folder_that_nothing_could_run_is_not_called_verified(document):
    document["export"] |= {
        "format": "sdnq", "loads_with": WAYS["sdnq"], "verified": False, "max_abs_error": None,
        "notes": ["sdnq has a rule of its own", NOT_EXECUTED],
    }  # fmt: skip
    card = render_card(document, [], RECIPE)
    assert f"**It was not run before it was published**: {NOT_EXECUTED}." in card
    assert card.count(NOT_EXECUTED) == 1
    assert "reopened" not in card
    assert "The verification failed" not in card
    assert "import sdnq\n" in card


def test_a_run_by_sdnq_is_not_called_equal(document):
    document["export"] |= {"format": "sdnq", "loads_with": WAYS["sdnq"], "max_abs_error": 0.0125}
    card = render_card(document, [], RECIPE)
    assert "the largest difference to our own integer runtime was 0.0125" in card


def test_an_absolute_path_is_not_published(document):
    document["export"]["path"] = "/home/someone/out/dit-w4a8"
    card = render_card(document, [], "")
    assert "someone" not in card
    assert 'compress.load("dit-w4a8")' in card


def test_other_formats_state_the_size_of_their_own_file(document):
    document["export"] |= {"format": "dequantized", "bytes": 40100}
    card = render_card(document, [], RECIPE)
    assert "**1.002** of the original" in card
    assert "neither smaller nor faster" in card


def test_figures_and_notes(document):
    card = render_card(document, ["samples.png", "bits.png"], RECIPE)
    assert "](samples.png)" in card
    assert "](bits.png)" in card
    for text in ("| class agreement | 93.0% | 92.0% |", "| feature FID | 3.400 | 3.900 |", "0.056", "92.2%"):
        assert text in card
    assert "| `fid` | <= 3 | 3.9 | **no** |" in card


def test_nothing_that_differs_between_two_runs(document):
    again = copy.deepcopy(document)
    again["stages"][0] |= {"seconds": 99.0, "peak_rss_bytes": 1}
    again["environment"] |= {
        "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1, "finished_at": "2030-01-01T00:00:00Z",
    }  # fmt: skip
    assert render_card(document, [], RECIPE) == render_card(again, [], RECIPE)


def test_a_card_without_measurements(document, tmp_path):
    for key in ("sqnr_db", "sqnr_db_worst_step", "psnr_db", "ssim", "class_agreement", "linear_bytes_ratio"):
        del document["evaluation"]["metrics"][key]
    for key in ("fidelity", "quality"):
        del document["evaluation"][key]
    document["gates"] = []
    write_card(tmp_path, document, [], recipe_text=RECIPE)
    card = (tmp_path / "README.md").read_text()
    assert "SQNR" not in card
    assert "required" not in card


@pytest.mark.parametrize(
    ("error", "words"), [(0.25, "the error is 0.25"), (None, "it does not load, or gives other outputs")]
)
def test_a_failed_verification_is_said(document, error, words):
    notes = ["does not load the 'compress' way in a fresh process: OSError: no"]
    document["export"] |= {"verified": False, "max_abs_error": error, "notes": notes}
    card = render_card(document, [], RECIPE)
    assert f"**The verification failed**: reopened in a fresh process, {words}; see the notes" in card
    assert "- Does not load the 'compress' way in a fresh process: OSError: no.\n" in card


def test_label_is_that_of_most_parameters():
    assert label_of(LINEARS) == "W4A8"
    assert label_of(LINEARS[2:]) == "W8A16"
    assert label_of(LINEARS[3:]) is None
    assert average_bits(LINEARS[:2]) == 4
    assert exceptions(LINEARS[:2], "W4A8") == ["Every linear layer has 4-bit weights."]


def test_a_stored_copy_counts_once():
    copy_ = LINEARS[2] | {"name": "blocks.1.norm1.linear", "copy_of": "blocks.0.norm1.linear", "bytes": 0}
    original = [row | {"copy_of": None} for row in LINEARS]
    assert average_bits([*original, copy_]) == average_bits(LINEARS)
    wide = {**copy_, "parameters": 10**6}
    assert label_of([*original, wide]) == "W4A8"


def test_layers_are_grouped_by_what_they_are_stored_in():
    rows = grouped(LINEARS)
    assert rows[0] == ("blocks.*.ff.net.2", "4", "8", "64 inputs", 2, 6000, "weight_bits: 4")
    assert [row[0] for row in rows] == ["blocks.*.ff.net.2", "blocks.*.norm1.linear", "proj_out"]
    assert pattern_of("transformer_blocks.12.ff.net.0.proj") == "transformer_blocks.*.ff.net.0.proj"
