"""Expert pruning that cannot be, as a user meets it: refused before a weight is read, with place and hint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compress
import pytest
from compress.errors import CompressError, PlanError, RecipeError, SourceError

from ..tiny_items import make_asked_moe, write_items
from ..tiny_moe import make_moe

FITNESS = {"by": "tokens"}
SPLITS = {"train": 10, "test": 10}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return make_asked_moe(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return `refused(model, settings) -> the error of a run`, which has opened no model."""

    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("compress.execution.open_model", never)

    def run(model: Path | str, settings: dict[str, Any], **keys: Any) -> CompressError:
        recipe = {
            "model": str(model),
            "stages": [{"eep": settings}],
            "evaluate": {"fidelity": None},
            "export": {"path": str(tmp_path / "out")},
            **keys,
        }
        with pytest.raises(CompressError) as caught:
            compress.run(recipe, work_dir=tmp_path / "work")
        assert not (tmp_path / "out").exists()
        return caught.value

    return run


def search(**changes: Any) -> dict[str, Any]:
    return {"keep_experts": 4, "fitness": FITNESS, "splits": SPLITS, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"keep_experts": 2, "active_experts": 3},
            RecipeError,
            "active_experts 3 is more than keep_experts 2",
        ),
        ({"keep_experts": 1}, PlanError, "a token goes through 2|2 experts per token|2 of 1"),
        ({"keep_experts": 7}, PlanError, "7 are to stay, but a layer has 6 experts"),
        ({"keep_experts": 0.4}, PlanError, "0.4 of 6 experts is 2.4, no whole number"),
        ({"active_experts": 3}, PlanError, "3 experts per token; the model was trained with 2"),
        ({"groups": 9}, PlanError, "9 groups, but 3 layers have experts"),
        (
            {"experts": {"0": [0, 1], "1": [0, 1]}, "keep_experts": None},
            RecipeError,
            "no effect with experts",
        ),
    ],
)
def test_counts_that_do_not_fit(changes, error, message, mixtral, refused):
    caught = refused(mixtral, search(**changes))
    assert isinstance(caught, error)
    assert re.search(message, str(caught)), caught


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"0": [0, 1], "1": [0, 1]}, "nothing is said of the experts of layer 2"),
        ({"0": [0, 1], "1": [0, 1], "2": [0, 6]}, "goes beyond the experts, which are 0 to 5"),
        ({"0": [0, 1], "1": [0, 1], "2": [0, 1], "3": [0, 1]}, "layer 3 has no experts"),
        ({"0": [0], "1": [0], "2": [0]}, "more|2 experts|active"),
    ],
)
def test_given_experts_that_do_not_fit(experts, message, mixtral, refused):
    caught = refused(mixtral, {"experts": experts})
    assert isinstance(caught, PlanError)
    assert re.search(message, str(caught)), caught


def test_a_router_whose_groups_would_be_uneven(tmp_path, refused):
    folder = make_asked_moe(tmp_path / "deepseek", "DeepseekV3ForCausalLM")
    caught = refused(folder, search(keep_experts=5))
    assert isinstance(caught, PlanError) and "the router has 2 groups of experts" in caught.message
    assert caught.hint == "keep a multiple of 2"
    uneven = {str(layer): [0, 1, 2, 3, 4, 5] for layer in (1, 2)}
    caught = refused(folder, {"experts": uneven})
    assert isinstance(caught, PlanError) and "equally many" in caught.message


@pytest.mark.parametrize("method", ["mxfp4", "bitsandbytes"])
def test_quantized_experts(method, tmp_path, refused):
    folder = make_asked_moe(tmp_path / "quantized", "GptOssForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    caught = refused(folder, search())
    assert isinstance(caught, SourceError) and "already quantized" in caught.message
    assert caught.hint is not None and "quantized experts cannot be mixed" in caught.hint


def test_a_model_without_experts(refused):
    caught = refused("builtin:stories", search())
    assert isinstance(caught, PlanError) and "does not fit the family llm" in caught.message
    assert "eep fits the families moe" in str(caught.hint)


def test_items_that_are_not_there(tmp_path, refused):
    folder = make_moe(tmp_path / "plain", "MixtralForCausalLM")
    caught = refused(folder, search())
    assert isinstance(caught, SourceError) and "comes with no items of its own" in caught.message
    caught = refused(folder, search(fitness={**FITNESS, "data": str(tmp_path / "none.jsonl")}))
    assert isinstance(caught, SourceError) and "none.jsonl" in caught.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no item"),
        ('{"prompt": "1=", "answer": "1"}\n{"prompt": "2="}\n', "items.jsonl:2: no key 'answer'"),
        (
            '{"prompt": "1=", "answer": "1"}\n\n{"prompt": 3, "answer": "1"}\n',
            "items.jsonl:3: prompt: '3' is no",
        ),
        ('{"prompt": "1=", "answer": "1"}\n{"prompt"\n', "items.jsonl:2"),
    ],
)
def test_items_that_are_empty_or_malformed(text, message, tmp_path, mixtral, refused):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    caught = refused(mixtral, search(fitness={**FITNESS, "data": str(path)}))
    assert isinstance(caught, SourceError) and message in caught.message


def test_too_few_items(tmp_path, mixtral, refused):
    path = write_items(tmp_path / "items.jsonl", 15)
    caught = refused(mixtral, search(fitness={**FITNESS, "data": str(path)}))
    assert isinstance(caught, SourceError) and "splits ask for 10 for train + 10 for test" in caught.message


def test_a_task_that_no_item_has(mixtral, refused):
    caught = refused(mixtral, search(fitness={**FITNESS, "task": "cook"}))
    assert isinstance(caught, SourceError) and "no line has the task 'cook'" in caught.message
