"""K and V of which every KV head of every layer keeps tokens of its own: what eviction works on.

    rows  0 ....... counts      0 ....... counts      0 ....... counts       any counts, no padding
          │ kept │ new │        │  kept    │ new │    │ k │ new │

The rows lie in `Ranges`, of one head each or of several. Kernels see a batch of ``batch *
kv_heads`` sequences with one KV head each: nothing of them has to know about eviction. `keep`
closes the gaps and gives the pages behind back; the addresses stay. Beside K and V lies for each
row where its token stood in the text (``positions``), and whatever else a policy tracks (`Track`):
what is kept of K is kept of these.
"""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from . import heads_attention as attention
from .allocator.errors import VattnError
from .allocator.pool import Pool
from .batch import Ints
from .cache import ALL, CopyRefused
from .device import place_of
from .kernels import stream
from .kernels.compact import as_rows, compact
from .kernels.evict import DropLeast, Lines, Rule
from .kernels.kv import KV
from .layout import Layout, LayoutError
from .narrow import NarrowRows, check_masks
from .ranges import Ranges
from .track import Track
from .usage import Usage

WEIGHTS = "log_weight"  # of the tracks


class KeepError(VattnError, ValueError):
    """Rows to keep that a head does not hold."""


class HeadCache:
    """K and V of a batch of sequences, of which each KV head of each layer holds its own tokens.

    Args:
        layers, kv_heads, head_dim: of the model.
        max_tokens: most rows of a head; address space only.
        batch: sequences.
        dtype, page_bytes: see `Layout`.
        heads_per_range: KV heads whose rows share pages: these are as many as the longest of them
            needs. By default 1 on the host, where pages are small, and all on a device, whose pages
            of 2 MiB hold 8,192 rows of one head of 128 numbers in bfloat16.
        device, budget_bytes, pool: see `KVCache`.

    Raises:
        LayoutError, ReserveError, MapLimitError, NoDeviceError: as `KVCache`.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        *,
        batch: int = 1,
        dtype: str = "bfloat16",
        page_bytes: int | None = None,
        heads_per_range: int | None = None,
        device: str | torch.device | None = None,
        budget_bytes: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        for name, value in (("layers", layers), ("kv_heads", kv_heads), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise LayoutError(f"{name} must be a positive int, got {value!r}")
        self.layers, self.kv_heads, self.batch = layers, kv_heads, batch
        if heads_per_range is None:
            heads_per_range = kv_heads if place_of(device, pool).type == "cuda" else 1
        if pool is not None and page_bytes is None:
            page_bytes = pool.page_bytes
        layout = Layout(
            1, heads_per_range, head_dim, max_tokens,
            dtype=dtype, rows="token_major", page_bytes=page_bytes,
        )  # fmt: skip
        self.ranges = Ranges(
            (layers, batch, kv_heads), layout,
            device=device, budget_bytes=budget_bytes, pool=pool,
        )  # fmt: skip
        self.cache = self.ranges.cache
        self.layout, self.device, self.dtype = layout, self.cache.device, self.cache.dtype
        self.tracks: list[dict[str, Track]] = [{} for _ in range(layers)]
        self.tokens = np.zeros((layers, batch), np.int64)  # seen, kept or not
        self.narrowed: NarrowRows | None = None  # see `narrow`
        # Of each layer what `forget_least` did last, for as long as rule and tracks stay.
        self._prepared: list[tuple[Rule, list[Lines], DropLeast] | None] = [None] * layers

    # ---- what there is -------------------------------------------------------------------------
    def lengths(self, layer: int) -> Ints:
        """Rows that each head of a layer holds, [batch, kv_heads], but for narrow ones: those that
        an evictor chooses among."""
        return self.ranges.lengths(layer).copy()

    def longest(self, layer: int) -> int:
        """Rows of the longest head."""
        return int(np.maximum.reduce(self.ranges.lengths(layer), axis=None))

    def held(self, layer: int) -> Ints:
        """Tokens that each KV head of a layer holds, narrow rows among them, [batch, kv_heads]."""
        lengths = self.lengths(layer)
        return lengths if self.narrowed is None else lengths + self.narrowed.counts(layer)

    def places(self, layer: int) -> Tensor:
        """`positions` of all that is `held`."""
        positions = self.positions(layer)
        if self.narrowed is None:
            return positions
        return self.narrowed.places(layer, positions, self.lengths(layer))

    def counts(self, layer: int) -> Tensor:
        """`lengths` as a tensor on the device."""
        return torch.from_numpy(self.lengths(layer)).to(self.device)

    def track(self, layer: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers beside the rows of a layer, [batch, kv_heads, n] with n rows of the longest
        head: 0 until they are written."""
        found = self.tracks[layer].get(name)
        if found is None:
            found = self.tracks[layer][name] = Track(self.batch, self.kv_heads, dtype, self.device)
        return found.get(self.longest(layer))

    def positions(self, layer: int) -> Tensor:
        """Where the token of each row stood in its text, [batch, kv_heads, n] int64, from 0 on; any
        number behind a range's length."""
        return self.track(layer, "position", torch.int64)

    def log_weights(self, layer: int) -> Tensor | None:
        """Log of how many tokens each row stands for, [batch, kv_heads, n]; None: one each."""
        return self.track(layer, WEIGHTS) if WEIGHTS in self.tracks[layer] else None

    def kv(self, layer: int) -> KV:
        """A layer as kernels see it: batch * kv_heads sequences of one KV head. For use within one
        call."""
        return self.ranges.kv(layer)

    def stats(self) -> Usage:
        """See `KVCache.stats`; narrow rows are counted."""
        self.ranges.settle()
        usage = self.cache.stats()
        return usage if self.narrowed is None else self.narrowed.added_to(usage)

    # ---- growing -------------------------------------------------------------------------------
    def append(self, layer: int, k: Tensor, v: Tensor, counts: Ints | None = None) -> None:
        """Write new rows [batch, kv_heads, n, head_dim] behind the old ones; of sequence b the last
        ``counts[b]`` (padding is on the left), all by default.

        Raises:
            LayoutError, OutOfRange, OutOfPages, MapLimitError, DriverError: as `KVCache.append`;
            no range has changed.
        """
        if k.dim() != 4 or k.shape[:2] != (self.batch, self.kv_heads) or v.shape != k.shape:
            raise LayoutError(
                f"k and v must be [{self.batch}, {self.kv_heads}, n, {self.layout.head_dim}], got "
                f"{tuple(k.shape)} and {tuple(v.shape)}"
            )
        new, before = k.shape[2], self.counts(layer)
        added = None if counts is None else self._added(counts, new)
        self.ranges.append(layer, k, v, added)
        positions, at = self.positions(layer), torch.arange(new, device=self.device)
        even = [(slice(None), new)]
        uneven = [] if added is None else [(slice(b, b + 1), n) for b, n in enumerate(added)]
        for some, n in uneven or even:
            start = torch.from_numpy(self.tokens[layer, some]).to(self.device)[:, None, None]
            rows = before[some][..., None] + at[:n]
            positions[some].scatter_(2, rows, (start + at[:n]).expand_as(rows))
        self.tokens[layer] += new if added is None else added

    def _added(self, counts: Ints, new: int) -> Ints | None:
        """New tokens of each sequence; None where all get ``new``."""
        added = np.asarray(counts)
        wrong = added.shape != (self.batch,) or added.dtype.kind not in "iu"
        if wrong or added.min() < 0 or added.max() > new:
            raise LayoutError(f"counts must be {self.batch} ints from 0 to {new}, got {counts}")
        return None if added.min() == new else added.astype(np.int64)

    # ---- reading -------------------------------------------------------------------------------
    def attend_lse(
        self, query: Tensor, layer: int, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend to all rows of a layer: query [batch, Hq, L, head_dim], the last L tokens of each
        sequence, causally; returns the same shape, and the log-sum-exp [batch, Hq, L].

        Raises:
            LayoutError: the query does not suit the cache.
        """
        out, lse = attention.attend_lse(self, self.rows_of(query), layer, scale)
        return out.view(query.shape), lse.view(query.shape[:3])

    def attend_logits(
        self, query: Tensor, layer: int, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`attend_lse`, and `logits`: by one reading of K where the kernel can tell them."""
        out, lse, logits = attention.attend_logits(self, self.rows_of(query), layer, scale)
        found = logits.unflatten(0, (self.batch, self.kv_heads))
        return out.view(query.shape), lse.view(query.shape[:3]), found

    def logits(self, query: Tensor, layer: int, scale: float | None = None) -> Tensor:
        """scale * q k of all rows but narrow ones, [batch, kv_heads, G * L, n] float32, n those of
        the longest range; -inf where a query sees nothing. A row that stands for several tokens has
        the log of their number added."""
        found = attention.logits(self, self.rows_of(query), layer, scale)
        return found.unflatten(0, (self.batch, self.kv_heads))

    def rows_of(self, query: Tensor) -> Tensor:
        """A query [batch, Hq, L, D] as one of the ranges, [batch * kv_heads, Hq / kv_heads, L, D].

        Raises:
            LayoutError: it does not suit the cache.
        """
        if query.dim() != 4 or query.shape[0] != self.batch or query.shape[1] % self.kv_heads:
            raise LayoutError(
                f"query is {tuple(query.shape)}: must be [{self.batch}, a multiple of "
                f"{self.kv_heads} heads, tokens, {self.layout.head_dim}]"
            )
        if query.dtype != self.dtype or query.device != self.device:
            raise LayoutError(
                f"query is {query.dtype} on {query.device}, the cache {self.dtype} on {self.device}"
            )
        if query.requires_grad and torch.is_grad_enabled():
            raise LayoutError("a HeadCache has no gradients: call it under torch.no_grad()")
        return query.unflatten(1, (self.kv_heads, -1)).flatten(0, 1)

    def rows(self, layer: int) -> stream.Rows:
        """A layer as the stream kernel takes it. For use within one call."""
        return self.ranges.rows(layer)

    def narrow_rows(self, layer: int) -> NarrowRows | None:
        """The narrow rows, where this layer has any."""
        narrowed = self.narrowed
        return None if narrowed is None or narrowed.channels(layer) is None else narrowed

    def check_last(self, layer: int, queries: int) -> None:
        """Raise LayoutError unless every range holds as many rows as there are queries."""
        shortest = int(np.minimum.reduce(self.ranges.lengths(layer), axis=None))
        if shortest < queries:
            raise LayoutError(
                f"a head of layer {layer} holds {shortest} rows: fewer than the {queries} "
                "queries, which are its last tokens"
            )

    # ---- shrinking -----------------------------------------------------------------------------
    def keep(self, layer: int, rows: Tensor, counts: Tensor) -> None:
        """Keep of each range the rows [batch, kv_heads, m] (int64, ascending, the first ``counts``
        [batch, kv_heads] of them) and close the gaps; `release` gives the pages behind back. Pages
        that another sequence shares are copied first.

        Raises:
            KeepError: rows that do not ascend or are not there. OutOfPages, MapLimitError,
            DriverError: a shared page cannot be copied. Nothing has changed.
        """
        shape = (self.batch, self.kv_heads)
        if rows.dim() != 3 or rows.shape[:2] != shape or counts.shape != shape:
            raise KeepError(
                f"rows to keep are {tuple(rows.shape)} and their counts {tuple(counts.shape)}: "
                f"must be {(*shape, 'm')} and {shape}"
            )
        self.ranges.unshare(layer)
        try:
            compact(self.kv(layer), rows.flatten(0, 1)[:, None], counts.view(-1, 1))
        except ValueError as error:
            raise KeepError(str(error)) from error
        longest = self.longest(layer)
        for track in self.tracks[layer].values():
            track.get(longest)
            track.keep(rows.clamp(0, max(0, longest - 1)))
            track.clear_behind(counts)
        self.ranges.cut(layer, counts.cpu().numpy())

    def narrow(self, layer: int, keep: Tensor, old: Tensor, channels: Tensor) -> None:
        """`keep` the rows of a mask [batch, kv_heads, n], those of ``old`` as narrow rows: of K
        only the ``channels`` [batch, kv_heads, D'] of their head (int64, ascending), V whole. A
        layer that has narrow rows keeps its channels, and them until it is cleared. While this
        runs, both widths are there; `release` then gives pages back.

        Raises:
            KeepError: masks or channels that cannot be. LayoutError: other layers have narrow rows
            of another width. OutOfPages, OutOfRange, ReserveError, MapLimitError, DriverError:
            there is no room. Nothing has changed.
        """
        try:
            check_masks(keep, old, channels, self.counts(layer), self.layout.head_dim)
        except ValueError as error:
            raise KeepError(str(error)) from error
        stays = as_rows(keep & ~old)
        if not bool(old.any()):
            self.keep(layer, *stays)
            return
        if WEIGHTS in self.tracks[layer]:
            raise KeepError("rows that stand for several tokens cannot be narrow")
        if self.narrowed is None:
            shape = (self.layers, self.batch, self.kv_heads)
            self.narrowed = NarrowRows(self.cache, shape, channels.shape[2])
        narrowed = self.narrowed
        if narrowed.width != channels.shape[2]:
            raise LayoutError(
                f"narrow rows of {channels.shape[2]} channels beside those of {narrowed.width}: "
                "all layers of a cache have one width"
            )
        narrowed.take(layer, self.kv(layer), *as_rows(old), self.positions(layer), channels)
        try:
            self.keep(layer, *stays)
        except BaseException:
            narrowed.untake(layer)
            raise
        narrowed.count(layer, channels)

    def replace(
        self, layer: int, rows: Tensor, counts: Tensor, k: Tensor, v: Tensor, logs: Tensor | None
    ) -> None:
        """After `keep`: the rows kept hold what k and v [batch, kv_heads, n, head_dim] have in the
        places they came from. ``logs`` [batch, kv_heads, n]: log of how many tokens each stands
        for.

        Raises:
            KeepError: logs for a layer with narrow rows; counts that are not those of the heads.
            OutOfPages, MapLimitError, DriverError: a shared page cannot be copied. Nothing has
            changed.
        """
        if logs is not None and self.narrow_rows(layer) is not None:
            raise KeepError(f"layer {layer} has narrow rows: none can stand for several tokens")
        shape, held = (self.batch, self.kv_heads), self.ranges.lengths(layer)
        fits = rows.shape[:2] == k.shape[:2] == v.shape[:2] == shape == counts.shape
        if not fits or (counts.cpu().numpy() != held).any():
            raise KeepError(
                f"counts are {counts.tolist()}, of rows {tuple(rows.shape)} in k "
                f"{tuple(k.shape)}: must be what the heads hold, {held.tolist()}"
            )
        self.ranges.unshare(layer)
        inside = torch.arange(rows.shape[2], device=self.device) < counts[..., None]
        sequence, head, row = inside.nonzero().T
        units, source = self.ranges.units(layer)[sequence, head], rows[sequence, head, row]
        for side, new in ((self.ranges.key, k), (self.ranges.value, v)):
            side[units, 0, row] = new[sequence, head, source].to(self.dtype)
        if logs is not None:
            self.track(layer, WEIGHTS).copy_(logs.gather(2, rows).masked_fill(~inside, 0.0))

    def forget_one(self, layer: int, rows: Tensor, *, trusted: bool = False) -> None:
        """`forget` one row of each head, rows [batch, kv_heads] int64, -1 for none: the usual
        step. ``trusted`` rows are there, one of each head: a device need not be waited for.

        Raises:
            KeepError: a head holds no such row. Otherwise as `forget`.
        """
        longest = self.longest(layer)
        self.ranges.unshare(layer)
        beside = [track.lines(longest) for track in self.tracks[layer].values()]
        try:
            self.ranges.drop(layer, rows, beside, trusted=trusted)
        except ValueError as error:
            raise KeepError(str(error)) from error

    def forget_least(self, layer: int, rule: Rule, score: str, draft: int = 0) -> int | None:
        """`forget_one` of the rows that a rule names by a track of scores, choice and all by one
        compiled call: a decode step at its budget. Returns how many went; None, and no row has
        moved, where it cannot be: on a device or without numba, where pages are shared, and where
        `DropLeast` declines.
        """
        tracks, longest = self.tracks[layer], self.longest(layer)
        if score not in tracks or not stream.serves(self.ranges.key) or self.ranges.shared(layer):
            return None
        beside = [track.lines(longest) for track in tracks.values()]
        known = self._prepared[layer]
        if known is None or known[0] is not rule or known[1] != beside:
            known = self._prepared[layer] = rule, beside, self._prepare(layer, rule, score, beside)
        gone = known[2](draft)
        if gone > 0:
            self.ranges.dropped(layer)
        return None if gone < 0 else gone

    def _prepare(self, layer: int, rule: Rule, score: str, beside: list[Lines]) -> DropLeast:
        named = dict(zip(self.tracks[layer], beside, strict=True))
        shape = self.batch, self.kv_heads
        rows = self.longest(layer)  # a track that has fewer grows, and all of this is made anew
        scores, positions = (
            named[name].rows[:, :rows, 0].unflatten(0, shape) for name in (score, "position")
        )
        lengths, lines = self.ranges.lengths(layer), [*self.ranges.lines(layer), *beside]
        return DropLeast(rule, lengths, self.tokens[layer], scores, positions, lines)

    def forget(self, layer: int, drop: Tensor) -> None:
        """Drop the rows of a mask [batch, kv_heads, n]: the last rows take their places. What a
        decode step does at its budget: as many rows move as go, and no page is mapped or unmapped,
        but for copies of pages that another sequence shares.

        Raises:
            KeepError: the mask names rows that a range does not hold. OutOfPages, MapLimitError,
            DriverError: a shared page cannot be copied. Nothing has changed.
        """
        counts = self.counts(layer)
        at = torch.arange(drop.shape[2], device=self.device)
        fits = drop.dtype == torch.bool and drop.shape == (*counts.shape, int(counts.max()))
        if not fits or bool((drop & (at >= counts[..., None])).any()):
            raise KeepError(
                f"rows to forget are a mask of {(*counts.shape, int(counts.max()))} within "
                f"{counts.tolist()}, got {drop.dtype} {tuple(drop.shape)}"
            )
        left = counts - drop.sum(-1)
        # As many rows stay behind the new end as go before it; both in ascending order.
        stays = ~drop & (at >= left[..., None]) & (at < counts[..., None])
        sequence, head, row = (drop & (at < left[..., None])).nonzero().T
        source = stays.nonzero()[:, 2]
        self.ranges.unshare(layer)
        units = self.ranges.units(layer)[sequence, head]
        for side in (self.ranges.key, self.ranges.value):
            side[units, 0, row] = side[units, 0, source]
        for track in self.tracks[layer].values():
            track.get(drop.shape[2])
            track.move(sequence, head, row, source)
            track.clear_behind(left)
        self.ranges.cut(layer, left.cpu().numpy())

    def crop(self, layer: int, tokens: int) -> None:
        """Forget the last ``tokens`` tokens of the text (speculative rollback), those of them that
        are still held; what was evicted stays evicted.

        Raises:
            KeepError: negative, or more than a sequence has seen, or some of them are narrow.
            Otherwise as `forget`; nothing has changed.
        """
        self.check_crop(layer, tokens)
        first = torch.from_numpy(self.tokens[layer] - tokens).to(self.device)[:, None, None]
        counts, positions = self.counts(layer), self.positions(layer)
        at = torch.arange(positions.shape[2], device=self.device)
        self.forget(layer, (positions >= first) & (at < counts[..., None]))
        self.tokens[layer] -= tokens

    def check_crop(self, layer: int, tokens: int) -> None:
        """Raise KeepError where `crop` would."""
        seen = int(self.tokens[layer].min())
        if not 0 <= tokens <= seen:
            raise KeepError(f"cannot crop {tokens} tokens: a sequence has seen {seen}")
        first = torch.from_numpy(self.tokens[layer] - tokens).to(self.device)
        if self.narrowed is not None and self.narrowed.holds_from(layer, first):
            raise KeepError(
                f"cannot crop {tokens} tokens: some of them are narrow rows of layer {layer}; "
                "clear it and read the text again"
            )

    def clear(self, layer: int) -> None:
        """Forget a layer's rows."""
        self.ranges.cut(layer, np.zeros((self.batch, self.kv_heads), np.int64))
        self.tracks[layer].clear()
        self.tokens[layer] = 0
        if self.narrowed is not None:
            self.narrowed.clear(layer)

    def release(self) -> int:
        """Give pages without a row back to the pool; returns how many went."""
        gone = self.ranges.reclaim(ALL)
        if self.narrowed is not None:
            gone += self.narrowed.reclaim(ALL)
        self.cache.advance()
        return gone

    def close(self) -> None:
        """Give everything back. Idempotent."""
        try:
            if self.narrowed is not None:
                self.narrowed.close()
        finally:
            self.cache.close()

    def __enter__(self) -> HeadCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CopyRefused(
            "a HeadCache cannot be copied or pickled: its rows are mapped memory of this process"
        )
