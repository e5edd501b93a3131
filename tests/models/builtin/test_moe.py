"""The shipped mixture of experts is what its folder says it is, and its scripts make it."""

import argparse
import json
import math

import compress
import pytest
import torch
from compress.errors import PlanError
from compress.evaluation.by_task import evaluator_for
from compress.models.builtin.moe_tasks import (
    ITEM_TOKENS,
    PARTS,
    TASKS,
    VOCABULARY,
    digits_of,
    split_numbers,
    texts,
    token_rows,
    write_files,
    write_tokenizer,
)
from compress.models.builtin.train_moe import (
    CONTEXT,
    DATA_SEED,
    FOLDER,
    balance_loss,
    build_model,
    drawn_rows,
    hits,
    save,
    shares,
    train,
    weights_of,
)
from compress.models.experts import keep_experts_of
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef

PARAMETERS = 463_936
"""By hand: 2 * 20 * 64, and 4 layers of 4 * 64 * 64 + 8 * (3 * 64 * 64 + 64) + 2 * 64, and 64."""


def _lines(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stock():
    from transformers import AutoModelForCausalLM

    model, notes = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(FOLDER), local_files_only=True)


def test_the_folder_is_small_and_its_readme_quotes_its_record(record):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_500_000
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for task in TASKS:
        tokens, items = record["token_accuracy"][task], record["item_accuracy"][task]
        assert f"| `{task}` |" in readme and f"| {tokens:.2%} | {items:.2%} |" in readme
        assert tokens >= 0.99
    assert f"--steps {record['steps']} --seed {record['seed']}" in readme
    assert f"{PARAMETERS:,} parameters" in readme


def test_it_opens_with_the_stock_class_at_the_size_that_is_told(stock):
    config = stock.config
    assert type(stock).__name__ == "MixtralForCausalLM"
    assert sum(parameter.numel() for parameter in stock.parameters()) == PARAMETERS
    assert (config.num_local_experts, config.num_experts_per_tok, config.num_hidden_layers) == (8, 2, 4)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}


@pytest.mark.parametrize("task", TASKS)
def test_it_solves_every_task_on_strings_that_it_never_saw(task, stock, tokenizer, record):
    items = [item for item in _lines("answers/test.jsonl") if item["task"] == task]
    whole = [f"{item['prompt']} {item['answer']}" for item in items]
    ids = tokenizer(whole, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = stock(input_ids=ids).logits[:, -7:-1].argmax(dim=-1)
    accuracy = float((first == ids[:, -6:]).double().mean())
    assert accuracy >= 0.99
    assert accuracy == pytest.approx(record["token_accuracy"][task], abs=2e-3)  # another machine rounds


def test_it_writes_the_answer_and_stops(stock, tokenizer):
    items = [item for item in _lines("answers/test.jsonl") if item["task"] == "sort"][:16]
    prompts = tokenizer([item["prompt"] for item in items], return_tensors="pt", padding=True)
    made = stock.generate(**prompts, max_new_tokens=12, do_sample=False)
    written = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(text.strip() == item["answer"] for text, item in zip(written, items, strict=True))
    assert right >= 15 and made.shape[1] == ITEM_TOKENS + 1  # the mark ends it


def test_all_experts_of_every_layer_are_used(stock):
    share = shares(stock, split_numbers(DATA_SEED)[0]["test"][:, :64])
    assert share.shape == (4, 8) and torch.allclose(share.sum(dim=1), torch.ones(4).double())
    assert float(share.min()) > 0.03


def test_its_perplexity_is_what_random_digits_leave_and_fewer_experts_cost_some(tmp_path):
    evaluate = EvaluateSettings.model_validate({"fidelity": {"samples": 8}})
    model = open_model(ModelRef(id="builtin:moe"), progress=SilentProgress())
    evaluator = evaluator_for(model, evaluate, 0, CalibrationSettings(samples=8))
    reference = evaluator.reference(model, tmp_path, SilentProgress())
    keep_experts_of(model, {layer: tuple(range(6)) for layer in range(4)})
    metrics = evaluator.compare(model, reference, SilentProgress()).metrics
    least = math.exp((math.log(len(TASKS)) + 6 * math.log(10)) / ITEM_TOKENS)
    assert least * 0.98 < metrics["perplexity_original"] < least * 1.1
    assert metrics["perplexity_increase"] > 0.05 and metrics["kl"] > 0.05


def test_a_stage_for_other_models_is_refused():
    stage = {"isomorphic": {"target": {"macs": 0.5}}}
    recipe = {"model": "builtin:moe", "stages": [stage], "export": {"path": "out"}}
    with pytest.raises(PlanError, match="does not fit the family moe"):
        compress.plan(recipe)


def test_a_prompt_and_its_answer_are_tokens_of_their_own(tokenizer):
    for item in _lines("answers/train.jsonl")[:: PARTS["train"]]:
        prompt = tokenizer(item["prompt"])["input_ids"]
        answer = tokenizer(item["answer"], add_special_tokens=False)["input_ids"]
        assert len(prompt) == 9 and len(answer) == 6
        for joint in (" ", ""):
            assert tokenizer(item["prompt"] + joint + item["answer"])["input_ids"] == prompt + answer
        assert tokenizer.decode(answer) == item["answer"]
    assert [tokenizer.convert_tokens_to_ids(token) for token in VOCABULARY] == list(range(len(VOCABULARY)))


def test_ids_that_are_trained_on_are_those_of_the_text(tokenizer):
    digits = torch.tensor([[4, 1, 9, 2, 7, 3], [0, 0, 5, 9, 1, 6]])
    for place, task in enumerate(TASKS):
        ids = tokenizer([f"{prompt} {answer}" for prompt, answer in texts(task, digits)])["input_ids"]
        assert token_rows(torch.tensor([place, place]), digits).tolist() == ids


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("copy", "4 1 9 2 7 3"), ("reverse", "3 7 2 9 1 4"), ("sort", "1 2 3 4 7 9"),
        ("add_three", "7 4 2 5 0 6"), ("prefix_sum", "4 5 4 6 3 6"), ("rotate", "1 9 2 7 3 4"),
    ],
)  # fmt: skip
def test_tasks_are_what_they_are_called(task, answer):
    assert list(texts(task, digits_of(torch.tensor([419273])))) == [(f"{task} 4 1 9 2 7 3 =", answer)]


