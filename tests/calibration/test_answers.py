"""Questions with answers: read, refused, drawn."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from compress.calibration import answers
from compress.calibration.answers import Item, in_order, read_items, splits_of
from compress.errors import SourceError
from compress.recipes.experts import EepSettings

GOOD = '{"prompt": "1 + 1 =", "answer": " 2"}\n'
CHOICES = '{"prompt": "p", "choices": ["a", "b"], "answer": 1}\n'


def _write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def _items(path, count, *, first=0, task=None):
    rows = [{"prompt": f"q{index}", "answer": f"a{index}"} for index in range(first, first + count)]
    return _write(path, *[row if task is None else {**row, "task": task} for row in rows])


def _settings(**values):
    return EepSettings.model_validate({"keep_experts": 2, **values})


def _answers(folder):
    """Put items of its own into a model's folder."""
    (folder / "answers").mkdir(exist_ok=True)
    _items(folder / "answers" / "train.jsonl", 5, first=100)
    _items(folder / "answers" / "test.jsonl", 5, first=200)
    return folder


def _prompts(items):
    return {item.prompt for item in items}


def test_an_item_says_where_it_stands(tmp_path):
    path = _write(tmp_path / "a.jsonl", "\n", GOOD, "  \n", {"prompt": "", "answer": "x", "more": [1]})
    assert read_items(path, "exact_match", None) == [
        Item("1 + 1 =", " 2", place=f"{path}:2"),
        Item("", "x", place=f"{path}:4"),
    ]


def test_choices_are_read_for_every_judgement(tmp_path):
    path = _write(tmp_path / "a.jsonl", CHOICES)
    wanted = Item("p", "b", ("a", "b"), 1, f"{path}:1")
    assert all(read_items(path, by) == [wanted] for by in ("choices", "exact_match", "tokens", "loss"))


