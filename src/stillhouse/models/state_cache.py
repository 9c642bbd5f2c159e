"""What a state-space mixer remembers between tokens, kept where ``transformers`` keeps keys and values.

A `StateLayer` takes one layer's place in a ``DynamicCache``: its size is the same after one token and after a million.
Layers of a hybrid that kept their attention keep their keys and values beside it.

Shapes: B sequences, T tokens, D channels, H heads, N size of a head's state, P width of a head's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from stillhouse.base.errors import ModelError


class StateLayer(CacheLayerMixin):
    """The state of one mixer: ``state`` (B, H, N, P), the inputs that its convolutions still see, the tokens so far."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.tails: dict[str, Tensor] = {}
        self.seen = 0

    def before(self, name: str, x_BTD: Tensor, count: int) -> Tensor:
        """The ``count`` inputs of a convolution that stood before ``x``, zeros at the beginning: (B, count, D).

        The last ones of ``x`` are kept for the next time.
        """
        found_BTD = self.tails.get(name)
        if found_BTD is None:
            found_BTD = x_BTD.new_zeros(x_BTD.shape[0], count, x_BTD.shape[2])
        self.tails[name] = torch.cat([found_BTD, x_BTD], 1)[:, x_BTD.shape[1] :]
        return found_BTD

    def advance(self, state_BHNP: Tensor, tokens: int) -> None:
        """Keep the state after so many more tokens."""
        self.state, self.seen, self.is_initialized = state_BHNP, self.seen + tokens, True

    # -- what ``transformers`` asks of a layer of a cache -----------------------------------------------------------

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: the first token makes the state."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ModelError("this layer of the cache belongs to a state-space mixer, which has no keys and values to keep")

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)  # 5.0 passes the tokens' positions
        return self.seen + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers 5

    def reset(self) -> None:
        self.state, self.tails, self.seen, self.is_initialized = None, {}, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ModelError("a state-space mixer cannot take tokens back; generate without an assistant model")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda kept: kept.index_select(0, beam_idx.to(kept.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda kept: kept[indices])

    def offload(self) -> None:
        """Nothing: a state is small, and of one size."""

    prefetch = offload

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = change(self.state)
            self.tails = {name: change(tail) for name, tail in self.tails.items()}


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The state of layer ``index`` in a cache; an unused layer for keys and values makes room for it.

    Raises:
        ModelError: a cache of fixed size, or one that another model has filled.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
        raise ModelError(
            f"layer {index} of the cache is a {type(layer).__name__}, but its state-space mixer keeps a state; begin "
            "with an empty DynamicCache, or with none"
        )
    made = cache.layers[index] = StateLayer()
    return made
