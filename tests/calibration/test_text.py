"""Text for language models: cut, chosen, kept, replayed."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil

import pytest
import torch
from compress.calibration import tokens
from compress.calibration.pieces import pieces_of
from compress.calibration.recording import calls_of, record
from compress.calibration.sensitivity import Candidate, Target, measure
from compress.calibration.text import TextCalibration, TextCalls, record_text, text_key
from compress.calibration.tokens import sequences_of
from compress.errors import SourceError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

WORDS = [
    *("one", "day", "a", "cat", "saw", "the", "big", "red", "ball"),
    *("and", "was", "very", "happy", "to", "play", "with", "it"),
]


@pytest.fixture(scope="module")
def stories():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())


def _settings(**values):
    return CalibrationSettings.model_validate({"samples": 4, "length": 32, "batch_size": 3, **values})


def _text(tmp_path, words=2000, name="text.txt"):
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    path = tmp_path / name
    path.write_text(" ".join(WORDS[index] for index in chosen), encoding="utf-8")
    return path


def _record(model, settings, cache=None, seed=0, fresh=False):
    return record_text(model, settings, seed=seed, cache=cache, progress=SilentProgress(), fresh=fresh)


def test_a_text_is_cut_into_sequences_that_begin_as_the_tokenizer_begins(stories, tmp_path):
    from transformers import AutoTokenizer

    path = _text(tmp_path)
    found = sequences_of(stories, _settings(text=path), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(stories.source.folder, local_files_only=True)
    ids = tokenizer(path.read_text())["input_ids"]
    assert found.prefix == 1 and set(found.ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert found.ids.shape == (len(ids) // 31, 32) and found.first(1).dtype == torch.int64
    assert found.ids[:, 1:].reshape(-1).tolist() == ids[: len(ids) // 31 * 31]


def test_every_document_of_a_jsonl_begins_anew(stories, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one day"}\n\n{"text": "a cat", "more": 1}\n' * 20, encoding="utf-8")
    flat = sequences_of(stories, _settings(text=path), seed=0).ids[:, 1:].reshape(-1).tolist()
    one, two = (_settings_ids(stories, text) for text in ("one day", "a cat"))
    assert flat[: len(one) + len(two)] == one + two and one[0] == two[0] == 1


def test_only_a_newline_ends_a_line_of_a_jsonl(stories, tmp_path):
    path = tmp_path / "text.jsonl"
    texts = ["one day\u2028a cat", "the\x85 ball", "a cat"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines * 9)).encode())
    found = sequences_of(stories, _settings(text=path), seed=0)
    expected = sum((_settings_ids(stories, text) for text in texts), []) * 9
    assert found.ids[:, 1:].reshape(-1).tolist() == expected[: len(found.ids) * 31]


def test_a_long_text_is_tokenized_in_pieces(stories, tmp_path, monkeypatch):
    """Of a tokenizer that cuts at spaces, the pieces together are the whole."""
    words = (" ".join(WORDS[index % 17] for index in range(4000)) + "\n") * 3 + "a" * 700
    path = tmp_path / "text.txt"
    path.write_text(words)
    whole = sequences_of(stories, _settings(text=path), seed=0).ids
    monkeypatch.setattr(tokens, "_PIECE", 500)
    assert "".join(pieces_of(words, 500)) == words
    assert max(map(len, pieces_of(words, 500))) <= 500
    assert {piece[0] for piece in pieces_of(words, 500)} <= {" ", "o", "a"}
    assert {piece[-1] for piece in pieces_of(words, 500)} & {"\n"}
    parts = sequences_of(stories, _settings(text=path), seed=0).ids
    assert whole[0].tolist() == parts[0].tolist() and len(parts) == pytest.approx(len(whole), rel=0.02)


def test_marks_at_the_end_of_a_text_do_not_begin_sequences(stories, tmp_path, monkeypatch):
    folder = shutil.copytree(stories.source.folder, tmp_path / "marked")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer["post_processor"]["single"].append(end)
    tokenizer["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    path = tmp_path / "text.jsonl"
    path.write_text((json.dumps({"text": "one day a cat saw the big red ball"}) + "\n") * 30)
    ids = _settings_ids(model, "one day a cat saw the big red ball")
    assert ids[0] == 1 and ids[-1] == 2
    found = sequences_of(model, _settings(text=path), seed=0)
    assert found.prefix == 1
    assert found.ids[:, 1:].reshape(-1).tolist() == (ids * 30)[: len(found.ids) * 31]
    monkeypatch.setattr(tokens, "_PIECE", 20)
    flat = sequences_of(model, _settings(text=path), seed=0).ids[:, 1:].reshape(-1).tolist()
    assert flat.count(1) == flat.count(2) + (flat[-1] != 2) > 10
    assert all(after == 1 for before, after in itertools.pairwise(flat) if before == 2)


def _settings_ids(model, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.source.folder)(text)["input_ids"]


def test_what_is_calibrated_on_is_not_measured_on(stories, tmp_path):
    found = sequences_of(stories, _settings(text=_text(tmp_path)), seed=3)
    half = len(found.ids) // 2
    first, last = found.first(half), found.last(half, apart_from=half)
    rows = {tuple(row.tolist()) for row in found.ids}
    assert len(rows) == len(found.ids), "the random text repeats itself"
    assert not {tuple(row.tolist()) for row in first} & {tuple(row.tolist()) for row in last}
    with pytest.raises(
        SourceError, match=f"makes {len(found.ids)} sequences of 32 tokens; .* besides the {half}"
    ):
        found.last(len(found.ids) - half + 1, apart_from=half)
    with pytest.raises(SourceError, match="sequences are asked for"):
        found.first(len(found.ids) + 1)


def test_the_seed_chooses(stories):
    settings = _settings()
    one, again, other = (_record(stories, settings, seed=seed).ids() for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_choice_is_kept_by_content(stories, tmp_path):
    path, cache = _text(tmp_path), tmp_path / "cache"
    first = _record(stories, _settings(text=path), cache)
    written = first.file.stat().st_mtime_ns
    moved = tmp_path / "elsewhere.txt"
    shutil.copy(path, moved)
    again = _record(stories, _settings(text=moved), cache)
    assert again.file == first.file and again.file.stat().st_mtime_ns == written
    save_file({"input_ids": torch.zeros(4, 32, dtype=torch.int64)}, first.file)
    assert torch.equal(_record(stories, _settings(text=path), cache).ids(), again.ids())
    assert _record(stories, _settings(text=path), cache).ids().any()
    folder = shutil.copytree(stories.source.folder, tmp_path / "copy")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    changed = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    others = [
        text_key(changed, _settings(text=path), 0),
        text_key(stories, _settings(text=_text(tmp_path, 1999, "other.txt")), 0),
        text_key(stories, _settings(text=path, length=33), 0),
        text_key(stories, _settings(text=path), 1),
        first.key,
    ]
    assert len(set(others)) == 5


def test_observers_see_every_token_of_every_layer(stories):
    calibration = _record(stories, _settings())
    seen: dict[str, list[torch.Tensor]] = {}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.4.mlp.down_proj", "lm_head"]
    calibration.observe(
        stories,
        names,
        lambda name, x, times: seen.setdefault(name, []).append(torch.cat([x.flatten(), times])),
        SilentProgress(),
    )
    assert {name: [len(part) for part in parts] for name, parts in seen.items()} == {
        names[0]: [3 * 32 * 64 + 3, 32 * 64 + 1],
        names[1]: [3 * 32 * 172 + 3, 32 * 172 + 1],
        names[2]: [3 * 32 * 64 + 3, 32 * 64 + 1],
    }
    assert calibration.count() == 2
    embedded = stories.module.model.embed_tokens(calibration.ids()[:3])
    normed = stories.module.model.layers[0].input_layernorm(embedded)
    assert torch.equal(seen[names[0]][0][:-3], normed.flatten())
    assert not any(module._forward_pre_hooks for module in stories.module.modules())
    with pytest.raises(StageError, match="the model has no such layer"):
        calibration.observe(stories, ["model.layers.9"], lambda *_: None, SilentProgress())
    with pytest.raises(StageError, match="no forward reaches this layer"):
        calibration.observe(stories, ["model.layers"], lambda *_: None, SilentProgress())


def test_calls_are_single_sequences_of_those_recorded(stories):
    calibration = record(stories, _settings(), seed=0, cache=None, progress=SilentProgress())
    assert isinstance(calibration, TextCalibration)
    calls = calls_of(calibration, steps=8, samples=2)
    rest = calls_of(calibration, steps=8, start=2)
    together = torch.cat([call["input_ids"] for part in (calls, rest) for call in part])
    assert torch.equal(together, calibration.ids())
    assert len({calls.key, rest.key, TextCalls(calibration).key}) == 3
    assert list(pickle.loads(pickle.dumps(calls)))[1]["use_cache"] is False
    for wrong in ({"samples": 0}, {"start": -1}):
        with pytest.raises(ValueError, match="are none"):
            TextCalls(calibration, **wrong)


def test_sensitivities_are_measured_on_text(stories, tmp_path):
    """The first block, one in the middle and the head run from where they are entered."""
    from contextlib import contextmanager

    @contextmanager
    def halved(name, linear, candidate):
        before = linear.weight
        linear.weight = torch.nn.Parameter(before * (1 - 2.0**-candidate.bits), requires_grad=False)
        try:
            yield
        finally:
            linear.weight = before

    candidates = tuple(Candidate("weight", f"w{bits}", bits) for bits in (2, 8))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj", "model.layers.4.mlp.down_proj"]
    calls = calls_of(_record(stories, _settings()), steps=1, samples=2)
    table = measure(
        stories, calls, [Target(name, candidates) for name in names], halved, path=tmp_path / "table.jsonl",
        settings={}, progress=SilentProgress(),
    )  # fmt: skip
    rows = {(row.layer, row.bits): row.loss for row in table.rows}
    inputs = torch.cat([call["input_ids"] for call in calls])
    with torch.no_grad():
        wanted = stories.module(inputs).logits.double()
        for name in names:
            with halved(name, stories.module.get_submodule(name), candidates[0]):
                given = stories.module(inputs).logits.double()
            loss = float((given - wanted).square().sum() / wanted.square().sum())
            assert rows[name, 2] == pytest.approx(loss, rel=1e-3)
            assert rows[name, 8] < rows[name, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\nno json\n', r"a\.jsonl:2: not JSON"),
        ("A.JSONL", b"no json", r"A\.JSONL:1: not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl:1: no text under the key 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: no text under the key 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', r"a\.jsonl: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "ab \\ud800"}', r"a\.jsonl:1: text: character 3 is one half"),
        ("a.txt", b"short", "makes 0 sequences of 32 tokens; 4 sequences are asked for"),
        ("a.txt", b"", "makes 0 sequences"),
    ],
)
def test_a_text_of_no_use_is_refused(name, content, message, stories, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        _record(stories, _settings(text=tmp_path / name))


def test_a_text_that_is_too_long_is_refused(stories, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.calibration.tokens.MAX_TEXT_BYTES", 1000)
    with pytest.raises(SourceError, match="has at most 1000"):
        _record(stories, _settings(text=_text(tmp_path)))
    with pytest.raises(SourceError, match=r"nowhere\.txt: cannot be read"):
        _record(stories, _settings(text=tmp_path / "nowhere.txt"))


def test_a_folder_without_text_or_tokenizer_says_so(make_llm, tmp_path):
    folder = make_llm("LlamaForCausalLM")
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    with pytest.raises(SourceError, match="none is named") as found:
        _record(model, _settings())
    assert "text: FILE.txt" in str(found.value.hint)
    path = _text(tmp_path)
    with pytest.raises(SourceError, match="the tokenizer cannot be read"):
        _record(model, _settings(text=path))


def test_a_tokenizer_of_another_model_is_refused(make_llm, stories, tmp_path):
    folder = make_llm("LlamaForCausalLM")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories.source.folder / name, folder / name)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    with pytest.raises(SourceError, match="the model knows 60"):
        _record(model, _settings(text=_text(tmp_path)))


def test_a_tokenizer_with_code_of_its_own_is_not_run(make_llm, stories, tmp_path):
    folder = make_llm("LlamaForCausalLM", vocab_size=512)
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    with pytest.raises(SourceError, match="the tokenizer cannot be read"):
        _record(model, _settings(text=_text(tmp_path)))
