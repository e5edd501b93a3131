"""The Hub without a network: what is asked for, and what its refusals become."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from compress.errors import HubError, SourceError
from compress.models.checkpoint import locate
from compress.models.open import read_spec
from compress.models.source_card import is_text_name
from compress.recipes.schema import ModelRef
from huggingface_hub import errors

TransportError = errors.HfHubHTTPError.__bases__[0]  # of whichever HTTP client the Hub's uses
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_dit):
    """A Hub that holds one pipeline; `calls` lists the patterns asked for."""
    remote, local, calls = tmp_path / "remote", tmp_path / "hub" / COMMIT, []
    shutil.copytree(tiny_dit, remote / "transformer", ignore=shutil.ignore_patterns("scheduler"))
    shutil.copytree(tiny_dit / "scheduler", remote / "scheduler")
    (remote / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        calls.append((repo_id, revision, tuple(allow_patterns)))
        files = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return type("Hub", (), {"remote": remote, "local": local, "calls": calls})


def test_a_plan_fetches_configs_only(hub):
    spec = read_spec(ModelRef(id="org/name"))
    assert spec.source.revision == COMMIT
    assert len(hub.calls) == 1
    assert not list(hub.local.rglob("*.safetensors"))
    assert {path.name for path in hub.local.rglob("*.json")} == {
        "config.json", "model_index.json", "scheduler_config.json",
    }  # fmt: skip


def test_a_language_model_comes_with_its_tokenizer(hub, repository):
    shutil.rmtree(hub.remote)
    shutil.copytree(repository / "models" / "builtin" / "stories", hub.remote)
    (hub.remote / "tokenizer.py").write_text("raise SystemExit")
    assert read_spec(ModelRef(id="org/name")).family.name == "llm"
    fetched = {path.name for path in hub.local.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= fetched
    assert not {"tokenizer.py", "model.safetensors", "calibration.jsonl"} & fetched
    assert [path.name for path in locate(ModelRef(id="org/name")).files] == ["model.safetensors"]


def test_a_language_model_in_a_subfolder_comes_with_its_tokenizer(hub, repository):
    shutil.copytree(repository / "models" / "builtin" / "stories", hub.remote / "lm")
    assert read_spec(ModelRef(id="org/name", subfolder="lm")).family.name == "llm"
    fetched = {path.name for path in (hub.local / "lm").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= fetched
    assert "model.safetensors" not in fetched


def test_the_licence_comes_with_the_configs(hub):
    (hub.remote / "README.md").write_text("---\nlicense: other\nlicense_link: TERMS.md\n---\n")
    (hub.remote / "LICENSE.md").write_text("terms")
    card = read_spec(ModelRef(id="org/name")).source.card
    assert len(hub.calls) == 1
    assert (card.license, card.base_model) == ("other", "org/name")
    assert card.license_link == f"https://huggingface.co/org/name/blob/{COMMIT}/TERMS.md"
    assert [path.name for path in card.texts] == ["LICENSE.md"]


def test_only_texts_are_fetched_as_licences(hub):
    names = [
        *("LICENSE", "Licence.TXT", "LICENSE-2.0.md", "license_code", "LICENSE.", "NOTICE", "notice.v1.txt"),
        *(
            "LICENSE.md",
            "LICENSE.txt",
            "LICENSE.safetensors",
            "LICENSE-1.0",
            "license_plates.pt",
            "LICENSE.d",
        ),
        *("LICENSE.t", "LICENSE.xt", "NOTICE.cmd", "NOTICE.1txt", "noticeboard.md", "NOTICE.md.bin"),
        *("LICENCE-texts/all.md", "licenses/big.bin", "NOTICE-of/weights"),
    ]
    for name in names:
        path = hub.remote / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("terms")
    locate(ModelRef(id="org/name"), weights=False)
    found = {path.relative_to(hub.local).as_posix() for path in hub.local.rglob("*") if path.is_file()}
    assert found & set(names) == {name for name in names if is_text_name(name)}


def test_weights_are_of_the_same_commit_and_the_plain_variant(hub):
    weights = hub.remote / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (hub.remote / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    found = locate(ModelRef(id="org/name", revision="main"))
    assert [call[:2] for call in hub.calls] == [("org/name", "main"), ("org/name", COMMIT)]
    assert [path.name for path in found.files] == ["diffusion_pytorch_model.safetensors"]
    assert not list(hub.local.rglob("*.bin"))


def test_a_pipeline_with_a_unet(hub, tiny_unet):
    shutil.rmtree(hub.remote / "transformer")
    shutil.copytree(tiny_unet, hub.remote / "unet", ignore=shutil.ignore_patterns("scheduler"))
    assert read_spec(ModelRef(id="org/name")).family.name == "unet"
    assert not list(hub.local.rglob("*.safetensors"))
    found = locate(ModelRef(id="org/name"))
    assert [path.relative_to(hub.local).as_posix() for path in found.files] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]


def test_loading_fetches_the_denoiser_that_the_pipeline_names(hub, tiny_unet, monkeypatch):
    import compress

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **more: download(repo, **{"ignore_patterns": None} | more),
    )
    (hub.remote / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    shutil.copytree(tiny_unet, hub.remote / "unet", ignore=shutil.ignore_patterns("scheduler"))
    shutil.rmtree(hub.remote / "transformer")
    (hub.remote / "vae").mkdir()
    (hub.remote / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not fetched")
    assert type(compress.load("org/name")).__name__ == "UNet2DConditionModel"
    assert not (hub.local / "vae").exists()
    (hub.remote / "model_index.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(SourceError, match="bytes; at most"):
        compress.load("org/name")


def test_a_repository_with_pickles_only(hub):
    (hub.remote / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (hub.remote / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="no safetensors weights in transformer/"):
        locate(ModelRef(id="org/name"))


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errors.RepositoryNotFoundError("404", response=response(404)), "HF_TOKEN"),
        (errors.GatedRepoError("403", response=response(403)), "HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=response(404)), "model.revision"),
        (errors.LocalEntryNotFoundError("offline and not cached"), "HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError("500", response=response(500)), "network"),
        (TransportError("no route"), "network"),
        (OSError("disk"), "network"),
    ],
)
def test_refusals(monkeypatch, error, hint):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError) as caught:
        locate(ModelRef(id="org/name"))
    assert caught.value.exit_code == 7
    assert "org/name" in caught.value.message
    assert hint in caught.value.hint


def test_offline_and_not_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="org/name: cannot be fetched"):
        locate(ModelRef(id="org/name"), weights=False)
