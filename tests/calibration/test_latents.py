"""Latents on disk: layouts, what is refused, which items a batch holds."""

import numpy as np
import pytest
import torch
from compress.calibration import latents as module
from compress.calibration.latent_files import find_latents, fingerprint
from compress.calibration.latents import stored_latents
from compress.calibration.seeds import generator_for
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from safetensors.torch import save_file


@pytest.fixture
def dit(tiny_dit):
    return open_model(ModelRef(id=str(tiny_dit)), device="cpu", progress=SilentProgress())


def random_latents(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def tables(folder, counts=(3, 5), flipped=True, **changes):
    """Several safetensors files; return (latents, flipped, labels) of all of them."""
    folder.mkdir()
    latents, others = random_latents(sum(counts)), random_latents(sum(counts), 1)
    labels = torch.arange(sum(counts)) % 10
    start = 0
    for number, count in enumerate(counts):
        rows = slice(start, start + count)
        tensors = {"latents": latents[rows].clone(), "labels": labels[rows].clone()}
        if flipped:
            tensors["flipped"] = others[rows].clone()
        save_file({**tensors, **changes}, folder / f"part-{number}.safetensors")
        start += count
    return latents, others, labels


def arrays(folder, pairs=False):
    """One item a file, as scripts that encode ImageNet write them."""
    for name in ("imagenet_features", "imagenet_labels"):
        (folder / name).mkdir(parents=True)
    latents = random_latents(12).numpy()
    for index in range(6):
        values = np.stack(latents[2 * index : 2 * index + 2])[None] if pairs else latents[index : index + 1]
        np.save(folder / "imagenet_features" / f"{index}.npy", values)
        np.save(folder / "imagenet_labels" / f"{index}.npy", np.array([index], dtype=np.int32))
    return torch.from_numpy(latents)


def generators(items):
    return [generator_for(0, "test", item) for item in items]


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_items_come_from_their_files(tmp_path, dit, monkeypatch, kept_bytes):
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    latents, flipped, labels = tables(tmp_path / "data")
    found = stored_latents(dit, tmp_path / "data", None)
    assert len(found) == 8 and found.shape == (4, 8, 8) and found.mirror == "stored"
    items = [7, 0, 3, 2] * 8
    clean, conditions = found.batch(items, torch.Generator().manual_seed(0))
    turned = [torch.equal(one, flipped[item]) for one, item in zip(clean, items, strict=True)]
    expected = [flipped[item] if turn else latents[item] for item, turn in zip(items, turned, strict=True)]
    assert torch.equal(clean, torch.stack(expected)) and 6 < sum(turned) < 26
    assert torch.equal(conditions["class_labels"], labels[items])
    assert bool(found._kept) == (kept_bytes > 0)


def test_a_file_by_itself_and_no_mirroring(tmp_path, dit):
    latents, _, _ = tables(tmp_path / "data", counts=(4,))
    path = tmp_path / "data" / "part-0.safetensors"
    still = stored_latents(dit, path, False)
    assert torch.equal(still.batch([3, 1], torch.Generator())[0], latents[[3, 1]])
    assert still.key != stored_latents(dit, path, None).key


def test_mirrored_ones_are_taken_where_they_are(tmp_path, dit):
    latents, _, _ = tables(tmp_path / "data", flipped=False)
    found = stored_latents(dit, tmp_path / "data", None)
    assert found.mirror is None
    assert torch.equal(found.batch(range(8), torch.Generator())[0], latents)
    with pytest.raises(SourceError, match="no mirrored latents"):
        stored_latents(dit, tmp_path / "data", True)


def test_what_an_item_gets_does_not_depend_on_its_batch(tmp_path, dit):
    tables(tmp_path / "data")
    found = stored_latents(dit, tmp_path / "data", None)
    whole, _ = found.batch(range(8), generators(range(8)))
    part, _ = found.batch(range(5, 8), generators(range(5, 8)))
    assert torch.equal(whole[5:], part)


def test_arrays_of_one_item_each(tmp_path, dit):
    latents = arrays(tmp_path / "plain")
    found = stored_latents(dit, tmp_path / "plain", None)
    clean, conditions = found.batch([5, 2], torch.Generator())
    assert torch.equal(clean, latents[[5, 2]]) and conditions["class_labels"].tolist() == [5, 2]
    latents = arrays(tmp_path / "pairs", pairs=True).view(6, 2, 4, 8, 8)
    found = stored_latents(dit, tmp_path / "pairs", None)
    assert len(found) == 6 and found.mirror == "stored"
    clean, _ = found.batch([4] * 20, torch.Generator().manual_seed(0))
    turned = [torch.equal(one, latents[4, 1]) for one in clean]
    assert all(torch.equal(one, latents[4, int(turn)]) for one, turn in zip(clean, turned, strict=True))
    assert 4 < sum(turned) < 16


def test_the_key_is_of_the_content(tmp_path):
    tables(tmp_path / "one")
    tables(tmp_path / "two")
    first, second = (fingerprint(find_latents(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    tables(tmp_path / "three", labels=torch.zeros(3, dtype=torch.int64), counts=(3,))
    assert fingerprint(find_latents(tmp_path / "three")) != first


def test_text_models_read_embeddings_row_by_row(tmp_path, tiny_pixart):
    model = open_model(ModelRef(id=str(tiny_pixart)), device="cpu", progress=SilentProgress())
    embeds = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6)
    path = tmp_path / "data.safetensors"
    save_file({"latents": random_latents(3), "prompt_embeds": embeds, "prompt_attention_mask": mask}, path)
    _, conditions = stored_latents(model, path, None).batch([2, 0], torch.Generator())
    assert torch.equal(conditions["encoder_hidden_states"], embeds[[2, 0]])
    assert torch.equal(conditions["encoder_attention_mask"], mask[[2, 0]])
    save_file({"latents": random_latents(3), "prompt_embeds": embeds}, path)
    with pytest.raises(SourceError, match="no tensor 'prompt_attention_mask'"):
        stored_latents(model, path, None)


def test_values_that_are_not_finite_are_refused_with_their_place(tmp_path, dit):
    values = random_latents(3)
    values[1, 2, 3, 4] = float("nan")
    save_file({"latents": values, "labels": torch.zeros(3, dtype=torch.int64)}, tmp_path / "x.safetensors")
    found = stored_latents(dit, tmp_path / "x.safetensors", None)
    found.batch([0, 2], torch.Generator())
    with pytest.raises(SourceError, match="latents of item 1 are not finite"):
        found.batch([0, 1], torch.Generator())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"values": torch.zeros(1)}, "has no tensor 'latents'"),
        ({"latents": torch.zeros(2, 4, 8)}, r"latents is F32 \[2, 4, 8\]"),
        ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.int64)}, r"latents is I64 .*, needed: floats"),
        ({"latents": torch.zeros(2, 4, 8, 8), "flipped": torch.zeros(1, 4, 8, 8)}, "flipped is F32"),
        ({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(3, dtype=torch.int64)}, "2 latents"),
        ({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(2)}, "labels is F32"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "has no tensor 'labels'"),
        ({"latents": torch.zeros(2, 4, 8, 9), "labels": torch.zeros(2, dtype=torch.int64)}, r"\[4, 8, 9\]"),
        (
            {"latents": torch.zeros(2, 4, 8, 8), "labels": torch.tensor([3, 10])},
            r"x\.safetensors: the label 10 is out of range; the model has 10 classes",
        ),
        (
            {"latents": torch.zeros(1, 4, 8, 8), "labels": torch.tensor([1]), "extra": torch.zeros(1)},
            "'extra' is none that the model is conditioned on",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, dit, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=message):
        stored_latents(dit, tmp_path, None)


