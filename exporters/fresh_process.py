"""Verification of an exported folder by running it: a fresh process must give the same bits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CompressError
from ..models.base import OpenModel
from ..models.registry import family_for
from ..progress import Progress, step
from ..recipes.export import PACKAGES
from ..recipes.secrets import TOKEN_VARIABLES
from ..runtime.first_token import feature_of, put_first
from ..runtime.kv.adapter import is_adapter
from ..runtime.kv.assembled import open_whole
from ..runtime.library_sections import export_format
from ..runtime.modules import name_of
from ..runtime.threads import computing_with
from ..runtime.validate import QUANT_METHOD
from .decoding import Decoding, decoding_of
from .formats import as_shipped
from .sdnq_format import check_written
from .stock import library_of, loader_of, registered_way, stock_way
from .verify_worker import DECODED, joined

_WORKER = Path(__file__).with_name("verify_worker.py")
_BATCH = 2
_TIMEOUT_SECONDS = 1800
_OTHER_SEED = 0x5EED


NOT_EXECUTED: Mapping[str, str] = {
    "sdnq": "written and decoded back to the model's integers; not executed, because sdnq is not installed",
    **{
        format_: f"written, but not executed, because {package} is not installed"
        for format_, package in PACKAGES.items()
        if format_ != "sdnq"
    },
}
"""Format -> what is said of a folder that could not be run here."""
# Equal integers under other rules for activations stay above 20 dB; one wrong layer is far below.
_SAME_INTEGERS_DB = 10.0


@dataclass(frozen=True)
class Verification:
    """What a fresh process computed.

    Attributes:
        verified: every way of loading was executed and gave the expected outputs: the same bits,
            or under the package sdnq, whose arithmetic is its own, the same up to rounding.
        executed: every way of loading gave an output.
        max_abs_error: largest difference over all ways; None where a way has no finite one.
        ways: way of loading -> its largest absolute difference, None where there is none.
        loads_with: the Python expressions that were tried.
        failure: what speaks against the folder, in one sentence. None if nothing does, also where
            nothing could be executed because an optional package is not installed.
        runtime_sqnr_db: the exported model against our own integer runtime, where the format
            computes differently (all but compress); None where it must be equal.
        notes: for the report and the card; a failure is among them.
    """

    verified: bool
    executed: bool
    max_abs_error: float | None
    ways: dict[str, float | None]
    loads_with: list[str]
    failure: str | None = None
    runtime_sqnr_db: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Answer:
    """What the fresh process said: outputs by way, errors by way, packages it does not have.

    Attributes:
        decoded: logits by way, where the cache is compressed; see `verify_worker.decode`.
    """

    outputs: dict[str, Tensor]
    errors: dict[str, str]
    missing: list[str]
    decoded: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Expected:
    """What the model in memory computes.

    Attributes:
        output: of one forward.
        decoded: logits through the compressed cache; None: the cache is not compressed.
        own: of one forward in our own arithmetic; `output` itself where the format keeps to that.
    """

    output: Tensor
    decoded: Tensor | None
    own: Tensor


def verify_export(
    model: OpenModel,
    folder: Path,
    *,
    seed: int,
    progress: Progress,
    threads: int | None = None,
    shipped: OpenModel | None = None,
) -> Verification:
    """Load `folder` in a fresh process every documented way and compare outputs.

    The process draws from another global seed, so that nothing may depend on it. A folder that does
    not load or computes something else is no exception but a result with a `failure`.

    Args:
        model: what was exported, in memory.
        folder: what was written.
        seed: of the inputs.
        threads: CPU threads of both processes' arithmetic; None: as many as this one uses.
        shipped: `formats.as_shipped` of the model where the caller has it; None: made here.
    """
    base = model.source.folder if is_adapter(folder) else None
    try:
        stored = open_whole(folder, base)
        if stored.quant_method == "sdnq":
            check_written(model, folder)
    except CompressError as error:
        return _failed(f"the folder does not open: {_without(Path(folder), error.message)}")
    if stored.manifest.kv_cache != model.kv_cache:
        return _failed("the folder's manifest does not say how the cache is compressed as the model does")
    format_ = export_format(stored)
    dtype, ours_alone = name_of(model.spec.dtype), stored.own_code or base is not None
    ways, loads_with = ways_of(stored.class_name, dtype, format_, ours_alone=ours_alone)
    shipped = shipped or as_shipped(model, format_)
    device = next(shipped.module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    inputs = model.family.example_inputs(model.module, _BATCH, generator)
    inputs = put_first(feature_of(shipped.module), inputs)
    decoding = decoding_of(model.kv_cache, model.config, _BATCH, generator)
    request = request_of(
        folder, stored.class_name, format_, ways, dtype=dtype, device=str(device),
        seed=seed ^ _OTHER_SEED, threads=threads, decoding=decoding, base=base,
    )  # fmt: skip
    with step(progress, "verify in a fresh process", len(ways)) as bar:
        answer = ask_fresh_process(request, inputs)
        if answer.missing:
            return Verification(False, False, None, {}, [], notes=(NOT_EXECUTED[format_],))
        compared = model.family.compared
        output = _run(shipped.module, inputs, threads, compared)
        # What no stage has rounded has no integers: the format rounds it, and nothing of ours computes that.
        same = shipped is model or not model.quantization
        own = output if same else _run(model.module, inputs, threads, compared)
        expected = _Expected(output, _decode(shipped.module, decoding, threads), own)
        bar.advance(len(ways))
    return _judge(answer, ways, loads_with, expected, format_)


def _judge(
    answer: Answer, ways: list[str], loads_with: list[str], expected: _Expected, format_: str
) -> Verification:
    """Hold the outputs of the fresh process against those of the model in memory."""
    errors: dict[str, float | None] = {}
    failures = []
    sqnr = None if expected.own is expected.output else _sqnr_db(expected.output, expected.own)
    for way in ways:
        output = answer.outputs.get(way)
        if output is None:
            errors[way] = None
            failures.append(f"does not load the {way!r} way in a fresh process: {answer.errors[way]}")
        elif format_ == "sdnq":
            errors[way] = largest_difference(output, expected.output)
            sqnr = _sqnr_db(output, expected.output) if errors[way] is not None else -math.inf
            if not sqnr >= _SAME_INTEGERS_DB:
                failures.append(f"loaded the {way!r} way, the outputs are {sqnr:.1f} dB from our runtime's")
        else:
            errors[way], different = _differences(way, output, answer.decoded.get(way), expected)
            failures += different
    known = [error for error in errors.values() if error is not None]
    failure = "; ".join(failures) or None
    if sqnr is not None and not math.isfinite(sqnr):
        sqnr = None
    notes = [] if failure is None else [failure]
    if sqnr is not None:
        notes.insert(0, f"on random inputs its outputs are {sqnr:.1f} dB from those of our integer runtime")
    if expected.decoded is not None and failure is None:
        steps = expected.decoded.shape[1] - 1
        notes.append(f"a fresh process decodes {steps} tokens through the compressed cache with equal logits")
    return Verification(
        verified=failure is None,
        executed=len(answer.outputs) == len(ways),
        max_abs_error=max(known) if len(known) == len(ways) else None,
        ways=errors,
        loads_with=loads_with,
        failure=failure,
        runtime_sqnr_db=sqnr,
        notes=tuple(notes),
    )


def _differences(
    way: str, output: Tensor, decoded: Tensor | None, expected: _Expected
) -> tuple[float | None, list[str]]:
    """Return the largest difference of all outputs, None without a finite one, and what speaks against it."""
    pairs = [("the outputs differ", output, expected.output)]
    if expected.decoded is not None and way != "stock":
        if decoded is None:
            return None, [f"loaded the {way!r} way in a fresh process, nothing was decoded"]
        pairs.append(("what it decodes through the compressed cache differs", decoded, expected.decoded))
    found: list[float | None] = []
    failures = []
    for what, actual, wanted in pairs:
        found.append(largest_difference(actual, wanted))
        if torch.equal(actual, wanted):
            continue
        size = "in shape or by values that are not finite"
        if found[-1] is not None:
            size = f"by up to {found[-1]:.3g}"
        failures.append(
            f"loaded the {way!r} way in a fresh process, {what} from the model's in memory {size}"
        )
    known = [error for error in found if error is not None]
    return (max(known) if len(known) == len(found) else None), failures


def _failed(failure: str) -> Verification:
    return Verification(False, False, None, {}, [], failure, notes=(failure,))


def ways_of(
    class_name: str, dtype: str, format_: str, *, ours_alone: bool = False
) -> tuple[list[str], list[str]]:
    """Return the ways of loading a format for the worker, and as Python.

    Args:
        class_name: of config.json.
        dtype: "float32", "float16" or "bfloat16".
        format_: of the folder.
        ours_alone: no other way is tried. Code that lies in the folder, by which transformers loads it, is
            nobody's to run but the user's; and of an adapter transformers knows nothing.
    """
    if ours_alone:
        return ["compress"], ["compress.load(path)"]
    stock = stock_way(class_name, dtype)
    if format_ == QUANT_METHOD:
        return ["registered", "compress"], ["compress.load(path)", registered_way(class_name)]
    if format_ == "sdnq":
        return ["stock"], [stock]
    return ["stock", "compress"], [stock, "compress.load(path)"]


def packages_of(format_: str) -> list[str]:
    """Return the packages without which a format cannot be run."""
    return [PACKAGES[format_]] if format_ in PACKAGES else []


def request_of(
    folder: Path,
    class_name: str,
    format_: str,
    ways: list[str],
    *,
    dtype: str,
    device: str,
    seed: int,
    threads: int | None,
    decoding: Decoding | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Return what the fresh process is to do: all that `verify_worker` reads of a request but the inputs.

    Args:
        folder: to load.
        class_name: of config.json.
        format_: of the folder.
        ways: of `ways_of`.
        dtype: "float32", "float16" or "bfloat16".
        device: to compute on.
        seed: of its global generator.
        threads: of its arithmetic; None: as many as this process uses.
        decoding: what is decoded through a compressed cache; None: it is not compressed.
        base: folder of the original of an adapter; None of whole checkpoints.
    """
    return {
        "folder": str(Path(folder).resolve()),
        "base": None if base is None else str(Path(base).resolve()),
        "library": library_of(class_name), "class_name": loader_of(class_name), "dtype": dtype,
        "device": device, "seed": seed, "threads": threads or torch.get_num_threads(), "ways": ways,
        "needs": packages_of(format_), "compared": list(family_for(class_name).compared),
        "unexpected": list(decoding.factors) if decoding else [],
        "decoding": {"ids": decoding.ids.tolist(), "prompt": decoding.prompt} if decoding else None,
    }  # fmt: skip


