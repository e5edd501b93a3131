"""Train the built-in Segment Anything model on shapes over photographs and measure it.

    python -m compress.models.builtin.train_sam --data FOLDER --out FOLDER --steps 3000

Every image is new (`scenes`). A prompt is one point, mostly on a shape, sometimes on what is left of the
photograph; the answer is what can be seen of the thing at that point. The losses are those of Segment
Anything (arXiv 2304.02643): focal and dice loss of the best of three masks, and the square error of the
predicted IoU; here the other masks count too, half as much, since a point is seldom ambiguous. In one step of
four the single mask is trained, that of `multimask_output=False`.

Notable choices
- The library starts an encoder with weights near 0, and the positions of points at a frequency of half the
  width; here every layer starts as torch starts it, and positions as the paper's code does.
- Matrices of the blocks are trained by Muon (orthogonalised momentum), everything else by AdamW.
- The run is bounded by steps or by wall time; the learning rate follows either.
- Arithmetic is in bfloat16 (autocast), weights in float32. The weights kept are the moving average; the
  figures are those of the file as written.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig, SamImageProcessorPil, SamModel

from .course import Course
from .scenes import Photographs, Pixels, decoded, draw_scene, shapes_of
from .write_scenes import FOLDER, drawn

Bits = NDArray[np.bool_]
Points = NDArray[np.float64]

SIDE = 128
OTHERS = 0.5
"""Weight of the loss of all masks beside that of the best: here a point is seldom ambiguous."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

README = """\
---
license: apache-2.0
pipeline_tag: mask-generation
---
# The built-in Segment Anything model

A `SamModel` of {parameters:,} parameters, {encoder:,} of them in the image encoder: {layers} layers, width
{hidden}, {heads} heads, windows of 6 x 6 tokens and every second layer global, {side} x {side} pixels in
patches of 8. It is what `recipes/sam_slimsam.yaml` slims, and loads with `from_pretrained`. It knows
geometric shapes over photographs and nothing else: it is here to show that compression works, not to segment
anything.

| measured by the training script, on the weights as stored | |
| --- | --- |
| mIoU on {masks} masks of `images/validation.tar`, one point each: of the mask rated best | {miou:.4f} |
| of the best of its three masks | {best_miou:.4f} |
| steps of {batch} images with {points} points each | {steps:,} |
| minutes on {threads} thread of a shared machine | {minutes:.0f} |

| file | holds |
| --- | --- |
| `model.safetensors` | weights in float32 |
| `images/train.tar` | {train_images} images with their masks, for scores and aligning |
| `images/validation.tar` | {validation_images} images with their masks, for evaluation |
| `training.json` | settings and course of the training |

The archives hold `NAME.jpg` beside `NAME.json` as SA-1B does. The model was trained on other images, drawn
in the same way. All are made by

    python -m compress.models.builtin.write_scenes --data PHOTOGRAPHS
    python -m compress.models.builtin.train_sam \\
        --data PHOTOGRAPHS --out FOLDER --steps {steps} --seed {seed}

With `--minutes` in place of `--steps` the learning rate follows the clock.

An image is a crop of a photograph with up to four shapes over it, which are filled with another photograph
or with colours. Training sees the left 70 % of each photograph, validation the rest, so no pixel is in both.

| photograph, as scikit-image distributes it | licence |
| --- | --- |
| `chelsea.png`, by Stefan van der Walt | CC0 |
| `coffee.png`, by Rachel Michetti, courtesy of Pikolo Espresso Bar | CC0 |
| `rocket.jpg`, by SpaceX | public domain |
| `astronaut.png`, by NASA (of which the suit is used) | public domain |
"""


@dataclass(frozen=True)
class Prompts:
    """A batch of images and of points on them.

    Attributes:
        pixels: [b, 3, 128, 128] float32, normalised, 0 where an image is padded.
        points: [b, p, 1, 2] float32, (x, y) in pixels.
        truth: [b, p, 64, 64] float32, covered share of each place of the model's masks.
        valid: [b, 1, 64, 64] float32, 1 where there is image.
    """

    pixels: Tensor
    points: Tensor
    truth: Tensor
    valid: Tensor


