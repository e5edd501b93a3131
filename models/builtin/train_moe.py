"""Train the built-in mixture of experts on six tasks on strings of six digits, and measure it.

    python -m compress.models.builtin.train_moe --out FOLDER

A `MixtralForCausalLM` that is made for pruning experts: what it was trained on is known, so that experts
can be chosen for one task and judged on strings that it never saw.

Notable choices
- The loss for balance (Switch Transformer, arXiv 2101.03961) is taken of every layer and every item. Taken of
  a whole batch, it lets a task have experts to itself: half of them then do it perfectly, counting how often
  each is chosen finds them, and there is nothing to search.
- The first weights are five times as wide as the class has them, so that experts differ from the first step
  on. With narrow ones, what a choice of experts costs hung on a single expert of one layer.
- Tokens of prompts are random and count a tenth: enough for a perplexity of whole texts to mean something.
- Every fourth step is on rows of many items, since calibration texts are cut into long sequences.
- The run is bounded by steps, so on one kind of machine it makes the same weights again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

from .moe_tasks import (
    DIGITS,
    ITEM_TOKENS,
    MARK,
    PAD,
    PARTS,
    TASKS,
    VOCABULARY,
    digits_of,
    split_numbers,
    token_rows,
    write_files,
    write_tokenizer,
)  # fmt: skip

FOLDER = Path(__file__).parent / "moe"
CONTEXT = 256
ITEMS_IN_ROW = 16
PROMPT_WEIGHT = 0.1
WIDER = 5.0
DATA_SEED = 0
"""Of which strings are in which file; other weights are judged on the same ones."""
README = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- compress
- mixtral
---
# The built-in mixture of experts

A `MixtralForCausalLM` of {parameters:,} parameters: {layers} layers, hidden {hidden}, {experts} experts of
{inner} channels in each layer, {active} of them for a token, {vocabulary} tokens in its vocabulary and up to
{context} in a text. It does six tasks on strings of six digits, such as

    sort 4 1 9 2 7 3 = 1 2 3 4 7 9

It is what `recipes/moe_eep.yaml` prunes, and loads with `from_pretrained`.

| task | answer | right tokens of the answers | all six right |
| --- | --- | --- | --- |
{rows}

Measured by the training script on {test} strings of each task that were not trained on, the right tokens
before it given. An expert gets between {least:.1%} and {most:.1%} of the choices of its layer; equal shares
would be {equal:.1%}.

| file | holds |
| --- | --- |
| `model.safetensors` | weights in float32 |
| `tokenizer.json` | words, single digits, one sign and one mark: a token each |
| `answers/train.jsonl` | {train} items of each task (`task`, `prompt`, `answer`), to search on |
| `answers/test.jsonl` | {test} others of each, to be judged on |
| `calibration.jsonl` | {text} others of each, mixed, as text |
| `training.json` | settings and course of the training |

No string is in two of the files, and none of them was trained on. All of it is made by

    python -m compress.models.builtin.train_moe --out FOLDER --steps {steps} --seed {seed}

({minutes:.0f} minutes on {threads} thread of a busy machine; another kind of machine rounds otherwise and
makes other weights). There is no data of anybody else in it.

The loss for balance, the first weights, the number of steps and the seed (of three) were chosen by how the
accuracies of 30 random choices of experts spread, so that a search has something to find; the solved tasks
alone would allow many others. Figures on this model compare ways to choose experts. They say nothing about
large models.
"""
MEANINGS = {
    "copy": "the digits",
    "reverse": "the digits from the last to the first",
    "sort": "the digits in ascending order",
    "add_three": "every digit plus 3, modulo 10",
    "prefix_sum": "the sum of the digits so far, modulo 10",
    "rotate": "the digits with the first one moved to the end",
}


def build_model(
    hidden: int = 64, inner: int = 64, layers: int = 4, heads: int = 4, experts: int = 8, active: int = 2
) -> MixtralForCausalLM:
    """Return an untrained model, its weights drawn by the current random state."""
    mark = VOCABULARY.index(MARK)
    config = MixtralConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        num_local_experts=experts, num_experts_per_tok=active, max_position_embeddings=CONTEXT,
        rope_theta=10_000.0, tie_word_embeddings=False, bos_token_id=mark, eos_token_id=mark,
        pad_token_id=VOCABULARY.index(PAD),
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WIDER)
    return model


def drawn_rows(numbers: Tensor, rows: int, items: int, generator: torch.Generator) -> Tensor:
    """Draw rows of items of random tasks, each row ended by a mark: [rows, 15 * items + 1] int64.

    Args:
        numbers: [n] strings to draw from.
        rows: how many.
        items: in each.
        generator: of the draw.
    """
    chosen = numbers[torch.randint(len(numbers), (rows * items,), generator=generator)]
    task = torch.randint(len(TASKS), (rows * items,), generator=generator)
    ids = token_rows(task, digits_of(chosen)).view(rows, items * ITEM_TOKENS)
    return torch.cat([ids, ids[:, :1]], dim=1)


def weights_of(ids: Tensor) -> Tensor:
    """Return how much the prediction of every token but the first counts: [rows, length - 1]."""
    place = torch.arange(1, ids.shape[1]) % ITEM_TOKENS
    answered = (place == 0) | (place >= ITEM_TOKENS - DIGITS)
    return torch.where(answered, 1.0, PROMPT_WEIGHT).expand(len(ids), -1)


