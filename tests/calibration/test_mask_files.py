"""Masks of run lengths: hand-worked texts, points, and files that claim what is not so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from compress.calibration import mask_files
from compress.calibration.decoding import ImageHead, Unreadable
from compress.calibration.mask_files import inner_point, read_outlines

from ..tiny_scenes import annotation, coco_string, drawn, runs, scene_json

SIZE = (4, 5)
HEAD = ImageHead(SIZE, SIZE, False)


def _read(entry, head=HEAD):
    return read_outlines(json.dumps({"annotations": [entry]}).encode(), "x.json", head)


def _entry(counts, size=SIZE, **more):
    return {"segmentation": {"size": list(size), "counts": counts}, **more}


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("52305", [5, 2, 3, 2, 8]),  # a character each; the last two are 2 - 2 and 8 - 3
        ("053M7", [0, 5, 3, 2, 10]),  # M is 29, or -3 in five bits: 2 - 5; then 10 - 3
        ("d0", [20]),  # 20 has the bit of the sign, so a 0 follows
    ],
)
def test_texts_by_hand(text, lengths):
    """Five bits a character from 48 on; the sixth says that more follow, the last fifth is the sign."""
    found = mask_files._coco_runs(text)
    assert found.tolist() == lengths and coco_string(lengths) == text


def test_a_mask_by_hand():
    """4 x 5: five zeros down the first column and into the second, two ones, three zeros, two ones."""
    (outline,) = _read(_entry("52305"))
    wanted = np.zeros((5, 4), dtype=bool)
    wanted[1, 1:3] = wanted[2, 2:4] = True
    assert np.array_equal(outline.mask(), wanted.T) and outline.area == 4
    (listed,) = _read(_entry([5, 2, 3, 2, 8]))
    assert np.array_equal(listed.mask(), wanted.T)


def test_masks_come_back_from_both_kinds_of_runs():
    generator = np.random.default_rng(0)
    head = ImageHead((17, 23), (17, 23), False)
    for density in (0.02, 0.5, 0.98):
        mask = generator.random((17, 23)) < density
        for kind in ("string", "runs"):
            (outline,) = _read(annotation(mask, kind), head)
            assert np.array_equal(outline.mask(), mask) and outline.area == mask.sum()


def test_long_runs_of_every_number_of_characters():
    generator = np.random.default_rng(1)
    for power in range(1, 27):
        lengths = generator.integers(0, 2**power, 9).tolist()
        assert mask_files._coco_runs(coco_string(lengths)).tolist() == lengths


def test_objects_without_an_area_are_left_out_and_only_the_first_are_read(monkeypatch):
    entries = [_entry([20]), _entry("52305"), _entry([0, 20]), _entry([19, 1])]
    content = json.dumps({"annotations": entries}).encode()
    assert [found.area for found in read_outlines(content, "x.json", HEAD)] == [4, 20, 1]
    monkeypatch.setattr(mask_files, "MASKS_OF_AN_IMAGE", 2)
    assert [found.area for found in read_outlines(content, "x.json", HEAD)] == [4, 20]
    monkeypatch.setattr(mask_files, "_MASK_PIXELS", 20)
    assert [found.area for found in read_outlines(content, "x.json", HEAD)] == [4]


def test_the_annotated_point_counts_where_it_lies_in_the_image():
    (inside,) = _read(_entry("52305", point_coords=[[4.5, 0.0], [1.0, 1.0]]))
    assert inside.click(inside.mask()) == (4.5, 0.0)
    outside = [[5.0, 1.0]], [[1.0, 4.0]], [[-0.1, 1.0]], [[1.0, float("nan")]], [], None, [[True, 1]], "x"
    for given in outside:
        (found,) = _read(_entry("52305", point_coords=given))
        assert found.point is None and found.click(found.mask()) == inner_point(found.mask())


def test_the_innermost_pixel():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:10, 12:19] = True
    mask[15, 2:29] = True
    assert inner_point(mask) == (15.0, 6.0)
    assert inner_point(np.ones((5, 9), dtype=bool)) == (2.0, 2.0), "the image ends, and so does the object"
    two = np.zeros((9, 9), dtype=bool)
    two[0:3, 5:8] = two[5:8, 1:4] = True
    assert inner_point(two) == (6.0, 1.0), "of equal ones the first by rows"


def test_large_objects_are_thinned_out_before_they_are_measured(monkeypatch):
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:51, 20:61] = True
    exact = inner_point(mask)
    monkeypatch.setattr(mask_files, "_MEASURED_PIXELS", 100)
    found = inner_point(mask)
    assert mask[int(found[1]), int(found[0])] and np.abs(np.subtract(found, exact)).max() <= 5
    line = np.zeros((60, 90), dtype=bool)
    line[[11, 30], [23, 41]] = True
    x, y = inner_point(line)
    assert line[int(y), int(x)], "a pixel of the object even where the steps miss it"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "has no `segmentation`"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has no `segmentation`"),
        (_entry([20], size=(5, 4)), r"the mask has 5 x 4 pixels \(height x width\), the image 4 x 5"),
        (_entry([20], size=(4.0, 5)), "is not"),
        (_entry([20], size=(True, 5)), "is not"),
        (_entry([19]), "runs cover 19 of 20 pixels"),
        (_entry([10, 11]), "runs cover 21 of 20"),
        (_entry([30, -10]), "negative, too long"),
        (_entry([2**70]), "too long|digits"),
        (_entry([2**40]), "too long"),
        (_entry([0] * 30 + [20]), "too many"),
        (_entry([5.0, 15]), "neither a text nor a list"),
        (_entry(None), "neither a text nor a list"),
        (_entry("5230ö"), "characters that are none"),
        (_entry("52 05"), "characters that are none"),
        (_entry("5230d"), "ends within a number"),
        (_entry("dddddddd0"), "too long"),
        (_entry(""), "runs cover 0 of 20"),
        (_entry([]), "runs cover 0 of 20"),
    ],
)
def test_entries_that_are_refused(entry, message):
    with pytest.raises(Unreadable, match=message) as found:
        _read(entry)
    assert "x.json" in str(found.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"annotations": {}}', "\xff", '{"annotations": [' * 200])
def test_files_that_are_refused(text):
    with pytest.raises(Unreadable, match=r"x\.json"):
        read_outlines(text.encode("latin-1"), "x.json", HEAD)


def test_a_text_of_endless_runs_is_refused_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr(mask_files, "_MOST_TEXT", 4)
    with pytest.raises(Unreadable, match="5 characters; 4 are read"):
        _read(_entry("52305"))


def test_masks_belong_to_the_upright_image():
    """A camera says that the rows in the file lie on their side: only masks of the upright size will do."""
    head = ImageHead((5, 4), (4, 5), True)
    assert len(_read(_entry("52305", size=(5, 4)), head)) == 1
    with pytest.raises(Unreadable, match="upright as its camera says: save the image so"):
        _read(_entry("52305", size=(4, 5)), head)
    half = ImageHead((4, 5), (4, 5), True)  # turned by half, or mirrored
    with pytest.raises(Unreadable, match="its size does not tell"):
        _read(_entry("52305"), half)


def test_damaged_files_are_refused_or_read_and_nothing_else():
    """Random changes of a real file: a value or the one error, within the bounds of the image."""
    generator = np.random.default_rng(2)
    (_, masks) = drawn(1, 24, 32, objects=3)[0]
    head = ImageHead((24, 32), (24, 32), False)
    for kind in ("string", "runs"):
        whole = scene_json(masks, (24, 32), kind).encode()
        refused = 0
        for _ in range(400):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), generator.integers(1, 4)):
                data[place] = generator.integers(0, 256) if generator.random() < 0.3 else ord("0") + 3
            cut = data[: generator.integers(1, len(data))] if generator.random() < 0.1 else data
            try:
                outlines = read_outlines(bytes(cut), "x.json", head)
            except Unreadable:
                refused += 1
                continue
            for outline in outlines:
                mask = outline.mask()
                x, y = outline.click(mask)
                assert mask.shape == (24, 32) and 0 <= x < 32 and 0 <= y < 24
        assert 50 < refused < 400, "some changes do no harm, others do"


def test_runs_of_the_helper_are_column_by_column():
    mask = np.array([[1, 0], [1, 1]], dtype=bool)
    assert runs(mask) == [0, 2, 1, 1]
