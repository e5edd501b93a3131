"""Scores of answers, against what is computed item by item, without padding and without a cache."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from compress.calibration.answer_scores import Score, Scorer
from compress.calibration.answer_text import generated
from compress.calibration.answer_tokens import Texts, padded, parts_of
from compress.calibration.answers import Item
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.experts import FitnessSettings
from compress.recipes.schema import ModelRef

from ..tiny_moe import make_moe

ITEMS = [
    Item("One day a cat", " saw the big red ball and was very happy", place="x:1"),
    Item("The", " dog", place="x:2"),
    Item("Once upon a time, there was a little", " girl named Lily", place="x:3"),
    Item("One day a ", "cat", place="x:4"),
    Item("They went to the", " park to play", place="x:5"),
]
CHOICES = [
    Item(item.prompt, item.answer, (item.answer, " xzq", " the of and"), 0, item.place) for item in ITEMS
] + [Item("The cat", " xq xq", (" sat", " xq xq", " ran"), 1, "x:6")]


@pytest.fixture(scope="module")
def stories():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())


@pytest.fixture(scope="module")
def tokenizer(stories):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories.source.folder)


@pytest.fixture
def mixture(stories, tmp_path):
    """A mixture of experts with random weights and the stories' tokenizer."""

    def make(class_name="MixtralForCausalLM", **changes):
        folder = make_moe(tmp_path / class_name, class_name, vocab_size=512, **changes)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(stories.source.folder / name, folder / name)
        return open_model(ModelRef(id=str(folder)), progress=SilentProgress())

    return make


def _settings(by, **values):
    return FitnessSettings.model_validate({"by": by, "batch_size": 2, **values})


def _ids(tokenizer, prompt, answer):
    """Return ids of a prompt with its mark, and of an answer."""
    plain = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer, answer)
    ]
    start, both, alone = plain
    behind = both[len(start) :] if both[: len(start)] == start else alone
    return [1, *start], behind


@torch.no_grad()
def _plain(model, tokenizer, prompt, answer):
    """Return the log-likelihood of every token of an answer, and whether it is the first choice."""
    before, behind = _ids(tokenizer, prompt, answer)
    logits = model.module(input_ids=torch.tensor([before + behind]), use_cache=False).logits[0]
    likely = logits.double().log_softmax(dim=-1)[len(before) - 1 : -1]
    return [float(row[id_]) for row, id_ in zip(likely, behind, strict=True)], [
        int(row.argmax()) == id_ for row, id_ in zip(likely, behind, strict=True)
    ]