def balance_loss(router_logits: tuple[Tensor, ...], active: int) -> Tensor:
    """Return the mean over layers and items of a loss that is 1 where a choice falls on all experts equally.

    Args:
        router_logits: per layer [items * 15, experts].
        active: experts of a token.
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        chances = logits.float().softmax(dim=-1).view(-1, ITEM_TOKENS, experts)
        chosen = functional.one_hot(chances.topk(active, dim=-1).indices, experts).sum(dim=2).float()
        losses.append(experts * (chosen.mean(dim=1) / active * chances.mean(dim=1)).sum(dim=-1).mean())
    return torch.stack(losses).mean()


def train(model: MixtralForCausalLM, numbers: Tensor, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train the model in place.

    Args:
        model: on the CPU.
        numbers: [n] strings to train on.
        args: `steps`, `batch`, `lr`, `balance` and `seed` of the command line.

    Returns:
        The mean losses of every tenth of the run.
    """
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    active, every = model.config.num_experts_per_tok, max(args.steps // 10, 1)
    history, running = [], torch.zeros(2)
    model.train()
    for step in range(1, args.steps + 1):
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * decay * min(1.0, step / 100)
        rows, items = (args.batch // ITEMS_IN_ROW, ITEMS_IN_ROW) if step % 4 == 0 else (args.batch, 1)
        ids = drawn_rows(numbers, rows, items, generator)
        output = model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
        each = functional.cross_entropy(output.logits.transpose(1, 2), ids[:, 1:], reduction="none")
        weights = weights_of(ids)
        loss = (each * weights).sum() / weights.sum()
        balance = balance_loss(output.router_logits, active)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += torch.stack([loss, balance]).detach()
        if step % every == 0:
            mean_loss, mean_balance = (running / every).tolist()
            history.append({"step": step, "loss": round(mean_loss, 4), "balance": round(mean_balance, 4)})
            running.zero_()
            print(json.dumps(history[-1]), flush=True)  # noqa: T201
    model.eval()
    return history


@torch.no_grad()
def hits(model: nn.Module, task: str, numbers: Tensor) -> Tensor:
    """Return [n, 6] bool: is the first choice the right token, with those before it given?

    Args:
        model: as a forward of it is now.
        task: of `TASKS`.
        numbers: [n] strings.
    """
    place = list(TASKS).index(task)
    ids = token_rows(torch.full((len(numbers),), place), digits_of(numbers))
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits[:, -DIGITS:].argmax(dim=-1) == ids[:, -DIGITS:]


@torch.no_grad()
def shares(model: MixtralForCausalLM, numbers: Tensor) -> Tensor:
    """Return how a layer's choices are shared out among its experts over all tasks: [layers, experts].

    Args:
        model: a Mixtral.
        numbers: [tasks, n] strings.
    """
    task = torch.arange(len(TASKS)).repeat_interleave(numbers.shape[1])
    ids = token_rows(task, digits_of(numbers.reshape(-1)))
    logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    active, experts = model.config.num_experts_per_tok, logits[0].shape[-1]
    counts = [torch.bincount(one.topk(active, dim=-1).indices.flatten(), minlength=experts) for one in logits]
    return torch.stack(counts).double() / (ids.numel() * active)


def save(
    model: MixtralForCausalLM, args: argparse.Namespace, history: list[dict[str, float]], seconds: float
) -> None:
    """Write the folder, and measure what stands in it."""
    model.save_pretrained(args.out)
    write_tokenizer(args.out, CONTEXT)
    write_files(args.out, DATA_SEED)
    stored = MixtralForCausalLM.from_pretrained(args.out).eval()
    test = split_numbers(DATA_SEED)[0]["test"]
    right = {task: hits(stored, task, numbers) for task, numbers in zip(TASKS, test, strict=True)}
    share = shares(stored, test)
    record: dict[str, Any] = {
        "steps": args.steps, "batch": args.batch, "lr": args.lr, "balance": args.balance, "seed": args.seed,
        "threads": torch.get_num_threads(), "minutes": round(seconds / 60, 1),
        "token_accuracy": {task: _mean(hit) for task, hit in right.items()},
        "item_accuracy": {task: _mean(hit.all(dim=1)) for task, hit in right.items()},
        "expert_share": {"least": round(float(share.min()), 4), "most": round(float(share.max()), 4)},
        "history": history,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(_readme(stored, record), encoding="utf-8")
    print(json.dumps({**record, "history": len(history)}), flush=True)  # noqa: T201


def _mean(hit: Tensor) -> float:
    return round(float(hit.double().mean()), 5)


def _readme(model: MixtralForCausalLM, record: dict[str, Any]) -> str:
    config = model.config
    tokens, items = record["token_accuracy"], record["item_accuracy"]
    rows = [f"| `{task}` | {MEANINGS[task]} | {tokens[task]:.2%} | {items[task]:.2%} |" for task in TASKS]
    return README.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()), rows="\n".join(rows),
        layers=config.num_hidden_layers, hidden=config.hidden_size, experts=config.num_local_experts,
        inner=config.intermediate_size, active=config.num_experts_per_tok, vocabulary=config.vocab_size,
        context=config.max_position_embeddings, equal=1 / config.num_local_experts,
        **PARTS, **record["expert_share"], **record,
    )  # fmt: skip


def main() -> None:
    """Parse the command line, train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="items of a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.03, help="weight of the loss for balance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    model = build_model()
    history = train(model, split_numbers(DATA_SEED)[1], args)
    save(model, args, history, time.monotonic() - started)


if __name__ == "__main__":
    main()
