"""Scores of records by the kernel: those that their formats define, and no record that is not."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.guard import allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels import index_scores, index_select, nibbles, signs, summaries, top_pages
from vattn.kernels.index import Index

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
SCORES = {"summaries": summaries.scores, "signs": signs.scores, "nibbles": nibbles.scores}


@pytest.fixture(autouse=True)
def poisoned(one_thread: None) -> Iterator[None]:
    """New memory holds NaN."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Records of a batch, NaN or 255 wherever none counts, and a query for them."""

    kind: str = "summaries"
    counts: tuple[int, ...] = (70, 13)
    slots: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    dim: int = 32
    records: int = 70
    reserved: int = 80
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    parts: int = 2
    token_major: bool = False
    place: str = "cpu"

    def make(self) -> tuple[Tensor, Index]:
        slots = self.slots or tuple(range(len(self.counts)))
        keys = torch.randn(max(slots) + 1, self.kv_heads, self.reserved, self.dim)
        stored = self.stored or self.dtype
        made = {
            "summaries": lambda: (keys.to(stored), torch.rand_like(keys).to(stored))[: self.parts],
            "signs": lambda: signs.pack(keys),
            "nibbles": lambda: nibbles.pack(keys),
        }[self.kind]()
        parts = tuple(self.laid(part, slots) for part in made)
        make = {"dtype": torch.int64 if self.slots else torch.int32, "device": self.place}
        query = torch.randn(len(self.counts), self.heads, self.tokens, self.dim).to(self.dtype)
        at = None if self.slots is None else torch.tensor(self.slots, **make)
        return query.to(self.place), Index(parts, torch.tensor(self.counts, **make), at)

    def laid(self, part: Tensor, slots: tuple[int, ...]) -> Tensor:
        blank = torch.full_like(part, float("nan") if part.is_floating_point() else 255)
        for slot, count in zip(slots, self.counts, strict=True):
            blank[slot, :, :count] = part[slot, :, :count]
        blank = blank.transpose(1, 2).contiguous().transpose(1, 2) if self.token_major else blank
        return blank.to(self.place)