def test_folders_that_hold_something_else_are_refused(tmp_path, dit):
    with pytest.raises(SourceError, match="no such file or folder of latents"):
        find_latents(tmp_path / "absent")
    with pytest.raises(SourceError, match="neither safetensors files nor two folders"):
        find_latents(tmp_path)
    arrays(tmp_path / "data")
    (tmp_path / "data" / "imagenet_labels" / "3.npy").unlink()
    with pytest.raises(SourceError, match=r"3\.npy is in one of imagenet_features and imagenet_labels alone"):
        find_latents(tmp_path / "data")
    np.save(tmp_path / "data" / "imagenet_labels" / "3.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(SourceError, match="cannot be read as an array"):
        find_latents(tmp_path / "data")
    tables(tmp_path / "mixed", counts=(2, 2))
    save_file({"latents": torch.zeros(1, 4, 4, 4)}, tmp_path / "mixed" / "z.safetensors")
    with pytest.raises(SourceError, match="give files of one kind|its items are"):
        find_latents(tmp_path / "mixed")


def refused_pair(folder, flipped):
    """Two folders of arrays, of which one file alone has mirrored images."""
    arrays(folder, pairs=not flipped)
    values = random_latents(2).numpy()
    np.save(folder / "imagenet_features" / "4.npy", values[None] if flipped else values[:1])


@pytest.mark.parametrize("flipped", [True, False])
def test_arrays_of_which_some_have_mirrored_images_are_refused(tmp_path, flipped):
    refused_pair(tmp_path / "data", flipped)
    item, pair = r"\[4, 8, 8\]", r"\[4, 8, 8\] with mirrored ones"
    told = (pair, item) if flipped else (item, pair)
    with pytest.raises(SourceError, match=rf"4\.npy: its items are {told[0]}, those of 0\.npy {told[1]}$"):
        find_latents(tmp_path / "data")


def test_tables_of_which_some_have_mirrored_images_are_refused(tmp_path):
    tables(tmp_path / "data")
    labels = torch.zeros(1, dtype=torch.int64)
    save_file({"latents": torch.zeros(1, 4, 8, 8), "labels": labels}, tmp_path / "data" / "z.safetensors")
    with pytest.raises(SourceError, match=r"z\.safetensors.*those of part-0\.safetensors .* mirrored ones"):
        find_latents(tmp_path / "data")


@pytest.mark.parametrize("kind", ["features", "labels"])
@pytest.mark.parametrize("content", ["archive", "zip", "empty", "cut", "header"])
def test_what_is_no_array_is_refused_with_its_name(tmp_path, kind, content):
    arrays(tmp_path / "data")
    path = tmp_path / "data" / f"imagenet_{kind}" / "3.npy"
    if content == "archive":
        with path.open("wb") as stream:
            np.savez(stream, values=np.zeros((1, 4, 8, 8), np.float32))
    else:
        whole = path.read_bytes()
        path.write_bytes(
            {
                "zip": b"PK\x03\x04" + bytes(200),
                "empty": b"",
                "cut": whole[:-1],
                "header": whole[:10] + b"{'descr': (((" + whole[23:],
            }[content]
        )
    with pytest.raises(SourceError, match=r"3\.npy: cannot be read as an array"):
        find_latents(tmp_path / "data")


def text_data(class_name, count, **changes):
    """What a file of latents holds for a tiny text model."""
    generator = torch.Generator().manual_seed(2)
    found = {
        "latents": random_latents(count),
        "prompt_embeds": torch.randn(count, 6, 32, generator=generator),
    }
    if class_name == "pixart":
        found["prompt_attention_mask"] = torch.ones(count, 6)
    else:
        found["pooled_prompt_embeds"] = torch.randn(count, 32, generator=generator)
    return {**found, **changes}


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        (
            "pixart",
            {"prompt_embeds": torch.zeros(2, 6, 31)},
            "prompt_embeds of 32 channels, and these have 31",
        ),
        ("pixart", {"prompt_embeds": torch.zeros(2, 32)}, "prompt_embeds of any x 32, and these have 32"),
        ("pixart", {"prompt_attention_mask": torch.ones(2, 5)}, "mask of 6 values, and these have 5"),
        ("sd3", {"prompt_embeds": torch.zeros(2, 6, 33)}, "prompt_embeds of 32 channels, and these have 33"),
        ("sd3", {"prompt_embeds": torch.zeros(2, 32)}, "prompt_embeds of any x 32, and these have 32"),
        ("sd3", {"pooled_prompt_embeds": torch.zeros(2, 1, 32)}, "pooled_prompt_embeds of 32, and .* 1 x 32"),
        ("sd3", {"pooled_prompt_embeds": torch.zeros(2, 8)}, "pooled_prompt_embeds of 32 channels, .* 8"),
    ],
)
def test_embeddings_that_the_model_cannot_read_are_refused(tmp_path, request, class_name, changes, message):
    folder = request.getfixturevalue(f"tiny_{class_name}")
    model = open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())
    (tmp_path / "data").mkdir()
    save_file(text_data(class_name, 2), tmp_path / "data" / "a.safetensors")
    stored_latents(model, tmp_path / "data", None).batch([0, 1], torch.Generator())
    save_file(text_data(class_name, 2, **changes), tmp_path / "data" / "a.safetensors")
    with pytest.raises(SourceError, match=rf"a\.safetensors: .*{message}"):
        stored_latents(model, tmp_path / "data", None)


