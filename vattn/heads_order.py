"""Sequences of a `HeadCache` in another order, or as often as wanted: beam search, forks, choices.

reorder     in place: pages are remapped, only partly filled tails are copied
selected    another HeadCache with sequences of its own: rows are copied
"""

from __future__ import annotations

from .heads import HeadCache
from .narrow import NarrowRows
from .track import Track


def reorder(heads: HeadCache, order: list[int]) -> None:
    """Sequence i gets what sequence ``order[i]`` holds, in every layer; as many as there are.

    Raises:
        OutOfPages, MapLimitError, DriverError: as `KVCache.reorder`; nothing has changed.
    """
    narrowed = heads.narrowed
    table = None if narrowed is None else narrowed.share(order)
    try:
        heads.ranges.reorder(order)
    except BaseException:
        if narrowed is not None and table is not None:
            narrowed.unshare(table)
        raise
    if narrowed is not None and table is not None:
        narrowed.adopt(table, order)
    heads.tokens[:] = heads.tokens[:, order]
    for layer in range(heads.layers):
        heads.tracks[layer] = _tracks(heads, layer, order)


def selected(heads: HeadCache, order: list[int]) -> HeadCache:
    """A new HeadCache over the same pool, whose sequence i holds what ``order[i]`` holds here.

    Raises:
        OutOfPages, MapLimitError, DriverError: as `HeadCache.append`; nothing is left behind.
    """
    layout = heads.layout
    twin = HeadCache(
        heads.layers,
        heads.kv_heads,
        layout.head_dim,
        layout.max_tokens,
        batch=len(order),
        dtype=layout.dtype,
        page_bytes=layout.page,
        heads_per_range=layout.kv_heads,
        pool=heads.cache.pool,
    )
    try:
        for layer in range(heads.layers):
            _copy(heads, twin, layer, order)
        if heads.narrowed is not None:
            shape = (twin.layers, twin.batch, twin.kv_heads)
            twin.narrowed = NarrowRows(twin.cache, shape, heads.narrowed.width)
            twin.narrowed.copy_of(heads.narrowed, order)
    except BaseException:
        twin.close()
        raise
    return twin


def _copy(heads: HeadCache, twin: HeadCache, layer: int, order: list[int]) -> None:
    twin.ranges.copy_of(heads.ranges, layer, order)
    twin.tokens[layer] = heads.tokens[layer, order]
    twin.tracks[layer] = _tracks(heads, layer, order)


def _tracks(heads: HeadCache, layer: int, order: list[int]) -> dict[str, Track]:
    """What lies beside the rows, in the new order."""
    longest = int(heads.lengths(layer).max())
    found = {}
    for name, track in heads.tracks[layer].items():
        rows = track.get(longest)[order]
        found[name] = Track(rows.shape[0], rows.shape[1], rows.dtype, rows.device)
        found[name].get(longest).copy_(rows)
    return found
