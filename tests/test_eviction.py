"""An evictor at work: what is left is what attention sees, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from vattn.eviction import Eviction, dense_prompt
from vattn.evictor import Evictor, EvictorError, Seen, best
from vattn.evictors import H2O, SlidingWindow, SnapKV, Streaming
from vattn.heads import HeadCache
from vattn.layout import LayoutError
from vattn.selector import Caps

LAYERS, BATCH, HEADS, GROUPS, DIM = 2, 2, 2, 2, 16


class Text:
    """All rows there have ever been, and what attention over the kept ones must give."""

    def __init__(self, evictor: Evictor) -> None:
        self.heads = HeadCache(LAYERS, HEADS, DIM, 1024, batch=BATCH, dtype="float32")
        self.eviction = Eviction(self.heads, evictor)
        self.k = [torch.zeros(BATCH, HEADS, 0, DIM) for _ in range(LAYERS)]
        self.v = [torch.zeros(BATCH, HEADS, 0, DIM) for _ in range(LAYERS)]

    def feed(self, n: int, *, given: bool = False) -> list[Tensor]:
        """Run n tokens through every layer; each result is checked against the kept rows."""
        outs = []
        for layer in range(LAYERS):
            query = torch.randn(BATCH, HEADS * GROUPS, n, DIM)
            k, v = torch.randn(2, BATCH, HEADS, n, DIM).unbind(0)
            self.k[layer] = torch.cat([self.k[layer], k], 2)
            self.v[layer] = torch.cat([self.v[layer], v], 2)
            self.eviction.append(layer, k, v)
            right = self.expected(query, layer)
            attended = dense_prompt(query, k, v, None, None) if given else None
            out = self.eviction.attend(query, layer, attended=attended)
            assert (out.double() - right).abs().max() < 2e-6
            outs.append(out)
        self.heads.cache.check()
        return outs

    def expected(self, query: Tensor, layer: int) -> Tensor:
        positions, counts = self.heads.positions(layer), self.heads.counts(layer)
        total, length = self.k[layer].shape[2], query.shape[2]
        out = torch.empty(query.shape, dtype=torch.float64)
        for b in range(BATCH):
            for h in range(HEADS):
                at = positions[b, h, : counts[b, h]]
                some = slice(h * GROUPS, (h + 1) * GROUPS)
                scores = query[b, some].double() @ self.k[layer][b, h, at].double().T / DIM**0.5
                now = total - length + torch.arange(length)
                scores.masked_fill_(at > now[:, None], float("-inf"))
                out[b, some] = scores.softmax(-1) @ self.v[layer][b, h, at].double()
        return out

    def held(self) -> set[int]:
        return {n for layer in range(LAYERS) for n in self.heads.lengths(layer).flatten().tolist()}


EVICTORS = [
    H2O(budget=0.25),
    H2O(budget=40, every=5),
    SnapKV(budget=0.3),
    Streaming(budget=0.25),
    SlidingWindow(budget=20),
]


@pytest.mark.parametrize("given", [True, False], ids=["given", "read back"])
@pytest.mark.parametrize("evictor", EVICTORS, ids=lambda e: type(e).__name__)
def test_attention_is_that_over_the_kept_rows(evictor: Evictor, given: bool):
    fresh_seed()
    text = Text(evictor)
    text.feed(160, given=given)
    target = int(evictor.target(torch.tensor([160])))
    assert text.held() == {target}
    for n in (1, 1, 1, 4, 1, 1, 30, 1, 1):
        text.feed(n)
    steps = [kept.steps for kept in text.eviction.kept()]
    assert steps == [8] * LAYERS
    if evictor.decodes:
        target = int(evictor.target(torch.tensor([199])))  # the text up to the second prompt
        assert max(text.held()) <= target + (evictor.every - 1)
    for kept in text.eviction.kept():
        assert kept.seen == BATCH * 201
        assert kept.evicted == BATCH * HEADS * 201 - sum(kept.budgets)
        assert 0 < kept.share < 1


@pytest.mark.parametrize("evictor", [H2O(budget=1.0), SnapKV(budget=500), Streaming(budget=1.0)])
def test_with_room_for_all_the_bits_are_those_of_no_eviction(evictor: Evictor):
    seed = fresh_seed()
    runs = []
    for each in (evictor, Nothing(budget=1.0)):
        torch.manual_seed(seed)
        text = Text(each)
        outs = text.feed(120)
        for _ in range(6 if isinstance(evictor.budget, int) else 0):
            outs += text.feed(1)
        runs.append(outs)
        assert not any(kept.evicted for kept in text.eviction.kept())
    for ours, plain in zip(*runs, strict=True):
        assert torch.equal(ours, plain)


@dataclass(frozen=True, kw_only=True)
class Nothing(Evictor):
    """Evicts nothing."""

    caps: ClassVar[Caps] = Caps(frozenset(), "token")
    adaptive: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        return seen.score

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return seen.valid


def test_a_dense_layer_keeps_everything():
    fresh_seed()
    text = Text(H2O(budget=0.25, dense_layers=(1,)))
    text.feed(100)
    for _ in range(5):
        text.feed(1)
    assert text.heads.lengths(0).tolist() == [[25] * HEADS] * BATCH
    assert text.heads.lengths(1).tolist() == [[105] * HEADS] * BATCH


def test_a_budget_in_tokens_is_grown_into():
    fresh_seed()
    text = Text(Streaming(budget=50))
    text.feed(30)
    for n in range(31, 60):
        text.feed(1)
        assert text.held() == {min(n, 50)}


def test_padding_is_never_kept():
    """A sequence that is shorter by its padding is as it would be alone."""
    fresh_seed()
    counts = [60, 23]
    k, v = torch.randn(2, BATCH, HEADS, 60, DIM).unbind(0)
    query = torch.randn(BATCH, HEADS * GROUPS, 60, DIM)
    both = HeadCache(1, HEADS, DIM, 128, batch=BATCH, dtype="float32")
    eviction = Eviction(both, SnapKV(budget=0.5, recent_tokens=4, window_tokens=8))
    eviction.append(0, k, v, np.array(counts))
    eviction.attend(query[:, :, -20:], 0)
    for b, count in enumerate(counts):
        alone = HeadCache(1, HEADS, DIM, 128, dtype="float32")
        single = Eviction(alone, SnapKV(budget=0.5, recent_tokens=4, window_tokens=8))
        single.append(0, k[b : b + 1, :, -count:], v[b : b + 1, :, -count:])
        single.attend(query[b : b + 1, :, -20:], 0)
        held = alone.lengths(0)[0]
        assert both.lengths(0)[b].tolist() == held.tolist()
        for h, n in enumerate(held):
            assert torch.equal(both.positions(0)[b, h, :n], alone.positions(0)[0, h, :n])


def test_whoever_watches_is_told_what_goes():
    fresh_seed()
    text = Text(SnapKV(budget=0.25))
    told: list[tuple[int, int]] = []
    text.eviction.watchers.append(lambda layer, seen, keep: told.append((layer, int(keep.sum()))))
    text.feed(200)
    assert told == [(0, 50 * BATCH * HEADS), (1, 50 * BATCH * HEADS)]


def test_the_best_are_the_lowest_of_equals():
    ranked = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert best(ranked, torch.tensor([2])).tolist() == [[False, True, True, False, False]]
    assert best(ranked, torch.tensor([9])).all()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"budget": 0.0}, "got 0.0"),
        ({"budget": 1.5}, "got 1.5"),
        ({"budget": 0}, "got 0"),
        ({"budget": True}, "got True"),
        ({"budget": 20}, "budget must be >= 36"),
        ({"every": 0}, "every must be an int >= 1"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": 2.5}, "recent_tokens"),
    ],
)
def test_wrong_parameters_are_named(options, what):
    with pytest.raises(EvictorError, match=what):
        Streaming(**options)


def test_what_does_not_suit_is_refused():
    with HeadCache(2, 1, 8, 64, dtype="float32") as heads:
        with pytest.raises(EvictorError, match="dense_layers has 2"):
            Eviction(heads, H2O(dense_layers=(2,)))
        eviction = Eviction(heads, H2O(budget=0.5))
        with pytest.raises(LayoutError, match="append first"):
            eviction.attend(torch.randn(1, 1, 3, 8), 0)
