"""The latents that the layers of one transformers cache hold: a KVCache for each, over one pool.

    layer 0   [batch, tokens, rank 0] of K and of V ─┐
    layer 1   [batch, tokens, rank 1]               ─┼─ pages of one pool, one budget
    ...                                              │  beside them: the position of each token

A row of a layer is as wide as its rank, so each has a layout of its own. The layers move in step,
as in `vattn.hf_store`. A batch operation reaches them one after the other, and each is done with it
at once: where one has no pages left for it, the layers differ in batch until `reset`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vattn.allocator.errors import ClosedError
from vattn.allocator.pool import Pool
from vattn.cache import KVCache
from vattn.device import open_pool
from vattn.hf_attention import UnsupportedError
from vattn.hf_heads import DTYPES, added
from vattn.hf_lorc import Compressed
from vattn.layout import Layout, LayoutError
from vattn.sequence import Sequence
from vattn.track import Track
from vattn.usage import Usage

if TYPE_CHECKING:
    from vattn.hf_store import Options


def check_latents(options: Options) -> None:
    """Raise where the options of a cache do not go with latents.

    Raises:
        LayoutError: they are not what `compress` returns. UnsupportedError: another option excludes
        them, or the model was restored.
    """
    latents = options.latents
    if latents is None:
        return
    if not isinstance(latents, Compressed):
        raise LayoutError(f"latents must be what vattn.hf.compress(model) returns, got {latents!r}")
    for name, wrong, reason in (
        ("policy", options.policy is not None, "a policy wants to see K"),
        ("selector", options.selector is not None, "a selector wants to see K"),
        ("tiers", options.tiers is not None, "all latents are read at every step"),
        ("trace", options.trace, "ranges of several layouts are not traced"),
        ("group_layers", options.group_layers != 1, "layers differ in width"),
        ("rows", options.rows != "head_major", "a latent has no heads"),
        ("VattnStaticCache", options.zero_backed, "its rows are K and V"),
    ):
        if wrong:
            raise UnsupportedError(
                f"latents and {name} do not go together, {reason}: leave one of them out"
            )
    if not latents.active:
        raise UnsupportedError("latents: the model was restored; compress it again")


class Caches:
    """One KVCache for each layer, over one pool; closed when nobody holds this any more."""

    def __init__(self, options: Options, ranks: Seq[int], batch: int, dtype: str) -> None:
        def layout(rank: int, page: int | None) -> Layout:
            return Layout(1, 1, rank, options.max_tokens, dtype=dtype, page_bytes=page)

        widest = layout(max(ranks), options.page_bytes)
        self.pool = open_pool(widest, torch.device("cpu"), budget_bytes=options.budget_bytes)
        self.each: list[KVCache] = []
        weakref.finalize(self, _close_caches, self.each, self.pool)
        slots = options.slots or max(64, 8 * batch)
        for rank in ranks:
            self.each.append(KVCache(layout(rank, widest.page), slots=slots, pool=self.pool))


class LatentRows:
    """The latents of one transformers cache.

    `copy.deepcopy` makes a fork: full pages aliased, tails copied, independent afterwards. When the
    last reference goes, the rows go; with the last fork the pool closes, too.
    """

    def __init__(self, options: Options) -> None:
        assert options.latents is not None
        self.options, self.compressed = options, options.latents
        self.layers = 0
        self._caches: Caches | None = None
        self._sequences: list[list[Sequence]] = []
        self._positions: list[Track] = []
        self._filled: set[int] = set()
        self._latest = -1
        weakref.finalize(self, _close, self._sequences)

    # ---- life --------------------------------------------------------------------------------
    def add_layer(self) -> int:
        """Count one more layer in; returns its index.

        Raises:
            UnsupportedError: the compressed model has no more.
        """
        if self.layers == len(self.compressed.ranks):
            raise UnsupportedError(
                f"the compressed model has {self.layers} layers: pass latents of the model that "
                "this cache is for"
            )
        self.layers += 1
        return self.layers - 1

    @property
    def opened(self) -> bool:
        """Whether there are caches."""
        return self._caches is not None

    @property
    def caches(self) -> list[KVCache]:
        """The KVCache of each layer; raises ClosedError before the first tokens."""
        if self._caches is None:
            raise ClosedError("this cache holds no tokens yet; run the model once")
        return self._caches.each

    def open_layer(self, layer: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for the latents of a layer; opens those of all layers at first.

        Raises:
            LayoutError: dtype, device or batch do not fit this cache.
        """
        name = DTYPES.get(dtype)
        if name is None or device.type != "cpu":
            raise LayoutError(
                f"layer {layer} got {dtype} on {device}; this cache holds "
                f"{', '.join(sorted(DTYPES.values()))} on the CPU"
            )
        if not self._filled:
            if self._caches is None or self._caches.each[0].dtype != dtype:
                self._caches = Caches(self.options, self.compressed.ranks, batch, name)
            self._hold(self._each(lambda layer, cache: cache.open_batch(batch)))
            device = torch.device("cpu")
            self._positions = [Track(batch, 1, torch.int32, device) for _ in self.caches]
        elif batch != len(self._sequences[layer]) or self.caches[layer].dtype != dtype:
            raise LayoutError(
                f"layer {layer} got a batch of {batch} in {dtype}, but the cache holds "
                f"{len(self._sequences[layer])} sequences in {self.caches[layer].dtype}; reset() "
                "the cache before another batch"
            )
        self._filled.add(layer)

    def clear(self, layer: int) -> None:
        """Forget a layer's latents; the sequences close with the last layer."""
        self._latest = -1
        if layer not in self._filled:
            return
        self._filled.discard(layer)
        if self._filled:
            for sequence in self._sequences[layer]:
                sequence.truncate(0)
        else:
            self._hold([])

    # ---- one layer ---------------------------------------------------------------------------
    def batch(self, layer: int) -> int:
        """Sequences of a layer; 0 before its first tokens."""
        return len(self._sequences[layer]) if layer in self._filled else 0

    def tokens(self, layer: int) -> int:
        """Tokens that a layer holds."""
        if layer not in self._filled:
            return 0
        return int(self.caches[layer].tokens[self._sequences[layer][0].slot])

    def append(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write latents [batch, n, rank] of tokens at positions [batch, n] behind the last ones.
        Pages of all layers are mapped at the first layer of a step: a budget that does not reach
        stops the step before a row changes.

        Raises:
            OutOfRange, OutOfPages, MapLimitError, DriverError: as `KVCache.extend`.
        """
        if self._latest < 0 or layer <= self._latest:
            for cache, sequences in zip(self.caches, self._sequences, strict=True):
                cache.advance()
                cache.extend(sequences, key.shape[1])
        self._latest = layer
        held = self.tokens(layer)
        self.caches[layer].append(0, key[:, None], value[:, None], self._sequences[layer])
        track = self._positions[layer].get(held + key.shape[1])
        track[:, 0, held:] = positions

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of K and V, [batch, tokens, rank], zero copy, and positions [batch, tokens]."""
        cache, slots = self.caches[layer], [one.slot for one in self._sequences[layer]]
        key, value = (cache.tensor(slots, 0, side)[:, 0] for side in (0, 1))
        positions = self._positions[layer].get(self.tokens(layer))[:, 0].long()
        return key, value, positions

    def drop_last(self, layer: int, tokens: int) -> None:
        """Take a layer's last tokens back (speculative rollback)."""
        left = self.tokens(layer) - tokens
        for sequence in self._sequences[layer]:
            sequence.truncate(left)

    def reorder(self, layer: int, order: list[int]) -> None:
        """Let batch row i of a layer hold what row ``order[i]`` holds; any length of order."""
        if layer not in self._filled or order == list(range(self.batch(layer))):
            return
        cache, old = self.caches[layer], self._sequences[layer]
        if len(order) == len(old):
            cache.reorder(old, order)
        else:
            self._sequences[layer] = cache.select(old, order)
            _close([old])
        self._positions[layer] = self._picked(layer, order)

    # ---- the whole ---------------------------------------------------------------------------
    def stats(self) -> Usage:
        """Bytes of all layers together. Raises ClosedError before the first tokens."""
        each = [cache.stats() for cache in self.caches]
        return replace(reduce(added, each), sequences=each[0].sequences, tokens=each[0].tokens)

    def check(self) -> None:
        """Assert the laws of every KVCache. For tests."""
        for cache in self.caches:
            cache.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentRows:
        twin = LatentRows(self.options)
        memo[id(self)] = twin
        twin.layers, twin._caches, twin._filled = self.layers, self._caches, set(self._filled)
        if self._sequences:
            orders = [list(range(len(sequences))) for sequences in self._sequences]

            def forked(layer: int, cache: KVCache) -> list[Sequence]:
                return cache.select(self._sequences[layer], orders[layer])

            twin._hold(self._each(forked))
            twin._positions = [self._picked(layer, order) for layer, order in enumerate(orders)]
        return twin

    def _each(self, opened: Callable[[int, KVCache], list[Sequence]]) -> list[list[Sequence]]:
        """Sequences of every layer, or of none."""
        many: list[list[Sequence]] = []
        try:
            for layer, cache in enumerate(self.caches):
                many.append(opened(layer, cache))
        except BaseException:
            _close(many)
            raise
        return many

    def _picked(self, layer: int, order: list[int]) -> Track:
        """Positions of the rows in another order, in memory of their own."""
        held = self.tokens(layer)
        picked = Track(len(order), 1, torch.int32, torch.device("cpu"))
        picked.get(held).copy_(self._positions[layer].get(held)[order])
        return picked

    def _hold(self, sequences: list[list[Sequence]]) -> None:
        # In place: the finalizer holds this very list.
        _close(self._sequences)
        self._sequences[:] = sequences


def _close(many: list[list[Sequence]]) -> None:
    for sequences in many:
        for sequence in sequences:
            if not sequence.closed:
                sequence.close()


def _close_caches(each: list[KVCache], pool: Pool) -> None:
    for cache in each:
        cache.close()
    pool.close()
