"""A compileable layer: static shapes and addresses, pages mapped on demand all the same.

K and V are [B, Hkv, max_tokens, D] from the start. Rows without a page read as zeros, because one
shared zero page lies behind them, and the mask hides them. Pages are mapped by a tiny operator
inside the graph, before the rows of a step are written: there is nothing to call between steps, no
graph break, and no graph depends on the length.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from vattn.hf_layers import removed
from vattn.hf_store import Store, store_of


@torch.library.custom_op("vattn::map_rows", mutates_args=())
def map_rows(length: Tensor, tokens: int, store: int) -> Tensor:
    """Map pages for `tokens` rows behind the first `length` (0-d int64); returns `length` copied.

    Rows are written where the result says, so no graph can write them before they are mapped.
    Raises OutOfPages or OutOfRange from inside the graph; nothing is written then.
    """
    store_of(store).reach(int(length) + tokens)
    return length.clone()


@map_rows.register_fake
def _(length: Tensor, tokens: int, store: int) -> Tensor:
    return torch.empty_like(length)


class VattnStaticLayer(StaticLayer):
    """A layer of static shape over a zero-backed KVCache.

    Sliding-window layers use it too: their mask does the sliding, and nothing is rolled or copied.
    """

    is_croppable = True

    def __init__(self, store: Store, **kwargs: Any) -> None:
        super().__init__(max_cache_len=store.options.max_tokens)
        self.store = store
        self.index = store.add_layer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, head size and dtype from the first rows [B, Hkv, n, D]."""
        self.store.open_layer(self.index, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim = self.v_head_dim = key_states.shape[-1]
        self._show()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write rows [B, Hkv, n, D] at the present length; returns all `max_tokens` rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        start = self.cumulative_length
        if self.index == 0:
            # Layer 0 maps for all of them: what the others write depends on what it returns.
            start = map_rows(start, tokens, self.store.id)
        where = torch.arange(tokens, device=self.device) + start
        self.cumulative_length.add_(tokens)
        self.keys.index_copy_(2, where, key_states)
        self.values.index_copy_(2, where, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens: their rows are masked, then overwritten."""
        length = int(self.cumulative_length)
        self.cumulative_length.fill_(length - min(removed(tokens_to_remove, length), length))

    def reset(self) -> None:
        """Forget all tokens; addresses, shapes and mapped pages stay."""
        if self.is_initialized:
            for rows in (self.keys, self.values):
                rows[:, :, : int(self.cumulative_length)].zero_()
            self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue from row `beam_idx[i]`; copies the rows held, in place."""
        if self.is_initialized:
            for rows in (self.keys, self.values):
                held = rows[:, :, : int(self.cumulative_length)]
                held.copy_(held.index_select(0, beam_idx))

    def offload(self) -> None:
        """Nothing: the rows are in host memory already."""

    def prefetch(self) -> None:
        """Nothing: the rows are in host memory already."""

    def __deepcopy__(self, memo: dict[int, Any]) -> VattnStaticLayer:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.store = copy.deepcopy(self.store, memo)
        twin.cumulative_length = self.cumulative_length.clone()
        if self.is_initialized:
            length = int(self.cumulative_length)
            twin.store.reach(length)
            twin._show()
            twin.keys[:, :, :length].copy_(self.keys[:, :, :length])
            twin.values[:, :, :length].copy_(self.values[:, :, :length])
        return twin

    def _show(self) -> None:
        self.keys, self.values = self.store.static_rows(self.index)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
