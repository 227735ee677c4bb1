"""A selector behind transformers' attention: how a query finds the cache that holds its keys.

transformers hands the attention function plain tensors. The keys that `VattnLayer.update` returns
carry a `Reader`, so that the function named "vattn" reads what the selector chooses instead of all
of them. Any other attention would read everything without a word: the next update says so.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vattn.batch import Ints
from vattn.hf_attention import UnsupportedError
from vattn.sparse import SparseAttention

if TYPE_CHECKING:
    from vattn.hf_store import Store


class Reader:
    """One layer of a store with a selector."""

    def __init__(self, store: Store, sparse: SparseAttention, layer: int) -> None:
        self.sparse, self._store, self._layer = sparse, weakref.ref(store), layer
        self._owed = False
        self._mask: tuple[weakref.ref[Tensor], int, Ints] | None = None

    def check(self) -> None:
        """Before the next rows are appended.

        Raises:
            UnsupportedError: the keys of the step before were read by another attention.
        """
        if self._owed:
            store = self._store()
            if store is not None:
                store.excuse_readers()  # the next step may do better
            raise UnsupportedError(
                f"layer {self._layer} has a selector, but its last step was read by another "
                'attention, which reads everything: call model.set_attn_implementation("vattn") '
                "(after vattn.hf.register()), or make the cache without a selector"
            )

    def excuse(self) -> None:
        """Forget that a step is owed."""
        self._owed = False

    def mark(self, key: Tensor) -> None:
        """Let ``key`` carry this reader."""
        self._owed = True
        key.vattn_reader = self  # type: ignore[attr-defined]

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, refused: dict[str, object]
    ) -> Tensor | None:
        """Attend as the selector chooses, [B, Hq, L, D]; None where it reads everything.

        Raises:
            UnsupportedError: a mask or an argument that no selection honours.
        """
        self._owed = False
        store = self._store()
        if store is None or query.shape[2] > self.sparse.most_queries:
            return None
        named = [name for name, value in refused.items() if value]
        if named:
            raise UnsupportedError(
                f"layer {self._layer} has a selector, and {', '.join(named)} cannot be honoured "
                "with it; make the cache without a selector for this model"
            )
        starts = None if mask is None else self._starts(mask, query)
        found = self.sparse.try_attend(
            query, store.cache.view(store.sequences), self._layer, scale=scale, starts=starts
        )
        return None if found is None else found[0]

    def _starts(self, mask: Tensor, query: Tensor) -> Ints:
        """The padding on the left of each sequence."""
        # What inference mode makes has no version, and is made anew for each step.
        version = 0 if mask.is_inference() else mask._version
        if self._mask is not None and self._mask[0]() is mask and self._mask[1] == version:
            return self._mask[2]
        counts = left_padding(mask, query, f"layer {self._layer} has a selector")
        self._mask = (weakref.ref(mask), version, counts)
        return counts


def left_padding(mask: Tensor, query: Tensor, reason: str) -> Ints:
    """The padding on the left of each sequence, where a mask says nothing else beyond causality.

    Raises:
        UnsupportedError: it does; the message begins with the reason why that matters.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and bool((mask > torch.finfo(mask.dtype).min / 2)[~seen].any()):
        raise UnsupportedError(
            f"{reason}, and a mask that adds to scores: make the cache without it for this model"
        )
    seen = seen.expand(query.shape[0], *seen.shape[1:])
    length, tokens = seen.shape[-2:]
    starts = tokens - seen[:, 0, -1].sum(-1)
    at = torch.arange(tokens, device=mask.device)
    last = tokens - length + torch.arange(length, device=mask.device)
    plain = (at >= starts[:, None, None, None]) & (at <= last[:, None])
    if not torch.equal(plain.expand_as(seen), seen):
        raise UnsupportedError(
            f"{reason}, and a mask that is not padding on the left: pad prompts on the left, or "
            "make the cache without it"
        )
    counts: Ints = starts.numpy().astype(np.int64)
    return counts
