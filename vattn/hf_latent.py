"""A full-attention layer of a transformers cache that holds latents in place of K and V.

    compressed = vattn.hf.compress(model, keep=0.5)
    cache = vattn.hf.VattnCache(model.config, latents=compressed)

The rows handed out are ordinary K and V of all tokens, made anew at every step: any attention reads
them. They take memory while a layer is at work, and for one layer at a time.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vattn.allocator.errors import VattnError
from vattn.hf_attention import UnsupportedError
from vattn.hf_layers import HeldLayer, removed
from vattn.hf_store import Store


class LatentLayer(HeldLayer):
    """A layer of latents.

    `keys` and `values` are rebuilt whenever they are asked for, and cannot be assigned.
    """

    def __init__(self, store: Store, **kwargs: Any) -> None:
        # Not super().__init__(): it would assign None to the two properties.
        if store.latents is None:
            raise UnsupportedError("a LatentLayer needs a store with latents")
        self.latents, self.index = store.latents, store.latents.add_layer()
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, dtype and device from the first rows [B, Hkv, n, D]."""
        self._open(key_states.shape[0], key_states.dtype, key_states.device)

    def _open(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.latents.open_layer(self.index, batch, dtype, device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the latents behind rows [B, Hkv, n, D]; returns K and V of all tokens."""
        batch, _, tokens, _ = key_states.shape
        new = self.latents.compressed.take(self.index, batch, tokens)
        fresh = not self.is_initialized
        held = self.get_seq_length()
        try:
            # Under autocast K is of another dtype than what it was projected from.
            self._open(batch, new[0].dtype, key_states.device)
            self.latents.append(self.index, *new)
        except VattnError:
            if fresh:  # bound to no batch: the next try may bring another
                self.reset()
            raise
        # What the model has just made of the first latents need not be made again.
        return self._rebuilt() if held else (key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.latents.tokens(self.index)

    def get_max_length(self) -> int:
        """Tokens that fit into the reservation."""
        return self.latents.options.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (see `removed`)."""
        held = self.get_seq_length()
        tokens = min(removed(tokens_to_remove, held), held)
        if tokens:
            self.latents.drop_last(self.index, tokens)

    def reset(self) -> None:
        """Forget all tokens; the next ones may come in another batch size."""
        self.latents.clear(self.index)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue from row `beam_idx[i]`."""
        self.latents.reorder(self.index, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, copies side by side."""
        rows = range(self.latents.batch(self.index))
        self.latents.reorder(self.index, [row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that `indices` (integers or a bool mask) name, in that order."""
        rows = torch.arange(self.latents.batch(self.index))
        if len(rows):
            self.latents.reorder(self.index, rows[torch.as_tensor(indices)].tolist())

    @property
    def keys(self) -> Tensor | None:
        """K of the tokens held, [B, Hkv, tokens, D], rebuilt."""
        return self._rebuilt()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, rows: Tensor) -> None:
        self._refuse("keys")

    @property
    def values(self) -> Tensor | None:
        """V of the tokens held, [B, Hkv, tokens, D], rebuilt."""
        return self._rebuilt()[1] if self.is_initialized else None

    @values.setter
    def values(self, rows: Tensor) -> None:
        self._refuse("values")

    def _rebuilt(self) -> tuple[Tensor, Tensor]:
        return self.latents.compressed.rebuilt(self.index, *self.latents.rows(self.index))

    def _refuse(self, name: str) -> NoReturn:
        raise UnsupportedError(
            f"layer {self.index} holds latents: `{name}` are rebuilt from them and cannot be "
            "assigned; make the cache without latents"
        )
