"""What the layers of one transformers cache share: one KVCache and a batch of sequences.

    transformers Cache ── layers[i] ─┐
                          layers[j] ─┼── Store ── KVCache, and one sequence for each batch row
                                     │            (consecutive slots: a layer is one tensor)

All sequences of a store move in step: a layer has one length, whatever the batch. Batch operations
(beam search, repeat, select) reach every layer in turn, as transformers calls them; the store
waits for the last layer and then moves whole sequences once, by aliasing pages.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from vattn.allocator.errors import ClosedError, VattnError
from vattn.allocator.pool import Pool
from vattn.batch import Batch
from vattn.cache import CopyRefused, KVCache
from vattn.evictor import Evictor
from vattn.hf_attention import UnsupportedError
from vattn.hf_batch import Orders, check_fits, fits
from vattn.hf_heads import DTYPES, HeadStore, Owner, check_policy
from vattn.hf_latent_rows import LatentRows, check_latents
from vattn.hf_lorc import Compressed
from vattn.hf_sparse import Reader
from vattn.layout import Layout, LayoutError
from vattn.selector import Selector
from vattn.sequence import Sequence
from vattn.sparse import SparseAttention
from vattn.tiers import Tiers

_ids = itertools.count()
_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Options:
    """How the KVCache behind a transformers cache is made; shapes come with the first tokens."""

    max_tokens: int
    rows: str = "head_major"
    group_layers: int = 1
    page_bytes: int | None = None
    budget_bytes: int | None = None
    slots: int | None = None
    trace: bool = False
    zero_backed: bool = False
    selector: Selector | None = None
    tiers: Mapping[str, Any] | None = None
    policy: Evictor | None = None
    outputs: tuple[Tensor, ...] | None = None
    latents: Compressed | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise LayoutError(f"max_tokens must be at least 1, got {self.max_tokens}")
        check_policy(self)
        check_latents(self)

    def open(self, layers: int, batch: int, like: Tensor, pool: Pool | None = None) -> KVCache:
        """Make the KVCache for rows like `like` [B, Hkv, n, D]; in ``pool``, or in one of its
        own."""
        layout = Layout(
            layers=layers,
            kv_heads=like.shape[1],
            head_dim=like.shape[3],
            max_tokens=self.max_tokens,
            dtype=DTYPES[like.dtype],
            rows=self.rows,  # type: ignore[arg-type]
            group_layers=min(self.group_layers, layers),
            page_bytes=self.page_bytes if pool is None else pool.page_bytes,
        )
        # Slots are address space: room for deepcopies, and for a batch beside itself repeated by 4.
        return KVCache(
            layout,
            slots=self.slots or max(64, 8 * batch),
            budget_bytes=self.budget_bytes if pool is None else None,
            pool=pool,
            zero_backed=self.zero_backed,
            trace=self.trace,
        )


class Store:
    """One KVCache and the batch of sequences that the layers of one transformers cache share.

    `copy.deepcopy` makes a fork: full pages aliased, tails copied, independent afterwards. When
    the last reference goes, the sequences close; with the last fork the KVCache closes, too.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.kv: KVCache | None = None
        self.sparse: SparseAttention | None = None
        self.tiers: Tiers | None = None
        self.kept = None if options.policy is None else HeadStore(options, options.policy)
        self.latents = None if options.latents is None else LatentRows(options)
        self._readers: dict[int, Reader] = {}
        self._owner: Owner | None = None
        self.layers = 0
        self.sequences: list[Sequence] = []
        self.id = next(_ids)
        _stores[self.id] = self
        self._batch: Batch | None = None
        self._filled: set[int] = set()
        self._orders = Orders()
        self._latest = -1
        weakref.finalize(self, _close, self.sequences)

    # ---- life --------------------------------------------------------------------------------
    def add_layer(self) -> int:
        """Count one more layer in; returns its index. Only before the first tokens."""
        if self.kv is not None:
            raise UnsupportedError("layers cannot be added to a cache that already holds tokens")
        self.layers += 1
        return self.layers - 1

    def open_layer(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Make room for rows like `key` and `value` [B, Hkv, n, D]; opens the KVCache at first.

        Raises:
            UnsupportedError: K and V differ in shape.
            LayoutError: dtype, device, batch or heads do not fit this cache.
        """
        check_rows(layer, key, value)
        batch = key.shape[0]
        if not self._filled:
            if self.kv is None or not self._fits(self.kv, key):
                pool = None if self.kept is None else self.kept.pool(key)
                self._open(self.options.open(self.layers, batch, key, pool))
            self._hold(self.cache.open_batch(batch))
        else:
            layout = self.cache.layout
            check_fits(layer, key, len(self.sequences), layout.kv_heads, layout)
        self._filled.add(layer)

    def _open(self, kv: KVCache) -> None:
        """Hold a new KVCache, its tiers and its selector: all or none."""
        options = self.options
        try:
            tiers = None if options.tiers is None else Tiers(kv, **options.tiers)
            sparse = None
            if options.selector is not None:
                sparse = SparseAttention(kv, options.selector, tiers)
        except BaseException:
            kv.close()
            raise
        self.kv, self._owner, self.tiers, self.sparse = kv, Owner(kv), tiers, sparse
        self._readers.clear()

    @property
    def batch(self) -> Batch:
        """The sequences and their slots, looked up once."""
        if self._batch is None:
            self._batch = self.cache.batch(self.sequences)
        return self._batch

    @property
    def cache(self) -> KVCache:
        """The KVCache; raises ClosedError before the first tokens."""
        if self.kv is None:
            raise ClosedError("this cache holds no tokens yet; run the model once")
        return self.kv

    def clear(self, layer: int) -> None:
        """Forget a layer's rows; the sequences close with their last layer."""
        self._orders.pop(layer)
        self._readers.pop(layer, None)
        self._latest = -1
        if layer not in self._filled:
            return
        self._filled.discard(layer)
        if self._filled:
            self._truncate(layer, 0)
        else:
            _close(self.sequences)
            self._batch = None

    # ---- rows of one layer -------------------------------------------------------------------
    def tokens(self, layer: int) -> int:
        """Rows that a layer holds."""
        if layer not in self._filled:
            return 0
        slot = self.sequences[0].slot
        return int(self.cache.lengths[slot, layer] - self.cache.starts[slot, layer])

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write rows behind a layer's last one. Pages of all layers are mapped at the first layer
        of a step, so that a budget that does not reach stops the step before it changes anything.
        """
        self.settle(layer)
        if layer <= self._latest or self._latest < 0:
            self.cache.advance()
            self.cache.extend(self.batch, key.shape[2])
        self._latest = layer
        self.cache.append(layer, key, value, self.batch)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, [B, Hkv, tokens, D], zero copy."""
        self.settle(layer)
        cache, slots = self.cache, [sequence.slot for sequence in self.sequences]
        return cache.tensor(slots, layer, 0), cache.tensor(slots, layer, 1)

    def reader(self, layer: int) -> Reader:
        """What reads a layer under the selector."""
        found = self._readers.get(layer)
        if found is None:
            assert self.sparse is not None
            found = self._readers[layer] = Reader(self, self.sparse, layer)
        return found

    def excuse_readers(self) -> None:
        """No layer's reader waits for an attention any more."""
        for reader in self._readers.values():
            reader.excuse()

    def keep_last(self, layer: int, tokens: int) -> None:
        """Say that only a layer's last `tokens` rows will be read again. Pages in front of them
        return at a later step, never under a live view."""
        start = int(self.cache.lengths[self.sequences[0].slot, layer]) - tokens
        for sequence in self.sequences:
            sequence.release_before(layer, start)

    def drop_last(self, layer: int, tokens: int) -> None:
        """Take a layer's last `tokens` rows back (speculative rollback)."""
        self.settle(layer)
        self._truncate(layer, int(self.cache.lengths[self.sequences[0].slot, layer]) - tokens)

    def replace(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put other rows in a layer's place; they may be views of the present ones."""
        check_rows(layer, key, value)
        if key.shape[0] != len(self.sequences) or not self._fits(self.cache, key):
            raise LayoutError(
                f"layer {layer} cannot take rows {tuple(key.shape)} in {key.dtype}: it holds "
                f"{len(self.sequences)} sequences of {self.cache.layout}"
            )
        key, value, held = key.clone(), value.clone(), self.tokens(layer)
        # Down to the first row still mapped, not to 0: what a window released stays released.
        self._truncate(layer, int(self.cache.starts[self.sequences[0].slot, layer]))
        try:
            self.cache.append(layer, key, value, self.batch)
        except VattnError:
            # Nothing was written: the old rows are still there.
            self.cache.commit(self.batch, held, layer)
            raise

    # ---- batch operations --------------------------------------------------------------------
    def reorder(self, layer: int, order: list[int]) -> None:
        """Let batch row i of a layer hold what row `order[i]` holds; `order` may have any length.

        Applied to whole sequences as soon as every layer was asked the same.
        """
        if layer not in self._filled:
            return
        whole = self._orders.ask(layer, order, len(self._filled))
        if whole is not None:
            self._move(whole)

    def settle(self, layer: int) -> None:
        """Apply to one layer alone what was asked of it alone: its rows are copied."""
        order = self._orders.pop(layer)
        if order is None:
            return
        if len(order) != len(self.sequences):
            raise UnsupportedError(
                f"layer {layer} was resized to a batch of {len(order)} on its own; call "
                "batch_repeat_interleave or batch_select_indices on the cache"
            )
        index = torch.tensor(order)
        key, value = self.rows(layer)
        self.replace(layer, key[index], value[index])

    def _move(self, order: list[int]) -> None:
        here = list(range(len(self.sequences)))
        if order == here:
            return
        if len(order) == len(here):
            self.cache.reorder(self.batch, order)
            return
        old = list(self.sequences)
        self._hold(self.cache.select(old, order))
        _close(old)

    # ---- rows written by compiled graphs (zero-backed) -----------------------------------------
    def reach(self, tokens: int) -> None:
        """Map pages so that every sequence holds `tokens` rows, all zero until they are written."""
        held = int(self.cache.tokens[self.sequences[0].slot])
        if tokens < held:
            for sequence in self.sequences:
                sequence.truncate(tokens)
        elif tokens > held:
            self.cache.advance()
            self.cache.extend(self.batch, tokens - held)
            self.cache.commit(self.batch, tokens - held)

    def static_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, [B, Hkv, max_tokens, D]: mapped rows, and zeros behind them."""
        view = self.cache.static_view(self.sequences)
        return view.k[layer], view.v[layer]

    # ---- copies ------------------------------------------------------------------------------
    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        twin = Store(self.options)
        memo[id(self)] = twin
        twin.kv, twin._owner = self.kv, self._owner
        twin.sparse, twin.tiers = self.sparse, self.tiers
        twin.kept = copy.deepcopy(self.kept, memo)
        twin.latents = copy.deepcopy(self.latents, memo)
        twin.layers, twin._filled = self.layers, set(self._filled)
        twin._orders = copy.deepcopy(self._orders, memo)
        if self.sequences and self.options.zero_backed:
            # Compiled graphs write where they please: their pages are never shared.
            twin._hold(self.cache.open_batch(len(self.sequences)))
        elif self.sequences:
            twin._hold(self.cache.select(self.sequences, range(len(self.sequences))))
        return twin

    @staticmethod
    def _fits(kv: KVCache, rows: Tensor) -> bool:
        return fits(rows, kv.layout.kv_heads, kv.layout)

    def _hold(self, sequences: list[Sequence]) -> None:
        # In place: the finalizer holds this very list.
        self.sequences[:] = sequences
        self._batch = None

    def _truncate(self, layer: int, tokens: int) -> None:
        for sequence in self.sequences:
            sequence.truncate(tokens, layer)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CopyRefused(
            "a vattn cache cannot be pickled: its rows are mapped memory of this process. "
            "Save clones of layer.keys and layer.values, or copy.deepcopy the cache to fork it"
        )


def check_rows(layer: int, key: Tensor, value: Tensor) -> None:
    if key.dim() != 4 or value.dim() != 4:
        raise LayoutError(
            f"layer {layer} got K {tuple(key.shape)} and V {tuple(value.shape)}; "
            "rows come as [batch, kv_heads, tokens, head_dim]"
        )
    if key.shape != value.shape or key.dtype != value.dtype:
        raise UnsupportedError(
            f"layer {layer} has K {tuple(key.shape)} in {key.dtype} but V {tuple(value.shape)} in "
            f"{value.dtype}: K and V of different head sizes or types (multi-head latent "
            "attention) are not served; use transformers' DynamicCache for this model"
        )
    if key.dtype not in DTYPES or key.device.type != "cpu":
        raise LayoutError(
            f"layer {layer} got {key.dtype} on {key.device}; this cache holds "
            f"{', '.join(sorted(DTYPES.values()))} on the CPU"
        )


def _close(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        if not sequence.closed:
            sequence.close()
    sequences.clear()


def store_of(number: int) -> Store:
    """The living store with this id."""
    return _stores[number]
