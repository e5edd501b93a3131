"""Shapes over photographs: what is drawn is what the masks say, and the archives hold it as SA-1B does."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from compress.models.builtin.scenes import (
    SMALLEST,
    SOURCES,
    Photographs,
    decoded,
    draw_scene,
    outline,
    shapes_of,
)
from compress.models.builtin.write_scenes import (
    FOLDER,
    SEEDS,
    annotation,
    characters,
    drawn,
    run_lengths,
    write,
)
from PIL import Image

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "images"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data/images")


@pytest.fixture
def photographs(tmp_path):
    """Photographs of one colour each in their left 70 %, and black in the rest."""
    for number, (name, (_, _, right, bottom)) in enumerate(SOURCES.items()):
        pixels = np.zeros((bottom, right, 3), dtype=np.uint8)
        pixels[:, : round(0.7 * right)] = 60 + 40 * number
        Image.fromarray(pixels).save(tmp_path / name, quality=100)
    return tmp_path


def unpacked(counts: str, height: int, width: int) -> np.ndarray:
    """Decode COCO's characters by their definition: five bits each, the sixth says that more follow."""
    runs, values = [], iter(ord(character) - 48 for character in counts)
    for value in values:
        number, shift = value & 31, 5
        while value & 32:
            value = next(values)
            number |= (value & 31) << shift
            shift += 5
        if value & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_written_as_coco_writes_them(seed):
    generator = np.random.default_rng(seed)
    mask = generator.uniform(size=tuple(generator.integers(1, 90, 2))) < generator.uniform()
    assert sum(run_lengths(mask)) == mask.size
    assert np.array_equal(unpacked(characters(run_lengths(mask)), *mask.shape), mask)


def test_characters_of_a_known_mask():
    """By hand: differences from the fourth run on, five bits a character."""
    assert characters([0, 4]) == "04"
    assert characters([6, 1, 40, 4, 13, 100]) == "61X13UOP3"


def test_run_lengths_begin_with_what_is_off():
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == [6]
    assert run_lengths(np.ones((2, 3), dtype=bool)) == [0, 6]


def test_an_annotation_tells_box_area_and_a_point_inside():
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:22] = True
    told = annotation(mask, 3, np.random.default_rng(0))
    assert (told["id"], told["area"], told["bbox"]) == (3, 60, [10, 4, 12, 5])
    ((x, y),) = told["point_coords"]
    assert mask[int(y), int(x)]


def test_no_part_sees_a_pixel_of_the_other(photographs):
    bright = [np.asarray(image) for image in Photographs(photographs, "train").images]
    dark = [np.asarray(image) for image in Photographs(photographs, "validation").images]
    assert all(image.min() > 40 for image in bright) and all(image.max() < 20 for image in dark)


def test_shapes_differ_from_what_they_cover(photographs):
    train, generator = Photographs(photographs, "train"), np.random.default_rng(0)
    sizes, gaps = set(), []
    for _ in range(60):
        file, labels = draw_scene(train, generator)
        image = decoded(file)
        sizes.add(labels.shape)
        for label in shapes_of(labels):
            assert (labels == label).sum() >= SMALLEST
            around = (labels != label) & (labels == 0)
            if around.any():
                gap = image[labels == label].mean(axis=0) - image[around].mean(axis=0)
                gaps.append(np.abs(gap).max())
    assert sizes == {(128, 128), (96, 128), (128, 96)}
    assert len(gaps) > 100 and np.median(gaps) > 50 and np.quantile(gaps, 0.1) > 25


@pytest.mark.parametrize("kind", ["ellipse", "rectangle", "polygon", "star", "ring"])
def test_outlines_stay_within_the_unit_circle(kind):
    generator = np.random.default_rng(0)
    for _ in range(20):
        assert np.linalg.norm(outline(kind, generator), axis=1).max() <= 1 + 1e-9


def test_the_same_seed_writes_the_same_bytes_and_every_image_has_masks(photographs, tmp_path):
    for name in ("one", "two"):
        write(photographs, tmp_path / name, "train", 6)
    assert (tmp_path / "one/train.tar").read_bytes() == (tmp_path / "two/train.tar").read_bytes()
    assert all(len(notes) >= 1 for _, _, notes in drawn(photographs, "train", 6))
    assert len(set(SEEDS.values())) == len(SEEDS)


@pytest.mark.parametrize(("part", "count"), [("train", 256), ("validation", 64)])
def test_the_shipped_archives_hold_images_beside_their_masks(part, count):
    with tarfile.open(FOLDER / f"{part}.tar") as archive:
        files = {item.name: archive.extractfile(item).read() for item in archive.getmembers()}
    assert list(files) == [
        f"{part}_{number:04d}.{end}" for number in range(1, count + 1) for end in ("jpg", "json")
    ]
    for name in [name for name in files if name.endswith(".json")][:12]:
        told = json.loads(files[name])
        with Image.open(io.BytesIO(files[told["image"]["file_name"]])) as image:
            assert image.size == (told["image"]["width"], told["image"]["height"])
            size = [image.height, image.width]
        for note in told["annotations"]:
            assert note["segmentation"]["size"] == size
            mask = unpacked(note["segmentation"]["counts"], *size)
            ((x, y),) = note["point_coords"]
            assert mask[int(y), int(x)] and mask.sum() == note["area"]


@needs_data
def test_the_shipped_masks_are_those_that_the_script_draws():
    """Masks alone: the bytes of a JPEG file depend on the library's version."""
    with tarfile.open(FOLDER / "validation.tar") as archive:
        for number, (_, _, notes) in enumerate(drawn(DATA, "validation", 5), start=1):
            told = json.loads(archive.extractfile(f"validation_{number:04d}.json").read())
            assert told["annotations"] == notes
