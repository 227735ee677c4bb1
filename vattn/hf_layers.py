"""The layers of a transformers cache as views into one KVCache: full attention, sliding window."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vattn.allocator.errors import VattnError
from vattn.hf_store import Store
from vattn.hf_versions import queries_of
from vattn.layout import LayoutError

# Until 5.18 a positive argument of `crop` was the length to keep; since then it is refused.
CROP_TAKES_LENGTHS = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)


def removed(tokens_to_remove: int, length: int) -> int:
    """How many of `length` tokens a call of `crop` takes away, as the installed transformers means.

    Raises:
        ValueError: positive, and this transformers takes only "how many to remove", negative.
    """
    if tokens_to_remove <= 0:
        return -tokens_to_remove
    if CROP_TAKES_LENGTHS:
        return max(0, length - tokens_to_remove)
    raise ValueError(
        f"crop({tokens_to_remove}) is not supported: pass a negative number, how many tokens to "
        "remove"
    )


class HeldLayer(CacheLayerMixin):
    """What all layers over our memory have in common."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys, offset of the first key) of the mask of `query_length` new tokens."""
        return self.get_seq_length() + queries_of(query_length), 0

    def get_max_cache_shape(self) -> int:
        """What 5.2 calls `get_max_length`."""
        return self.get_max_length()

    def offload(self) -> None:
        """Nothing: the rows are in host memory already."""

    def prefetch(self) -> None:
        """Nothing: the rows are in host memory already."""


class VattnLayer(HeldLayer):
    """A full-attention layer: all rows in one growing view.

    `keys` and `values` are [B, Hkv, tokens, D] views, or None before the first tokens. Both can be
    assigned: the layer then holds copies of the assigned rows. A first assignment waits for the
    second, so that K and V never differ in length.
    """

    def __init__(self, store: Store, **kwargs: Any) -> None:
        # Not super().__init__(): it would assign None to the two properties.
        self.store = store
        self.index = store.add_layer()
        self.is_initialized = False
        self._half: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, head size and dtype from the first rows [B, Hkv, n, D]."""
        self.store.open_layer(self.index, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [B, Hkv, n, D]; returns all rows to attend to, as views."""
        if self.store.sparse is not None:
            self.store.reader(self.index).check()
        self._append(key_states, value_states)
        key, value = self.store.rows(self.index)
        if self.store.sparse is not None:
            self.store.reader(self.index).mark(key)
        return key, value

    def get_seq_length(self) -> int:
        """Tokens held."""
        self._settle()
        return self.store.tokens(self.index)

    def get_max_length(self) -> int:
        """Tokens that fit into the reservation."""
        return self.store.options.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (see `removed`)."""
        self._settle()
        tokens = removed(tokens_to_remove, self.get_seq_length())
        if tokens and self.is_initialized:
            self.store.drop_last(self.index, min(tokens, self.get_seq_length()))

    def reset(self) -> None:
        """Forget all tokens; the next ones may come in another batch size."""
        self._half.clear()
        self.store.clear(self.index)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue from row `beam_idx[i]`."""
        self._settle()
        self.store.reorder(self.index, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, copies side by side."""
        self._settle()
        batch = len(self.store.sequences)
        self.store.reorder(self.index, [row for row in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that `indices` (integers or a bool mask) name, in that order."""
        self._settle()
        batch = torch.arange(len(self.store.sequences))
        self.store.reorder(self.index, batch[torch.as_tensor(indices)].tolist())

    @property
    def keys(self) -> Tensor | None:
        """K of the tokens held, [B, Hkv, tokens, D]."""
        return self._half.get("keys", self._rows(0))

    @keys.setter
    def keys(self, rows: Tensor) -> None:
        self._assign("keys", rows)

    @property
    def values(self) -> Tensor | None:
        """V of the tokens held, [B, Hkv, tokens, D]."""
        return self._half.get("values", self._rows(1))

    @values.setter
    def values(self, rows: Tensor) -> None:
        self._assign("values", rows)

    def _rows(self, side: int) -> Tensor | None:
        return self.store.rows(self.index)[side] if self.is_initialized else None

    def _assign(self, name: str, rows: Tensor) -> None:
        self._half[name] = rows
        if len(self._half) == 2:
            self._settle()

    def _settle(self) -> None:
        """Take assigned rows over; an assignment of one half keeps the other as it is."""
        if not self._half:
            return
        key = self._half.get("keys", self._rows(0))
        value = self._half.get("values", self._rows(1))
        name = next(iter(self._half))
        if key is None or value is None or key.shape != value.shape:
            raise LayoutError(
                f"layer {self.index}: only `{name}` was assigned, with "
                f"{self._half[name].shape[-2]} tokens; assign keys and values of the same length"
            )
        self._half.clear()
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.store.replace(self.index, key, value)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._settle()
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key_states, value_states)
        try:
            self.store.append(self.index, key_states, value_states)
        except VattnError:
            if fresh:  # bound to no batch: the next try may bring another
                self.reset()
            raise


class VattnSlidingLayer(VattnLayer):
    """A sliding-window (or chunked) layer: the last `sliding_window - 1` rows stay, pages in front
    of them go back one step later. Positions stay linear: no ring, no copy.

    While the past is recorded (assisted decoding) everything stays until the next `crop`.
    """

    is_sliding = True

    def __init__(self, store: Store, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(store)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def activate_past_recording(self) -> None:
        """Keep rows behind the window until the next `crop`."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [B, Hkv, n, D]; returns those in reach of the new queries, as views."""
        self._settle()
        visible = min(self.store.tokens(self.index), self.sliding_window - 1)
        visible += key_states.shape[-2]
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        key, value = self.store.rows(self.index)
        if not self.record_past:
            # After the views were taken: they keep their pages until they are gone.
            self.store.keep_last(self.index, min(visible, self.sliding_window - 1))
        return key[:, :, -visible:], value[:, :, -visible:]

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        self._settle()
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys, offset of the first key) that `update` will return for `query_length` tokens."""
        self._settle()
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + queries_of(query_length), offset

    def get_max_length(self) -> int:
        """Tokens that a query sees."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens and what lies behind the window.

        Raises:
            RuntimeError: the window was passed without recording: the rows are gone.
        """
        self._settle()
        passed = self.cumulative_length >= self.sliding_window
        if passed and not self.record_past:
            raise RuntimeError(
                "`crop` after the sliding window was passed needs the rows behind it: call "
                "activate_past_recording() on the cache before generating"
            )
        if passed and tokens_to_remove > 0:
            raise RuntimeError(
                "a sliding-window layer that passed its window takes only a negative number: "
                "how many tokens to remove"
            )
        tokens = min(removed(tokens_to_remove, self.cumulative_length), self.cumulative_length)
        if not self.is_initialized:
            return
        if tokens:
            self.store.drop_last(self.index, min(tokens, self.store.tokens(self.index)))
            self.cumulative_length -= tokens
        self.store.keep_last(
            self.index, min(self.store.tokens(self.index), self.sliding_window - 1)
        )

    def reset(self) -> None:
        """Forget all tokens; the next ones may come in another batch size."""
        super().reset()
        self.cumulative_length = 0

    def _settle(self) -> None:
        assigned = bool(self._half)
        super()._settle()
        if assigned and self.cumulative_length < self.sliding_window:
            self.cumulative_length = self.store.tokens(self.index)
