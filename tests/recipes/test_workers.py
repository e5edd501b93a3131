"""What `--workers` may say."""

import sys

import pytest
from compress.errors import UsageError
from compress.recipes.experts import EepSettings
from compress.recipes.stages import ViditQSettings
from compress.recipes.workers import RaySettings, read_workers, workers_for

EEP = EepSettings.model_validate({"keep_experts": 2})


@pytest.mark.parametrize(
    ("text", "found"), [("1", 1), ("16", 16), ("ray", RaySettings()), ("ray:3", RaySettings(3))]
)
def test_a_number_or_a_cluster(text, found):
    assert read_workers(text) == found
    assert read_workers(found) == found and str(found) == text


@pytest.mark.parametrize("text", ["", "two", "-1", "1.5", "ray:", "ray:x", "Ray", "1 ", "ray:1:2"])
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match=f"--workers {text}: neither a number") as caught:
        read_workers(text)
    assert "ray:N" in caught.value.hint


@pytest.mark.parametrize("given", ["0", "ray:0", 0, -3, RaySettings(0)])
def test_none_at_all_is_refused(given):
    with pytest.raises(UsageError, match="at least one"):
        read_workers(given)


def test_an_address_belongs_into_the_environment():
    with pytest.raises(UsageError) as caught:
        read_workers("ray://head:10001")
    assert "RAY_ADDRESS" in caught.value.hint


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not there
    assert read_workers("2") == 2
    with pytest.raises(UsageError, match="ray is not installed") as caught:
        read_workers("ray")
    assert "compress[ray]" in caught.value.hint


def test_a_cluster_that_no_stage_uses_is_refused():
    other = ViditQSettings.model_validate({})
    given = EepSettings.model_validate({"experts": {0: [0, 1]}})
    assert workers_for([other, EEP], "ray") == RaySettings()
    assert workers_for([other], "4") == 4
    for stages in ([], [other], [given]):
        with pytest.raises(UsageError, match="no stage of this recipe uses a Ray cluster"):
            workers_for(stages, "ray:2")
