"""What is inherited from the source, and what an untrusted source cannot make us read."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from compress.models.checkpoint import locate
from compress.models.open import read_spec
from compress.models.source_card import SourceCard, read_source_card, snapshot_of
from compress.recipes.schema import ModelRef
from compress.report import describe_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(folder, text=None, repo=None, revision=None):
    folder.mkdir(parents=True, exist_ok=True)
    if text is not None:
        (folder / "README.md").write_text(text, encoding="utf-8")
    return read_source_card([folder], repo, revision)


def test_the_licence_and_the_task_are_read(tmp_path):
    (tmp_path / "LICENSE.md").write_text("all rights")
    (tmp_path / "NOTICE").write_text("by us")
    text = (
        "---\nlicense: other\nlicense_name: 'über: \"a\" b'\nlicense_link: LICENSE.md\n"
        "pipeline_tag: text-to-image\ntags: [a]\n---\n# A model\n"
    )
    card = read(tmp_path, text)
    assert card.to_json() == {
        "license": "other", "license_name": 'über: "a" b', "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
    }  # fmt: skip
    assert [path.name for path in card.texts] == ["LICENSE.md", "NOTICE"]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license:\n- openrail++\n- 7", ["openrail++"]),
        ("license: 7", None),
        ("license: {a: b}", None),
        ("license: ''", None),
        ('license: "a\\nb"', None),
        ("license: " + "x" * 301, None),
        ("license: []", None),
        ("tags: [a]", None),
        ("just text", None),
        ("license: [", None),
        ("license: mit\nlicense: gpl", None),
        ("date: 2000-99-99\nlicense: mit", "mit"),
        ("a: !!bool maybe\nb: !!int ''\nc: !!float _\nlicense: mit", "mit"),
        ("license: !!bool maybe", None),
        ("license: !!int ''", None),
        ("license: !!float _", None),
        ('license: "\\UFFFFFFFF"', None),
        ("<<: {license: mit}", None),
        ("license: mit\nx: " + "a" * 2**16, None),
        ("license: ${HOME}", "${HOME}"),
        ("a: " + "[" * 3000, None),
        ("license: !!python/object/apply:os.getcwd []", None),
    ],
)
def test_only_plain_texts_are_taken_over(tmp_path, block, expected):
    assert read(tmp_path, f"---\n{block}\n---\n").to_json()["license"] == expected


def test_a_block_made_to_cost_time_and_memory_costs_little(tmp_path):
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)]
    text = "\n".join(["---", *lines, "license: mit", "---", ""])
    tracemalloc.start()
    start = time.process_time()
    assert read(tmp_path, text).license == "mit"
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("text", [None, "", "# no block", "---\nlicense: mit\n", "\nlicense: mit\n---\n"])
def test_no_block_is_no_licence(tmp_path, text):
    assert read(tmp_path, text) == SourceCard()


def test_windows_lines_and_a_mark_at_the_start(tmp_path):
    (tmp_path / "README.md").write_bytes("\ufeff---\r\nlicense: mit\r\n---\r\ntext".encode())
    assert read(tmp_path).license == "mit"


def test_what_is_too_large_or_no_text_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n" + b"x" * 2**20)
    (tmp_path / "LICENSE").write_bytes(b"\xff\xfe")
    (tmp_path / "LICENSE.bin").write_text("x")
    (tmp_path / "NOTICE.md").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "notice").mkdir()
    assert read(tmp_path) == SourceCard()


def test_no_link_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").symlink_to(tmp_path / "secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    assert read(model) == SourceCard()


def test_a_folder_of_the_hub_cache_is_known_by_its_path(tmp_path):
    repository = tmp_path / "models--org--na.me"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "transformer").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("---\nlicense: mit\nlicense_link: docs/L.md\n---\n")
    (snapshot / "README.md").symlink_to("../../blobs/abc")
    card = read_source_card([snapshot / "transformer", snapshot], None, None)
    assert (card.base_model, card.license) == ("org/na.me", "mit")
    assert card.license_link == f"https://huggingface.co/org/na.me/blob/{COMMIT}/docs/L.md"
    assert snapshot_of(snapshot) == ("org/na.me", COMMIT)
    assert snapshot_of(tmp_path) is None


@pytest.mark.parametrize(
    ("link", "repo", "expected"),
    [
        ("https://example.org/x", None, "https://example.org/x"),
        ("https://example.org/<b>x", None, None),
        ("https://example.org/x> [y](javascript:z)", "org/name", None),
        ("https://", None, None),
        ("docs/my <b>.md", "org/name", f"https://huggingface.co/org/name/blob/{COMMIT}/docs/my%20%3Cb%3E.md"),
        ("LICENSE", None, None),
        ("LICENSE", "org/name", f"https://huggingface.co/org/name/blob/{COMMIT}/LICENSE"),
        ("../x", "org/name", None),
        ("/etc/x", "org/name", None),
        ("javascript:x", "org/name", None),
    ],
)
def test_a_link_holds_where_the_result_lies(tmp_path, link, repo, expected):
    text = f"---\nlicense: other\nlicense_link: {json.dumps(link)}\n---\n"
    assert read(tmp_path, text, repo, COMMIT).license_link == expected


def test_a_checkpoint_says_it_and_the_report_repeats_it(tiny_dit):
    assert "license" in describe_model(read_spec(ModelRef(id=str(tiny_dit))))
    (tiny_dit / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    ref = ModelRef(id=str(tiny_dit))
    assert locate(ref).card.license == "cc-by-nc-4.0"
    assert describe_model(read_spec(ref))["license"] == "cc-by-nc-4.0"
    assert "base_model" not in describe_model(read_spec(ref))


def test_the_card_of_the_pipeline_counts_for_its_component(make_tiny, tmp_path):
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    make_tiny().rename(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "README.md").write_text("---\nlicense: mit\n---\n")
    (pipeline / "LICENSE").write_text("MIT")
    for ref in (ModelRef(id=str(pipeline)), ModelRef(id=str(pipeline / "transformer"))):
        found = locate(ref).card
        assert found.license == "mit"
        assert [path.name for path in found.texts] == ["LICENSE"]


def test_the_built_in_model_has_its_licence():
    assert read_spec(ModelRef(id="builtin:dit")).source.card.license == "apache-2.0"