def test_prompts_of_different_lengths_do_not_make_a_batch(tmp_path, tiny_sd3):
    model = open_model(ModelRef(id=str(tiny_sd3)), device="cpu", progress=SilentProgress())
    (tmp_path / "data").mkdir()
    save_file(text_data("sd3", 2), tmp_path / "data" / "a.safetensors")
    save_file(text_data("sd3", 2, prompt_embeds=torch.zeros(2, 7, 32)), tmp_path / "data" / "b.safetensors")
    with pytest.raises(SourceError, match=r"b\.safetensors: .*\[7, 32\].*a\.safetensors .*\[6, 32\]"):
        stored_latents(model, tmp_path / "data", None)


def test_embeddings_that_are_not_finite_or_no_numbers_are_refused(tmp_path, tiny_sd3):
    model = open_model(ModelRef(id=str(tiny_sd3)), device="cpu", progress=SilentProgress())
    path = tmp_path / "data.safetensors"
    tensors = text_data("sd3", 3)
    tensors["prompt_embeds"][1, 2, 3] = float("nan")
    save_file(tensors, path)
    data = stored_latents(model, path, None)
    data.batch([0, 2], torch.Generator())
    with pytest.raises(SourceError, match=r"data\.safetensors: prompt_embeds of item 1 are not finite"):
        data.batch([0, 1], torch.Generator())
    whole = torch.zeros(3, 32, dtype=torch.int64)
    save_file(text_data("sd3", 3, pooled_prompt_embeds=whole), path)
    with pytest.raises(SourceError, match=r"data\.safetensors: pooled_prompt_embeds is int64"):
        stored_latents(model, path, None).batch([0], torch.Generator())
