"""What is stored of a compressed key-value cache: ranks per attention, window, bits; torch-free.

CSKV, arXiv 2409.10593. It is part of the manifest, and so untrusted input: bounds on every number.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Width = Annotated[int, Field(ge=1, le=2**20)]
Tokens = Annotated[int, Field(ge=0, le=2**24)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=512)]
FACTORS = "cskv"
"""Name of the module below an attention that holds its four factors."""
FACTOR_NAMES = ("k_a", "k_b", "v_a", "v_b")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KvLayer(_Strict):
    """Ranks of one attention.

    Attributes:
        hidden: channels of the attention's input, h.
        width: channels of its keys, and of its values: KV heads * head_dim, h_kv.
        rank_k, rank_v: channels that the cache keeps of a token's keys and values.
        value_group: channels of a value that share a scale where the cache is quantized; the last group of a
            token may have fewer.
    """

    hidden: Width
    width: Width
    rank_k: Width
    rank_v: Width
    value_group: Width

    @model_validator(mode="after")
    def _within_width(self) -> KvLayer:
        for name, rank in (("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            if rank > self.width:
                raise ValueError(f"{name} {rank} is above the {self.width} channels that there are")
        return self

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the factors' weights: `k_a` and `v_a` [rank, h], `k_b` and `v_b` [h_kv, rank]."""
        return {
            "k_a": (self.rank_k, self.hidden), "k_b": (self.width, self.rank_k),
            "v_a": (self.rank_v, self.hidden), "v_b": (self.width, self.rank_v),
        }  # fmt: skip


class KvCacheScheme(_Strict):
    """How the cache of a model is compressed.

    Every field is required: a file that lacks one is damaged, and a default would load another cache.

    Attributes:
        layers: name of an attention module -> its ranks. Attentions that are not listed keep a plain cache.
        window: latest tokens whose keys and values are kept exactly as well.
        mode: `sliding`: every token is compressed at once, and the last `window` are kept exactly, too;
            `block`: whole blocks of `window` tokens lie compressed alone, those after them exactly as well.
        bits: of a stored number; None: the model's floating-point type.
        key_group: consecutive tokens of a channel that share a scale where the cache is quantized; in mode
            `block` the window. The tokens after the last whole group are not quantized.
    """

    layers: dict[ModuleName, KvLayer] = Field(min_length=1, max_length=2**12)
    window: Tokens
    mode: Literal["sliding", "block"]
    bits: Literal[2, 4] | None
    key_group: Annotated[int, Field(ge=1, le=2**12)]

    @model_validator(mode="after")
    def _blocks(self) -> KvCacheScheme:
        if self.mode == "block" and self.window == 0:
            raise ValueError("mode block needs a window of at least one token")
        if self.mode == "block" and self.bits is not None and self.key_group != self.window:
            raise ValueError(
                f"mode block rounds whole windows: key_group is {self.key_group}, not {self.window}"
            )
        return self


def factor_tensors(scheme: KvCacheScheme) -> dict[str, tuple[int, int]]:
    """Return the tensors that a checkpoint stores of a compressed cache: name -> shape."""
    return {
        f"{attention}.{FACTORS}.{factor}.weight": shape
        for attention, layer in scheme.layers.items()
        for factor, shape in layer.factor_shapes.items()
    }
