"""Run in a fresh process by `verify`: load a folder each stated way and write what it computes.

    python -P verify_worker.py REQUEST.json

A script and not a module of the package: stock ways must be shown to work without importing it.
Ways: "stock" (the library alone), "registered" (stock class after `import compress`), "compress".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Answer one request.

    Args:
        request_path: JSON with `folder`, `class_name`, `dtype`, `device`, `threads`, `seed`,
            `ways`, `inputs` (safetensors), `constants`, and `outputs`, the file to write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    tensors = {name: tensor.to(request["device"]) for name, tensor in load_file(request["inputs"]).items()}
    outputs = {}
    # The ways that need this package come last, so that the others run without it.
    for way in sorted(request["ways"], key=["stock", "registered", "compress"].index):
        module = _load(way, request)
        with torch.no_grad():
            outputs[way] = module(**_nested(tensors, request["constants"]), return_dict=False)[0].cpu()
        del module
    save_file({way: tensor.contiguous() for way, tensor in outputs.items()}, request["outputs"])


def _load(way: str, request: dict[str, Any]) -> Any:
    import torch

    if way == "compress":
        import compress

        return compress.load(request["folder"], device=request["device"])
    options: dict[str, Any] = {"torch_dtype": getattr(torch, request["dtype"])}
    if way == "registered":
        import compress  # noqa: F401

        options = {}
    elif "compress" in sys.modules:
        raise SystemExit("the stock way must not see the package `compress`")
    import diffusers

    stock = getattr(diffusers, request["class_name"])
    module, info = stock.from_pretrained(request["folder"], output_loading_info=True, **options)
    if any(info.values()):
        raise SystemExit(f"the stock loader reports {info}")
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
