"""Files of an exported folder that were edited by hand: whoever reads them says which file is wrong."""

from __future__ import annotations

import json
import struct

import compress
import pytest
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.exporters.inspection import inspect
from compress.exporters.verify import FolderError, verify_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def exported(make_tiny, open_quantized, schemes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(open_quantized(make_tiny(), schemes["w4a8"]), out, "compress")
    return out


def replace(name, old, new):
    """Return a damage: the first `old` in the file `name` becomes `new`."""

    def damage(folder):
        data = (folder / name).read_bytes()
        assert old in data
        (folder / name).write_bytes(data.replace(old, new, 1))

    return damage


def in_header(change):
    """Return a damage: `change(header)` of the weights."""

    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def in_json(name, change):
    """Return a damage: `change(value)` of the JSON file `name`."""

    def damage(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def first_tensor(header):
    return next(value for name, value in header.items() if name != "__metadata__")


def raise_settings(manifest):
    manifest["history"][0]["settings"] = {"x": nested(300)}


DAMAGES = {
    "long integer in the manifest": (
        replace("compress.json", b'"bits": 4', b'"bits": ' + b"9" * 5000),
        r"compress\.json: not JSON: an integer of 5000 digits",
    ),
    "integer just short enough for Python": (
        replace("compress.json", b'"bits": 4', b'"bits": ' + b"9" * 4000),
        r"compress\.json: not JSON: an integer of 4000 digits",
    ),
    "long integer in the config": (
        replace("config.json", b'"num_layers": 2', b'"num_layers": ' + b"9" * 5000),
        r"config\.json: not JSON",
    ),
    "manifest not UTF-8": (
        replace("compress.json", b"bits", b"\xff\xfe"), r"compress\.json: not JSON: byte \d+ is not UTF-8",
    ),
    "config not UTF-8": (replace("config.json", b"sample", b"\xff"), r"config\.json: not JSON: byte"),
    "manifest a list": (
        lambda out: (out / "compress.json").write_text("[]"), r"compress\.json: not a JSON object",
    ),
    "manifest deep": (
        lambda out: (out / "compress.json").write_text('{"a":' * 900 + "1" + "}" * 900),
        r"compress\.json: .*levels deep",
    ),
    "history deep": (in_json("compress.json", raise_settings), r"compress\.json: .*levels deep"),
    "config deep": (
        in_json("config.json", lambda config: config.update(x=nested(500))), r"config\.json: .*levels deep",
    ),
    "config with a name twice": (
        replace("config.json", b'"num_layers"', b'"sample_size": 4, "num_layers"'),
        "'sample_size' stands twice",
    ),
    "metadata a list": (
        in_header(lambda header: header.update(__metadata__=["x"])),
        rf"{WEIGHTS}: __metadata__ .* not an object",
    ),
    "metadata of numbers": (
        in_header(lambda header: header.update(__metadata__={"a": 1})), rf"{WEIGHTS}: __metadata__",
    ),
    "dtype a list": (
        in_header(lambda header: first_tensor(header).update(dtype=["F32"])), rf"{WEIGHTS}: tensor .* dtype",
    ),
    "shape an object": (
        in_header(lambda header: first_tensor(header).update(shape={"a": 1})), rf"{WEIGHTS}: tensor .* shape",
    ),
    "header deep": (
        in_header(lambda header: first_tensor(header).update(shape=nested(500))),
        rf"{WEIGHTS}: .*levels deep",
    ),
    "section dtype a list": (
        in_json("config.json", lambda config: config["quantization_config"].update(dtype=["float32"])),
        r"config\.json: quantization_config\.dtype",
    ),
    "section modules a list": (
        in_json("config.json", lambda config: config["quantization_config"].update(modules=[1])),
        r"config\.json: quantization_config: quantization",
    ),
    "index not UTF-8": (
        lambda out: (out / f"{WEIGHTS}.index.json").write_bytes(b'{"weight_map": "\xff"}'),
        r"index\.json: not JSON: byte",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_every_reader_names_the_file(exported, name):
    damage, words = DAMAGES[name]
    damage(exported)
    for read in (inspect, compress.load):
        with pytest.raises(SourceError, match=words):
            read(exported)
    with pytest.raises(FolderError, match=words):
        verify_folder(exported)


@pytest.mark.parametrize("kinds", [[1], {"int4": 5}, "x"])
def test_a_section_of_another_library_edited_by_hand(exported, kinds):
    def change(config):
        config["quantization_config"] = {"quant_method": "sdnq", "modules_dtype_dict": kinds}

    in_json("config.json", change)(exported)
    (exported / "compress.json").unlink()
    in_header(lambda header: header.update({"proj_out_1.scale": header.pop("proj_out_1.bias")}))(exported)
    with pytest.raises(SourceError, match="config and tensors are not what sdnq writes"):
        inspect(exported)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b'{"export": []}',
        b'{"export": {"files": [{"name": "a", "bytes": Infinity, "sha256": ""}]}}',
        b'{"export": {"files": [{"name": "a", "bytes": ' + b"9" * 5000 + b', "sha256": ""}]}}',
        b"[" * 10**5,
    ],
)
def test_a_report_edited_by_hand(exported, text):
    (exported / "report.json").write_bytes(text)
    with pytest.raises(FolderError, match=r"report\.json has no readable export\.files"):
        verify_folder(exported)


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "\ud800", ""])
def test_a_report_with_names_that_no_file_has(exported, name):
    entry = {"name": name, "bytes": 1, "sha256": ""}
    (exported / "report.json").write_text(json.dumps({"export": {"files": [entry]}}))
    with pytest.raises(FolderError, match="files: ") as caught:
        verify_folder(exported)
    assert caught.value.message.encode()
