"""How the sizes of a cut model are written: in a stock config as far as that can say them.

Three forms, the first that fits: a config from which the stock class builds the model as it is; a config
that says the sizes layer by layer in the library's words; the config of the original. What the config
does not say stands in the manifest and is applied to the module that the stock class builds from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..models.base import Family
from ..models.building import meta_module
from ..models.shapes import complete_config, expected_shapes
from ..runtime.differing import difference
from ..runtime.layered import homogeneous
from ..runtime.manifest import ModuleSurgery
from ..runtime.validate import CONFIG_NAME, open_folder

SECTION = "quantization_config"


@dataclass(frozen=True)
class StoredForm:
    """What a folder says of its sizes.

    Attributes:
        config: config.json, without a section on quantization.
        surgery: what differs from what the stock class builds from it.
    """

    config: dict[str, Any]
    surgery: dict[str, ModuleSurgery]


def stored_form(
    family: Family, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
) -> StoredForm:
    """Choose the form for a model that was opened from `config` and cut by `surgery`.

    Equal sizes give equal forms, whatever `surgery` lists beyond what is needed.
    """
    if not surgery:
        return StoredForm(dict(config), {})
    native = family.native_config(config, surgery)
    layered = family.layered_config(config, surgery) if native is None else None
    chosen = dict(native or layered or config)
    left = difference(meta_module(family, config, surgery), meta_module(family, homogeneous(chosen)))
    if native is not None and left:
        raise ValueError(f"the native config of the family {family.name} does not build {min(left)} as it is")
    return StoredForm(chosen, left)


def stored_surgery(folder: Path, family: Family, config: Mapping[str, Any]) -> dict[str, ModuleSurgery]:
    """Return what the model in a folder has otherwise than `config` implies, in whichever form it is.

    Args:
        folder: in any format of ours, or a dense stock folder, of the same class as `config`.
        family: of the class.
        config: of the original.

    Raises:
        SourceError: the folder is damaged, or its sizes are none that a model of `config` can be cut to.
    """
    stored = open_folder(folder)
    if stored.class_name != config["_class_name"]:
        raise SourceError(f"{folder}: is of the class {stored.class_name}, not {config['_class_name']}")
    own = {key: value for key, value in homogeneous(stored.config).items() if key != SECTION}
    complete = complete_config(stored.class_name, own, str(folder / CONFIG_NAME))
    same = expected_shapes(stored.class_name, complete) == expected_shapes(stored.class_name, config)
    if same and not stored.manifest.surgery:
        return {}
    return difference(meta_module(family, complete, stored.manifest.surgery), meta_module(family, config))
