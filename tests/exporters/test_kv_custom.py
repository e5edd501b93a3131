"""A checkpoint that brings the code of its compressed cache: the same bits without this package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compress
import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.exporters.formats import predict_bytes, predict_tensor_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.kv_code import _laid_flat, code_files
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import kv_scheme_of
from compress.runtime.kv.scheme import factor_tensors
from compress.runtime.validate import open_folder
from safetensors import safe_open
from safetensors.torch import save_file

from ..tiny_cache import decoded, quantize_linears, save_llama, with_cache
from ..tiny_moe import make_moe

STOCK = {"torch", "transformers", *sys.stdlib_module_names}
IDS = torch.arange(20).reshape(2, 10) * 5 % 60
# Greedy, by beams, and with a row that is padded on the left.
WAYS = {
    "greedy": {}, "beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 4},
    "padded": {"attention_mask": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10]},
}  # fmt: skip

PROGRAM = """
import json, sys
sys.modules["compress"] = None  # whoever imports it fails
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

ids = load_file(sys.argv[2])["ids"]
ways = json.loads(sys.argv[3])
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if (path / "config.json").is_file()):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    module, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    found = {}
    for way, options in ways.items():
        if "attention_mask" in options:
            options = {**options, "attention_mask": torch.tensor(options["attention_mask"])}
        found[way] = module.generate(
            ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, **options
        )
    kept = module.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        found["logits"] = module(ids).logits
    said = {
        "refused": refused, "wrong": str({key: sorted(value) for key, value in info.items() if value}),
        "cache": type(kept.past_key_values).__name__, "ours": str(any("pydantic" in n for n in sys.modules)),
    }
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "found", said)
"""


def _written(model: OpenModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write(model, folder, "compress", kv_cache="custom")
    return folder


def _generated(module: torch.nn.Module, way: str) -> torch.Tensor:
    options = dict(WAYS[way])
    if "attention_mask" in options:
        options["attention_mask"] = torch.tensor(options["attention_mask"])
    return module.generate(IDS, max_new_tokens=24, min_new_tokens=24, do_sample=False, **options)


def _qwen(folder: Path, kind: str) -> Path:
    import transformers

    sizes = {
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = getattr(transformers, f"{kind}ForCausalLM")(config)
        for name, tensor in module.state_dict().items():
            if name.endswith("bias") or "norm" in name:
                tensor += 0.3 * torch.randn(tensor.shape)
        module.save_pretrained(folder)
    return folder


def _models(place: Path) -> dict[str, OpenModel]:
    llama, small = save_llama(place / "llama"), save_llama(place / "half", torch.bfloat16)
    moe = make_moe(place / "moe", "MixtralForCausalLM", max_position_embeddings=64)
    return {
        "sliding": with_cache(llama),
        "block": with_cache(llama, mode="block", window=8, key_group=8, bits=4),
        "packed": with_cache(small, bits=2, window=0),
        "bias": with_cache(_qwen(place / "qwen2", "Qwen2"), bits=4),
        "norm": with_cache(_qwen(place / "qwen3", "Qwen3")),
        "experts": with_cache(moe, bits=4),
    }


def test_without_this_package_it_writes_the_same_text(tmp_path):
    models = _models(tmp_path / "models")
    folders = {name: _written(model, tmp_path / "out" / name) for name, model in models.items()}
    save_file({"ids": IDS}, tmp_path / "ids")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "out"), str(tmp_path / "ids")]
    done = subprocess.run(
        [*command, json.dumps(WAYS)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        plain = open_model(ModelRef(id=str(model.source.folder)), progress=SilentProgress()).module
        with safe_open(folders[name] / "found", "pt") as file:
            said = file.metadata()
            for way in WAYS:
                assert torch.equal(file.get_tensor(way), _generated(model.module, way)), (name, way)
            assert not torch.equal(file.get_tensor("greedy"), _generated(plain, "greedy")), name
            with torch.no_grad():
                assert torch.equal(file.get_tensor("logits"), plain(IDS).logits), name
        assert "trust_remote_code" in said["refused"], name
        assert (said["wrong"], said["cache"], said["ours"]) == ("{}", "CskvCache", "False"), name


def test_our_own_loader_runs_none_of_the_code_and_gives_the_same_bits(tmp_path):
    model = with_cache(save_llama(tmp_path / "model"), bits=4)
    folder = _written(model, tmp_path / "out")
    code = sorted(folder.glob("*.py"))
    assert {"modeling_cskv.py", "configuration_cskv.py", "cskv_cache.py"} <= {path.name for path in code}
    for path in code:
        assert "Apache License" in path.read_text()
        path.write_text("raise SystemExit('the code was run')\n")
    loaded = compress.load(folder)
    assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.config.model_type == "llama"
    assert not hasattr(loaded.config, "cskv") and kv_scheme_of(loaded) == model.kv_cache
    assert torch.equal(decoded(loaded), decoded(model.module))
    found = verify_export(model, folder, seed=1, progress=SilentProgress())
    assert found.verified and found.loads_with == ["compress.load(path)"]


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "Qwen2MoeForCausalLM"])
def test_the_plan_predicts_what_is_written(tmp_path, class_name):
    place = tmp_path / "model"
    model = with_cache(save_llama(place) if class_name.startswith("Llama") else make_moe(place, class_name))
    (tmp_path / "out").mkdir()
    info = write(model, tmp_path / "out", "compress", kv_cache="custom")
    spec = model.spec.with_kv_cache(model.kv_cache)
    assert predict_bytes(spec, "compress", kv_cache="custom") == info.bytes
    assert predict_tensor_bytes(spec, "compress", kv_cache="custom") == info.tensor_bytes
    stored = open_folder(tmp_path / "out")
    assert stored.own_code and stored.class_name == class_name
    assert set(factor_tensors(model.kv_cache)) < set(stored.tensors)


def test_its_code_is_ours_and_needs_torch_and_transformers_alone():
    files = code_files("LlamaForCausalLM", "LlamaConfig", "llama")
    room = Path(compress.__file__).parent / "runtime" / "kv"
    assert 'model_type = "cskv_llama"' in files["configuration_cskv.py"]
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, (name, node.module)
                _check_names(files[f"{node.module}.py"], node, name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {str(found).partition(".")[0] for found in names} <= STOCK, (name, names)
    # Whatever else differs, a function of the cache is the one that runs here.
    for name in ("cache", "latents", "rounding"):
        own, shipped = (
            ast.parse(text) for text in ((room / f"{name}.py").read_text(), files[f"cskv_{name}.py"])
        )
        assert [ast.dump(node) for node in own.body if not isinstance(node, ast.ImportFrom | ast.If)] == [
            ast.dump(node) for node in shipped.body if not isinstance(node, ast.ImportFrom)
        ]


def test_a_module_is_laid_flat_without_what_a_type_checker_reads():
    text = (
        "from typing import TYPE_CHECKING\nfrom ...errors import PlanError\n"
        "from ..packing import (\n    pack,\n)\n"
        "if TYPE_CHECKING:\n    import numpy\n    from ..manifest import Manifest\n"
        "def later():\n    from .cache import CskvCache\n"
    )
    flat, needed = _laid_flat("runtime.kv.attach", text)
    assert sorted(needed) == ["errors", "runtime.kv.cache", "runtime.packing"]
    assert "numpy" not in flat and "Manifest" not in flat
    assert "from .cskv_packing import (\n    pack," in flat and "    from .cskv_cache import" in flat
    with pytest.raises(ValueError, match=r"runtime\.kv\.attach imports numpy"):
        _laid_flat("runtime.kv.attach", "import numpy\n")


def _check_names(text: str, node: ast.ImportFrom, name: str) -> None:
    defined = {
        found
        for item in ast.parse(text).body
        for found in (
            [item.name]
            if isinstance(item, ast.FunctionDef | ast.ClassDef)
            else [target.id for target in item.targets if isinstance(target, ast.Name)]
            if isinstance(item, ast.Assign)
            else []
        )
    }
    for alias in node.names:
        assert alias.name in defined, (name, node.module, alias.name)


def quantized(model: OpenModel) -> None:
    quantize_linears(model)


def uncompressed(model: OpenModel) -> None:
    model.kv_cache = None


@pytest.mark.parametrize(("change", "words"), [(quantized, "is quantized"), (uncompressed, "not compressed")])
def test_what_needs_other_code_is_refused(tmp_path, change: Callable[[OpenModel], None], words):
    model = with_cache(save_llama(tmp_path / "model"))
    change(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match=f"export.kv_cache: custom: .*{words}") as told:
        write(model, tmp_path / "out", "compress", kv_cache="custom")
    assert told.value.hint == "use checkpoint"


def test_config_and_manifest_must_say_the_same(tmp_path):
    folder = _written(with_cache(save_llama(tmp_path / "model")), tmp_path / "out")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "cskv": {**config["cskv"], "window": 5}}))
    with pytest.raises(SourceError, match=r"config\.json: its 'cskv' is not how compress\.json says"):
        compress.load(folder)
    path.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SourceError, match=r"architectures and model_type are not of a compressed cache"):
        compress.load(folder)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("custom", "config.json: .* already compressed"),
        ("adapter", "is an adapter of"),
        (None, "already comp"),
    ],
)
def test_it_is_no_source_of_another_run(tmp_path, form, words):
    folder = tmp_path / "out"
    folder.mkdir()
    write(with_cache(save_llama(tmp_path / "model")), folder, "compress", kv_cache=form)
    with pytest.raises(SourceError, match=words):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())
