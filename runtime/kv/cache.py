"""The bi-branch cache: all tokens compressed, the latest ones exactly as well.

CSKV, arXiv 2409.10593, section 2.2. A hook on every compressed attention (`attach`) stages the attention's
input; the stock attention then calls `update` with its exact keys and values, and gets what it is to attend
to: the history rebuilt out of compressed states, the latest tokens exactly, the new ones exactly. Nothing
that is rebuilt is kept. Without a history, as in a prompt, keys and values pass as they are, so that the
logits of a prompt are the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ...errors import UsageError
from .latents import Latents
from .rebuild import Angles, factors_below, rebuilt_keys, rebuilt_values
from .scheme import KvCacheScheme

_OTHER_MODEL = "a compressed cache was given to another model than the one that it was made for"
_OWN_CACHE = (
    "make one per conversation and model with new_cache(model), or leave past_key_values out of generate()"
)
_STOCK = "pass past_key_values=DynamicCache() of transformers to generate() for the uncompressed cache"


class _Held:
    """A module that a cache works with and does not own: a copy of the cache works with the same one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a compressed cache cannot be pickled: it belongs to a model in this process")


class Positions:
    """Positions of all cached tokens, per row, once for all layers; and their angles during one forward.

    Attributes:
        ids: int32 [batch, tokens]; None before the first forward.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.ids: Tensor | None = None
        self._rotary = _Held(rotary)
        self._angles: tuple[int, Angles] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens have a position."""
        return 0 if self.ids is None else self.ids.shape[1]

    def extend(self, ids: Tensor, batch: int, before: int) -> None:
        """Append the positions of new tokens, unless another layer of the same forward has.

        Args:
            ids: [batch or 1, new tokens].
            batch: rows.
            before: tokens that the asking layer holds.

        Raises:
            UsageError: the layers do not hold the same tokens: a forward was broken off.
        """
        new = ids.shape[1]
        if self.tokens == before + new:
            return
        if self.tokens != before:
            raise UsageError(
                f"the compressed cache has positions of {self.tokens} tokens and a layer of {before}: a"
                " forward was broken off",
                hint="start with a new cache, or call reset()",
            )
        ids = ids.to(torch.int32).expand(batch, new)
        self.ids = ids.clone() if self.ids is None else torch.cat([self.ids, ids.to(self.ids.device)], dim=1)

    def angles(self, tokens: int, like: Tensor) -> Angles:
        """Return cos and sin of the first `tokens` positions, in the dtype and on the device of `like`."""
        if self.ids is None:
            raise ValueError("no positions")
        if self._angles is None or self._angles[0] != tokens:
            self._angles = tokens, self._rotary.module(like, self.ids[:, :tokens].long().to(like.device))
        cos, sin = self._angles[1]
        return cos.to(like.device), sin.to(like.device)

    def release(self) -> None:
        """Forget the angles: they are several times as large as the positions."""
        self._angles = None

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows."""
        self.ids = None if self.ids is None else change(self.ids)
        self._angles = None

    def clear(self) -> None:
        """Forget all tokens."""
        self.ids, self._angles = None, None


class CskvLayer(CacheLayerMixin):
    """The cache of one attention.

    Attributes:
        keys, values: of the latest tokens, exactly, [batch, KV heads, tokens, head_dim], keys rotated.
        latents: of all tokens.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, name: str, attention: nn.Module, scheme: KvCacheScheme, positions: Positions) -> None:
        super().__init__()
        self.name = name
        self._attention = _Held(attention)
        self.scheme = scheme
        self.positions = positions
        self.latents = Latents(scheme, scheme.layers[name])
        self._staged: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def attention(self) -> nn.Module:
        """The attention that this is the cache of."""
        return self._attention.module

    def stage(self, x: Tensor, position_ids: Tensor) -> None:
        """Compress the attention's input, before the attention itself runs.

        Args:
            x: [batch, new tokens, h].
            position_ids: [batch or 1, new tokens].
        """
        factors = factors_below(self.attention)
        self._staged = factors.k_a(x), factors.v_a(x), position_ids

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens and return what the attention is to attend to.

        Args:
            key_states, value_states: [batch, KV heads, new tokens, head_dim], keys rotated.

        Returns:
            Keys and values of all tokens, in the same layout.

        Raises:
            UsageError: nothing was staged: another model's attention called.
        """
        if self._staged is None:
            raise UsageError(
                f"{self.name}: {_OTHER_MODEL}",
                hint=_OWN_CACHE,
            )
        (c_k, c_v, ids), self._staged = self._staged, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = self.get_seq_length()
        self.positions.extend(ids, key_states.shape[0], tokens)
        keys, values = self._with_history(tokens, key_states, value_states)
        self.latents.append(c_k, c_v)
        self._keep_exact(keys, values, tokens + key_states.shape[2])
        return keys, values

    def _with_history(self, tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is rebuilt and what is kept exactly before the new tokens."""
        exact = self.keys.shape[2]
        if not tokens:
            return k, v
        keys, values = [self.keys, k], [self.values, v]
        history = tokens - exact
        if history:
            c_k, c_v = self.latents.read(history)
            angles = self.positions.angles(history, c_k)
            keys.insert(0, rebuilt_keys(self.attention, c_k, angles).to(k.dtype))
            values.insert(0, rebuilt_values(self.attention, c_v).to(v.dtype))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _keep_exact(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Keep the latest tokens of [..., tokens, ...]; copies, as a view would keep everything alive.

        What is kept was exact: the window is at most what was exact before and what is new.
        """
        window = self.scheme.window
        exact = min(tokens, window) if self.scheme.mode == "sliding" else tokens % window
        first = keys.shape[2] - exact
        self.keys, self.values = keys[:, :, first:].clone(), values[:, :, first:].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask covers, and where it starts."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens are cached."""
        return self.latents.tokens

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is stored."""
        if self.is_initialized:
            yield from (self.keys, self.values)
            yield from self.latents.tensors()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows of everything that is stored."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.latents.change(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows, as beam search does."""
        self.change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self.latents.clear()
        self._staged = None

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: exact keys that left the window cannot be brought back."""
        _refuse_crop()

    def offload(self) -> NoReturn:
        """Refuse."""
        _refuse_offloading()

    def prefetch(self) -> NoReturn:
        """Refuse."""
        _refuse_offloading()


class CskvCache(Cache):
    """The cache of one conversation; make it with `new_cache`, pass it as `past_key_values`.

    Attributes:
        scheme: how it is compressed.
    """

    def __init__(self, layers: list[CacheLayerMixin], scheme: KvCacheScheme, positions: Positions) -> None:
        super().__init__(layers=layers)
        self.scheme = scheme
        self.positions = positions
        self._last = max(i for i, layer in enumerate(layers) if isinstance(layer, CskvLayer))

    def stage(self, attention: Any, x: Tensor, position_ids: Tensor | None) -> None:
        """Compress the input of an attention of the model that this cache was made for.

        Raises:
            UsageError: the attention belongs to another model.
        """
        layer = self.layers[attention.layer_idx] if attention.layer_idx < len(self.layers) else None
        if not isinstance(layer, CskvLayer) or layer.attention is not attention:
            raise UsageError(
                f"layer {attention.layer_idx}: {_OTHER_MODEL}",
                hint=_OWN_CACHE,
            )
        if position_ids is None:
            raise TypeError(f"{layer.name} got no position_ids")
        layer.stage(x, position_ids)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens of a layer; see `CskvLayer.update`."""
        found = super().update(key_states, value_states, layer_idx, *arguments, **keywords)
        if layer_idx == self._last:
            self.positions.release()
        return found

    def stored_bytes(self) -> int:
        """Return the bytes of all tensors, of layers that are not compressed as well."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is stored."""
        if self.positions.ids is not None:
            yield self.positions.ids
        for layer in self.layers:
            if isinstance(layer, CskvLayer):
                yield from layer.tensors()
            elif layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self.positions.change(lambda ids: ids.index_select(0, beam_idx.to(ids.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.positions.change(lambda ids: ids.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.positions.change(lambda ids: ids[indices.to(ids.device)])

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.positions.clear()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: exact keys that left the window cannot be brought back."""
        _refuse_crop()

    def activate_past_recording(self) -> NoReturn:
        """Refuse what assisted decoding needs in order to take tokens back."""
        _refuse_crop()


def _refuse_crop() -> NoReturn:
    raise UsageError(
        "a compressed cache cannot take tokens back: exact keys that left the window are gone. So it cannot"
        " be cropped, and serves no assisted or speculative decoding",
        hint=_STOCK,
    )


def _refuse_offloading() -> NoReturn:
    raise UsageError("a compressed cache is not offloaded", hint=_STOCK)


def stock_layers(module: Any) -> list[Any]:
    """Return the layers of an empty stock cache of a model, as many as it has."""
    return list(DynamicCache(config=module.config.get_text_config(decoder=True)).layers)


def cache_of(module: Any, scheme: KvCacheScheme, rotary: nn.Module) -> CskvCache:
    """Return an empty cache: stock layers, and compressed ones for the attentions of the scheme."""
    positions = Positions(rotary)
    layers = stock_layers(module)
    for name in scheme.layers:
        attention = module.get_submodule(name)
        layers[attention.layer_idx] = CskvLayer(name, attention, scheme, positions)
    return CskvCache(layers, scheme, positions)
