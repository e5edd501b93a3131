"""What lets a dense model with a compressed cache be saved again: the manifest goes with its factors.

Without it the factors would be tensors of which nothing says what they are. Models with quantized layers need
no such help: their config.json holds the scheme.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...errors import UsageError
from ..manifest import FILE_NAME, Manifest
from ..stored_section import check_kept_factors


class SaveWithManifest:
    """Stands before a module's `save_pretrained`, and writes the manifest beside what that writes.

    An object that holds the module, and no bound method, so that copies of the module hold their own.
    """

    def __init__(self, module: nn.Module, manifest: Manifest) -> None:
        self.module = module
        self.manifest = manifest

    def __call__(self, save_directory: str | Path, *arguments: Any, **keywords: Any) -> Any:
        """Save; arguments and result are those of the stock method.

        Raises:
            SourceError: the factors are not those that were loaded.
            UsageError: `push_to_hub`, which would upload the folder without the manifest.
        """
        if keywords.get("push_to_hub"):
            raise UsageError(
                "save_pretrained(push_to_hub=True) uploads before the manifest is there",
                hint="use model.push_to_hub(...), or save the folder and upload that",
            )
        check_kept_factors(self.manifest, self.module.state_dict())
        stock: Any = getattr(type(self.module), "save_pretrained")  # noqa: B009
        result = stock(self.module, save_directory, *arguments, **keywords)
        folder = Path(save_directory)
        if folder.is_dir():  # of the main process alone, where there are several
            (folder / FILE_NAME).write_text(self.manifest.to_json(), encoding="utf-8")
        return result
