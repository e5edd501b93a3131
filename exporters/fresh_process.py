"""Verification of an exported folder by running it: a fresh process must give the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import VerifyError
from ..models.base import OpenModel
from ..progress import Progress, step
from ..runtime.modules import name_of
from ..runtime.validate import QUANT_METHOD, open_folder

_WORKER = Path(__file__).with_name("verify_worker.py")
_BATCH = 2
_TIMEOUT_SECONDS = 1800
_OTHER_SEED = 0x5EED


@dataclass(frozen=True)
class Verification:
    """What a fresh process computed.

    Attributes:
        verified: every way of loading gave exactly the expected outputs.
        max_abs_error: largest difference over all ways; 0.0 when verified.
        ways: way of loading -> its largest absolute difference.
        loads_with: the Python expressions that were tried.
        runtime_sqnr_db: the exported model against our own integer runtime, where the format
            computes differently (torchao, sdnq, dequantized); None where it must be equal.
    """

    verified: bool
    max_abs_error: float
    ways: dict[str, float]
    loads_with: list[str]
    runtime_sqnr_db: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


def verify_export(
    model: OpenModel, folder: Path, *, seed: int, progress: Progress, threads: int | None = None
) -> Verification:
    """Load `folder` in a fresh process every documented way and compare outputs.

    The process draws from another global seed, so that nothing may depend on it.

    Args:
        model: what was exported, in memory.
        folder: what was written.
        seed: of the inputs.
        threads: CPU threads of both processes' arithmetic; None: as many as this one uses.

    Raises:
        VerifyError: a way does not load, or its outputs differ in any bit.
    """
    stored = open_folder(folder)
    if stored.quant_method == "sdnq":
        return _decode(model, folder)
    dense = stored.quant_method is None
    ways, reference, loads_with = _ways(model, stored.quant_method)
    device = next(reference.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    inputs = model.family.example_inputs(model.module, _BATCH, generator)
    with step(progress, "verify in a fresh process", len(ways)) as bar:
        expected = _run(reference, inputs, threads)
        own = expected if reference is model.module else _run(model.module, inputs, threads)
        request = {
            "folder": str(Path(folder).resolve()), "class_name": stored.class_name,
            "dtype": name_of(model.spec.dtype), "device": str(device),
            "threads": threads or torch.get_num_threads(), "seed": seed ^ _OTHER_SEED, "ways": ways,
        }  # fmt: skip
        outputs = _ask_fresh_process(request, inputs)
        bar.advance(len(ways))
    errors = {way: _difference(outputs[way], expected) for way in ways}
    different = [way for way in ways if not torch.equal(outputs[way], expected)]
    if different:
        raise VerifyError(
            f"{folder}: loaded the {different[0]!r} way in a fresh process, the outputs differ from the "
            f"model in memory by up to {errors[different[0]]:.3g}",
            hint="the folder is kept for inspection; this is a defect of the export",
        )
    sqnr = None if reference is model.module or dense and not model.quantization else _sqnr_db(expected, own)
    return Verification(True, max(errors.values()), errors, loads_with, sqnr)


def _decode(model: OpenModel, folder: Path) -> Verification:
    """Verify a folder that only a package we never import can run: by its integers."""
    from .sdnq_format import check_written

    check_written(model, folder)
    note = "sdnq is not installed" if find_spec("sdnq") is None else "sdnq is never imported here"
    return Verification(
        True,
        0.0,
        {"decoded": 0.0},
        [],
        notes=(
            f"{note}: the file was read back and decodes to the model's integers; no output was computed",
        ),
    )


def _ways(model: OpenModel, quant_method: str | None) -> tuple[list[str], nn.Module, list[str]]:
    """Return the ways of loading, the module that must be reproduced, and the ways as Python."""
    name = type(model.module).__name__
    stock = f"diffusers.{name}.from_pretrained(path, torch_dtype=torch.{name_of(model.spec.dtype)})"
    if quant_method == QUANT_METHOD:
        registered = f"import compress; diffusers.{name}.from_pretrained(path)"
        return ["registered", "compress"], model.module, ["compress.load(path)", registered]
    loads_with = [stock, "compress.load(path)"]
    if quant_method == "torchao":
        from .torchao_format import in_memory

        return ["stock", "compress"], in_memory(model), loads_with
    if model.quantization:
        from .dequantized_format import in_memory as dequantized

        return ["stock", "compress"], dequantized(model), loads_with
    return ["stock", "compress"], model.module, loads_with


def _run(module: nn.Module, inputs: Mapping[str, Any], threads: int | None) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.no_grad():
            output: Tensor = module(**inputs, return_dict=False)[0]
    finally:
        torch.set_num_threads(before)
    return output.cpu()


def _flat(inputs: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested keyword arguments into tensors by slash-joined names and the rest, nested."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[prefix + key] = value.cpu().contiguous()
        elif isinstance(value, Mapping):
            inner, constants[key] = _flat(value, f"{prefix}{key}/")
            tensors |= inner
        else:
            constants[key] = value
    return tensors, constants


def _ask_fresh_process(request: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors, constants = _flat(inputs)
    with tempfile.TemporaryDirectory(prefix="compress-verify-") as name:
        place = Path(name)
        save_file(tensors, place / "inputs.safetensors")
        request = {
            **request, "constants": constants,
            "inputs": str(place / "inputs.safetensors"), "outputs": str(place / "outputs.safetensors"),
        }  # fmt: skip
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # The package may be imported from a checkout; the process must find the same one, but a
        # stray PYTHONPATH entry must not put this folder's modules before installed ones: hence -P.
        command = [sys.executable, "-P", str(_WORKER), str(place / "request.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(request["threads"]), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise VerifyError(f"{request['folder']}: no answer within {_TIMEOUT_SECONDS} seconds") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise VerifyError(
                f"{request['folder']} does not load in a fresh process: {lines[-1]}",
                hint="run `compress verify` on the folder, or load it by hand to see the whole error",
            )
        return load_file(place / "outputs.safetensors")


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).abs().max())


def _sqnr_db(actual: Tensor, reference: Tensor) -> float:
    """Return 10 log10 of signal over squared difference, in decibels."""
    noise = (actual.double() - reference.double()).square().sum()
    signal = reference.double().square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")
