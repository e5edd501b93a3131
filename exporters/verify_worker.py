"""Run in a fresh process by `verify`: load a folder each stated way and write what it computes.

    python -P verify_worker.py REQUEST.json

A script and not a module of the package: stock ways must be shown to work without importing it.
Ways: "stock" (the library alone, after the packages that it `needs`), "registered" (stock class after
`import compress`), "compress". Where the model's cache is compressed, those two also decode through it; the
library alone must compute what it computes without the factors, which it reports as unexpected.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DECODED = "/decoded"


def main(request_path: str) -> None:
    """Answer one request.

    Args:
        request_path: JSON with `folder`, `base` (of an adapter: folder of its original; or None), `library`,
            `class_name`, `dtype`, `device`, `threads`, `seed`, `ways`, `needs` (packages without which
            nothing is tried), `inputs` (safetensors), `constants`, `compared` (see `joined`), `unexpected`
            (tensors that are none of the library's, sorted), `decoding` (None, or `ids`, a list of rows, and
            `prompt`, see `decode`), and the files to write: `outputs`
            (safetensors, by way; decoded: by way and `DECODED`) and `answer`, JSON with `missing`, packages
            that are not installed, and `errors`, by way.
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
                found = module(**_nested(tensors, request["constants"]), return_dict=False)
                output = joined(found, request["compared"])
            outputs[way] = output.cpu().contiguous()
            if request["decoding"] and way != "stock":
                outputs[way + DECODED] = _decode_anew(module, request)
            del module
        except Exception as error:
            errors[way] = " ".join(f"{type(error).__name__}: {error}".split())
    save_file(outputs, request["outputs"])
    return errors


def joined(outputs: Any, compared: Any) -> Any:
    """Return the compared outputs of a forward as one tensor: itself, or all of them end to end.

    Args:
        outputs: a tuple of tensors.
        compared: positions in it.
    """
    import torch

    found = [outputs[position] for position in compared]
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found])


def _decode_anew(module: Any, request: dict[str, Any]) -> Any:
    import torch

    new_cache = import_module("compress.runtime.kv.attach").new_cache
    ids = torch.tensor(request["decoding"]["ids"], dtype=torch.int64, device=request["device"])
    return decode(module, new_cache(module), ids, request["decoding"]["prompt"])


def decode(module: Any, cache: Any, ids: Any, prompt: int) -> Any:
    """Feed a prompt at once and what follows it token by token, whatever the model would have written.

    Args:
        module: a language model of transformers.
        cache: empty.
        ids: [batch, tokens] int64.
        prompt: how many of the tokens are fed at once.

    Returns:
        Logits [batch, tokens - prompt + 1, vocabulary] after the prompt and after every further token.
    """
    import torch

    ends = [prompt, *range(prompt + 1, ids.shape[1] + 1)]
    logits = []
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            output = module(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            logits.append(output.logits[:, -1:].cpu())
    return torch.cat(logits, dim=1).contiguous()


def _load(way: str, request: dict[str, Any]) -> Any:
    import torch

    if way == "compress":
        import compress

        return compress.load(request["folder"], device=request["device"], base=request["base"])
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
    known = set(request["unexpected"]) if way == "stock" else set()
    others = [value for key, value in info.items() if key != "unexpected_keys"]
    if any(others) or set(info["unexpected_keys"]) != known:
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
