"""An evictor at work: what is left is what attention sees, and nothing else changes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from vattn.allocator.errors import OutOfPages
from vattn.eviction import SCORE, Eviction, dense_prompt
from vattn.evictor import Evictor, EvictorError, Seen, Step, best
from vattn.evictors import (
    CAKE,
    H2O,
    TOVA,
    DuoAttention,
    Elastic,
    LagKV,
    Merging,
    Oracle,
    PerLayer,
    PoolCounter,
    PoolFifo,
    RandomTokens,
    SimLayerKV,
    SlidingWindow,
    SnapKV,
    Streaming,
    ThinK,
)
from vattn.evictors.combined import Wrapper
from vattn.heads import HeadCache
from vattn.kernels import stream
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

    def feed(self, n: int, *, given: bool = False, checked: bool = True) -> list[Tensor]:
        """Run n tokens through every layer; each result is checked against the kept rows."""
        outs = []
        for layer in range(LAYERS):
            query = torch.randn(BATCH, HEADS * GROUPS, n, DIM)
            k, v = torch.randn(2, BATCH, HEADS, n, DIM).unbind(0)
            self.k[layer] = torch.cat([self.k[layer], k], 2)
            self.v[layer] = torch.cat([self.v[layer], v], 2)
            self.eviction.append(layer, k, v)
            right = self.expected(query, layer) if checked else None
            attended = dense_prompt(query, k, v, None, None) if given else None
            out = self.eviction.attend(query, layer, attended=attended)
            assert right is None or (out.double() - right).abs().max() < 2e-6
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

    def crop(self, tokens: int) -> None:
        """Forget the last tokens of every layer."""
        for layer in range(LAYERS):
            self.eviction.crop(layer, tokens)
            self.k[layer], self.v[layer] = (x[layer][:, :, :-tokens] for x in (self.k, self.v))

    def held(self) -> set[int]:
        return {n for layer in range(LAYERS) for n in self.heads.lengths(layer).flatten().tolist()}


def assert_same_rows(
    one: HeadCache, other: HeadCache, tracks: tuple[str, ...], evictor: Evictor
) -> None:
    """Heads hold equally many rows, with the same numbers beside them, in the same places."""
    for layer in range(LAYERS):
        assert (one.lengths(layer) == other.lengths(layer)).all()
        counts = one.counts(layer)
        inside = torch.arange(int(counts.max())) < counts[..., None]
        for name in tracks:
            kind = torch.int64 if name == "position" else torch.float32
            ours, theirs = (heads.track(layer, name, kind) for heads in (one, other))
            assert torch.equal(ours[inside], theirs[inside]), (evictor, name)


class Placed(Elastic):
    """Merges nothing: the rows stay those of the text."""

    def merged(self, seen: Seen, keep: Tensor) -> None:
        return None


class Uneven(H2O):
    """Heads reach their budgets one after the other."""

    def budgets(self, seen: Seen) -> Tensor:
        return seen.target[:, None] + 6 * torch.arange(seen.counts.shape[1])


@pytest.mark.skipif(stream.available() is not None, reason=str(stream.available()))
def test_compiled_steps_drop_what_others_drop(monkeypatch, one_thread):
    """The same rows in the same places, whoever chooses: one call of compiled loops, or worst."""
    seed = fresh_seed()
    future = torch.rand(LAYERS, BATCH, HEADS, 300)
    many = [
        H2O(budget=60),
        TOVA(budget=60),
        PoolFifo(budget=60),
        PoolCounter(budget=60),
        Streaming(budget=60),
        SlidingWindow(budget=60),
        RandomTokens(budget=60),
        Oracle(budget=60, future=future),
        Placed(budget=60, distance=9),
        Uneven(budget=60),
        DuoAttention(retrieval=((0, 1), (1, 0)), sink_tokens=3, recent_tokens=20),
        SimLayerKV(sink_tokens=2, recent_tokens=30, threshold=0.3),
    ]
    monkeypatch.setattr("vattn.evictor.AHEAD", 16)
    plain, called = HeadCache.forget_least, []

    def counted(self: HeadCache, *given: Any) -> int | None:
        found = plain(self, *given)
        called.append(found)
        return found

    for evictor in many:
        found = []
        for way in (counted, lambda *_: None):
            monkeypatch.setattr(HeadCache, "forget_least", way)
            called.clear()
            torch.manual_seed(seed)
            text = Text(evictor)
            text.feed(100)
            for length in [1] * 30 + [3, 1, 2] + [1] * 12:
                text.feed(length, checked=False)
            text.crop(2)
            for length in [1, 4, 1, 1, 1]:
                text.feed(length, checked=False)
            text.eviction.follow(replace(evictor, recent_tokens=evictor.recent_tokens + 1))
            for length in [1] * 12 + [70] + [1] * 30:
                text.feed(length, checked=False)
            if way is counted:
                assert sum(bool(each) for each in called) > 50, (evictor, called)
            found.append(text)
        one, other = found
        assert_same_rows(one.heads, other.heads, ("position", SCORE), evictor)
        assert [kept.evicted for kept in one.eviction.kept()] == [
            kept.evicted for kept in other.eviction.kept()
        ]


@pytest.mark.parametrize("prompt", range(17, 60, 6))
def test_heads_that_grow_to_their_budget_step_by_step(prompt, one_thread):
    fresh_seed()
    text = Text(Streaming(budget=60))
    text.feed(prompt)
    for _ in range(70 - prompt):
        text.feed(1)
    assert text.held() == {60}


class Expanded(H2O):
    """Budgets that are no line of numbers."""

    def budgets(self, seen: Seen) -> Tensor:
        return torch.full((HEADS,), 40, dtype=torch.int32).expand(BATCH, HEADS)


class Latest(Streaming):
    """Drops the newest that may go: the recorded scores are not what counts."""

    def rescore(self, seen: Seen) -> Tensor:
        return -seen.positions.float()


class Unforced(DuoAttention):
    """Its heads keep one token in two."""

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return super().choose(score, seen, budgets) & (seen.positions % 2 == 0)


class Backwards(Wrapper):
    """Keeps what its base would drop."""

    def rescore(self, seen: Seen) -> Tensor:
        return -super().rescore(seen)


OTHERS = [
    Expanded(budget=60, recent_tokens=8),
    Latest(budget=60, recent_tokens=8),
    Unforced(retrieval=((0, 1),), sink_tokens=3, recent_tokens=20),
    Backwards(H2O(budget=60, recent_tokens=8)),
    Merging(H2O(budget=60, recent_tokens=8)),
    PerLayer((H2O(budget=60, recent_tokens=8), Streaming(budget=60, recent_tokens=8))),
    PerLayer((DuoAttention(budget=60, retrieval=((0, 1),), recent_tokens=20), SnapKV(budget=60))),
    RandomTokens(budget=60),
]


@pytest.mark.parametrize("evictor", OTHERS, ids=lambda each: type(each).__name__)
def test_evictors_of_others_are_asked(evictor, monkeypatch, one_thread):
    seed, found = fresh_seed(), []
    for compiled in (True, False):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(HeadCache, "forget_least", lambda *_: None)
            text = Text(evictor)
            for length in [70] + [1] * 25 + [3, 1, 1]:
                text.feed(length, checked=False)
        found.append(text.heads)
    one, other = found
    assert_same_rows(one, other, ("position",), evictor)
    for layer in range(LAYERS):
        held = set(one.lengths(layer).flatten().tolist())
        if len(held) == 1:
            many = held.pop()
            assert torch.equal(one.ranges.view(layer, 1, many), other.ranges.view(layer, 1, many))


def test_a_fixed_score_is_asked_for_where_a_class_has_its_own(one_thread):
    text = Text(Latest(budget=60, recent_tokens=8))
    for length in [70] + [1] * 25:
        text.feed(length)
    kept = sorted(text.heads.positions(0)[0, 0].tolist())
    assert kept == [*range(4), *range(14, 62), *range(87, 95)]


def test_another_cache_gets_pages_whose_last_row_a_step_has_dropped(one_thread):
    with HeadCache(
        4, 4, 128, 1024, dtype="float32", page_bytes=4096, budget_bytes=288 * 4096
    ) as one:
        eviction = Eviction(one, H2O(budget=64, recent_tokens=4))
        for length in [60] + [1] * 20:
            for layer in range(4):
                k, v = torch.randn(2, 1, 4, length, 128).unbind(0)
                eviction.append(layer, k, v)
                eviction.attend(torch.randn(1, 4, length, 128), layer)
        with HeadCache(1, 4, 128, 64, dtype="float32", page_bytes=4096, pool=one.cache.pool) as two:
            rows = torch.randn(1, 4, 24, 128)
            with suppress(OutOfPages):  # pages rest for a step
                two.append(0, rows, rows)
            one.cache.advance()
            if not two.tokens.any():
                two.append(0, rows, rows)
            one.ranges.check_laws()
            two.ranges.check_laws()
            assert torch.equal(two.ranges.view(0, 0, 24), rows)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "evictor",
    [H2O(budget=40), TOVA(budget=40), CAKE(budget=40), LagKV(budget=40, lag=8), ThinK(budget=40)],
    ids=lambda e: type(e).__name__,
)
def test_the_type_that_torch_makes_by_default_does_not_matter(evictor: Evictor, dtype: torch.dtype):
    lines = [torch.randn(4, BATCH, HEADS, n, DIM) for n in (160, 1, 1, 3, 1, 20, 1)]
    runs = []
    for default in (torch.float32, dtype):
        heads = HeadCache(LAYERS, HEADS, DIM, 1024, batch=BATCH, dtype="float32")
        eviction = Eviction(heads, evictor)
        torch.set_default_dtype(default)
        try:
            for line in lines:
                for layer in range(LAYERS):
                    eviction.append(layer, line[0], line[1])
                    out = eviction.attend(line[2:].transpose(0, 1).flatten(1, 2), layer)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append([out, *(heads.places(layer) for layer in range(LAYERS))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


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


def test_a_draft_that_is_taken_back_costs_no_token():
    """Tokens that may yet go are held beyond the budget, and recent ones are those before them."""
    fresh_seed()
    text = Text(Streaming(budget=12, sink_tokens=4, recent_tokens=4))
    text.feed(40)
    for draft, wrong in ((8, 7), (8, 0), (3, 2), (1, 0)):
        before = text.heads.tokens[0, 0]
        text.feed(draft)
        assert text.held() == {12 + draft - 1}
        for layer in range(LAYERS):
            text.eviction.crop(layer, wrong)
            text.k[layer], text.v[layer] = (
                x[layer][:, :, : x[layer].shape[2] - wrong] for x in (text.k, text.v)
            )
        held = text.heads.positions(0)[0, 0, : text.heads.counts(0)[0, 0]].tolist()
        assert {0, 1, 2, 3, *range(before, before + draft - wrong)} <= set(held)
        assert min(text.held()) >= 12
    text.feed(1)
    assert text.held() == {12}


def test_the_newest_stay_where_more_is_to_stay_than_the_budget_holds():
    fresh_seed()
    text = Text(H2O(budget=10, sink_tokens=8, recent_share=0.9))
    text.feed(100)
    for _ in range(5):
        text.feed(1)
        newest = int(text.heads.tokens[0, 0]) - 1
        assert set(text.heads.positions(0)[0, 0].tolist()) >= {newest, newest - 1, newest - 2}
    assert text.held() == {10}


def test_a_padded_prompt_alone_is_that_without_padding():
    fresh_seed()
    k, v = torch.randn(2, 1, HEADS, 70, DIM).unbind(0)
    query = torch.randn(1, HEADS * GROUPS, 70, DIM)
    kept = []
    for padding in (0, 30):
        some = slice(30 - padding, 70)
        with HeadCache(1, HEADS, DIM, 128, dtype="float32") as heads:
            eviction = Eviction(heads, H2O(budget=0.5))
            eviction.append(0, k[:, :, some], v[:, :, some], np.array([40]))
            eviction.attend(query[:, :, some], 0, attended=query[:, :, some])
            kept.append(heads.positions(0)[..., :20].clone())
            assert heads.lengths(0).tolist() == [[20] * HEADS]
    assert torch.equal(*kept)


def test_every_sequence_gets_a_token_and_steps_are_not_padded():
    with HeadCache(1, 1, 8, 64, batch=2, dtype="float32") as heads:
        eviction = Eviction(heads, H2O(budget=0.5))
        k = torch.randn(2, 1, 20, 8)
        with pytest.raises(LayoutError, match="every sequence needs at least one"):
            eviction.append(0, k, k, np.array([20, 0]))
        eviction.append(0, k, k, np.array([20, 3]))
        eviction.attend(torch.randn(2, 1, 20, 8), 0, attended=k)
        with pytest.raises(LayoutError, match="a decode step all of them"):
            eviction.append(0, k[:, :, :2], k[:, :, :2], np.array([2, 1]))
        assert heads.tokens[0].tolist() == [20, 3]


def test_steps_that_fail_and_are_taken_back_leave_layers_in_step():
    fresh_seed()
    text = Text(Streaming(budget=20, sink_tokens=2, recent_tokens=4, every=3))
    text.feed(40)
    k = torch.randn(BATCH, HEADS, 1, DIM)
    text.eviction.append(0, k, k)
    text.eviction.attend(torch.randn(BATCH, HEADS * GROUPS, 1, DIM), 0)
    text.eviction.crop(0, 1)  # layer 1 had no memory, say
    for _ in range(7):
        text.feed(1)
        assert len(text.held()) == 1, "both layers hold equally many rows"


def test_merged_rows_weigh_in_what_evictors_see():
    fresh_seed()
    seen: list[Tensor] = []

    class Watching(H2O):
        def observe(self, score: Tensor, step: Step) -> Tensor:
            seen.append(step.weights.sum(-1))
            return super().observe(score, step)

    text = Text(Watching(budget=100))
    text.feed(50)
    for layer in range(LAYERS):
        text.heads.track(layer, "log_weight").fill_(2.0)
    k = torch.randn(BATCH, HEADS, 1, DIM)
    text.eviction.append(0, k, k)
    text.eviction.attend(torch.randn(BATCH, HEADS * GROUPS, 1, DIM), 0)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))
    # A second prompt: sums over its queries, row by row of attention with the weights.
    query = torch.randn(BATCH, HEADS * GROUPS, 20, DIM)
    k = torch.randn(BATCH, HEADS, 20, DIM)
    text.eviction.append(0, k, k)
    out = text.eviction.attend(query, 0)
    looked = text.eviction._seen(0, DIM**-0.5)
    looked.query = query
    found = looked.columns(20).total.sum(2)
    logs = text.heads.track(0, "log_weight")
    keys, values = looked.keys.double(), looked.values.double()
    for b, h in ((0, 0), (1, 1)):
        some = query[b, h * GROUPS : (h + 1) * GROUPS].double()
        scores = some @ keys[b, h].T * DIM**-0.5 + logs[b, h].double()
        scores.masked_fill_(torch.ones(20, 71).triu(52).bool(), float("-inf"))
        weights = scores.softmax(-1)
        assert torch.allclose(found[b, h].double(), weights.sum((0, 1)), atol=1e-5)
        right = weights @ values[b, h]
        assert torch.allclose(out[b, h * GROUPS : (h + 1) * GROUPS].double(), right, atol=1e-5)


def test_a_prompt_that_fails_and_is_taken_back_leaves_the_budget_as_it_was():
    fresh_seed()

    class Failing(H2O):
        def score(self, seen: Seen) -> Tensor:
            if int(seen.tokens.max()) == 300:
                raise EvictorError("not this one")
            return super().score(seen)

    text = Text(Failing(budget=0.25))
    text.feed(200)
    for _ in range(40):
        text.feed(1)
    assert text.held() == {50}
    rows = torch.randn(BATCH, HEADS, 60, DIM)
    text.eviction.append(0, rows, rows)
    with pytest.raises(EvictorError, match="not this one"):
        text.eviction.attend(torch.randn(BATCH, HEADS * GROUPS, 60, DIM), 0)
    text.eviction.crop(0, 60)
    for _ in range(20):
        text.feed(1)
    assert text.held() == {50}


def test_an_evictor_that_follows_has_to_suit_the_cache_too():
    first = H2O(budget=40)
    text = Text(first)
    with pytest.raises(EvictorError, match="dense_layers has 7"):
        text.eviction.follow(H2O(budget=40, dense_layers=(7,)))
    assert text.eviction.evictor is first
    # A layer that stays dense is none of those that decide together.
    text.eviction.follow(CAKE(budget=40, dense_layers=(0,)))
    text.feed(100)
    assert sorted(text.held()) == [40, 100]