@torch.no_grad()
def _continued(model, tokenizer, prompt, count):
    """Return greedy text, every step a forward over everything before it."""
    ids = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    for _ in range(count):
        ids.append(int(model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def _loss(model, tokenizer, items=ITEMS):
    found = [value for item in items for value in _plain(model, tokenizer, item.prompt, item.answer)[0]]
    return -sum(found) / len(found)


def test_the_loss_is_the_mean_of_a_token(stories, tokenizer):
    score = Scorer(stories, ITEMS, _settings("loss")).score()
    assert score.loss == pytest.approx(_loss(stories, tokenizer), rel=1e-5)
    assert score.points == -100.0 * score.loss and score.accuracy is None and score.standard_error is None
    assert score.count == len(ITEMS) and 0.5 < score.loss < 5.0


def test_tokens_that_are_the_first_choice(stories, tokenizer):
    score = Scorer(stories, ITEMS, _settings("tokens", tie_break=0.5)).score()
    hits = [_plain(stories, tokenizer, item.prompt, item.answer)[1] for item in ITEMS]
    total, tokens = sum(map(sum, hits)), sum(map(len, hits))
    assert 0 < total < tokens and score.accuracy == pytest.approx(total / tokens)
    assert score.points == pytest.approx(100 * total / tokens - 0.5 * _loss(stories, tokenizer), rel=1e-6)
    # Of a ratio: what every item is off the common share, by the mean length.
    share, mean = total / tokens, tokens / len(hits)
    off = [(sum(row) - share * len(row)) / mean for row in hits]
    assert score.standard_error == pytest.approx(math.sqrt(sum(x * x for x in off)) / len(hits))


def test_the_most_likely_choice(stories, tokenizer):
    score = Scorer(stories, CHOICES, _settings("choices")).score()
    right = []
    for item in CHOICES:
        likely = [sum(_plain(stories, tokenizer, item.prompt, text)[0]) for text in item.choices]
        right.append(max(likely) == likely[item.right])
    share = sum(right) / len(right)
    assert 0 < share < 1 and score.accuracy == pytest.approx(share)
    loss = _loss(stories, tokenizer, CHOICES)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.points == pytest.approx(100 * share - 1e-3 * loss)
    assert score.standard_error == pytest.approx(math.sqrt(share * (1 - share) / len(right)))
    assert score.to_json() == {
        "points": score.points, "accuracy": score.accuracy, "standard_error": score.standard_error,
        "loss": score.loss, "count": 6,
    }  # fmt: skip


def test_generated_text_is_compared_without_space_around_it(stories, tokenizer):
    texts = [_continued(stories, tokenizer, item.prompt, 6) for item in ITEMS]
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    items = [
        Item(item.prompt, f" {text.strip()}\n", place=item.place)
        for item, text in zip(ITEMS, texts, strict=True)
    ]
    items[1] = Item(items[1].prompt, items[1].answer.strip() + "x", place="x:2")
    for size in (1, 2, 8):
        settings = _settings("exact_match", new_tokens=6, tie_break=0.0, batch_size=size)
        score = Scorer(stories, items, settings).score()
        assert score.points == 80.0 and score.accuracy == 0.8 and score.loss is None
        assert score.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    tied = Scorer(stories, items, _settings("exact_match", new_tokens=6)).score()
    assert tied.points == pytest.approx(80.0 - 1e-3 * _loss(stories, tokenizer, items))
    # One token more is other text.
    assert Scorer(stories, items, _settings("exact_match", new_tokens=7)).score().accuracy < 0.8


def test_text_ends_where_the_model_ends_it(stories, tokenizer, tmp_path):
    """Also by an id that only the folder's defaults of generation name, and never drawn by chance."""
    folder = shutil.copytree(stories.source.folder, tmp_path / "m")
    ids = tokenizer(_continued(stories, tokenizer, "The", 6), add_special_tokens=False)["input_ids"]
    end = ids[3]
    defaults = {"eos_token_id": [2, end], "do_sample": True, "temperature": 5.0, "max_new_tokens": 1}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert end not in ids[:3]
    items = [Item("The", tokenizer.decode(ids[:3]), place="x:1"), ITEMS[2]]
    score = Scorer(model, items, _settings("exact_match", new_tokens=20)).score()
    assert score.accuracy == 0.5


def test_sampling_of_the_module_is_switched_off(stories):
    items = ITEMS[:2]
    scorer = Scorer(stories, items, _settings("exact_match", new_tokens=5))
    state = torch.random.get_rng_state()
    wanted = scorer.score()
    kept = stories.module.generation_config
    try:
        stories.module.generation_config = type(kept)(do_sample=True, temperature=9.0, num_beams=3)
        assert scorer.score() == wanted
    finally:
        stories.module.generation_config = kept
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_model_takes_no_more_than_it_has_positions(mixture):
    """32 of them: a prompt of 13 with a long answer wanted gets the 19 that are left."""
    model = mixture()
    asked = []
    stock = model.module.generate

    def generate(**kwargs):
        found = stock(**kwargs)
        asked.append(found.shape[1])
        return found

    model.module.generate = generate
    Scorer(model, [ITEMS[0]], _settings("exact_match", new_tokens=500)).score()
    assert asked == [32]


def test_a_short_prompt_keeps_its_room_beside_a_long_one(mixture, tokenizer):
    model = mixture()
    short, long = "The", "One day a cat saw the big red ball and was very happy"
    items = [Item(text, "x", place="x:1") for text in (long, short)]
    scorer = Scorer(model, items, _settings("exact_match", new_tokens=100))
    room = [32 - len(tokenizer(text)["input_ids"]) for text in (long, short)]
    assert room[0] < 16 < room[1]
    wanted = [
        _continued(model, tokenizer, text, count) for text, count in zip((long, short), room, strict=True)
    ]
    assert generated(model.module, Texts(model), scorer._questions[0], scorer._stops, 100) == wanted


@pytest.mark.parametrize("by", ["exact_match", "tokens", "loss", "choices"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_has_no_points(mixture, by, bad):
    model = mixture()
    items = CHOICES[:2] if by == "choices" else ITEMS[:2]
    for tie_break in (0.0, 1e-3) if by != "loss" else (1e-3,):
        scorer = Scorer(model, items, _settings(by, tie_break=tie_break))
        good = scorer.score()
        weight = model.module.lm_head.weight.data
        kept = weight[7].clone()
        weight[7] = bad
        score = scorer.score()
        weight[7] = kept
        assert score == Score(-math.inf, None, None, 2) and score.to_json()["points"] is None
        assert math.isfinite(good.points) and scorer.score() == good


def test_prompts_have_the_same_tokens_with_every_answer(stories, tokenizer):
    texts = Texts(stories)
    item = Item("One day a ", "cat", ("cat", "dog and", " "), 0, "x:1")
    rows = texts.rows(item, every=True)
    alone = tokenizer("One day a ")["input_ids"]
    assert [row.ids[: row.prompt] for row in rows] == [alone] * 3
    # The seam would make one token of the space and what follows it.
    joined = tokenizer("One day a cat")["input_ids"]
    assert joined[: len(alone)] != alone
    assert rows[0].ids[rows[0].prompt :] == tokenizer("cat", add_special_tokens=False)["input_ids"]
    smooth = texts.rows(ITEMS[0], every=False)[0]
    assert smooth.ids == tokenizer(ITEMS[0].prompt + ITEMS[0].answer)["input_ids"]


def test_plain_forwards_over_all_items(stories, tokenizer):
    for by, items in (("tokens", ITEMS), ("choices", CHOICES), ("exact_match", ITEMS)):
        found = []
        for call in Scorer(stories, items, _settings(by)).prompts():
            stories.module(**call)
            assert len(call["input_ids"]) <= 2 and call["use_cache"] is False
            for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True):
                assert bool((mask[:-1] >= mask[1:]).all())  # padded at the right
                found.append(ids[: int(mask.sum())].tolist())
        pairs = [_ids(tokenizer, item.prompt, item.answer) for item in items]
        assert sorted(found) == sorted(before + behind for before, behind in pairs)


def test_a_text_without_a_prompt_is_judged_behind_its_first_token(stories, tmp_path):
    """A tokenizer that puts nothing before a text leaves the first token without anything before it."""
    folder = shutil.copytree(stories.source.folder, tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    row = Texts(model).rows(Item("", "One day a cat saw"), every=False)[0]
    assert row.prompt == 0
    with torch.no_grad():
        likely = model.module(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    wanted = -sum(float(likely[at, id_]) for at, id_ in enumerate(row.ids[1:])) / (len(row.ids) - 1)
    score = Scorer(model, [Item("", "One day a cat saw")], _settings("loss")).score()
    assert score.loss == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(SourceError, match=r"x:3: .* a token that follows another"):
        Scorer(model, [Item("", "One", place="x:3")], _settings("loss"))
    with pytest.raises(SourceError, match="x:4: prompt: has no token"):
        Scorer(model, [Item("", "One day", place="x:4")], _settings("exact_match"))


def test_items_that_do_not_fit_the_model_are_named(mixture, stories):
    long = Item("One day " * 20, "a cat", place="x:9")
    with pytest.raises(SourceError, match=r"x:9: prompt and answer have \d+ tokens; the model takes 32"):
        Scorer(mixture(), [ITEMS[0], long], _settings("tokens"))
    model = mixture("OlmoeForCausalLM")
    model.config["vocab_size"] = 300
    with pytest.raises(SourceError, match="the model knows 300"):
        Scorer(model, ITEMS, _settings("tokens"))
    with pytest.raises(ValueError, match="no items"):
        Scorer(stories, [], _settings("tokens"))


def test_a_model_without_tokenizer_is_refused(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    with pytest.raises(SourceError, match="the tokenizer cannot be read"):
        Scorer(model, ITEMS, _settings("tokens"))


@pytest.mark.parametrize("class_name", ["GptOssForCausalLM", "DeepseekV2ForCausalLM", "PhimoeForCausalLM"])
def test_mixtures_of_experts_are_scored(mixture, tokenizer, class_name):
    model = mixture(class_name)
    score = Scorer(model, ITEMS, _settings("loss")).score()
    assert score.loss == pytest.approx(_loss(model, tokenizer), rel=1e-4)
    text = _continued(model, tokenizer, "The", 4)
    items = [Item("The", text or "a", place="x:1"), Item("One day a cat", "xx", place="x:2")]
    found = Scorer(model, items, _settings("exact_match", new_tokens=4)).score()
    assert (
        found.accuracy == 0.5
        and found == Scorer(model, items, _settings("exact_match", new_tokens=4)).score()
    )


def test_a_model_in_bfloat16_is_scored_in_float32(mixture):
    model = mixture(dtype="bfloat16")
    scores = [Scorer(model, ITEMS, _settings("tokens")).score() for _ in range(2)]
    assert scores[0] == scores[1] and scores[0].loss is not None
    assert scores[0].loss != torch.tensor(scores[0].loss).bfloat16().item()


def test_batches_of_rows_of_about_one_length():
    lengths = [3, 9, 3, 7, 5]
    assert parts_of(lengths, 2) == [[1, 3], [4, 0], [2]]
    batch = padded([[5], [6, 7, 8], [9]], [1, 2], torch.device("cpu"), left=True)
    assert batch.ids.tolist() == [[6, 7, 8], [0, 0, 9]] and batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    batch = padded([[5], [6, 7, 8], [9]], [1, 2], torch.device("cpu"))
    assert batch.ids.tolist() == [[6, 7, 8], [9, 0, 0]] and batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
