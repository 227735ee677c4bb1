"""One request's K and V in a cache, and what kernels see of one or several of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .allocator.errors import ClosedError
from .layout import LayoutError

if TYPE_CHECKING:
    from .cache import KVCache

K, V = 0, 1


class Side:
    """``k`` or ``v`` of a sequence or view: index it by layer to get a tensor."""

    __slots__ = ("_of", "_side")

    def __init__(self, of: Sequence | View, side: int) -> None:
        self._of, self._side = of, side

    def __getitem__(self, layer: int) -> Tensor:
        return self._of.tensor(layer, self._side)

    def __len__(self) -> int:
        return self._of.cache.layout.layers


class Sequence:
    """One slot of a cache while it is open. Made by `KVCache.open`, `fork` and `share`.

    ``k[layer]`` and ``v[layer]`` are tensors [kv_heads, tokens, head_dim] over the mapped prefix:
    zero-copy, with the layout's strides, valid for as long as they live. Take them anew after an
    append: a tensor does not grow.
    """

    __slots__ = ("_version", "cache", "k", "slot", "tenant", "v")

    def __init__(self, cache: KVCache, slot: int, tenant: int) -> None:
        self.cache, self.slot, self.tenant = cache, slot, tenant
        self._version = cache.opened.item(slot)
        self.k, self.v = Side(self, K), Side(self, V)

    @property
    def closed(self) -> bool:
        """True once closed, or once the cache is."""
        return self.cache.closed or self.cache.opened.item(self.slot) != self._version

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return int(self.lengths.min())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens appended to each physical layer, [physical_layers]."""
        self.check_open()
        return self.cache.lengths[self.slot].copy()

    @property
    def starts(self) -> NDArray[np.int64]:
        """First token still readable in each physical layer, [physical_layers]."""
        self.check_open()
        return self.cache.starts[self.slot].copy()

    def tensor(self, layer: int, side: int) -> Tensor:
        """K (``side`` 0) or V (1) of a layer: [kv_heads, length - start, head_dim].

        Raises:
            ClosedError: the sequence or its cache is closed.
            LayoutError: there is no such layer.
        """
        self.check_open()
        return self.cache.tensor([self.slot], layer, side)[0]

    def truncate(self, tokens: int, layer: int | None = None) -> None:
        """See `KVCache.truncate`."""
        self.cache.truncate(self, tokens, layer)

    def release_before(self, layer: int, token: int) -> None:
        """See `KVCache.release_before`."""
        self.cache.release_before(self, layer, token)

    def fork(self) -> Sequence:
        """See `KVCache.fork`."""
        return self.cache.fork(self)

    def share(self, tokens: int) -> Sequence:
        """See `KVCache.fork`: the first ``tokens`` tokens only."""
        return self.cache.fork(self, tokens)

    def close(self) -> None:
        """See `KVCache.close_sequence`."""
        self.cache.close_sequence(self)

    def check_open(self) -> None:
        """Raise `ClosedError` unless the sequence is open."""
        if self.closed:
            raise ClosedError(
                f"the sequence in slot {self.slot} is closed; open a new one with KVCache.open()"
            )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.length} tokens"
        return f"<Sequence slot {self.slot}, {state}>"


@dataclass(frozen=True)
class Ragged:
    """One layer of several sequences of any length, for kernels that take pointers.

    ``k`` and ``v`` are per-sequence tensors [kv_heads, tokens, head_dim]; the arrays name the same
    memory: element strides are equal for all of them.
    """

    k: list[Tensor]
    v: list[Tensor]
    k_pointers: NDArray[np.int64]
    v_pointers: NDArray[np.int64]
    lengths: NDArray[np.int64]
    strides: tuple[int, int, int]


class View:
    """Several sequences as a kernel sees them, at the lengths they had when it was made.

    ``k[layer]`` and ``v[layer]`` are [batch, kv_heads, tokens, head_dim] where the slots are
    consecutive and the lengths equal; `ragged` serves every other batch. A view of a sequence that
    was closed, truncated or reordered since raises `ClosedError`.
    """

    def __init__(self, cache: KVCache, sequences: list[Sequence], static: bool = False) -> None:
        self.cache, self.sequences, self.static = cache, sequences, static
        self.slots = [sequence.slot for sequence in sequences]
        self._versions = cache.versions[self.slots].copy()
        self.lengths = cache.lengths[self.slots].copy()
        self.starts = cache.starts[self.slots].copy()
        self.k, self.v = Side(self, K), Side(self, V)

    def tensor(self, layer: int, side: int) -> Tensor:
        """K (``side`` 0) or V (1) of a layer, [batch, kv_heads, tokens, head_dim].

        Raises:
            ClosedError: a sequence was closed, truncated or reordered since.
            LayoutError: no such layer, or the batch is ragged.
        """
        self.check_current()
        physical = self.cache.layout.physical(layer)
        if self.static:
            return self.cache.tensor(self.slots, layer, side, static=True)
        spans = {
            (int(a), int(b))
            for a, b in zip(self.starts[:, physical], self.lengths[:, physical], strict=True)
        }
        first = self.slots[0]
        if len(spans) > 1 or self.slots != list(range(first, first + len(self.slots))):
            raise LayoutError(
                f"slots {self.slots} with tokens {sorted(spans)} are not one tensor: use "
                "ragged(layer), or open the batch with open_batch()"
            )
        return self.cache.tensor(self.slots, layer, side, span=spans.pop())

    def ragged(self, layer: int) -> Ragged:
        """The layer of each sequence on its own, with pointers.

        Raises:
            ClosedError: a sequence was closed, truncated or reordered since.
        """
        self.check_current()
        physical = self.cache.layout.physical(layer)
        spans = list(
            zip(self.starts[:, physical].tolist(), self.lengths[:, physical].tolist(), strict=True)
        )
        k, v = (
            [
                self.cache.tensor([slot], layer, side, span=span)[0]
                for slot, span in zip(self.slots, spans, strict=True)
            ]
            for side in (K, V)
        )
        return Ragged(
            k,
            v,
            np.array([t.data_ptr() for t in k], np.int64),
            np.array([t.data_ptr() for t in v], np.int64),
            np.array([end - start for start, end in spans], np.int64),
            self.cache.layout.strides,
        )

    def check_current(self) -> None:
        """Raise `ClosedError` if a sequence was closed, truncated or reordered since the view was
        made."""
        for sequence in self.sequences:
            sequence.check_open()
        stale = np.flatnonzero(self.cache.versions[self.slots] != self._versions)
        if len(stale):
            raise ClosedError(
                f"the sequence in slot {self.slots[int(stale[0])]} was truncated or reordered "
                "after this view was made; take a new view"
            )
