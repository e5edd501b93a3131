"""The card says what the report says, in a form that a reader and the Hub can use."""

import copy
import hashlib

import pytest
from compress.exporters.card import render_card, write_card
from compress.exporters.fresh_process import NOT_EXECUTED
from compress.exporters.layer_table import (
    average_bits,
    exceptions,
    grouped,
    label_of,
    mixed_label_of,
    pattern_of,
)
from compress.exporters.markdown import code, table

RECIPE = "model: builtin:dit\nstages:\n  - vidit_q: {weight_bits: 4}\nexport: {path: out/x}\n"


def test_the_label_never_stands_alone(document):
    card = render_card(document, [], RECIPE)
    # (12000 * 4 + 3000 * 8 + 1000 * 16) / 16000
    assert "**W4A8**: averaged over all linear layers\n**5.50 bits per weight**" in card
    assert "- 8-bit weights: `blocks.*.norm1.linear`" in card
    assert "- 16-bit floating point: `proj_out`" in card


def test_the_recipe_is_verbatim(document):
    assert f"```yaml\n{RECIPE}```" in render_card(document, [], RECIPE)


def test_what_a_format_changes_is_listed(document, ways):
    notes = ["activations follow another rule", "2 layers were rounded to a symmetric one"]
    document["export"] |= {"format": "torchao", "loads_with": ways["torchao"], "notes": notes}
    card = render_card(document, [], RECIPE)
    section = card.split("## What the format changes\n\n")[1].split("\n\n")[0]
    assert section == "- Activations follow another rule.\n- 2 layers were rounded to a symmetric one."


def test_a_folder_that_nothing_could_run_is_not_called_verified(document, ways):
    document["export"] |= {
        "format": "sdnq", "loads_with": ways["sdnq"], "verified": False, "max_abs_error": None,
        "notes": ["sdnq has a rule of its own", NOT_EXECUTED["sdnq"]],
    }  # fmt: skip
    card = render_card(document, [], RECIPE)
    assert f"**It was not run before it was published**: {NOT_EXECUTED['sdnq']}." in card
    assert card.count(NOT_EXECUTED["sdnq"]) == 1
    assert "reopened" not in card
    assert "The verification failed" not in card
    assert "import sdnq\n" in card


def test_a_run_by_sdnq_is_not_called_equal(document, ways):
    document["export"] |= {"format": "sdnq", "loads_with": ways["sdnq"], "max_abs_error": 0.0125}
    card = render_card(document, [], RECIPE)
    assert "the largest difference to our own integer runtime was 0.0125" in card


def test_an_absolute_path_is_not_published(document):
    document["export"]["path"] = "/home/someone/out/dit-w4a8"
    card = render_card(document, [], "")
    assert "someone" not in card
    assert 'compress.load("dit-w4a8")' in card


def test_every_format_states_the_bytes_of_its_tensors(document):
    document["export"] |= {"format": "dequantized", "bytes": 45000}
    document["evaluation"]["metrics"]["bytes"] = 40100
    card = render_card(document, [], RECIPE)
    assert "**1.002** of the original" in card
    assert "neither smaller nor faster" in card


def test_figures_and_notes(document):
    card = render_card(document, ["samples.png", "bits.png"], RECIPE)
    assert "![Samples of the original and of this checkpoint from equal noise.](samples.png)" in card
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


def test_label_is_that_of_most_parameters(linears):
    assert label_of(linears) == "W4A8"
    assert label_of(linears[2:]) == "W8A16"
    assert label_of(linears[3:]) is None
    assert average_bits(linears[:2]) == 4
    assert exceptions(linears[:2], "W4A8") == ["Every linear layer has 4-bit weights."]


@pytest.mark.parametrize(
    ("mean", "inputs", "label"),
    [(4.0, 8, "W4.0A8"), (3.999, 8, "W4.0A8"), (3.516, 4, "W3.52A4/8"), (2.5, None, "W2.5A8")],
)
def test_a_mixed_model_is_called_by_its_mean(document, mean, inputs, label):
    assert mixed_label_of(document) is None
    stages = [{"details": {"allocation": {"used": {"mean_bits": mean}}}}]
    rows = document["evaluation"]["linears"]
    rows = [*rows, {**rows[0], "name": "blocks.0.more", "activation_bits": inputs}]
    assert mixed_label_of({"stages": stages, "evaluation": {"linears": rows}}) == label
    floating = [row for row in rows if row["method"] is None]
    assert mixed_label_of({"stages": stages, "evaluation": {"linears": floating}}) is None


