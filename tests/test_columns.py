"""Sums of attention over keys: both ways of making them, against the definition in float64."""

from __future__ import annotations

import math
import threading
from array import array

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.guard import allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels import columns_kernel, crew
from vattn.kernels.columns import Columns, columns, logits
from vattn.kernels.kv import KV

LIMIT = 2e-5  # of a sum of at most some tens of weights in float32
HALF_LIMIT = 2e-2  # products of half precision are exact in float32, their inputs are the same


def definition(query: Tensor, kv: KV, scale: float | None) -> Columns:
    """In float64, a sequence and a query head at a time."""
    batch, heads, rows, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    counts = kv.lengths.tolist()
    slots = list(range(batch)) if kv.slots is None else kv.slots.tolist()
    total = torch.zeros(batch, heads, max(counts), dtype=torch.float64)
    square, entropy = torch.zeros_like(total), torch.zeros(batch, heads, dtype=torch.float64)
    for b, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        for h in range(heads):
            keys = kv.key[slot, h // (heads // kv.key.shape[1]), :count].double().cpu()
            for r in range(rows):
                seen = count - rows + 1 + r
                weights = (keys[:seen] @ query[b, h, r].double().cpu() * scale).softmax(0)
                total[b, h, :seen] += weights
                square[b, h, :seen] += weights**2
                entropy[b, h] += torch.special.entr(weights).sum()
    return Columns(total, square, entropy, rows)


def drawn(
    counts: tuple[int, ...], heads: tuple[int, int], rows: int, dim: int, dtype: torch.dtype,
    place: str = "cpu", slots: tuple[int, ...] | None = None,
) -> tuple[Tensor, KV]:  # fmt: skip
    """A query and K, NaN behind the lengths."""
    reserved, many = max(counts) + 9, max(slots or range(len(counts))) + 1
    key = torch.full((many, heads[1], reserved, dim), math.nan)
    for slot, count in zip(slots or range(len(counts)), counts, strict=True):
        key[slot, :, :count] = torch.randn(heads[1], count, dim)
    query = torch.randn(len(counts), heads[0], rows, dim).to(dtype).to(place)
    key = key.to(dtype).to(place)
    at = None if slots is None else torch.tensor(slots, device=place)
    return query, KV(key, key, torch.tensor(counts, device=place), slots=at)


def assert_right(found: Columns, right: Columns, limit: float = LIMIT) -> None:
    assert found.rows == right.rows
    for name in ("total", "square", "entropy"):
        have, want = getattr(found, name).cpu().double(), getattr(right, name)
        assert have.shape == want.shape
        assert (have - want).abs().max() <= limit * right.rows, name


CASES = [
    pytest.param((70, 33), (4, 2), 5, 16, None, id="window"),
    pytest.param((24,), (2, 2), 24, 8, None, id="whole prompt"),
    pytest.param((66, 1, 30), (4, 1), 1, 32, (4, 0, 2), id="one row, slots"),
    pytest.param((67, 20), (3, 3), 20, 20, (1, 3), id="odd width"),
]


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a CPU makes them: by compiled loops, or where these are not to be had."""
    if request.param == "torch":
        monkeypatch.setattr("vattn.kernels.stream.available", lambda: "not asked for")
    return request.param


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [1, 500, 1 << 19])
def test_loops_take_any_block(block: int, threads: int, monkeypatch: pytest.MonkeyPatch):
    fresh_seed()
    monkeypatch.setattr("vattn.kernels.columns.BLOCK", block)
    monkeypatch.setattr("vattn.kernels.columns.THREAD_SCORES", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    query, kv = drawn((65, 41), (6, 2), 37, 16, torch.float32)
    assert_right(columns(query, kv), definition(query, kv, None))


def test_extreme_scores_and_a_bias(way: str):
    fresh_seed()
    query, kv = drawn((40, 40), (4, 2), 9, 16, torch.float32)
    kv.key[0, :, 3] = 1e19  # of one weight, or of none
    bias = torch.randn(2, 2, 40)
    found, seen = columns(query, kv, bias=bias), [block for _, block in logits(query, kv)]
    weights = (torch.cat(seen, 2) + bias.repeat_interleave(2, 1)[:, :, None]).double().softmax(-1)
    assert (found.total - weights.sum(2)).abs().max() < LIMIT
    assert (found.square - weights.square().sum(2)).abs().max() < LIMIT
    assert (found.entropy - torch.special.entr(weights).sum((-1, -2))).abs().max() < 1e-3


def test_nan_is_told(way: str):
    query, kv = drawn((12,), (2, 1), 3, 16, torch.float32)
    query[0, 1, 2] = math.nan
    found = columns(query, kv)
    assert found.total[0, 1].isnan().all()
    assert not found.total[0, 0].isnan().any()
    assert found.entropy.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(("counts", "heads", "rows", "dim", "slots"), CASES)
def test_a_cpu_gives_the_definition(counts, heads, rows, dim, slots, way):
    fresh_seed()
    query, kv = drawn(counts, heads, rows, dim, torch.float32, slots=slots)
    assert_right(columns(query, kv), definition(query, kv, None))
    assert_right(columns(query, kv, scale=0.7), definition(query, kv, 0.7))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("counts", "heads", "rows", "dim", "slots"), CASES)
def test_the_kernel_gives_the_definition(counts, heads, rows, dim, slots, place):
    fresh_seed()
    query, kv = drawn(counts, heads, rows, dim, torch.float32, place, slots)
    assert_right(columns_kernel.columns(query, kv), definition(query, kv, None))
    assert_right(columns_kernel.columns(query, kv, scale=-0.4), definition(query, kv, -0.4))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, place: str):
    fresh_seed()
    query, kv = drawn((66, 40), (4, 2), 20, 16, dtype, place)
    right = definition(query, kv, None)
    assert_right(columns_kernel.columns(query, kv), right, HALF_LIMIT)
    if place == "cpu":
        assert_right(columns(query, kv), right, LIMIT)


def test_rows_sum_to_one_and_blocks_are_the_rows(monkeypatch: pytest.MonkeyPatch):
    fresh_seed()
    query, kv = drawn((60, 45), (4, 2), 30, 16, torch.float32)
    whole = columns(query, kv)
    assert torch.allclose(whole.total.sum(-1), torch.full((2, 4), 30.0), atol=1e-4)
    monkeypatch.setattr("vattn.kernels.columns.SCORES", 2 * 4 * 60 * 7)
    blocks = list(logits(query, kv))
    assert [first for first, _ in blocks] == [0, 7, 14, 21, 28]
    weights = torch.cat([block for _, block in blocks], 2).softmax(-1)
    assert torch.allclose(weights.sum(2), whole.total, atol=1e-5)
    assert_right(columns(query, kv), definition(query, kv, None))


def test_more_rows_than_tokens_are_refused():
    query, kv = drawn((9, 4), (2, 2), 5, 8, torch.float32)
    for compute in (columns, columns_kernel.columns):
        with pytest.raises(ValueError, match="shortest holds 4"):
            compute(query, kv)
    query, kv = drawn((9, 8), (2, 2), 5, 8, torch.float32)
    with pytest.raises(ValueError, match="starts must be 0"):
        columns(query, KV(kv.key, kv.value, kv.lengths, starts=torch.tensor([0, 1])))


@pytest.mark.parametrize("which", ["inside", "outside"])
def test_no_row_behind_the_length_is_read(which: str):
    code, said = outcome(f"tests.test_columns:read_{which}")
    assert (code == 0) is (which == "inside"), said


def read(rows: int) -> None:
    """Sums over K of which the first page of each of two heads may be read: 64 rows of 64 bytes."""
    key = fenced((1, 2, 256, 16), torch.float32)
    for head in range(2):
        allow(key[0, head, :64]).normal_()
    query = torch.randn(1, 4, 3, 16)
    kv = KV(key, key, torch.tensor([rows]))
    for compute in (columns, columns_kernel.columns):
        assert torch.isfinite(compute(query, kv).total).all()


def read_inside() -> None:
    read(64)


def read_outside() -> None:
    read(65)


def test_scores_of_minus_infinity_end_and_give_nan(way: str, monkeypatch: pytest.MonkeyPatch):
    """Whichever thread meets them."""
    monkeypatch.setattr("vattn.kernels.columns.THREAD_SCORES", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    for head in range(6):
        query, kv = drawn((300, 300), (6, 6), 40, 16, torch.float32)
        query.abs_()
        kv.key[:, head, :300] = -math.inf
        found = columns(query, kv)
        assert found.total[:, head].isnan().any()
        assert not found.total[:, [h for h in range(6) if h != head]].isnan().any()


def test_what_a_helping_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch):
    caller = threading.get_ident()

    def run() -> None:
        if threading.get_ident() != caller:
            raise ArithmeticError("here")

    counts = array("q", bytes(8 * crew.COUNTS))
    with pytest.raises(ArithmeticError, match="here"):
        crew.work(run, counts, 1, 2)
