"""The card's section on loading: code that runs as it stands, and what was done to verify it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..models.registry import task_of
from .card_subject import Subject
from .fresh_process import NOT_EXECUTED
from .markdown import fenced
from .stock import library_of
from .tensors_seen import compared_tensors

_TRUSTING = "trust_remote_code"
_GENERATE = """\
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained({})
inputs = tokenizer("Once upon a time", return_tensors="pt")
inputs.pop("token_type_ids", None)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""

_MASKS = """\
import transformers
from PIL import Image
processor = transformers.SamProcessor(transformers.SamImageProcessor.from_pretrained({}))
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(image, input_points=[[[320, 240]]], return_tensors="pt")  # x, y in pixels of the image
output = model(**inputs)
masks = processor.post_process_masks(
    output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
)  # of the one image: [1, 3, height, width]; output.iou_scores says which of the three is the best"""


def loading(subject: Subject) -> Iterator[str]:
    """Yield the section."""
    export = subject.export
    yield from ("## Load it", "")
    for way in export["loads_with"]:
        yield from (_introduction(way, subject), "")
        yield from fenced("\n".join(_lines(way, subject)), "python")
    if any("compress" in way for way in export["loads_with"]):
        yield "`compress` is the toolkit that made this, in the version that stands below: install it"
        yield from ("from its own repository, not a package of the same name from elsewhere.", "")
    if export["format"] == "compress" and any("import compress" in way for way in export["loads_with"]):
        asks = library_of(subject.model["class"]) == "transformers"
        what = "that asks for it" if asks else "of the library that may not name `compress`"
        yield "Import `compress` before the stock class loads: without it, loading stops with an error"
        yield from (f"{what}; it never fills in random weights.", "")
    yield from _use(subject)
    yield from _generating(export)
    yield from (_verified(export), "")


def _generating(export: Mapping[str, Any]) -> Iterator[str]:
    """Say which cache a loaded model uses, where one was compressed."""
    form = export.get("kv_cache")
    if form is not None:
        here = "Loaded by compress," if form == "checkpoint" else "Loaded so,"
        yield f"{here} `model.generate` uses the compressed cache by itself; with"
        yield "`past_key_values=transformers.DynamicCache()` it uses a plain one."


def _place(subject: Subject) -> str:
    """Return where the files of the folder lie, as Python arguments."""
    arguments = json.dumps(subject.place or subject.folder, ensure_ascii=False)
    if subject.place and subject.revision:
        arguments += f", revision={json.dumps(subject.revision)}"
    return arguments


def _use(subject: Subject) -> Iterator[str]:
    """Say what the loaded object is, and what goes with it."""
    if subject.is_adapter:
        yield "The model is the original with factors beside its attentions. `compress.load` finds the"
        yield "original by the name in `cskv.json`, or takes another place of it as `base`, and refuses a"
        yield "model whose projections of keys and values have other hashes. The tokenizer, where the"
        yield "original has one, lies beside the factors. To generate:"
        yield from ("", *fenced(_GENERATE.format(_place(subject)), "python"))
        return
    if task_of(subject.model["family"]) == "classify":
        yield "This is the whole classifier. How an image is prepared for it is unchanged and lies beside it:"
        yield f"`transformers.AutoImageProcessor.from_pretrained({_arguments(subject)})`."
        return
    if task_of(subject.model["family"]) == "segment":
        yield "This is the whole model: image encoder, prompt encoder and mask decoder. How images and points"
        yield "are prepared for it is unchanged and lies beside it. To get masks of what is at a point:"
        yield from ("", *fenced(_MASKS.format(_arguments(subject)), "python"))
        return
    if library_of(subject.model["class"]) == "transformers":
        # The config names code of its own, and the library asks before it reads that even for a tokenizer.
        asks = any(_TRUSTING in way for way in subject.export["loads_with"])
        place = _arguments(subject) + (f", {_TRUSTING}=True" if asks else "")
        yield "This is the whole language model. Its tokenizer and its defaults for generating are unchanged"
        yield f"and lie beside it: `transformers.AutoTokenizer.from_pretrained({place})`."
        return
    part = "unet" if subject.model["class"].startswith("UNet") else "transformer"
    yield f"This is the denoiser and its scheduler, not a whole pipeline: pass it on as `{part}=model`."


def _introduction(way: str, subject: Subject) -> str:
    format_, library = subject.export["format"], library_of(subject.model["class"])
    if "compress.load" in way:
        return "With compress:"
    if _TRUSTING in way:
        return f"With stock {library}, which runs the code that lies beside the weights; read it first:"
    if subject.export.get("kv_cache") == "checkpoint" and "import compress" not in way:
        return f"With stock {library} alone, which names the factors as unexpected and keeps a plain cache:"
    return {
        "compress": "With the stock class, which `import compress` teaches the format:",
        "torchao": f"With stock {library} and torchao, without compress:",
        "sdnq": f"With stock {library} and the package sdnq, without compress:",
        "compressed-tensors": f"With stock {library} and compressed-tensors, without compress:",
        "bitsandbytes-nf4": f"With stock {library} and bitsandbytes, without compress:",
        "bitsandbytes-int8": f"With stock {library} and bitsandbytes, without compress:",
        "dequantized": f"With stock {library} alone:",
    }[format_ if "import compress" in way or format_ != "compress" else "dequantized"]


def _lines(way: str, subject: Subject) -> Iterator[str]:
    """Yield the lines of one way of `loads_with`, with its imports and the checkpoint for `path`."""
    *statements, expression = way.split("; ")
    format_ = subject.export["format"]
    modules = [
        name for name in ("compress", "diffusers", "transformers", "torch") if f"{name}." in expression
    ]
    imports = [f"import {name}" for name in ([format_] if format_ == "sdnq" else []) + modules]
    yield from dict.fromkeys([*statements, *imports])
    arguments = _arguments(subject)
    yield "model = " + re.sub(r"\bpath\b", lambda _: arguments, expression)


def _arguments(subject: Subject) -> str:
    """Return the checkpoint's place as Python arguments."""
    arguments = _place(subject)
    if subject.is_adapter and subject.place and subject.is_local:  # whose folder nobody else has
        arguments += f", base={json.dumps(f'path/to/{subject.source}', ensure_ascii=False)}"
    return arguments


def _verified(export: Mapping[str, Any]) -> str:
    """Say what was done to verify the folder, and nothing more."""
    error = export["max_abs_error"]
    tried = [way for way in export["loads_with"] if _TRUSTING not in way]
    ways = "in each of these ways" if len(tried) > 1 else "in this way"
    code = ""
    if len(tried) < len(export["loads_with"]):
        ways, code = "with compress", " The code beside the weights was not run."
    if export["verified"] and compared_tensors(export):
        return (
            "Before it was published a fresh process compared it with its source, tensor by tensor: config,"
            " names, shapes and every bit are those that the source holds of what stays. No outputs were"
            " computed: it was made from disk to disk, without opening the model."
        )
    if not export["verified"]:
        unrun = NOT_EXECUTED.get(export["format"])
        if unrun in export.get("notes", ()):
            return f"**It was not run before it was published**: {unrun}."
        what = "it does not load, or gives other outputs" if error is None else f"the error is {error:.3g}"
        return f"**The verification failed**: reopened in a fresh process, {what}; see the notes below."
    done = f"Before it was published it was reopened in a fresh process {ways}: the largest difference"
    if export["format"] == "sdnq":
        return (
            f"{done} to our own integer runtime was {error:.3g}, because the arithmetic of sdnq is its own."
        )
    return f"{done} to the outputs of the same layers in memory was {error:g}.{code}"