def test_a_stored_copy_counts_once(linears):
    copy_ = linears[2] | {"name": "blocks.1.norm1.linear", "copy_of": "blocks.0.norm1.linear", "bytes": 0}
    original = [row | {"copy_of": None} for row in linears]
    assert average_bits([*original, copy_]) == average_bits(linears)
    wide = {**copy_, "parameters": 10**6}
    assert label_of([*original, wide]) == "W4A8"


def test_layers_are_grouped_by_what_they_are_stored_in(linears):
    rows = grouped(linears)
    assert rows[0] == ("blocks.*.ff.net.2", "4", "8", "64 inputs", 2, 6000, "weight_bits: 4")
    assert [row[0] for row in rows] == ["blocks.*.ff.net.2", "blocks.*.norm1.linear", "proj_out"]
    assert pattern_of("transformer_blocks.12.ff.net.0.proj") == "transformer_blocks.*.ff.net.0.proj"
    assert pattern_of("model.layers.3.mlp.experts.7.up_proj") == "model.layers.*.mlp.experts.*.up_proj"


def test_a_folder_of_this_machine_is_named_by_its_last_part(document):
    document["model"] |= {"id": "/home/someone/models/tiny dit", "license": None}
    document["export"]["path"] = "/home/someone/out/x"
    card = render_card(document, [], RECIPE)
    assert "someone" not in card
    assert "`tiny dit` (DiTTransformer2DModel" in card
    assert (
        "    compress verify x --against 'tiny dit'\n\nwhere `tiny dit` is the folder of the original."
        in card
    )
    assert "The licence of `tiny dit` is not known" in card


def test_a_folder_of_the_hub_cache_is_that_model(document):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = f"/home/someone/hub/models--org--name/snapshots/{commit}/transformer"
    document["model"] |= {"id": place, "base_model": "org/name"}
    card = render_card(document, [], RECIPE)
    assert f"| source | `org/name` at `{commit}` |" in card
    assert "--against org/name\n" in card
    assert "someone" not in card


def test_a_recipe_with_a_fence_stays_verbatim(document):
    text = RECIPE + "# ```\n# ````yaml\n"
    assert f"`````yaml\n{text}`````\n" in render_card(document, [], text)


def test_provenance_names_what_went_in_and_what_came_out(document):
    document["export"]["files"] = [
        {"name": "a.safetensors", "bytes": 1, "sha256": "cd" * 32},
        {"name": "README.md", "bytes": 1, "sha256": "ef" * 32},
    ]
    card = render_card(document, [], RECIPE)
    assert f"| SHA-256 of the source's `model.safetensors` | `{'ab' * 32}` |" in card
    assert f"| SHA-256 of `a.safetensors` | `{'cd' * 32}` |" in card
    assert "ef" * 32 not in card
    for row in ("| seed | 7 |", "| seed of the fidelity samples | 1 |", "| torch | 2.13.0 |"):
        assert row in card


def test_the_card_shows_the_hashes_of_the_weights_beside_it(document, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    write_card(tmp_path, document, [], recipe_text=RECIPE)
    card = (tmp_path / "README.md").read_text()
    listed = [{"name": "w.safetensors", "sha256": hashlib.sha256(b"weights").hexdigest()}]
    assert listed[0]["sha256"] in card
    assert "files" not in document["export"]
    # The same card comes out of the finished report, which lists the card as well.
    document["export"]["files"] = [*listed, {"name": "README.md", "sha256": "0"}]
    assert render_card(document, [], RECIPE) == card


@pytest.mark.parametrize("text", ["a|b", "a\nb", "`a`", "``"])
def test_no_text_breaks_a_table(text):
    lines = list(table(("x",), [[code(text)]]))
    assert len(lines) == 4
    assert lines[2].count("|") == 2 + text.count("|")
    assert lines[2].count("\\|") == text.count("|")
