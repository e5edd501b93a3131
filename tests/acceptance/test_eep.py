"""EEP as its brief accepts it: every family searched, written, opened by stock code; and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compress
import pytest
import torch
from compress.calibration.text import NoText
from compress.compressors.base import Workspace
from compress.compressors.pruning.eep import Eep
from compress.exporters.formats import write
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.experts import EepSettings
from compress.recipes.schema import ModelRef
from compress.runtime.moe_classes import MOE_CLASSES

from ..tiny_items import make_asked_moe
from ..tiny_moe import CLASSES

KEPT = 4
SMALL = {
    "keep_experts": KEPT, "init_random": 4, "prune_evals": 10, "total_evals": 24, "random_draws": 0,
    "fitness": {"by": "tokens"}, "splits": {"train": 10, "test": 10}, "mut_entry": 1.0, "mut_sigma": 0.3,
}  # fmt: skip


def searched(folder: Path, work: Path, **changes: Any):
    asked = EepSettings.model_validate_json(json.dumps({**SMALL, **changes}))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    work.mkdir()
    return model, Eep().apply(model, asked, NoText(0), Workspace(work, work), SilentProgress())


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(1, 17)[None]).logits


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_a_search_leaves_opens_as_stock_and_computes_the_same(class_name, tmp_path):
    """Acceptance 2 and 10, of merged experts, in the semantics that ship."""
    import transformers

    model, details = searched(make_asked_moe(tmp_path / "m", class_name), tmp_path / "work")
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out", "compress")
    stock, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(stock).__name__ == class_name
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(logits(stock.eval()), logits(model.module))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[name] for name in MOE_CLASSES[class_name].counts if name in config} == {KEPT}
    assert details["experts_after"] == KEPT and len(details["search"]["history"]) == 24


def mixtral(kept: int, tmp_path: Path) -> dict[str, Any]:
    """Return the stage of a plan on the config of Mixtral-8x7B alone."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder = tmp_path / "mixtral"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    experts = {str(layer): list(range(kept)) for layer in range(32)}
    document = compress.plan(
        {
            "model": {"id": str(folder), "dtype": "bfloat16"},
            "stages": [{"eep": {"experts": experts}}],
            "evaluate": {"fidelity": None},
            "export": {"path": str(tmp_path / "out")},
        }
    )
    return dict(document["stages"][0])


@pytest.mark.parametrize(
    ("kept", "billions", "exact"),
    [(6, 35.428, None), (4, 24.154, 24_153_690_112), (2, 12.879, None)],
)
def test_parameters_of_mixtral_from_its_config_alone(kept, billions, exact, tmp_path):
    """Acceptance 9."""
    stage = mixtral(kept, tmp_path)
    before, after = stage["before"], stage["after"]
    assert round(before["parameters"] / 1e9, 3) == 46.703
    assert round(before["active_parameters"] / 1e9, 3) == 12.880
    assert round(after["parameters"] / 1e9, 3) == billions and exact in (None, after["parameters"])
    assert round(after["active_parameters"] / 1e9, 3) == round(12.880 - (8 - kept) * 32 * 4096 / 1e9, 3)
    assert after["bytes"] == 2 * after["parameters"]
