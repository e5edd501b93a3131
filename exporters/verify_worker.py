"""Run in a fresh process by `verify`: load a folder each stated way and write what it computes.

    python -P verify_worker.py REQUEST.json

A script and not a module of the package: stock ways must be shown to work without importing it.
Ways: "stock" (the library alone, after the packages that it `needs`), "registered" (stock class after
`import compress`), "compress".
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Answer one request.

    Args:
        request_path: JSON with `folder`, `library`, `class_name`, `dtype`, `device`, `threads`, `seed`,
            `ways`, `needs` (packages without which nothing is tried), `inputs` (safetensors),
            `constants`, and the files to write: `outputs` (safetensors) and `answer`, JSON with
            `missing`, packages that are not installed, and `errors`, by way.
    """
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    missing = [name for name in request["needs"] if find_spec(name) is None]
    errors: dict[str, str] = {}
    if not missing:
        errors = _run(request)
    answer = {"missing": missing, "errors": errors}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _run(request: dict[str, Any]) -> dict[str, str]:
    """Write the outputs of the ways that load; return the errors of those that do not."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    tensors = {name: tensor.to(request["device"]) for name, tensor in load_file(request["inputs"]).items()}
    outputs, errors = {}, {}
    # The ways that need this package come last, so that the others run without it.
    for way in sorted(request["ways"], key=["stock", "registered", "compress"].index):
        # Any error of a loader is the answer for its way; the other ways are tried all the same.
        try:
            module = _load(way, request)
            with torch.no_grad():
                output = module(**_nested(tensors, request["constants"]), return_dict=False)[0]
            outputs[way] = output.cpu().contiguous()
            del module
        except Exception as error:
            errors[way] = " ".join(f"{type(error).__name__}: {error}".split())
    save_file(outputs, request["outputs"])
    return errors


def _load(way: str, request: dict[str, Any]) -> Any:
    import torch

    if way == "compress":
        import compress

        return compress.load(request["folder"], device=request["device"])
    keyword = "dtype" if request["library"] == "transformers" else "torch_dtype"
    options: dict[str, Any] = {keyword: getattr(torch, request["dtype"])}
    if way == "registered":
        import compress  # noqa: F401

        options = {}
    elif "compress" in sys.modules:
        raise RuntimeError("the stock way must not see the package `compress`")
    for name in request["needs"]:
        import_module(name)
    stock = getattr(import_module(request["library"]), request["class_name"])
    module, info = stock.from_pretrained(request["folder"], output_loading_info=True, **options)
    if any(info.values()):
        raise RuntimeError(f"the stock loader reports {info}")
    return module.to(request["device"])


def _nested(tensors: dict[str, Any], constants: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads(json.dumps(constants))
    for name, tensor in tensors.items():
        *outer, last = name.split("/")
        level = arguments
        for key in outer:
            level = level.setdefault(key, {})
        level[last] = tensor
    return arguments


if __name__ == "__main__":
    main(sys.argv[1])
