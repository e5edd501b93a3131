"""A mixture of experts behind mapped routers: written with its own code, and opened again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compress
import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.exporters.custom_code import NAMES
from compress.exporters.formats import predict_bytes, predict_tensor_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import inspect
from compress.models.base import OpenModel
from compress.models.mapped_experts import map_routers_of, mapped_routers_spec
from compress.models.mixtures import mixtures
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.resuming import resume
from compress.runtime.mapped_router import MappedRouter
from compress.runtime.mapped_routing import KEY, MAPPABLE
from compress.runtime.moe_config import moe_shape
from safetensors import safe_open

from ..tiny_moe import make_moe

_KEPT = 4


def _open(folder: Path) -> OpenModel:
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _rows(model: OpenModel, seed: int, kept: int = _KEPT) -> dict[int, torch.Tensor]:
    """Return coefficients near a choice of experts, some of them negative, for every layer."""
    shape, generator = moe_shape(model.config), torch.Generator().manual_seed(seed)
    noise = {layer: torch.randn(kept, shape.routing.experts, generator=generator) for layer in shape.sparse}
    chosen = torch.eye(shape.routing.experts).roll(1, 0)[:kept]
    return {layer: chosen + 0.3 * noise[layer] for layer in noise}


def _mapped(folder: Path, class_name: str, **changes: Any) -> OpenModel:
    model = _open(make_moe(folder, class_name, **changes))
    map_routers_of(model, _rows(model, 1), _rows(model, 2))
    return model


def _of_first(folder: Path, class_name: str, *shares: float, **changes: Any) -> OpenModel:
    """Return a model whose two experts have these shares of the first weight of the router."""
    model = _open(make_moe(folder, class_name, **changes))
    shape = moe_shape(model.config)
    mapping = torch.zeros(2, shape.routing.experts)
    mapping[:, 0] = torch.tensor(shares)
    map_routers_of(model, dict.fromkeys(shape.sparse, mapping), _rows(model, 2, 2))
    return model


def _written(model: OpenModel, folder: Path) -> Path:
    folder.mkdir()
    write(model, folder, "compress")
    return folder


def _logits(module: Any) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12) * 7 % 60
    with torch.no_grad():
        return module(input_ids=tokens).logits


_TRUSTING = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

tokens = torch.arange(24).reshape(2, 12) * 7 % 60
for folder in sorted(path for path in Path(sys.argv[1]).iterdir()):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    module, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    with torch.no_grad():
        logits = module(input_ids=tokens).logits
    state = {name: str(tensor.dtype) for name, tensor in module.state_dict().items()}
    said = {"refused": refused, "wrong": sum(map(len, info.values())), "state": json.dumps(state)}
    save_file({"logits": logits}, folder / "logits", {key: str(value) for key, value in said.items()})
assert "compress" not in sys.modules
"""


