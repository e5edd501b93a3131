"""Whole blocks of a model: which lists it has, which blocks may go, and the removal itself.

What is left is a shallower model of the stock class, with the original's weights bit for bit: the config
says the new depth, and every tensor keeps its name but for the number of its block. Works on the stock
modules of diffusers; nothing here knows why a block goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, StageError

Kept = Mapping[str, tuple[int, ...]]
"""Name of a list of blocks -> places of the blocks that stay, ascending."""

IMAGE = "hidden_states"
"""What blocks call the image that passes through them; a text may pass beside it."""


@dataclass(frozen=True)
class BlockList:
    """Blocks of one kind that run one after the other.

    Attributes:
        name: dotted name of the list.
        depth_key: config key that says how many there are.
        mirrored: block i feeds block (depth - 1 - i): such two stay or go together.
        returns: what a block returns, by the names of its arguments: the streams that pass through it.
    """

    name: str
    depth_key: str
    mirrored: bool = False
    returns: tuple[str, ...] = (IMAGE,)

    def image_of(self, output: Any) -> Any:
        """Return the image of what a block returned."""
        return output[self.returns.index(IMAGE)] if isinstance(output, tuple) else output


_SINGLE = (BlockList("transformer_blocks", "num_layers"),)
_TWO_STREAMS = ("encoder_hidden_states", IMAGE)
_LISTS: Mapping[str, tuple[BlockList, ...]] = {
    "DiTTransformer2DModel": _SINGLE,
    "PixArtTransformer2DModel": _SINGLE,
    "SD3Transformer2DModel": (BlockList("transformer_blocks", "num_layers", returns=_TWO_STREAMS),),
    "FluxTransformer2DModel": (
        BlockList("transformer_blocks", "num_layers", returns=_TWO_STREAMS),
        BlockList("single_transformer_blocks", "num_single_layers", returns=_TWO_STREAMS),
    ),
    "HunyuanDiT2DModel": (BlockList("blocks", "num_layers", mirrored=True),),
}
EMBEDDER = "norm1.emb"
"""In each block of a DiT, a copy of the one embedder that the model was trained with."""


def block_lists(class_name: str) -> tuple[BlockList, ...]:
    """Return the lists of blocks of a stock class, in the order in which they run.

    Raises:
        PlanError: none is known of the class.
    """
    if class_name not in _LISTS:
        raise PlanError(
            f"{class_name}: nothing is known of blocks that could be removed from it",
            hint=f"known: {', '.join(_LISTS)}",
        )
    return _LISTS[class_name]


def depths(config: Mapping[str, Any]) -> dict[str, int]:
    """Return list -> blocks, of lists that have any.

    Args:
        config: completed, with `_class_name`.
    """
    found = {blocks.name: int(config[blocks.depth_key]) for blocks in block_lists(config["_class_name"])}
    return {name: depth for name, depth in found.items() if depth > 0}


def checked(config: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return what stays of all lists: of those that `kept` does not name, everything.

    Args:
        config: completed, with `_class_name`.
        kept: list -> places, in any order.

    Raises:
        PlanError: a list or a place that the model has not, a place twice, a list without a block, nothing
            removed, or blocks that stay without their counterparts.
    """
    known = depths(config)
    for name in kept:
        if name not in known:
            raise PlanError(f"{name}: the model has no such blocks", hint=f"it has: {', '.join(known)}")
    found = {}
    for blocks in block_lists(config["_class_name"]):
        if blocks.name in known:
            depth = known[blocks.name]
            found[blocks.name] = _places(blocks, depth, kept.get(blocks.name, range(depth)))
    if all(len(found[name]) == depth for name, depth in known.items()):
        raise PlanError("all blocks stay, so nothing would be removed", hint="name fewer of them")
    return found


def _places(blocks: BlockList, depth: int, kept: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(kept))
    if len(set(chosen)) != len(chosen):
        raise PlanError(f"{blocks.name}: a block is named twice in {list(kept)}")
    if not chosen:
        raise PlanError(f"{blocks.name}: no block is left", hint="keep at least one")
    if chosen[0] < 0 or chosen[-1] >= depth:
        raise PlanError(f"{blocks.name}: {list(kept)} goes beyond the blocks, which are 0 to {depth - 1}")
    if blocks.mirrored and len(chosen) < depth:
        _check_mirrored(blocks, depth, chosen)
    return chosen


def _check_mirrored(blocks: BlockList, depth: int, chosen: tuple[int, ...]) -> None:
    """Long skips join block i to block depth - 1 - i; the two in the middle have none."""
    if depth % 2:
        raise PlanError(
            f"{blocks.name}: no block can go from an odd depth of {depth}: its skips are not pairs"
        )
    alone = [place for place in chosen if depth - 1 - place not in chosen]
    if alone:
        raise PlanError(
            f"{blocks.name}: block {alone[0]} would stay without block {depth - 1 - alone[0]}, to which"
            " a skip joins it",
            hint="such blocks go in pairs",
        )
    if depth // 2 not in chosen:
        raise PlanError(
            f"{blocks.name}: blocks {depth // 2 - 1} and {depth // 2} are the middle of the model, which"
            " has no skips; they must stay"
        )


