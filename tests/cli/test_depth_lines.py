"""What depth pruning shows on a terminal, and `inspect` of a folder that lost blocks."""

from __future__ import annotations

import copy
import json

import pytest
from compress.cli import _render
from compress.cli._tables import to_plain
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.exporters.inspection import inspect
from compress.models.open import open_model
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.manifest import HistoryEntry

LIST = "transformer_blocks"
CHOICES = [
    {"blocks": LIST, "of": [0, 1], "kept": [0], "confidence": 0.9712},
    {"blocks": LIST, "of": [2, 3], "kept": [2], "confidence": 0.9944},
    {"blocks": LIST, "of": [4, 5], "kept": [5], "confidence": 1.0},
    {"blocks": LIST, "of": [6, 7], "kept": [7], "confidence": 0.9901},
]
LEARNED = {"groups": "1:2", "choices": CHOICES, "blocks": {LIST: {"of": 8, "kept": [0, 2, 5, 7]}}}
MEASURED = {
    "sqnr_db": 6.5, "psnr_db": 12.25, "class_agreement": 0.25, "class_agreement_original": 0.93,
    "fid": 60.5, "fid_original": 3.4,
}  # fmt: skip


def shown(report, method, details):
    document = copy.deepcopy(report)
    document["stages"] = [{**report["stages"][0], "method": method, "details": details}]
    return "\n".join(to_plain(section) for section in _render.report(document))


def test_a_learned_choice_is_a_line_and_a_table_of_its_groups(report):
    text = shown(report, "tinyfusion", {**LEARNED, "measured": MEASURED})
    assert "tinyfusion: kept 4 of 8 blocks: 0, 2, 5, 7 (least confidence 0.97)\n" in text
    assert "4, 5             5     1.00" in text
    assert (
        "tinyfusion: right after it: class agreement 25.0%, of the original 93.0%, feature FID 60.500, of the"
        " original 3.400, SQNR 6.50 dB, PSNR of samples 12.25 dB\n" in text
    )


def test_every_list_has_its_own_confidence_and_groups_name_their_list(report):
    single = {"blocks": "single", "of": [0, 1], "kept": [1], "confidence": 0.27}
    blocks = {**LEARNED["blocks"], "single": {"of": 2, "kept": [1]}}
    text = shown(report, "tinyfusion", {"choices": [*CHOICES, single], "blocks": blocks})
    assert f"tinyfusion: {LIST}: kept 4 of 8 blocks: 0, 2, 5, 7 (least confidence 0.97)\n" in text
    assert "tinyfusion: single: kept 1 of 2 blocks: 1 (least confidence 0.27)\n" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"{LIST} 0, 1 0 0.97" in lines and "single 0, 1 1 0.27" in lines


def test_a_rule_is_named_and_lists_are_told_apart(report):
    blocks = {
        LIST: {"of": 8, "kept": [0, 7]},
        "single": {"of": 3, "kept": [1]},
        "whole": {"of": 1, "kept": [0]},
    }
    text = shown(report, "depth", {"by": "shortgpt", "blocks": blocks})
    assert f"depth: {LIST}: kept 2 of 8 blocks: 0, 7, by shortgpt\n" in text
    assert "depth: single: kept 1 of 3 blocks: 1, by shortgpt\n" in text
    assert "whole" not in text


def _folder(make_tiny, path, *rounds):
    source = make_tiny("DiTTransformer2DModel", num_layers=8)
    model = open_model(ModelRef(id=str(source)), progress=SilentProgress())
    for kept in rounds:
        keep_blocks(model, {LIST: kept}, {"method": "depth"})
    path.mkdir()
    write(model, path, "compress")
    return model


def test_inspect_says_which_blocks_of_the_original_are_left(call, make_tiny, tmp_path):
    _folder(make_tiny, tmp_path / "shallow", [0, 2, 3, 5, 7], [0, 1, 4])
    result = call("inspect", "shallow")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "depth 3 of 8 blocks of the original: 0, 2, 7" in lines
    found = call("inspect", "shallow", "--json").json["depth"]
    assert found == {LIST: {"of": 8, "kept": [0, 2, 7]}}


def test_inspect_of_a_whole_model_says_nothing_of_depth(call, make_tiny, tmp_path):
    source = make_tiny("DiTTransformer2DModel")
    assert inspect(source)["depth"] == {}
    assert "depth" not in call("inspect", str(source)).out


def test_a_damaged_file_of_origins_is_an_error(make_tiny, tmp_path):
    _folder(make_tiny, tmp_path / "shallow", [0, 2])
    path = tmp_path / "shallow" / "depth.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "blocks": {LIST: {"of": 1, "kept": [4]}}}))
    with pytest.raises(SourceError, match=r"depth\.json"):
        inspect(tmp_path / "shallow")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"\x1b[31mred": {"of": 8, "kept": [0, 2]}},
            r"2 blocks of '\x1b[31mred' are left, and the model has no",
        ),
        (
            {LIST: {"of": 8, "kept": [0, 2, 5]}},
            "3 blocks of 'transformer_blocks' are left, and the model has 2",
        ),
        (
            {f"{LIST}.0": {"of": 8, "kept": [0]}},
            "1 blocks of 'transformer_blocks.0' are left, and the model has",
        ),
    ],
)
def test_inspect_says_where_model_and_file_disagree(blocks, message, call, make_tiny, tmp_path):
    _folder(make_tiny, tmp_path / "shallow", [0, 2])
    path = tmp_path / "shallow" / "depth.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "blocks": blocks}))
    with pytest.raises(SourceError) as caught:
        inspect(tmp_path / "shallow")
    assert caught.value.message.startswith(f"{path}: ") and message in caught.value.message
    result = call("inspect", "shallow")
    assert result.code == 4 and "\x1b" not in result.out + result.err


def test_inspect_shows_the_stage_of_the_history(call, make_tiny, tmp_path):
    model = _folder(make_tiny, tmp_path / "first", [0, 2, 5, 7])
    model.history = [
        HistoryEntry(method="tinyfusion", settings={"groups": "1:2"}, seed=3, input_hash="0" * 64,
                     versions={"torch": "2"}, details=LEARNED)
    ]  # fmt: skip
    (tmp_path / "second").mkdir()
    write(model, tmp_path / "second", "compress")
    out = " ".join(call("inspect", "second").out.split())
    assert "tinyfusion: kept 4 of 8 blocks: 0, 2, 5, 7 (least confidence 0.97)" in out