def test_marks_and_other_line_ends_are_no_part_of_an_item(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": "a\u2028b", "answer": "c\x85d"}, ensure_ascii=False)
    path.write_bytes(("\ufeff" + line + "\r\n" + line).encode())
    assert [(item.prompt, item.answer) for item in read_items(path, "loss")] == [("a\u2028b", "c\x85d")] * 2


@pytest.mark.parametrize(
    ("line", "by", "message"),
    [
        ("{prompt}\n", "tokens", "not JSON"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}\n', "tokens", "'prompt' stands twice"),
        ('["prompt"]\n', "tokens", "not a JSON object, but list"),
        ('{"answer": "c"}\n', "tokens", "no key 'prompt'"),
        ('{"prompt": "c"}\n', "tokens", "no key 'answer'"),
        ('{"prompt": 1, "answer": "c"}\n', "tokens", "prompt: '1' is no text"),
        ('{"prompt": "a", "answer": 3}\n', "tokens", "answer: '3' is no text"),
        ('{"prompt": "a", "answer": ""}\n', "loss", "an answer is empty"),
        ('{"prompt": "a", "answer": " \\n"}\n', "exact_match", "an answer is empty"),
        ('{"prompt": "a", "answer": "\\ud800"}\n', "loss", "half of a surrogate pair"),
        (GOOD, "choices", "no list of two or more texts under the key 'choices'"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}\n', "choices", "no list of two or more"),
        ('{"prompt": "a", "choices": ["x", 2], "answer": 0}\n', "choices", "choices[1]: '2' is no text"),
        ('{"prompt": "a", "choices": ["x", "x"], "answer": 0}\n', "choices", "the same text stands twice"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}\n', "tokens", "2 is not the place of one"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": -1}\n', "choices", "-1 is not the place"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": true}\n', "choices", "True is not the place"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": "y"}\n', "choices", "'y' is not the place"),
        ('{"prompt": "a", "choices": ["x", ""], "answer": 0}\n', "choices", "an answer is empty"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, by, message):
    path = _write(tmp_path / "a.jsonl", CHOICES, CHOICES, line)
    with pytest.raises(SourceError) as caught:
        read_items(path, by)
    assert caught.value.message.startswith(f"{path}:3: ") and message in caught.value.message


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "answer": "a"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl:2: not JSON: byte 12 is not UTF-8"):
        read_items(path, "tokens")


def test_files_that_hold_nothing_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_items(tmp_path / "absent.jsonl", "tokens")
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read_items(folder, "tokens")
    with pytest.raises(SourceError, match="holds no item"):
        read_items(_write(tmp_path / "empty.jsonl", "\n \n"), "tokens")
    monkeypatch.setattr(answers, "MAX_ANSWERS_BYTES", 10)
    with pytest.raises(SourceError, match="a file of items has at most 10"):
        read_items(_write(tmp_path / "large.jsonl", GOOD), "tokens")


def test_one_task_of_a_file(tmp_path):
    rows = [{"prompt": str(index), "answer": "a", "task": f"t{index % 2}"} for index in range(4)]
    path = _write(tmp_path / "a.jsonl", *rows, {"prompt": "none", "answer": "a"})
    assert _prompts(read_items(path, "tokens", "t1")) == {"1", "3"}
    assert len(read_items(path, "tokens")) == 5
    with pytest.raises(SourceError, match="no line has the task 't2'") as caught:
        read_items(path, "tokens", "t2")
    assert caught.value.hint == "tasks of its lines: none, t0, t1"


def test_a_malformed_line_of_another_task_is_refused_too(tmp_path):
    path = _write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b", "task": "x"}, '{"task": "y"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl:2: no key 'prompt'"):
        read_items(path, "tokens", "x")


def test_a_text_is_items_without_prompts(tmp_path):
    text = "".join(f"line {index} of a longer text\n" for index in range(60)) + "\n" * 600 + "last"
    path = tmp_path / "a.txt"
    path.write_text(text)
    items = read_items(path, "loss")
    assert "".join(item.answer for item in items).replace("\n", "") == text.replace("\n", "")
    assert all(item.prompt == "" and 0 < len(item.answer) <= answers.TEXT_PIECE for item in items)
    lines = text.split("\n")
    for item in items:
        assert lines[int(item.place.rpartition(":")[2]) - 1].startswith(item.answer.split("\n")[0])
    for by, task, message in (("tokens", None, "no answers for by: tokens"), ("loss", "x", "has no effect")):
        with pytest.raises(SourceError, match=message):
            read_items(path, by, task)
    path.write_text(" \n")
    with pytest.raises(SourceError, match="holds no text"):
        read_items(path, "loss")
    path.write_bytes(b"ab\xff")
    with pytest.raises(SourceError, match="byte 2 is not UTF-8"):
        read_items(path, "loss")


def test_splits_are_drawn_by_seed_and_share_nothing(tmp_path):
    data = _items(tmp_path / "a.jsonl", 30)
    settings = _settings(fitness={"data": data}, splits={"train": 10, "dev": 5, "test": 15})
    found = splits_of(settings, tmp_path, 3)
    sets = [_prompts(part) for part in (found.train, found.dev, found.test)]
    assert [len(part) for part in sets] == [10, 5, 15] and len(set.union(*sets)) == 30
    assert splits_of(settings, tmp_path, 3) == found
    assert splits_of(settings, tmp_path, 4).key != found.key
    own = settings.model_copy(update={"seed": 4})
    assert splits_of(own, tmp_path, 3) == splits_of(settings, tmp_path, 4)


def test_a_draw_is_of_what_items_say(tmp_path):
    """Neither the order of the lines nor their number of times decides it."""
    items = read_items(_items(tmp_path / "a.jsonl", 20), "tokens")
    order = [item.prompt for item in in_order(items, 1)]
    assert [item.prompt for item in in_order([*items[::-1], *items], 1)] == order
    assert sorted(order) == sorted(_prompts(items)) and order != sorted(order)
    given = frozenset([items[0].sha256])
    assert [item.prompt for item in in_order(items, 1, given)] == [name for name in order if name != "q0"]


def test_more_than_there_are_is_refused(tmp_path):
    data = _items(tmp_path / "a.jsonl", 12)
    data.write_text(data.read_text() * 3)
    settings = _settings(fitness={"data": data}, splits={"train": 6, "dev": 5, "test": 2})
    with pytest.raises(SourceError) as caught:
        splits_of(settings, tmp_path, 0)
    assert caught.value.message == (
        f"{data}: 12 different items to draw from; splits ask for 6 for train + 5 for dev + 2 for test"
    )


def test_files_of_their_own_are_taken_as_they_are(tmp_path):
    test = _items(tmp_path / "test.jsonl", 8)
    data = _items(tmp_path / "a.jsonl", 12)
    settings = _settings(fitness={"data": data}, splits={"train": 4, "dev": None, "test": test})
    found = splits_of(settings, tmp_path, 0)
    assert [item.prompt for item in found.test] == [f"q{index}" for index in range(8)]
    # The others of the data are those that are not reported on.
    assert found.dev == () and _prompts(found.train) == {f"q{index}" for index in range(8, 12)}
    others = _items(tmp_path / "b.jsonl", 12, first=20)
    files = {"train": others, "dev": None, "test": test}
    assert len(splits_of(_settings(splits=files), tmp_path, 0).train) == 12


@pytest.mark.parametrize(
    ("more", "told"), [(1, r"train\.jsonl:12\);"), (3, r"train\.jsonl:10\), as are 2 more;")]
)
def test_files_that_share_an_item_are_refused(more, told, tmp_path):
    train = _items(tmp_path / "train.jsonl", 12)
    for name in ("dev", "test"):
        files = {"train": train, "dev": None, name: _items(tmp_path / f"{name}.jsonl", 8, first=12 - more)}
        with pytest.raises(
            SourceError, match=rf"{name}\.jsonl:1: an item of splits\.{name} is one of.*{told}"
        ):
            splits_of(_settings(splits={"test": 1, **files}, fitness={}), _answers(tmp_path), 0)


def test_searches_with_other_counts_report_on_the_same_items(tmp_path):
    data = _items(tmp_path / "a.jsonl", 40)
    many, few = (
        splits_of(
            _settings(fitness={"data": data}, splits={"train": count, "dev": 5, "test": 10}), tmp_path, 3
        )
        for count in (25, 8)
    )
    assert many.test == few.test and many.dev == few.dev and set(few.train) < set(many.train)
    assert len({*many.train, *many.dev, *many.test}) == 40


def test_one_file_is_not_two_splits(tmp_path):
    data = _items(tmp_path / "a.jsonl", 12)
    again = tmp_path / "." / "b" / ".." / "a.jsonl"
    (tmp_path / "b").mkdir()
    with pytest.raises(SourceError, match=r"both splits\.train and splits\.test name it"):
        splits_of(_settings(splits={"train": data, "dev": None, "test": again}), tmp_path, 0)
    with pytest.raises(SourceError, match=r"both splits\.test and fitness\.data name it"):
        splits_of(_settings(fitness={"data": data}, splits={"train": 2, "test": again}), tmp_path, 0)


def test_what_comes_with_the_model(tmp_path):
    own = tmp_path / "answers"
    with pytest.raises(SourceError, match="comes with no items of its own"):
        splits_of(_settings(), tmp_path, 0)
    own.mkdir()
    _items(own / "train.jsonl", 40, task="a")
    with (own / "train.jsonl").open("a") as stream:
        stream.write('{"prompt": "other", "answer": "x", "task": "b"}\n')
    _items(own / "test.jsonl", 10, first=35, task="a")
    splits = {"train": 20, "dev": 15, "test": 10}
    found = splits_of(_settings(fitness={"task": "a"}, splits=splits), tmp_path, 0)
    # Five items of train.jsonl are in test.jsonl, too.
    assert _prompts((*found.train, *found.dev)) == {f"q{index}" for index in range(35)}
    assert _prompts(found.test) == {f"q{index}" for index in range(35, 45)}
    with pytest.raises(SourceError, match=r"train\.jsonl: 35 different items to draw from"):
        splits_of(_settings(fitness={"task": "a"}, splits={**splits, "dev": 16}), tmp_path, 0)
    (own / "test.jsonl").unlink()
    with pytest.raises(SourceError, match=r"answers/test\.jsonl"):
        splits_of(_settings(splits=splits), tmp_path, 0)


def test_the_key_is_of_the_content(tmp_path):
    splits = {"train": 3, "dev": None, "test": 3}
    one, other = (
        _settings(fitness={"data": _items(tmp_path / f"{name}.jsonl", 6)}, splits=splits) for name in "ab"
    )
    assert splits_of(one, tmp_path, 0).key == splits_of(other, tmp_path, 0).key
    _items(tmp_path / "b.jsonl", 6, first=1)
    assert splits_of(one, tmp_path, 0).key != splits_of(other, tmp_path, 0).key


def test_reading_needs_no_torch():
    code = "import sys, compress.calibration.answers; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
