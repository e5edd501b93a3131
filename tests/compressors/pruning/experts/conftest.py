"""What the tests of the search share: test folders are no packages, so a module is loaded by its path."""

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "expert_search_landscape"


@pytest.fixture(scope="session")
def landscape():
    """Return the module `landscape.py` beside this file."""
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("landscape.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # a forked worker finds its functions there
    spec.loader.exec_module(module)
    return module
