"""The memory of a `HeadCache`: ranges of one slot of a `KVCache` each, of one KV head or several.

    one head        row i at  i                    │ h0 │ h0 │ h0 │ ...
    several         row i of head h at  i, h       │ h0 h1 h2 │ h0 h1 h2 │ ...

    slot  (layer * batch + sequence) * groups + group of heads

A range reaches as far as its longest head. Heads of a range that hold equally many rows waste
nothing, and a page ends after fewer tokens: a device's page of 2 MiB holds 8,192 rows of one head
of 128 numbers in bfloat16, and 1,024 tokens of eight heads.

Kernels see sequences of one KV head in any case. They find one by its *unit*, its place in an axis
whose step divides both the step of slots and that of heads:

    reserved  [slots, heads, S, D]  ──►  [units, 1, S, D],  unit = (slot * step + head * D) / gcd
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

from .allocator.errors import ClosedError
from .allocator.pool import Pool
from .batch import Batch, Ints
from .cache import KVCache
from .device import cannot_launch
from .kernels import stream
from .kernels.contract import plain_rows
from .kernels.evict import Lines, drop, scatter
from .kernels.kv import KV
from .layout import Layout, LayoutError
from .reclaimer import enlist

SPARE = 1  # rows of a range that stay counted when a step has dropped them


class Ranges:
    """Rows of each KV head of each layer, and how many there are.

    Args:
        shape: layers, sequences, KV heads.
        layout: of one range: a layer, its heads, token by token.
        device, budget_bytes, pool: see `KVCache`.

    Raises:
        LayoutError: a layer's heads are no multiple of a range's. Otherwise as `KVCache`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        layout: Layout,
        *,
        device: str | torch.device | None = None,
        budget_bytes: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.layers, self.batch, self.kv_heads = shape
        self.heads = layout.kv_heads  # of a range
        if self.kv_heads % self.heads:
            raise LayoutError(
                f"heads_per_range is {self.heads}: must divide the {self.kv_heads} KV heads"
            )
        self.groups, self.layout = self.kv_heads // self.heads, layout
        many = self.batch * self.groups  # ranges of a layer
        self.cache = KVCache(
            layout, slots=self.layers * many, device=device, budget_bytes=budget_bytes, pool=pool
        )
        try:
            every = self.cache.open_batch(self.layers * many)
            parts = range(0, len(every), many)
            self._batches = [self.cache.batch(every[at : at + many]) for at in parts]
            self._every = self.cache.batch(every)
            self._sides = self.cache.reserved(0)
        except BaseException:
            self.cache.close()
            raise
        self._lengths = np.zeros(shape, np.int64)
        enlist(self.cache.pool, self)
        step, dim = self._sides[0].stride(0), layout.head_dim
        each = gcd(step, dim) if self.heads > 1 else step
        slots = np.array([part.slots for part in self._batches]).reshape(*shape[:2], -1)
        head = np.arange(self.heads, dtype=np.int64)
        units = (slots[..., None] * step + head * dim) // each
        self._units: Ints = units.reshape(shape)
        self._where = torch.from_numpy(self._units).to(self.cache.device)
        last = int(self._units.max()) + 1
        with torch.inference_mode(False):  # later steps write to them
            self.key, self.value = (
                side.as_strided(
                    (last, 1, layout.max_tokens, dim), (each, each, self.row_step, 1),
                    side.storage_offset(),
                )
                for side in self._sides
            )  # fmt: skip
            sides = self.key[:, 0], self.value[:, 0]
        self._lines = [[Lines(side, where) for side in sides] for where in self._where]
        step_bytes = each * layout.item_bytes
        self._places = [side.data_ptr() + self._units * step_bytes for side in self._sides]

    @property
    def row_step(self) -> int:
        """Elements from one row of a head to its next."""
        return self.heads * self.layout.head_dim

    # ---- what there is -------------------------------------------------------------------------
    def lengths(self, layer: int) -> Ints:
        """Rows of each head, [batch, kv_heads], also of a closed cache: not to be written to."""
        if not 0 <= layer < self.layers:
            raise LayoutError(f"layer {layer} does not exist: the cache has {self.layers} layers")
        found: Ints = self._lengths[layer]
        return found

    def units(self, layer: int) -> Tensor:
        """Where each head lies in `key` and `value`, [batch, kv_heads] int64."""
        return self._where[layer]

    def kv(self, layer: int) -> KV:
        """A layer as kernels see it: batch * kv_heads sequences of one KV head. For use within one
        call."""
        self.check_open()
        lengths = torch.from_numpy(self.lengths(layer).ravel().copy()).to(self.cache.device)
        return KV(self.key, self.value, lengths, slots=self._where[layer].flatten())

    def rows(self, layer: int) -> stream.Rows:
        """A layer as the stream kernel takes it. For use within one call."""
        self.check_open()
        lengths = self.lengths(layer).ravel()
        k, v = (side[layer].ravel() for side in self._places)
        return stream.Rows(k, v, lengths, 1, 0, self.row_step * self.layout.item_bytes, keep=self)

    def view(self, layer: int, side: int, tokens: int) -> Tensor:
        """K (0) or V (1) of a layer whose heads all hold ``tokens`` rows, [batch, kv_heads, tokens,
        head_dim]. Keeps its pages mapped; a copy where 1 < heads per range < KV heads: not to be
        written to there.

        Raises OutOfRange where they do not hold as many.
        """
        slots = self._of(layer).slots.tolist()
        found = self.cache.tensor(slots, 0, side, span=(0, tokens))
        return found.unflatten(0, (self.batch, self.groups)).flatten(1, 2)

    # ---- writing -------------------------------------------------------------------------------
    def append(self, layer: int, k: Tensor, v: Tensor, added: Ints | None = None) -> None:
        """Write the last ``added`` [batch] of rows k and v [batch, kv_heads, n, head_dim], all by
        default, behind those of each head.

        Raises:
            LayoutError, OutOfRange, OutOfPages, MapLimitError, DriverError: as `KVCache.append`;
            nothing has changed.
        """
        n, before = k.shape[2], self.lengths(layer)
        self.cache.check_rows(k, v, (self.batch, self.kv_heads, n))
        ends = before + (n if added is None else added[:, None])
        self.reach(layer, before, ends)
        k, v, low = k.detach(), v.detach(), before.item(0)
        if added is not None:
            self._write_each(layer, before, added, k, v)
        elif bool((before == low).all()):
            pick = self._of(layer).pick
            for side, new in zip(self._sides, (k, v), strict=True):
                rows = side[pick, :, low : low + n]
                rows.copy_(new.reshape(rows.shape))
        elif n == 1 and stream.serves(self.key):
            self._write_one(layer, before, k, v)
        elif self.key.is_cuda and not cannot_launch(k):
            self._launch(layer, k, v)
        else:
            self._write_each(layer, before, np.full(self.batch, n), k, v)
        self.hold(layer, ends)

    def copy_of(self, other: Ranges, layer: int, order: list[int]) -> None:
        """Hold the rows of the sequences ``order`` of another; this layer is empty.

        Raises:
            OutOfPages, MapLimitError, DriverError: nothing has changed.
        """
        other.check_open()
        ends = other.lengths(layer)[order]
        self.reach(layer, np.zeros_like(ends), ends)
        for (b, h), many in np.ndenumerate(ends):
            source, target = other._units[layer, order[b], h], self._units[layer, b, h]
            self.key[target, 0, :many] = other.key[source, 0, :many]
            self.value[target, 0, :many] = other.value[source, 0, :many]
        self.hold(layer, ends)

    def reach(self, layer: int, first: Ints, ends: Ints) -> None:
        """Make the rows ``first .. ends`` [batch, kv_heads] of each head ready to be written.

        Raises:
            OutOfPages, OutOfRange, MapLimitError, DriverError: no row has changed.
        """
        self.cache.make_writable(self._of(layer), self._least(first), self._most(ends))

    def hold(self, layer: int, ends: Ints) -> None:
        """Count so many rows of each head, [batch, kv_heads]: those that were written."""
        self.cache.hold(self._of(layer), self._most(ends))
        self._lengths[layer] = ends

    def drop(self, layer: int, rows: Tensor, beside: list[Lines], *, trusted: bool = False) -> None:
        """Drop one row of each head and what lies ``beside`` it, see `kernels.evict.drop`: the last
        takes its place. Its page stays counted for the row that comes with the next step.

        Raises:
            ValueError: a head has no such row. Nothing has changed.
        """
        self.check_open()
        drop([*self._lines[layer], *beside], rows, self._lengths[layer], trusted=trusted)
        self.dropped(layer)

    def dropped(self, layer: int) -> None:
        """A row of some heads is gone, and ``lengths`` has been written to."""
        pick = self._batches[layer].pick
        if np.logical_or.reduce(self.cache.tokens[pick] > self._most(self._lengths[layer]) + SPARE):
            self.cut(layer, self._lengths[layer])

    def lines(self, layer: int) -> list[Lines]:
        """K and V as `kernels.evict.drop` moves rows in them."""
        return self._lines[layer]

    def shared(self, layer: int) -> bool:
        """Whether another sequence may share pages of this layer."""
        reach = self.cache.arena.shared_to[self._of(layer).pick]
        return bool(np.logical_or.reduce(reach))

    def cut(self, layer: int, ends: Ints) -> None:
        """Count fewer rows; pages stay mapped until `KVCache.reclaim`."""
        self.cache.truncate_batch(self._of(layer), self._most(ends))
        self._lengths[layer] = ends

    def settle(self) -> None:
        """Count no row but those that there are, in every layer."""
        self.check_open()
        most, slots = self._most(self._lengths), self._every.slots
        tokens = self.cache.tokens[slots]
        # Not where rows are on their way.
        spare = ((tokens > most) & (self.cache.promised[slots] <= tokens)).nonzero()[0]
        if len(spare):
            some = [self._every.sequences[i] for i in spare.tolist()]
            self.cache.truncate_batch(some, most[spare])

    def reclaim(self, pages: int) -> int:
        """Unmap up to ``pages`` pages without a row; returns how many went."""
        if self.cache.closed:
            return 0
        self.settle()
        return self.cache.reclaim(pages)

    def unshare(self, layer: int) -> None:
        """See `KVCache.unshare`."""
        self.cache.unshare(self._of(layer))

    def reorder(self, order: list[int]) -> None:
        """Sequence i gets what sequence ``order[i]`` holds: pages are remapped.

        Raises:
            OutOfPages, MapLimitError, DriverError: as `KVCache.reorder`; nothing has changed.
        """
        self.settle()
        slots = np.arange(self.cache.slots).reshape(self.layers, self.batch, self.groups)
        self.cache.reorder(self.cache.sequences, slots[:, order].ravel().tolist())
        self._lengths[:] = self._lengths[:, order]

    # ---- checks --------------------------------------------------------------------------------
    def check_open(self) -> None:
        """Raise ClosedError where the rows are gone, or the parent's of this process."""
        if self.cache.closed or self.cache.arena.turn.foreign:
            raise ClosedError(
                "this cache is closed, or belongs to the process that forked this one; make a new "
                "HeadCache"
            )

    def check_laws(self) -> None:
        """Assert every law. For tests."""
        self.cache.check()
        for layer, batch in enumerate(self._batches):
            spare = self.cache.tokens[batch.slots] - self._most(self._lengths[layer])
            assert bool(((spare >= 0) & (spare <= SPARE)).all())

    # ---- inside --------------------------------------------------------------------------------
    def _of(self, layer: int) -> Batch:
        self.check_open()
        return self.cache.batch(self._batches[layer])

    def _most(self, lengths: Ints) -> Ints:
        """The longest head of each range."""
        if self.heads == 1:
            return lengths.reshape(-1)
        return np.maximum.reduce(lengths.reshape(-1, self.heads), axis=1)

    def _least(self, lengths: Ints) -> Ints:
        """The shortest head of each range."""
        if self.heads == 1:
            return lengths.reshape(-1)
        return np.minimum.reduce(lengths.reshape(-1, self.heads), axis=1)

    def _write_each(self, layer: int, before: Ints, added: Ints, k: Tensor, v: Tensor) -> None:
        """Head by head."""
        for (b, h), at in np.ndenumerate(before):
            unit, many = self._units[layer, b, h], added.item(b)
            for side, new in ((self.key, k), (self.value, v)):
                side[unit, 0, at : at + many] = new[b, h, new.shape[2] - many :]

    def _write_one(self, layer: int, before: Ints, k: Tensor, v: Tensor) -> None:
        """A row of each head, in compiled loops."""
        size = self.layout.head_dim * self.layout.item_bytes
        at = before * (self.row_step * self.layout.item_bytes)
        for place, new in zip(self._places, (k, v), strict=True):
            rows = plain_rows(new.resolve_neg())
            scatter(rows, np.ascontiguousarray(place[layer] + at), size)

    def _launch(self, layer: int, k: Tensor, v: Tensor) -> None:
        """As many rows of every head, by one launch of `vattn.kernels.append`."""
        from .kernels.append import append

        keys, values = (plain_rows(x.resolve_neg()).flatten(0, 1)[:, None] for x in (k, v))
        append(keys, values, self.kv(layer))
