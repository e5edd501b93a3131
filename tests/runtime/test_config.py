"""A config that was edited by hand cannot make its class allocate what the weights do not need."""

from __future__ import annotations

import json
import subprocess
import sys

import compress
import pytest
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.runtime.config import check_config

from ..peaks import PEAK

MEASURE = f"""{PEAK}
import sys, time
from compress.errors import SourceError
from compress.runtime.load import load
before, start = peak(), time.perf_counter()
try:
    load(sys.argv[1])
except SourceError as error:
    print(error.message)
    print(time.perf_counter() - start, (peak() - before) // 1024)
"""


@pytest.fixture
def exported(make_tiny, open_quantized, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    model = open_quantized(make_tiny(), {"*.attn1.*": {"bits": 8}})
    write(model, out, "compress")
    return out


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("size", [1024, 4096, 8192, 2**20])
def test_a_larger_picture_is_refused_before_its_table_is_computed(exported, size):
    edit(exported, sample_size=size)
    with pytest.raises(SourceError, match=rf"config\.json: .*sample_size {size} "):
        compress.load(exported)


def test_a_refusal_costs_neither_memory_nor_time(exported):
    edit(exported, sample_size=8192)
    command = [sys.executable, "-c", MEASURE, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, numbers = done.stdout.strip().splitlines()
    seconds, kibibytes = map(float, numbers.split())
    assert "sample_size 8192" in message
    assert seconds < 2.0
    assert kibibytes < 50 * 1024


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sample_size": 1e9}, "sample_size 1000000000.0 is out of range"),
        ({"sample_size": 8192.0}, "sample_size: 8192.0 is not an integer"),
        ({"sample_size": [4096, 4096]}, "sample_size"),
        ({"patch_size": 0}, "patch_size: 0 is not an integer"),
        ({"patch_size": 0.001}, "patch_size: 0.001"),
        ({"num_layers": 10**6}, "num_layers 1000000 with only"),
        ({"num_layers": 3}, "num_layers 3, but the weights have 2 blocks"),
        ({"norm_eps": None}, "norm_eps: None is not a number from 0 to 1"),
        ({"norm_eps": -2.5}, "norm_eps: -2.5 is not a number"),
        ({"dropout": "x"}, "dropout: 'x' is not a number"),
        ({"norm_eps": True}, "norm_eps: True is not a number"),
        ({"attention_head_dim": 2**20}, r"num_attention_heads \* attention_head_dim"),
        ({"dropout": float("inf")}, "dropout inf is out of range"),
        ({"norm_eps": [[2**40]]}, "norm_eps 1099511627776 is out of range"),
    ],
)
def test_other_numbers(exported, values, words):
    edit(exported, **values)
    with pytest.raises(SourceError, match=words):
        compress.load(exported)


def test_position_tables_may_be_as_large_as_the_weights():
    config = {"_class_name": "SD3Transformer2DModel", "pos_embed_max_size": 192}
    check_config(config, 4 * 192**2 * 1152, "config.json", tensors=200)
    with pytest.raises(SourceError, match="the weights have only 1000"):
        check_config(config, 1000, "config.json", tensors=200)


def test_tables_of_other_classes_are_foreseen(exported):
    path = exported / "config.json"
    config = json.loads(path.read_text())
    config.update(_class_name="Transformer2DModel", sample_size=8192)  # the former name of the same class
    del config["patch_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"config\.json: Transformer2DModel would compute tables of \d+"):
        compress.load(exported)


def test_a_class_without_known_defaults():
    config = {"_class_name": "SanaTransformer2DModel", "sample_size": 128, "patch_size": 1}
    check_config(config, 0, "config.json", tensors=200)
    with pytest.raises(SourceError, match=f"{2**26} tokens"):
        check_config({**config, "sample_size": 2**13}, 0, "config.json", tensors=200)
