"""Draw the images that the built-in Segment Anything model is slimmed with and judged on.

    python -m compress.models.builtin.write_scenes --data FOLDER

Writes ``sam/images/train.tar`` and ``sam/images/validation.tar`` in the layout of SA-1B: NAME.jpg beside
NAME.json, whose masks are run lengths in COCO's characters. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scenes import Photographs, Pixels, draw_scene, shapes_of

FOLDER = Path(__file__).parent / "sam" / "images"
SEEDS = {"train": 1, "validation": 2}
"""Of the two files, and other ones than the training of the model uses."""


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return how long a mask [h, w] is off, on, off, ... read column by column, as COCO counts."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], ends, [mask.size]]))
    return [int(run) for run in (runs if runs[-1] else runs[:-1])]


def characters(runs: list[int]) -> str:
    """Return run lengths in COCO's characters: from the third on as a difference, five bits a character."""
    text = []
    for index, run in enumerate(runs):
        left = run - (runs[index - 2] if index > 2 else 0)
        more = True
        while more:
            bits = left & 31
            left >>= 5
            more = left != (-1 if bits & 16 else 0)
            text.append(chr(48 + (bits | 32 if more else bits)))
    return "".join(text)


def annotation(mask: NDArray[np.bool_], number: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return what SA-1B tells of a mask [h, w], with a point of it drawn by `generator`."""
    rows, columns = mask.nonzero()
    which = int(generator.integers(len(rows)))
    left, top = int(columns.min()), int(rows.min())
    return {
        "id": number,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
        "point_coords": [[float(columns[which]), float(rows[which])]],
        "segmentation": {"size": list(mask.shape), "counts": characters(run_lengths(mask))},
    }


def drawn(data: Path, part: str, count: int) -> Iterator[tuple[bytes, Pixels, list[dict[str, Any]]]]:
    """Yield images as JPEG files, what their pixels show [h, w], and their annotations by label.

    Args:
        data: folder of the photographs.
        part: "train" or "validation".
        count: images.
    """
    photographs, generator = Photographs(data, part), np.random.default_rng(SEEDS[part])
    while count:
        file, labels = draw_scene(photographs, generator)
        shapes = shapes_of(labels)
        if shapes:
            count -= 1
            yield file, labels, [annotation(labels == label, label, generator) for label in shapes]


def write(data: Path, out: Path, part: str, count: int) -> None:
    """Write one file; see the module."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{part}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (image, labels, annotations) in enumerate(drawn(data, part, count), start=1):
            name, (height, width) = f"{part}_{number:04d}", labels.shape
            about = {"image_id": number, "width": width, "height": height, "file_name": f"{name}.jpg"}
            text = json.dumps({"image": about, "annotations": annotations}, separators=(",", ":"))
            for ending, content in (("jpg", image), ("json", text.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of scikit-image's photographs")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--train", type=int, default=256, help="images of train.tar")
    parser.add_argument("--validation", type=int, default=64, help="images of validation.tar")
    args = parser.parse_args()
    write(args.data, args.out, "train", args.train)
    write(args.data, args.out, "validation", args.validation)


if __name__ == "__main__":
    main()
