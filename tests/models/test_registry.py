"""Class names to adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compress.errors import SourceError
from compress.models.registry import FAMILY_NAMES, family_for, stock_class_name


@pytest.mark.parametrize("class_name", FAMILY_NAMES)
def test_every_class_has_its_adapter(class_name):
    family = family_for(class_name)
    assert family.name == FAMILY_NAMES[class_name]
    assert class_name in family.class_names


def test_unknown_classes():
    with pytest.raises(SourceError, match="UNet is not supported") as caught:
        family_for("UNet")
    assert all(name in caught.value.hint for name in FAMILY_NAMES)
    assert stock_class_name(["DiTTransformer2DModel"], {}) is None
    assert stock_class_name("Transformer2DModel", {}) is None


def test_names_need_no_torch():
    code = "import sys, compress.models.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
