"""Going on where a run stopped: the model as a finished stage left it, here or in another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .exporters.attachments import read_attachments
from .exporters.form import stored_surgery
from .models.base import OpenModel
from .models.blocks import shallower_config
from .models.expert_choice import with_counts_of
from .models.open import open_model
from .models.origins import NAME as DEPTH_FILE
from .models.origins import kept_blocks
from .models.shallower import shallower_spec
from .progress import SilentProgress
from .recipes.schema import ModelRef
from .runtime.kv.adapter import is_adapter
from .runtime.load import read_checkpoint
from .runtime.validate import CONFIG_NAME, read_json


def resume(model: OpenModel, folder: Path) -> None:
    """Put the checkpoint of a finished stage in the place of the module that was opened."""
    module, manifest = read_checkpoint(folder)
    take_depth(model, folder)
    model.surgery = stored_surgery(folder, model.family, model.config)
    model.module = model.family.adopt(module).to(next(model.module.parameters()).device)
    model.quantization = dict(manifest.quantization)
    model.kv_cache = manifest.kv_cache
    model.history = list(manifest.history)


def take_depth(model: OpenModel, folder: Path) -> None:
    """Let a model say of its blocks what a checkpoint of it says: its config, copies and attachments.

    An adapter says nothing of them: it goes with the model as it was opened.
    """
    if is_adapter(folder):
        return
    attachments = read_attachments(folder)
    kept = kept_blocks(attachments[DEPTH_FILE]) if DEPTH_FILE in attachments else {}
    if kept:
        model.shared = dict(shallower_spec(model.spec, kept).shared)
        # Of the model as it was opened: it may have taken the place of an earlier stage since.
        model.config = shallower_config(model.spec.config, kept)
    model.config = with_counts_of(model.config, read_json(folder / CONFIG_NAME))
    model.attachments = attachments


@dataclass(frozen=True)
class Reopener:
    """Opens a model as a stage found it; picklable.

    Attributes:
        model: of the recipe.
        device: of the run.
        before: folder of the finished stage before; None for the first stage.
    """

    model: ModelRef
    device: str
    before: Path | None

    def __call__(self) -> OpenModel:
        """Open it."""
        model = open_model(self.model, device=self.device, progress=SilentProgress())
        if self.before is not None:
            resume(model, self.before)
        return model