def _run(
    module: nn.Module, inputs: Mapping[str, Any], threads: int | None, compared: tuple[int, ...]
) -> Tensor:
    with torch.no_grad(), computing_with(threads or torch.get_num_threads()):
        output: Tensor = joined(module(**inputs, return_dict=False), compared)
    return output.cpu()


def _decode(module: nn.Module, decoding: Decoding | None, threads: int | None) -> Tensor | None:
    if decoding is None:
        return None
    with computing_with(threads or torch.get_num_threads()):
        return decoding.run(module)


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


def ask_fresh_process(request: dict[str, Any], inputs: Mapping[str, Any]) -> Answer:
    """Let a new process load a folder and run it.

    Args:
        request: what `verify_worker` takes, without inputs and the files that it writes.
        inputs: keyword arguments of one forward.
    """
    tensors, constants = _flat(inputs)
    with tempfile.TemporaryDirectory(prefix="compress-verify-") as name:
        place = Path(name)
        save_file(tensors, place / "inputs.safetensors")
        request = {
            **request, "constants": constants,
            "inputs": str(place / "inputs.safetensors"), "outputs": str(place / "outputs.safetensors"),
            "answer": str(place / "answer.json"),
        }  # fmt: skip
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # The package may be imported from a checkout; the process must find the same one, but a
        # stray PYTHONPATH entry must not put this folder's modules before installed ones: hence -P.
        command = [sys.executable, "-P", str(_WORKER), str(place / "request.json")]
        # It loads what may come from elsewhere and asks nobody for anything: it needs no token.
        environment = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
        environment |= {"OMP_NUM_THREADS": str(request["threads"]), "HF_HUB_OFFLINE": "1"}
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
            return _no_answer(request, f"no answer within {_TIMEOUT_SECONDS} seconds")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return _no_answer(request, f"the process ended with {done.returncode}: {lines[-1]}")
        answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        found = load_file(place / "outputs.safetensors") if not answer["missing"] else {}
        decoded = {name: found.pop(name) for name in list(found) if name.endswith(DECODED)}
        decoded = {name.removesuffix(DECODED): tensor for name, tensor in decoded.items()}
        errors = {way: _without(Path(request["folder"]), text) for way, text in answer["errors"].items()}
        return Answer(found, errors, answer["missing"], decoded)


def _without(folder: Path, text: str) -> str:
    """Leave out where the folder lies: a card is read elsewhere, and the folder gets another name."""
    return text.replace(f"{folder}{os.sep}", "").replace(str(folder), "the folder")


def _no_answer(request: Mapping[str, Any], why: str) -> Answer:
    return Answer({}, dict.fromkeys(request["ways"], why), [])


def largest_difference(actual: Tensor, expected: Tensor) -> float | None:
    """Return the largest absolute difference; None for other shapes or values that are not finite."""
    if actual.shape != expected.shape:
        return None
    largest = float((actual.double() - expected.double()).abs().max())
    return largest if math.isfinite(largest) else None


def _sqnr_db(actual: Tensor, reference: Tensor) -> float:
    """Return 10 log10 of signal over squared difference, in decibels."""
    noise = (actual.double() - reference.double()).square().sum()
    signal = reference.double().square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")
