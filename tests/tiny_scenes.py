"""Small pictures with masks of what is drawn on them, as SA-1B lays them out: NAME.jpg beside NAME.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def drawn(
    count: int, height: int = 48, width: int = 64, seed: int = 0, objects: int = 1
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Return pictures [height, width, 3] uint8 and the masks [height, width] bool of their rectangles.

    Picture `index` of a seed does not depend on `count`.
    """
    found = []
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        rows, columns = np.mgrid[0:height, 0:width]
        waves = generator.uniform(0.02, 0.2, (3, 2))
        image = np.stack([np.sin(rows * a + columns * b) for a, b in waves], axis=-1) * 50 + 90
        masks = []
        for place in range(objects):
            # Side by side in strips of their own, so that no object covers another.
            left = place * width // objects + int(generator.integers(0, max(width // objects // 3, 1)))
            top = int(generator.integers(0, height // 2))
            mask = np.zeros((height, width), dtype=bool)
            mask[top : top + height // 3, left : left + width // objects // 2] = True
            image[mask] += generator.uniform(60, 100, 3)
            masks.append(mask)
        found.append((image.clip(0, 255).astype(np.uint8), masks))
    return found


def runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of the runs of a mask [height, width] bool, column by column, zeros first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def coco_string(lengths: Sequence[int]) -> str:
    """Write runs as COCO does: from the fourth on as the difference to the run two before, 5 bits a sign."""
    text = ""
    for index, length in enumerate(lengths):
        rest = length - lengths[index - 2] if index > 2 else length
        while True:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


def annotation(mask: np.ndarray, kind: str = "string", point: bool = True) -> dict[str, Any]:
    """Return one entry of `annotations` as SA-1B writes it; `kind` "string" or "runs"."""
    lengths = runs(mask)
    rows, columns = np.nonzero(mask)
    entry: dict[str, Any] = {
        "segmentation": {
            "size": list(mask.shape),
            "counts": coco_string(lengths) if kind == "string" else lengths,
        },
        "area": int(mask.sum()),
    }
    if point and len(rows):
        middle = len(rows) // 2
        entry["point_coords"] = [[float(columns[middle]), float(rows[middle])]]
    return entry


def scene_json(mask_list: Sequence[np.ndarray], size: tuple[int, int], kind: str = "string") -> str:
    """Return the text of the file beside a picture of (height, width)."""
    image = {"image_id": 1, "height": size[0], "width": size[1]}
    return json.dumps({"image": image, "annotations": [annotation(mask, kind) for mask in mask_list]})


def write_scenes(
    folder: Path,
    count: int,
    *,
    masks: bool = True,
    seed: int = 0,
    height: int = 48,
    width: int = 64,
    objects: int = 1,
    kind: str = "string",
    suffix: str = ".jpg",
) -> Path:
    """Write pictures, and their masks in a file beside each, into a folder; returns the folder.

    Args:
        folder: made where it is not there.
        count: how many pictures; they are called sa_0, sa_1 and so on.
        masks: false: pictures alone.
        seed: of the pictures; another seed, other pictures.
        height: of them, pixels.
        width: of them, pixels.
        objects: rectangles of each, with a mask each.
        kind: how runs are written: "string" or "runs".
        suffix: of the pictures; ".png" keeps their values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, found) in enumerate(drawn(count, height, width, seed, objects)):
        Image.fromarray(image).save(folder / f"sa_{index}{suffix}")
        if masks:
            text = scene_json(found, (height, width), kind)
            (folder / f"sa_{index}.json").write_text(text, encoding="utf-8")
    return folder


def write_parts(folder: Path, train: int, held_out: int, **options: Any) -> Path:
    """Write `train/` and `validation/` below a folder, of different pictures; returns the folder."""
    write_scenes(folder / "train", train, **{**options, "seed": options.get("seed", 0)})
    write_scenes(folder / "validation", held_out, **{**options, "seed": options.get("seed", 0) + 1000})
    return folder


def write_tar(folder: Path, path: Path, prefix: str = "./") -> Path:
    """Pack the files below a folder uncompressed, as SA-1B is distributed; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.add(file, arcname=prefix + file.relative_to(folder).as_posix())
    return path