def build_model(hidden: int, layers: int, heads: int) -> SamModel:
    """Return an untrained model whose every layer is alive."""
    token = {"image_size": SIDE, "patch_size": 8}
    config = SamConfig(
        vision_config={
            **token, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "mlp_dim": 4 * hidden, "window_size": 6, "output_channels": 64, "num_pos_feats": 32,
            "global_attn_indexes": [layers // 2 - 1, layers - 1],
        },
        prompt_encoder_config={**token, "hidden_size": 64, "mask_input_channels": 8},
        mask_decoder_config={
            # Two heads, not more: of so small a decoder those of 8 channels cannot tell places apart. The
            # library halves widths in its layers; the rate is that of the last attention.
            "hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 2, "attention_downsample_rate": 1,
            "iou_head_hidden_dim": 64,
        },
    )  # fmt: skip
    model = SamModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("positional_embedding"):
            nn.init.normal_(parameter)
            parameter.requires_grad_(False)
    return model


def pixel_values(images: list[Pixels]) -> Tensor:
    """Return images [n, 3, 128, 128] as the model's processor prepares them, zeros below and right."""
    batch = torch.zeros(len(images), 3, SIDE, SIDE)
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    for row, image in zip(batch, images, strict=True):
        normal = (torch.from_numpy(image).float() / 255 - mean) / deviation
        row[:, : image.shape[0], : image.shape[1]] = normal.permute(2, 0, 1)
    return batch


def point_in(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Return (x, y) of a random pixel of a mask [h, w]."""
    rows, columns = mask.nonzero()
    which = int(generator.integers(len(rows)))
    return int(columns[which]), int(rows[which])


def draw_batch(photographs: Photographs, generator: np.random.Generator, count: int, points: int) -> Prompts:
    """Return new images, and points on them.

    Args:
        photographs: to draw from.
        generator: of every choice.
        count: images.
        points: of an image, one of five on the background.
    """
    images, places = [], torch.zeros(count, points, 1, 2)
    truth, valid = torch.zeros(count, points, SIDE, SIDE), torch.zeros(count, 1, SIDE, SIDE)
    for index in range(count):
        file, labels = draw_scene(photographs, generator)
        height, width = labels.shape
        images.append(decoded(file))
        valid[index, :, :height, :width] = 1
        shapes = shapes_of(labels)
        for turn in range(points):
            label = 0 if not shapes or generator.uniform() < 0.2 else int(generator.choice(shapes))
            mask = labels == label
            if not mask.any():
                mask = labels >= 0
            places[index, turn, 0] = torch.tensor(point_in(mask, generator))
            truth[index, turn, :height, :width] = torch.from_numpy(mask)
    shrink = SIDE // 2
    return Prompts(
        pixel_values(images),
        places,
        functional.adaptive_avg_pool2d(truth, shrink),
        functional.adaptive_avg_pool2d(valid, shrink).floor(),
    )


def step_loss(model: SamModel, batch: Prompts, several: bool) -> tuple[Tensor, Tensor]:
    """Return the loss, and the mean IoU of the masks that were trained.

    Args:
        model: in training.
        batch: images and points.
        several: three masks of which the best is trained; else the single one.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, logits = model(
            pixel_values=batch.pixels,
            input_points=batch.points,
            input_labels=torch.ones(batch.points.shape[:3], dtype=torch.long),
            multimask_output=several,
            return_dict=False,
        )[:2]
    logits, scores = logits.float(), scores.float()
    truth, valid = batch.truth[:, :, None], batch.valid[:, :, None]
    probability = logits.sigmoid()
    error = functional.binary_cross_entropy_with_logits(logits, truth.expand_as(logits), reduction="none")
    focal = (error * (probability - truth).abs() ** 2 * valid).sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1))
    shared = (probability * truth * valid).sum(dim=(-2, -1))
    dice = 1 - (2 * shared + 1) / ((probability + truth) * valid).sum(dim=(-2, -1)).add(1)
    masks = 20 * focal + dice
    best = masks.argmin(dim=-1, keepdim=True)
    with torch.no_grad():
        predicted, wanted = (logits > 0) & (valid > 0), (truth >= 0.5) & (valid > 0)
        both, either = (predicted & wanted).sum(dim=(-2, -1)), (predicted | wanted).sum(dim=(-2, -1))
        iou = both / either.clamp(min=1)
    loss = masks.gather(-1, best).mean() + OTHERS * masks.mean() + functional.mse_loss(scores, iou)
    return loss, iou.gather(-1, best).mean()


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest, at one learning rate."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    inner = {
        name
        for name, value in trained.items()
        if value.ndim == 2 and ".layers." in name and name.endswith(".weight") and "mlps" not in name
    }
    matrices = [value for name, value in trained.items() if name in inner]
    others = [value for name, value in trained.items() if name not in inner]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True),
    ]


