"""Bars of other packages: silent inside, as before outside, also after an error."""

from __future__ import annotations

import sys
import types

import pytest
from compress.runtime.silent_bars import silent_bars
from tqdm import tqdm


@pytest.fixture
def packages(monkeypatch):
    """Two packages whose modules draw bars; one of them has a lazy module beside."""
    made = {}
    for name in ("loud", "loud.part", "louder"):
        module = made[name] = types.ModuleType(name)
        module.tqdm = tqdm
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "loud.empty", None)
    return made


def test_bars_of_a_package_alone_are_silent(packages, capsys):
    with silent_bars("loud"):
        for name in ("loud", "loud.part"):
            assert list(packages[name].tqdm(range(3), desc="bar")) == [0, 1, 2]
            list(packages[name].tqdm(range(3), desc="bar", disable=False))
        assert capsys.readouterr().err == ""
        assert list(packages["louder"].tqdm(range(3), desc="other")) == [0, 1, 2]
        assert "other" in capsys.readouterr().err
    list(packages["loud.part"].tqdm(range(3), desc="bar"))
    assert "bar" in capsys.readouterr().err


def test_an_error_leaves_nothing_behind(packages):
    with pytest.raises(OSError), silent_bars("loud"):
        assert packages["loud"].tqdm is not tqdm
        raise OSError
    assert all(module.tqdm is tqdm for module in packages.values())
    with silent_bars("loud"):  # the lock is free again
        pass
