"""What tests of evictors share beside `tests.evictor_cases`: which calls evict, and what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.evictor_cases import (
    Call,
    Run,
    Text,
    any_ranges,
    assert_best,
    held,
    text,
)
from vattn.eviction import Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache

# New tokens at a time: a step that drops one, one that drops several, and a further prompt.
FRESH = [1, 3, 20]
BUDGET = 40
Score = Callable[[Text, Call], Tensor]


def written(seed: int, fresh: int = 1, **options: Any) -> Text:
    return text(seed, fresh=fresh, steps={1: 22, 3: 8, 20: 2}[fresh], **options)


def evictions(done: Run, evictor: Evictor, seed: int) -> Iterator[tuple[Call, bool, str]]:
    """The calls, whether each is one that evicts, and what to say of it."""
    last = [0] * done.text.layers  # where a layer's last prompt ended
    for call in done.calls:
        note = f"seed {seed}, layer {call.layer}, tokens {call.start} to {call.stop} "
        if call.prompt:
            last[call.layer] = call.stop
            yield call, True, note
            continue
        first, behind = call.start - last[call.layer], call.stop - last[call.layer]
        yield call, evictor.decodes and first // evictor.every < behind // evictor.every, note


def ends(call: Call, sink: int, recent: int) -> Tensor:
    """[T] bool: the first and the last tokens so far, and those that may be taken back."""
    return (torch.arange(len(call.age)) < sink) | (call.since < recent)


def check(seed: int, done: Run, evictor: Evictor, budget: int, score: Score, recent: int) -> None:
    """Every eviction keeps the best by ``score``; no other call drops anything."""
    gone = 0
    for call, now, note in evictions(done, evictor, seed):
        if not now:
            assert torch.equal(call.before, call.after), note
            continue
        forced = ends(call, evictor.sink_tokens, recent)
        counts = torch.full(call.before.shape[:2], budget + call.draft)
        assert_best(call.before, call.after, score(done.text, call), forced, counts, note)
        gone += int((call.before & ~call.after).sum())
    assert gone > 0, "nothing was evicted: the test says nothing"


def assert_same(mine: Run, other: Run, note: str, layer: int | None = None) -> None:
    """Two runs keep the same tokens; or, where rows in another order round otherwise, as many that
    are worth the same."""
    for a, b in zip(mine.calls, other.calls, strict=True):
        if layer not in (None, a.layer) or torch.equal(a.after, b.after):
            continue
        where = f"{note}, layer {a.layer}, tokens to {a.stop}"
        assert torch.equal(a.after.sum(-1), b.after.sum(-1)), where
        torch.testing.assert_close(a.score.sum(-1), b.score.sum(-1), rtol=1e-3, atol=0, msg=where)


def played(
    text: Text,
    evictor: Evictor,
    outputs: list[Tensor] | None = None,
    hidden: Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
) -> list[Tensor]:
    """What each layer keeps in the end, [B, H, T] bool, by places in each sequence. ``outputs`` are
    weights behind attention, ``hidden`` is [layers, B, T, width]; of sequence b the first tokens of
    the prompt are padding, but for ``lengths[b]``."""
    batch, heads, tokens, dim = text.key[0].shape
    with HeadCache(
        text.layers,
        heads,
        dim,
        tokens,
        batch=batch,
        dtype="float32",
        device="cpu",
        heads_per_range=any_ranges(heads),
    ) as cache:
        eviction = Eviction(cache, evictor, outputs)
        for start, stop in text.spans():
            padded = lengths is not None and not start
            counts = np.array(lengths) if padded else None
            for i in range(text.layers):
                query, key, value = (
                    side[i][:, :, start:stop].contiguous()
                    for side in (text.query, text.key, text.value)
                )
                eviction.append(i, key, value, counts)
                state = None if hidden is None else hidden[i][:, start:stop]
                # Queries of padding see nothing, so that the caller has to do without them.
                out = torch.zeros_like(query) if padded else None
                eviction.attend(query, i, hidden=state, attended=out)
        return [held(cache, i, tokens) for i in range(text.layers)]
