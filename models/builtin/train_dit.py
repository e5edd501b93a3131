"""Train the built-in class-conditional DiT on Fashion-MNIST, in pixel space.

    python -m compress.models.builtin.train_dit --data FOLDER --out FOLDER --minutes 90

The objective is v-prediction (arXiv 2202.00512) on a squared-cosine schedule with trailing
timestep spacing, adaLN-zero initialisation (arXiv 2212.09748), small batches and many steps.
Timesteps are stratified over the batch, which lowers the variance of the gradient.

Notable choices
- diffusers gives every block its own copy of the timestep and label embedder. They are one module
  while training, and become equal copies in the file, as in converted ImageNet checkpoints.
- Labels are dropped here, not in the embedder: the copies would each draw a mask of their own.
- The run is bounded by wall time, so the learning rate follows the clock; the number of steps that
  it reached is written to ``training.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import load_split

NULL_CLASS = 10
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
}


def build_model(hidden: int = 128, layers: int = 8, heads: int = 4) -> DiTTransformer2DModel:
    """Return an untrained DiT with adaLN-zero initialisation and one shared embedder."""
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=28,
        patch_size=4,
        num_embeds_ada_norm=NULL_CLASS,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    shared = model.transformer_blocks[0].norm1.emb
    shared.class_embedder.dropout_prob = 0.0
    for linear in (shared.timestep_embedder.linear_1, shared.timestep_embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb = shared
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model


def untied(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Return a copy whose blocks own equal embedders, as the stock class saves and loads them."""
    model = copy.deepcopy(model)
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return model


def save(model: DiTTransformer2DModel, folder: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint in bfloat16 with its scheduler and the record of the training."""
    untied(model).to(torch.bfloat16).save_pretrained(folder)
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def v_loss(
    model: Callable[..., Any], alphas: Tensor, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of v for one batch.

    Args:
        alphas: [1000] cumulative product of 1 - beta.
        images: [batch, 1, 28, 28] in [-1, 1].
        labels: [batch] int64, some of them already dropped to the null class.
    """
    batch = images.shape[0]
    offset = torch.rand((), generator=generator)
    strata = (torch.arange(batch) + offset) / batch * 1000
    timesteps = strata.long().clamp_(max=999)
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn(images.shape, generator=generator)
    noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * images
    # The fused CPU attention spends half of the whole step in its bfloat16 backward pass.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
    return (predicted.float() - target).square().mean()


def train(args: argparse.Namespace) -> None:
    """Run the training within ``args.minutes`` of wall time."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_split(args.data, "train")
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    model = build_model(args.hidden, args.layers, args.heads).train()
    ema = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    forward = torch.compile(model) if args.compile else model

    started, step, running, history, last_save = time.monotonic(), 0, 0.0, [], 0.0
    order = torch.randperm(len(images), generator=generator)
    cursor = 0
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        progress = elapsed / (args.minutes * 60)
        lr = args.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        if cursor + args.batch > len(order):
            order, cursor = torch.randperm(len(images), generator=generator), 0
        index = order[cursor : cursor + args.batch]
        cursor += args.batch
        kept = labels[index].masked_fill(torch.rand(args.batch, generator=generator) < 0.1, NULL_CLASS)
        loss = v_loss(forward, alphas, images[index], kept, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)
        running += loss.item()
        if step % 500 == 0:
            history.append({"step": step, "seconds": round(elapsed), "v_loss": round(running / 500, 4)})
            running = 0.0
            print(json.dumps(history[-1]), flush=True)  # noqa: T201
        if elapsed - last_save > 300:
            last_save = elapsed
            save(ema, args.out, {"finished": False, "step": step, "history": history})
    record = {
        "finished": True, "steps": step, "batch": args.batch, "lr": args.lr, "ema": args.ema,
        "seed": args.seed, "minutes": args.minutes, "threads": torch.get_num_threads(), "history": history,
    }  # fmt: skip
    save(ema, args.out, record)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the forward and backward pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