def test_transformers_opens_it_with_trust_alone_and_gives_the_same_bits(tmp_path: Path) -> None:
    scaled = {"DeepseekV2ForCausalLM": {"routed_scaling_factor": 2.5}}
    models = {
        name: _mapped(tmp_path / f"m-{name}", name, dtype="bfloat16", **scaled.get(name, {}))
        for name in MAPPABLE
    }
    # Sums that are nearly zero, of both signs, or zero: a divisor keeps its distance from it, and its sign.
    sums = {"above": (1.0, 1e-5 - 1.0), "below": (1.0, -1e-5 - 1.0), "zero": (0.0, 0.0)}
    models |= {
        name: _of_first(tmp_path / f"m-{name}", "MixtralForCausalLM", *shares, dtype="bfloat16")
        for name, shares in sums.items()
    }
    assert all(_logits(models[name].module).isfinite().all() for name in sums)
    assert not torch.equal(_logits(models["above"].module), _logits(models["below"].module))
    (tmp_path / "out").mkdir()
    folders = {name: _written(model, tmp_path / "out" / name) for name, model in models.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", _TRUSTING, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        expected = _logits(model.module)
        assert torch.equal(_logits(compress.load(folders[name])), expected), name
        with safe_open(folders[name] / "logits", "pt") as file:
            assert torch.equal(file.get_tensor("logits"), expected), name
            said = file.metadata()
        assert "trust_remote_code" in said["refused"] and said["wrong"] == "0"
        state = {key: str(tensor.dtype) for key, tensor in model.module.state_dict().items()}
        assert json.loads(said["state"]) == state, name
        mappings = {dtype for key, dtype in state.items() if key.endswith(".mapping")}
        assert mappings == {"torch.float32"} and "torch.bfloat16" in state.values()


@pytest.mark.parametrize("kept", [_KEPT, 6])
def test_it_is_no_stock_model(tmp_path: Path, kept: int) -> None:
    from transformers import MixtralForCausalLM

    model = _open(make_moe(tmp_path / "m", "MixtralForCausalLM"))
    map_routers_of(model, _rows(model, 1, kept), _rows(model, 2, kept))
    folder = _written(model, tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatch"):
        MixtralForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "eep_mixtral" and config["architectures"] == ["EepMixtralForCausalLM"]
    assert config[KEY] == 6 and config["num_local_experts"] == kept


def test_our_own_loader_runs_none_of_the_code(tmp_path: Path) -> None:
    model = _mapped(tmp_path / "m", "OlmoeForCausalLM")
    folder = _written(model, tmp_path / "out")
    for name in NAMES:
        assert "Apache License" in (folder / name).read_text()
        (folder / name).write_text("raise SystemExit('the code was run')\n")
    assert torch.equal(_logits(compress.load(folder)), _logits(model.module))


@pytest.mark.parametrize("class_name", ["GptOssForCausalLM", "Qwen2MoeForCausalLM"])
def test_the_plan_says_what_is_written(tmp_path: Path, class_name: str) -> None:
    spec = _open(make_moe(tmp_path / "m", class_name, dtype="bfloat16")).spec
    model = _open(tmp_path / "m")
    map_routers_of(model, _rows(model, 1), _rows(model, 2), active=1)
    planned = mapped_routers_spec(spec, _KEPT, 1)
    (tmp_path / "out").mkdir()
    info = write(model, tmp_path / "out", "compress")
    assert (info.bytes, info.tensor_bytes) == (
        predict_bytes(planned, "compress"), predict_tensor_bytes(planned, "compress"),
    )  # fmt: skip
    assert planned.size() == model.size()
    assert model.size().parameters == sum(value.numel() for value in model.module.parameters())
    assert {name: tuple(value.shape) for name, value in model.module.state_dict().items()} == {
        name: tensor.shape for name, tensor in planned.tensors.items()
    }
    assert _open(tmp_path / "out").size() == model.size()


def test_a_stage_that_is_resumed_has_the_same_routers(tmp_path: Path) -> None:
    model = _mapped(tmp_path / "m", "Qwen3MoeForCausalLM")
    folder = _written(model, tmp_path / "stage")
    again = _open(tmp_path / "m")
    resume(again, folder)
    assert torch.equal(_logits(again.module), _logits(model.module))
    assert again.config[KEY] == 6 and again.size() == model.size() and not again.surgery
    second = _written(again, tmp_path / "second")
    assert {path.name: path.read_bytes() for path in second.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_it_can_be_the_source_of_another_run_but_not_of_another_search(tmp_path: Path) -> None:
    folder = _written(_mapped(tmp_path / "m", "DeepseekV2ForCausalLM"), tmp_path / "out")
    model = _open(folder)
    assert torch.equal(_logits(model.module), _logits(compress.load(folder)))
    again = _written(model, tmp_path / "again")
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with pytest.raises(PlanError, match="mapped already"):
        map_routers_of(model, _rows(model, 1, 2), _rows(model, 1, 2))
    with pytest.raises(PlanError, match="mapped already"):
        mapped_routers_spec(model.spec, 2)


def test_all_experts_may_stay_and_the_identity_changes_nothing(tmp_path: Path) -> None:
    model = _open(make_moe(tmp_path / "m", "MixtralForCausalLM"))
    before = _logits(model.module)
    same = dict.fromkeys(moe_shape(model.config).sparse, torch.eye(6))
    map_routers_of(model, same, same)
    torch.testing.assert_close(_logits(model.module), before, rtol=0, atol=1e-5)
    assert all(isinstance(mixture.router, MappedRouter) for mixture in mixtures(model.module))
    assert model.config[KEY] == 6 == moe_shape(model.config).routing.experts


def test_a_fresh_process_verifies_it_and_inspect_reads_it(tmp_path: Path) -> None:
    model = _mapped(tmp_path / "m", "MixtralForCausalLM")
    folder = _written(model, tmp_path / "out")
    verification = verify_export(model, folder, seed=3, progress=SilentProgress())
    assert verification.verified and verification.max_abs_error == 0.0
    assert verification.loads_with == ["compress.load(path)"]
    found = inspect(folder)
    assert found["parameters"] == model.size().parameters
    assert found["tensor_bytes"] == model.size().bytes


@pytest.mark.parametrize("format_", ["dequantized", "torchao", "sdnq"])
def test_other_formats_are_refused(tmp_path: Path, format_: str) -> None:
    model = _mapped(tmp_path / "m", "MixtralForCausalLM")
    with pytest.raises(PlanError, match="export.format"):
        write(model, tmp_path, format_)
    with pytest.raises(PlanError, match="export.format"):
        predict_bytes(model.dense(), format_)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({KEY: 3}, "fewer experts than"),
        ({KEY: "many"}, "not an integer"),
        ({KEY: 7}, "shape"),
        ({"model_type": "mixtral"}, "model_type"),
        ({KEY: None, "model_type": "eep_mixtral"}, "not an integer"),
    ],
)
def test_a_config_that_was_changed_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = _written(_mapped(tmp_path / "m", "MixtralForCausalLM"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError, match=said):
        compress.load(folder)


def test_a_config_without_its_key_is_refused(tmp_path: Path) -> None:
    folder = _written(_mapped(tmp_path / "m", "MixtralForCausalLM"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config[KEY]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="eep_mixtral"):
        compress.load(folder)


@pytest.mark.parametrize("class_name", ["PhimoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_other_classes_are_refused_by_their_config_alone(tmp_path: Path, class_name: str) -> None:
    model = _open(make_moe(tmp_path / "m", class_name))
    with pytest.raises(PlanError, match="router: free"):
        mapped_routers_spec(model.spec, _KEPT)
    before = _logits(model.module)
    with pytest.raises(PlanError, match="router: free"):
        map_routers_of(model, _rows(model, 1), _rows(model, 2))
    assert torch.equal(_logits(model.module), before)


def test_coefficients_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = _open(make_moe(tmp_path / "m", "Qwen2MoeForCausalLM"))  # layer 1 is dense
    rows = _rows(model, 1)
    bad: list[tuple[dict[int, torch.Tensor], str]] = [
        ({0: rows[0]}, "layer 2"),
        ({**rows, 1: rows[0]}, "layer 1 has no experts"),
        ({**rows, 2: rows[2][:3]}, "3 to 4 experts"),
        ({**rows, 2: rows[2][:, :5]}, "column"),
        ({**rows, 2: rows[2] * float("inf")}, "not finite"),
    ]
    for wrong, said in bad:
        with pytest.raises(PlanError, match=said):
            map_routers_of(model, rows, wrong)
        with pytest.raises(PlanError, match=said):
            map_routers_of(model, wrong, rows)
    with pytest.raises(PlanError, match="experts per token"):
        map_routers_of(model, *[{layer: value[:1] for layer, value in rows.items()}] * 2)