def exact(case: Case, query: Tensor, index: Index, scale: float | None) -> Tensor:
    """The definition, from records and query in float64."""
    batch, heads, tokens, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    out = query.new_full(
        (batch, case.kv_heads, heads // case.kv_heads * tokens, case.records),
        float("-inf"),
        dtype=torch.float64,
    )
    for b, n in enumerate(case.counts):
        slot = b if case.slots is None else case.slots[b]
        n = min(n, case.records)
        parts = [part[slot, :, :n] for part in index.parts]
        rows = query[b].double().reshape(case.kv_heads, -1, dim)
        if case.kind == "summaries":
            found = rows @ parts[0].double().mT
            found += rows.abs() @ parts[1].double().mT if len(parts) > 1 else 0
        else:
            stand = signs.unpack(*parts, dim) if case.kind == "signs" else nibbles.unpack(*parts)
            found = rows @ stand.double().mT
        out[b, :, :, :n] = found * scale
    return out


def assert_right(case: Case, scale: float | None = None) -> None:
    query, index = case.make()
    found = getattr(index_scores, case.kind)(query, index, case.records, scale=scale)
    right = exact(case, query, index, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found == float("-inf"), right == float("-inf"))
    there = right.isfinite()
    assert there.any() or not any(case.counts)
    # |q| . |record| bounds what rounding of the sums can be.
    size = 16 * case.dim**0.5 * (1.0 if scale is None else max(1.0, abs(scale) * case.dim**0.5))
    limit = size * 8 * torch.finfo(torch.float32).eps
    assert there.sum() == 0 or (found.double() - right)[there].abs().max() <= limit
    torch_scores = SCORES[case.kind](query, index, case.records, scale=scale)
    assert torch.allclose(found[there], torch_scores[there], rtol=0, atol=limit)


KINDS = ["summaries", "signs", "nibbles"]
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_exact(kind: str, dtype: torch.dtype, place: str) -> None:
    assert_right(Case(kind, dtype=dtype, place=place))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_slots_layouts_and_odd_dims(kind: str, place: str) -> None:
    """Rows beside each other by token, several queries, more records than are reserved."""
    case = Case(
        kind, (40, 0), (2, 0), 6, 2, 3, dim=20, records=90, token_major=True, place=place,
    )  # fmt: skip
    assert_right(case)
    assert_right(replace(case, records=17, dim=14), scale=-0.6)


@pytest.mark.parametrize(("query", "stored"), [HALVES, HALVES[::-1], (HALVES[1], torch.float32)])
@pytest.mark.parametrize("place", PLACES)
def test_a_query_of_another_dtype(query: torch.dtype, stored: torch.dtype, place: str) -> None:
    """No bit of either half dtype is lost on the way."""
    assert_right(Case(dtype=query, stored=stored, place=place))


@pytest.mark.parametrize("place", PLACES)
def test_one_part(place: str) -> None:
    assert_right(Case(parts=1, place=place), scale=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_more_rows_than_a_tile(kind: str, place: str) -> None:
    assert_right(Case(kind, (30,), heads=35, kv_heads=1, tokens=2, records=30, place=place))


@pytest.mark.parametrize("place", PLACES)
def test_keys_themselves_are_records_of_tokens(place: str) -> None:
    query, index = Case(parts=1, token_major=True, place=place).make()
    found = index_scores.summaries(query, index, 70)
    keys = index.parts[0][0, :, :70]
    rows = query[0].reshape(2, 2, 32)
    assert torch.allclose(found[0], rows @ keys.mT * 32**-0.5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_bounds_are_bounds(place: str) -> None:
    """No key of a page scores more than its record, in the low precision of either."""
    keys = torch.randn(1, 2, 12, 8, 16, device=place)
    index = Index(summaries.outward(keys.amin(3), keys.amax(3), torch.bfloat16))
    query = torch.randn(1, 4, 1, 16, device=place)
    bound = index_scores.summaries(query, index, 12).double()
    rows = query.double().reshape(1, 2, 2, 16)
    best = (rows @ keys.double().flatten(2, 3).mT).unflatten(-1, (12, 8)).amax(-1) * 0.25
    assert (bound >= best - tolerance(best, torch.float32, 16)).all()


@pytest.mark.parametrize("held", [True, False], ids=["held", "streamed"])
@pytest.mark.parametrize(("kind", "join"), [("summaries", "sum"), ("signs", "max")])
@pytest.mark.parametrize("place", PLACES)
def test_one_launch_chooses_what_two_do(
    kind: str, join: str, held: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again with the same counters, whoever is last."""
    monkeypatch.setattr(index_select, "HELD", 128 if held else 32)
    monkeypatch.setattr(index_scores, "MOST_RECORDS", 32)
    case = Case(kind, slots=(2, 0), heads=2, kv_heads=1, dtype=torch.float16, place=place)
    query, index = case.make()
    pages = torch.tensor([71, 14], device=place)
    forced = {"join": join, "pages": pages, "first": 1, "last": 1}
    scores = getattr(index_scores, kind)(query, index, 72)
    right = top_pages.top_k(scores, 9, **forced)
    arrived = index_select.arrived_for(query, index)
    for counters in (arrived, arrived if held else None):
        found = index_select.top_k(kind, query, index, 72, 9, arrived=counters, **forced)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not arrived.any()
    assert right[1].tolist() == [[9], [9]]
    assert (right[0][0, :, -1] == 70).all()


def test_no_records_and_no_counts() -> None:
    query, index = Case().make()
    assert index_scores.summaries(query, index, 0).shape == (2, 2, 2, 0)
    whole = Index(tuple(part.nan_to_num() for part in index.parts))
    assert index_scores.summaries(query, whole, 80).isfinite().all()
    moved = query.expand(2, 4, 3, 32).transpose(1, 2).contiguous().transpose(1, 2)
    found = index_scores.summaries(moved, index, 70)
    assert torch.equal(found, index_scores.summaries(moved.contiguous(), index, 70))


def test_offsets_beyond_two_to_the_31() -> None:
    """Heads and sequences more than 2^31 elements apart, records 2^24."""
    part = torch.frombuffer(mmap.mmap(-1, 1 << 40, flags=SPARSE), dtype=torch.float16).as_strided(
        (2, 2, 20, 16), (1 << 37, 1 << 33, 1 << 24, 1)
    )
    part.copy_(torch.randn(part.shape))
    query = torch.randn(2, 2, 1, 16).half()
    found = index_scores.summaries(query, Index((part,), torch.tensor([20, 9])), 20)
    right = (query.double() @ part.double().mT) / 4
    assert torch.allclose(found[0].double(), right[0], atol=1e-5)
    assert torch.allclose(found[1, ..., :9].double(), right[1, ..., :9], atol=1e-5)


# ---- nothing is read that is not there ----


def fenced_index(count: int) -> tuple[Tensor, Index]:
    """Records 0 to 16 of 64 are there, to the byte, in the second of three slots."""
    part = fenced((3, 64, 2, 128), torch.float16).transpose(1, 2)
    allow(part.transpose(1, 2)[1, :16]).normal_()
    query = torch.randn(1, 4, 1, 128).half()
    return query, Index((part, part), torch.tensor([count]), torch.tensor([1]))


def read_fenced() -> None:
    """Run in a child."""
    query, index = fenced_index(16)
    found = index_scores.summaries(query, index, 64)
    assert found[..., :16].isfinite().all()
    assert (found[..., 16:] == float("-inf")).all()


def read_a_record_too_many() -> None:
    index_scores.summaries(*fenced_index(17), 64)


def test_no_record_is_touched_that_is_not_there() -> None:
    code, said = outcome("tests.test_index_scores:read_fenced")
    assert code == 0, said


def test_a_stray_read_would_be_seen() -> None:
    code, _ = outcome("tests.test_index_scores:read_a_record_too_many")
    assert code == -signal.SIGSEGV


def test_what_is_refused() -> None:
    query, index = Case().make()
    for change, message in [
        ((query[..., :16], index, 3), "must be one or two of width 32|of width 16"),
        ((query.double(), index, 3), r"query is torch\.float64"),
        ((query, index, -1), "records is -1"),
        ((query[:1], index, 3), "query is"),
    ]:
        with pytest.raises(ValueError, match=message):
            index_scores.summaries(*change)
    with pytest.raises(ValueError, match="parts are"):
        index_scores.signs(query, index, 3)
    for options, message in [
        ({"last": -1}, "are .9, 0, -1."),
        ({"pages": torch.zeros(3)}, r"pages is torch\.float32"),
        ({"arrived": torch.zeros(2, dtype=torch.int32)}, r"arrived is torch\.int32 .2"),
    ]:
        with pytest.raises(ValueError, match=message):
            index_select.top_k("summaries", query, index, 70, 9, **options)