def shallower_config(config: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the config of the model that is left.

    Raises:
        PlanError: as `checked`.
    """
    chosen = checked(config, kept)
    changed = dict(config)
    for blocks in block_lists(config["_class_name"]):
        if blocks.name in chosen:
            changed[blocks.depth_key] = len(chosen[blocks.name])
    if config.get("dual_attention_layers"):
        (places,) = chosen.values()
        dual = set(config["dual_attention_layers"])
        changed["dual_attention_layers"] = type(config["dual_attention_layers"])(
            new for new, old in enumerate(places) if old in dual
        )
    return changed


def renamed(name: str, kept: Kept) -> str | None:
    """Return what a tensor or a module is called in the model that is left; None where it went.

    Args:
        name: in the model as it was.
        kept: from `checked`.
    """
    for blocks, places in kept.items():
        match = re.match(rf"{re.escape(blocks)}\.(\d+)(?=\.|$)", name)
        if match:
            place = int(match[1])
            return f"{blocks}.{places.index(place)}{name[match.end() :]}" if place in places else None
    return name


@torch.no_grad()
def drop_blocks(module: nn.Module, config: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> None:
    """Remove all other blocks from a stock module, in place; its own config says so afterwards.

    Args:
        module: of the stock class, as its library builds it.
        config: its config, completed, with `_class_name`.
        kept: list -> places that stay; lists that are not named stay whole.

    Raises:
        PlanError: as `checked`.
        StageError: the model uses what is in a block outside of it, and that differs between blocks.
    """
    chosen, changed = checked(config, kept), shallower_config(config, kept)
    if has_embedders(config["_class_name"]):
        _check_embedders(module, chosen["transformer_blocks"])
    for blocks in block_lists(config["_class_name"]):
        if blocks.name not in chosen:
            continue
        before = list(module.get_submodule(blocks.name).children())
        after = [before[place] for place in chosen[blocks.name]]
        if config["_class_name"] == "SD3Transformer2DModel":
            after[-1] = _as_last(after[-1], config)
        parent, _, attribute = blocks.name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, nn.ModuleList(after))
    keys = [key for key in changed if changed[key] != config[key]]
    # The attribute alone is not what is saved: a checkpoint would say the old depth, and stock loading
    # would fill the missing blocks with random numbers.
    module.register_to_config(**{key: changed[key] for key in keys})  # type: ignore[operator]


def pinned_blocks(module: nn.Module, config: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return (list, place) of blocks that cannot go, because the model uses what is in them elsewhere.

    Args:
        module: of the stock class.
        config: its config, completed, with `_class_name`.
    """
    if not has_embedders(config["_class_name"]):
        return set()
    blocks = range(1, depths(config)["transformer_blocks"])
    differ = any(differing_embedder(module, place) for place in blocks)
    return {("transformer_blocks", 0)} if differ else set()


def _check_embedders(module: nn.Module, places: tuple[int, ...]) -> None:
    """The head reads the embedder of the first block, whichever that is."""
    if places[0] == 0:
        return
    different = differing_embedder(module, places[0])
    if different:
        raise StageError(
            f"transformer_blocks.0.{EMBEDDER}.{different[0]} differs from the copy in block {places[0]},"
            " and the model's head reads that of its first block: without block 0 its output would change",
            hint="keep block 0; the copies were equal when the model was trained, fine-tuning has moved them",
        )


def has_embedders(class_name: str) -> bool:
    """Tell whether each block of a stock class has a copy of an embedder; the head reads the first."""
    return class_name == "DiTTransformer2DModel"


def differing_embedder(module: nn.Module, place: int) -> list[str]:
    """Return the tensors of a block's embedder that differ from those of the first block's.

    Args:
        module: with embedders in its blocks.
        place: of the block.
    """
    first = module.get_submodule(f"transformer_blocks.0.{EMBEDDER}").state_dict()
    other = module.get_submodule(f"transformer_blocks.{place}.{EMBEDDER}").state_dict()
    return [name for name, value in first.items() if not torch.equal(value, other[name])]


def _as_last(block: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Return a block of SD3 as the last one is built: what it does to the text goes nowhere.

    Only the shift and the scale of the text's first norm are left, in the other order.
    """
    if block.context_pre_only:
        return block
    with torch.device("meta"):
        last = type(block)(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            context_pre_only=True,
            qk_norm=config["qk_norm"],
            use_dual_attention=block.attn2 is not None,
        )
    state = block.state_dict()
    for part in ("weight", "bias"):
        rows = state[f"norm1_context.linear.{part}"].chunk(6)
        shift, scale = rows[:2]
        state[f"norm1_context.linear.{part}"] = torch.cat([scale, shift])
    last.load_state_dict({name: state[name] for name in last.state_dict()}, assign=True)
    for name, parameter in last.named_parameters():
        old = dict(block.named_parameters()).get(name)
        parameter.requires_grad_(old is None or old.requires_grad)
    return last.train(block.training)
