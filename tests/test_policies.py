"""What each policy promises, and what all of them do: nothing below the budget, forced pages above
it, no token that is not there, the same choice for the same question."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.attention import fresh_seed
from tests.looks import (
    BUDGET,
    DIM,
    FORCED,
    KV_HEADS,
    PLAIN,
    TOKENS,
    inputs,
    look_at,
    pages,
    recorded,
    tokens,
)
from vattn import policies
from vattn.kernels.kv import KV
from vattn.kernels.selection import reference
from vattn.policies import (
    Clusters,
    Cuboid,
    DoubleSparsity,
    Estimated,
    Exact,
    Graded,
    InfiniGen,
    Landmark,
    Loki,
    MeanDeviation,
    Nibbles,
    Quest,
    Random,
    Sampled,
    Signs,
    SparQ,
    Twilight,
    TwoStage,
    Window,
    skew,
)
from vattn.selector import Selector, SelectorError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def skewed(**options: Any) -> InfiniGen:
    keys, queries = recorded()
    return InfiniGen(map=skew(list(queries), list(keys), 0.5), **options)


MAKE: dict[str, Callable[[], Selector]] = {
    "Quest": lambda: Quest(page_tokens=8, **PLAIN),
    "MeanDeviation": lambda: MeanDeviation(page_tokens=8, **PLAIN),
    "Cuboid": lambda: Cuboid(page_tokens=8, **PLAIN),
    "Landmark": lambda: Landmark(outliers=3, **PLAIN),
    "Clusters": lambda: Clusters(page_tokens=16, **PLAIN),
    "Exact": lambda: Exact(**PLAIN),
    "Random": lambda: Random(page_tokens=8, **PLAIN),
    "Window": lambda: Window(page_tokens=8, **PLAIN),
    "Signs": lambda: Signs.calibrate(recorded()[0], **PLAIN),
    "Nibbles": lambda: Nibbles(**PLAIN),
    "Graded": lambda: Graded.calibrate(recorded()[0], fine=4, coarse=8, **PLAIN),
    "Loki": lambda: Loki.calibrate(recorded()[0], **PLAIN),
    "DoubleSparsity": lambda: DoubleSparsity.calibrate(*recorded(), **PLAIN),
    "SparQ": lambda: SparQ(rank=4, **PLAIN),
    "InfiniGen": lambda: skewed(**PLAIN),
    "Estimated": lambda: Estimated(page_tokens=8, **PLAIN),
    "TwoStage": lambda: TwoStage(page_tokens=8, base=pages(120), **PLAIN),
    "Twilight": lambda: Twilight(page_tokens=8, base=pages(120), p=0.8, **PLAIN),
    "Sampled": lambda: Sampled(base=Exact(budget_tokens=48, **FORCED), **PLAIN),
}
EVERY = pytest.mark.parametrize("name", MAKE)


# ---- what all of them do -------------------------------------------------------------------------
def test_every_policy_is_here() -> None:
    found = {
        name
        for name in policies.__all__
        if isinstance(kind := getattr(policies, name), type) and issubclass(kind, Selector)
    }
    assert found == set(MAKE)


@EVERY
def test_declares_what_it_looks_at(name: str) -> None:
    selector = MAKE[name]()
    caps = selector.caps
    assert caps.evidence
    assert caps.grain in ("token", "page")
    assert ("random" in caps.evidence) == (name in ("Random", "Sampled"))
    reads_query = name not in ("Random", "Window")
    assert ("query" in caps.evidence) == reads_query
    if selector.parts(DIM):
        assert "keys" in caps.evidence


@EVERY
def test_cannot_be_changed_and_says_what_a_field_may_be(name: str) -> None:
    selector = MAKE[name]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        selector.budget_tokens = 7  # type: ignore[misc]
    with pytest.raises(SelectorError, match="budget_tokens must be an int >= "):
        dataclasses.replace(selector, budget_tokens=1)


@EVERY
def test_records_are_what_the_parts_say(name: str) -> None:
    selector = MAKE[name]()
    keys = torch.randn(KV_HEADS, 5, selector.page_tokens, DIM).to(torch.bfloat16)
    made = selector.record(1, keys, keys)
    parts = selector.parts(DIM)
    assert [(t.shape, t.dtype) for t in made] == [((KV_HEADS, 5, p.width), p.dtype) for p in parts]
    stored = sum(t[0, 0].numel() * t.element_size() for t in made)
    assert selector.bytes_per_token(DIM) == stored / selector.page_tokens
    # Records are made page by page as the sequence grows: the others must not matter.
    alone = selector.record(1, keys[:, 2:3], keys[:, 2:3])
    for whole, one in zip(made, alone, strict=True):
        assert torch.equal(whole[:, 2:3], one)


@EVERY
@pytest.mark.parametrize("count", [1, BUDGET])
def test_reads_everything_within_its_budget(name: str, count: int) -> None:
    query, key = inputs(count=count)
    selector = MAKE[name]()
    assert selector.select(query, look_at(selector, key)) is None


@EVERY
def test_reads_everything_in_dense_layers(name: str) -> None:
    query, key = inputs()
    selector = dataclasses.replace(MAKE[name](), dense_layers=(1,))
    assert selector.select(query, look_at(selector, key, layer=1)) is None
    assert selector.select(query, look_at(selector, key, layer=0)) is not None


@EVERY
@pytest.mark.parametrize("length", [1, 3])
def test_chooses_what_is_there_and_what_is_forced(name: str, length: int) -> None:
    lengths = [TOKENS, 41, TOKENS - 9]
    query, key = inputs(3, length=length)
    selector = MAKE[name]()
    look = look_at(selector, key, lengths=lengths, layer=2)
    selection = selector.select(query, look)
    assert selection is not None
    size = selection.page_tokens
    assert selection.ids.shape[:2] == selection.count.shape == (3, KV_HEADS)
    for b, count in enumerate(lengths):
        for h in range(KV_HEADS):
            n = int(selection.count[b, h])
            ids = selection.ids[b, h, :n].tolist()
            assert ids == sorted(set(ids))
            assert all(0 <= page * size < count for page in ids)
            chosen = tokens(selection, b, h, count)
            recent = FORCED["recent_tokens"] + length - 1
            assert {*range(FORCED["sink_tokens"]), *range(count - recent, count)} <= chosen
            assert n * size <= BUDGET
            if count <= 41 and name not in ("Twilight", "InfiniGen"):
                assert chosen == set(range(count))  # shorter than the budget: all of it
            if count == TOKENS:
                assert len(chosen) < count
    out, lse, _ = reference(query, look.kv, selection)
    assert bool(out.isfinite().all())  # nothing behind the lengths was read
    assert bool(lse.isfinite().all())


@EVERY
def test_padding_on_the_left_is_not_chosen(name: str) -> None:
    query, key = inputs(2)
    starts = [0, 23]
    key[1, :, :23] = 50.0 * torch.randn(KV_HEADS, 23, DIM)  # loud, but not to be read
    selector = MAKE[name]()
    selection = selector.select(query, look_at(selector, key, starts=starts))
    assert selection is not None
    size = selection.page_tokens
    # The first page that may be read is forced, of which some is padding.
    sinks = range(23, 23 + FORCED["sink_tokens"] - 23 % selector.page_tokens)
    for h in range(KV_HEADS):
        ids = selection.ids[1, h, : int(selection.count[1, h])].tolist()
        assert all((page + 1) * size > 23 for page in ids)
        assert set(sinks) <= tokens(selection, 1, h, TOKENS)


@EVERY
def test_the_same_question_has_the_same_answer(name: str) -> None:
    query, key = inputs(2)
    selector = MAKE[name]()
    first, again = (selector.select(query, look_at(selector, key, step=3)) for _ in range(2))
    assert first is not None
    assert again is not None
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.count, again.count)
    # A sequence's choice does not depend on those beside it; draws do, on its place in the batch.
    alone = selector.select(query[:1], look_at(selector, key[:1], step=3))
    assert alone is not None
    for h in range(KV_HEADS):
        if name not in ("Random", "Sampled"):
            assert tokens(alone, 0, h, TOKENS) == tokens(first, 0, h, TOKENS)


@pytest.mark.parametrize("name", sorted(MAKE.keys() - {"Random", "Window", "Sampled"}))
def test_equal_keys_are_chosen_from_the_front(name: str) -> None:
    query, key = inputs()
    key[:] = 1.0
    selector = MAKE[name]()
    selection = selector.select(query, look_at(selector, key))
    assert selection is not None
    chosen = tokens(selection, 0, 0, TOKENS)
    free = sorted(t for t in chosen if t < TOKENS - 32)
    assert free == list(range(len(free)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quest(dtype=torch.int8), "dtype must be bfloat16, float16 or float32"),
        (lambda: Signs(page_tokens=16), "page_tokens must be 1 for Signs, got 16"),
        (lambda: MeanDeviation(weight=-1.0), "weight must be >= 0, got -1.0"),
        (lambda: Clusters(alpha=1.5), "alpha must be 0 to 1, got 1.5"),
        (lambda: Clusters(page_tokens=17), "page_tokens must be even, got 17"),
        (lambda: Clusters(layers=0), "layers must be 1 or more, got 0"),
        (lambda: Landmark(budget_tokens=256), "outliers must be >= 0 and < 26"),
        (lambda: SparQ(rank=0), "rank must be 1 or more, got 0"),
        (lambda: TwoStage(page_tokens=8), "base has page_tokens 16"),
        (lambda: TwoStage(base=Quest(sink_tokens=0, budget_tokens=4096)), "base.sink_tokens must"),
        (lambda: Twilight(p=0.0), "p must be above 0 and at most 1, got 0.0"),
        (lambda: Sampled(base=Exact(budget_tokens=4096)), "base.budget_tokens must be below 2048"),
        (lambda: Sampled(base=Quest(budget_tokens=256)), "page_tokens must be the base's 16"),
        (lambda: Sampled(error=2.0), "error must be above 0 and below 1, got 2.0"),
        (lambda: Graded.calibrate(recorded()[0], fine=3), "fine must be even"),
        (lambda: Loki.calibrate(torch.zeros(2, 3, 4)), r"keys are \(2, 3, 4\): must be"),
    ],
)
def test_names_what_is_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SelectorError, match=message):
        make()


def test_a_look_without_an_index_is_refused() -> None:
    query, key = inputs()
    bare = look_at(Window(**PLAIN), key)
    with pytest.raises(SelectorError, match="Quest has no records"):
        Quest(page_tokens=8, **PLAIN).select(query, bare)


def test_keys_of_eight_bits_cannot_be_read_as_records() -> None:
    query, key = inputs()
    look = look_at(Window(**PLAIN), key)
    eight = key.to(torch.float8_e4m3fn)
    look = dataclasses.replace(look, kv=KV(eight, eight, look.kv.lengths))
    with pytest.raises(SelectorError, match="this selector reads 16 or 32 bits"):
        Exact(**PLAIN).select(query, look)
