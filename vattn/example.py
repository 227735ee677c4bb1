"""A small cache that lives through everything, so that `vattn map` has something to draw."""

from __future__ import annotations

from typing import Literal, cast

from vattn.cache import KVCache
from vattn.layout import Layout
from vattn.picture import History
from vattn.sequence import Sequence
from vattn.show import MemoryMap, map_of

_LAYERS, _KV_HEADS, _HEAD_DIM, _MAX_TOKENS = 4, 2, 64, 1024
_WINDOW = 128


def live_through(page_bytes: int | None, rows: str | None) -> tuple[MemoryMap, History]:
    """Append, fork, share, slide, truncate, close; returns the map at the end and the history."""
    layout = Layout(
        _LAYERS,
        _KV_HEADS,
        _HEAD_DIM,
        _MAX_TOKENS,
        rows=cast("Literal['head_major', 'token_major']", rows or "head_major"),
        page_bytes=page_bytes,
    )
    points: list[tuple[float, int, int]] = []
    marks: dict[float, str] = {}

    with KVCache(layout, slots=8) as cache:

        def note(name: str) -> None:
            cache.advance()
            stats = cache.stats()
            marks[len(points)] = name
            points.append((len(points), stats.mapped_bytes, stats.used_bytes))

        first = cache.open()
        _append(cache, first, 700)
        note("append 700")
        chat = first.fork()
        _append(cache, chat, 120)
        note("fork,\nappend 120")
        answer = first.share(384)
        _append(cache, answer, 250)
        note("share 384,\nappend 250")
        sliding = cache.open()
        _append(cache, sliding, 560)
        for layer in range(0, _LAYERS, 2):
            sliding.release_before(layer, 560 - _WINDOW)
        note(f"append 560,\nwindow {_WINDOW}")
        guess = cache.open()
        _append(cache, guess, 400)
        guess.truncate(330)
        note("append 400,\ntruncate to 330")
        gone = cache.open()
        _append(cache, gone, 300)
        gone.close()
        note("append 300,\nclose")
        return map_of(cache), History("operation", points, marks=marks)


def _append(cache: KVCache, sequence: Sequence, tokens: int) -> None:
    import torch

    rows = torch.zeros(1, _KV_HEADS, tokens, _HEAD_DIM, dtype=cache.dtype)
    cache.extend([sequence], tokens)
    for layer in range(_LAYERS):
        cache.append(layer, rows, rows, [sequence])