def train(model: SamModel, photographs: Photographs, course: Course, args: argparse.Namespace) -> SamModel:
    """Train and return the moving average of the weights.

    Args:
        model: changed in place.
        photographs: to draw from.
        course: says when it ends, and keeps the losses.
        args: the command line.
    """
    generator, average = np.random.default_rng(args.seed), copy.deepcopy(model)
    parameters, both, running = list(model.parameters()), optimizers(model, args.lr), np.zeros(2)
    while course.progress < 1.0:
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * course.progress))
        for group in (group for optimizer in both for group in optimizer.param_groups):
            group["lr"] = args.lr * decay * min(1.0, (course.steps + 1) / 200)
        batch = draw_batch(photographs, generator, args.batch, args.points)
        loss, iou = step_loss(model, batch, several=course.steps % 4 != 3)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in both:
            optimizer.step()
        course.steps += 1
        keep = min(args.ema, (1 + course.steps) / (10 + course.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - keep)
        running += (loss.item(), iou.item())
        if course.steps % 100 == 0:
            loss, iou = (running / 100).tolist()
            course.note(loss=loss, iou=iou)
            print(json.dumps(course.history[-1]), flush=True)  # noqa: T201
            running[:] = 0
    return average.eval()


@torch.no_grad()
def measured(model: SamModel, scenes: Iterable[tuple[Pixels, Bits, Points]]) -> dict[str, float | int]:
    """Return the mIoU of masks that one point each asks for, and their number.

    Args:
        model: in evaluation mode.
        scenes: images [h, w, 3], their masks [n, h, w] and a point of each [n, 2] as (x, y).
    """
    chosen, best = [], []
    for image, masks, points in scenes:
        height, width = image.shape[:2]
        prompts = torch.from_numpy(points).float()[None, :, None]
        scores, logits = model(pixel_values=pixel_values([image]), input_points=prompts, return_dict=False)[
            :2
        ]
        full = functional.interpolate(logits[0].float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        found, truth = full[:, :, :height, :width] > 0, torch.from_numpy(masks)[:, None]
        iou = (found & truth).sum(dim=(-2, -1)) / (found | truth).sum(dim=(-2, -1))
        chosen += iou.gather(-1, scores[0].argmax(dim=-1, keepdim=True))[:, 0].tolist()
        best += iou.amax(dim=-1).tolist()
    means = {"miou": float(np.mean(chosen)), "best_miou": float(np.mean(best))}
    return {**{name: round(mean, 4) for name, mean in means.items()}, "masks": len(best)}


def held_out(data: Path, count: int) -> Iterator[tuple[Pixels, Bits, Points]]:
    """Yield what `measured` reads, of the images that are shipped for validation.

    Args:
        data: folder of the photographs.
        count: images.
    """
    for file, labels, notes in drawn(data, "validation", count):
        points = np.array([note["point_coords"][0] for note in notes])
        yield decoded(file), np.stack([labels == note["id"] for note in notes]), points


def save(average: SamModel, args: argparse.Namespace, course: Course) -> None:
    """Write the folder, and measure what stands in it."""
    average.save_pretrained(args.out)
    size, half = {"height": SIDE, "width": SIDE}, SIDE // 2
    SamImageProcessorPil(
        size={"longest_edge": SIDE}, pad_size=size,
        mask_size={"longest_edge": half}, mask_pad_size={"height": half, "width": half},
        image_mean=list(MEAN), image_std=list(DEVIATION),
    ).save_pretrained(args.out)  # fmt: skip
    stored = SamModel.from_pretrained(args.out).eval()
    shipped = {part: count_images(args.images / f"{part}.tar") for part in ("train", "validation")}
    record: dict[str, Any] = {
        "steps": course.steps, "batch": args.batch, "points": args.points, "lr": args.lr, "ema": args.ema,
        "seed": args.seed, "threads": torch.get_num_threads(), "minutes": round(course.seconds / 60, 1),
        **measured(stored, held_out(args.data, shipped["validation"])),
    }  # fmt: skip
    text = json.dumps({**record, "history": course.history}, indent=2)
    (args.out / "training.json").write_text(text + "\n", encoding="utf-8")
    page = README.format(
        parameters=sum(parameter.numel() for parameter in stored.parameters()),
        encoder=sum(parameter.numel() for parameter in stored.vision_encoder.parameters()),
        train_images=shipped["train"], validation_images=shipped["validation"], side=SIDE,
        layers=args.layers, hidden=args.hidden, heads=args.heads, **record,
    )  # fmt: skip
    (args.out / "README.md").write_text(page, encoding="utf-8")
    print(json.dumps(record), flush=True)  # noqa: T201


def count_images(archive: Path) -> int:
    """Return how many images are in a file of `write_scenes`."""
    with tarfile.open(archive) as opened:
        return sum(name.endswith(".jpg") for name in opened.getnames())


def main() -> None:
    """Parse the command line, train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of scikit-image's photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--images", type=Path, default=FOLDER, help="of write_scenes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--points", type=int, default=6, help="of an image")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--hidden", type=int, default=120)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    course = Course(limit_steps=args.steps, limit_seconds=60 * args.minutes)
    model = build_model(args.hidden, args.layers, args.heads).train()
    save(train(model, Photographs(args.data, "train"), course, args), args, course)


if __name__ == "__main__":
    main()