def test_the_files_are_those_that_the_script_writes_and_share_no_string(tmp_path):
    write_files(tmp_path, DATA_SEED)
    write_tokenizer(tmp_path, CONTEXT)
    files = ["answers/train.jsonl", "answers/test.jsonl", "calibration.jsonl"]
    for name in [*files, "tokenizer.json", "tokenizer_config.json"]:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    prompts = [[item.get("prompt", item.get("text")).split()[1:7] for item in _lines(name)] for name in files]
    assert [len(part) for part in prompts] == [6 * PARTS[part] for part in ("train", "test", "text")]
    assert len({tuple(one) for part in prompts for one in part}) == sum(map(len, prompts))
    for name, part in zip(files[:2], ("train", "test"), strict=True):
        counts = [sum(item["task"] == task for item in _lines(name)) for task in TASKS]
        assert counts == [PARTS[part]] * len(TASKS)
    _, rest = split_numbers(DATA_SEED)
    shipped = torch.tensor([int("".join(one)) for part in prompts for one in part])
    assert not torch.isin(shipped, rest).any()


def test_drawn_rows_end_with_a_mark_and_prompts_count_a_tenth():
    ids = drawn_rows(torch.tensor([419273]), 3, 4, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 4 * ITEM_TOKENS + 1) and (ids[:, ::ITEM_TOKENS] == 1).all()
    weights = weights_of(ids)
    assert weights.shape == (3, 4 * ITEM_TOKENS)
    expected = torch.tensor([0.1] * 8 + [1.0] * 7).repeat(3, 4)  # six digits and the mark that follows
    assert torch.equal(weights, expected)


def test_balance_is_least_where_every_item_of_every_layer_is_balanced():
    even = 9 * torch.eye(5).repeat(6, 1)  # two items of 15 tokens
    assert balance_loss((even, even), 1).item() == pytest.approx(1.0)
    # Each item leaves experts out, and both together leave out none.
    low, high = torch.arange(15) % 2, torch.arange(15) % 3 + 2
    assert balance_loss((even[torch.cat([low, high])],) * 2, 1).item() > 1.6
    # The same of two layers.
    assert balance_loss((even[low], even[high]), 1).item() > 1.6


def test_training_follows_its_seed_and_writes_a_folder_that_opens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = argparse.Namespace(seed=0, steps=8, batch=16, lr=3e-3, balance=0.01, out=tmp_path)

    def trained():
        torch.manual_seed(0)
        model = build_model(hidden=16, inner=16, layers=2, heads=2, experts=4)
        return model, train(model, torch.arange(1000), args)

    with torch.random.fork_rng():
        (one, history), (other, again) = trained(), trained()
    assert history == again and [entry["step"] for entry in history] == list(range(1, 9))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    save(one, args, history, seconds=1.0)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = AutoTokenizer.from_pretrained(str(tmp_path))("sort 4 1 9 2 7 3 =", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(stored(input_ids=ids).logits, one(input_ids=ids).logits)
    told = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert set(told["token_accuracy"]) == set(TASKS) and told["steps"] == 8
    assert "| `sort` |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_training_learns():
    args = argparse.Namespace(seed=0, steps=120, batch=64, lr=3e-3, balance=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model()
        history = train(model, split_numbers(0)[1], args)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert float(hits(model, "sort", torch.arange(0, 10**6, 5000)).double().mean()) > 0.3  # of ten digits
