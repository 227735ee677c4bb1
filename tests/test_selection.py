"""Laws of records and of choosing: bounds stay bounds, codes lose what they may, ties go to the
lowest index, and a selection means what its definition says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention import cache_rows, fresh_seed, tolerance
from tests.looks import poisoned
from vattn.kernels import choose, nibbles, score, signs, sparse, summaries
from vattn.kernels.contract import EMPTY
from vattn.kernels.contract import reference as dense
from vattn.kernels.index import Index
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection, reference

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = settings(max_examples=60, deadline=None, derandomize=False)
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


# ---- records -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("given_as", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_a_box_rounded_outward_holds_all_of_it(
    size: float, given_as: torch.dtype, kept: torch.dtype
) -> None:
    low, high = (size * torch.randn(2, 64, 16)).to(given_as).sort(dim=0).values
    a, b = summaries.outward(low, high, kept)
    assert a.dtype == b.dtype == kept
    a, b, low, high = a.double(), b.double(), low.double(), high.double()
    assert bool((b >= 0).all())
    assert bool((a - b <= low).all())
    assert bool((a + b >= high).all())
    # Two roundings to nearest and one up, each at most an eps of what it rounds.
    loose = 4 * torch.finfo(kept).eps * (low.abs() + high.abs()) + 8 * torch.finfo(kept).tiny
    assert bool((a + b - high <= loose).all())
    assert bool((low - (a - b) <= loose).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_key_of_a_page_scores_above_its_bound(dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 9, 8, 32) * torch.logspace(-1, 1.5, 32)).to(dtype)
    query = (3 * torch.randn(1, 6, 1, 32)).to(dtype)
    index = Index(tuple(p[None] for p in summaries.outward(keys.amin(2), keys.amax(2), dtype)))
    bound = score.summaries(query, index, 9).double()
    rows = query.reshape(1, 2, 3, 32).double()
    scores = torch.einsum("bhrd,hpsd->bhrps", rows, keys.double()) * 32**-0.5
    sums = torch.einsum("bhrd,hpsd->bhrps", rows.abs(), keys.double().abs()) * 32**-0.5
    slack = 32 * torch.finfo(torch.float32).eps * sums.amax(-1)
    assert bool((bound + slack >= scores.amax(-1)).all())


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_summaries(dtype: torch.dtype, spread: bool) -> None:
    query = torch.randn(2, 6, 2, 24)
    a, b = torch.randn(3, 2, 7, 24).to(dtype), torch.rand(3, 2, 7, 24).to(dtype)
    counts, slots = [5, 3], [2, 0]
    parts = [cut(p, counts, slots) for p in ((a, b) if spread else (a,))]
    index = Index(tuple(parts), torch.tensor(counts), torch.tensor(slots))
    found = score.summaries(query, index, 6, scale=0.7)
    rows = index.rows(query).double()
    exact = rows @ a[slots].double().mT * 0.7
    if spread:
        exact += rows.abs() @ b[slots].double().mT * 0.7
    assert_scores(found, exact[..., :6], counts, 24)


@pytest.mark.parametrize("dim", [5, 16, 33])
def test_sign_codes(dim: int) -> None:
    x = torch.randn(2, 3, 11, dim)
    codes, scales = signs.pack(x)
    assert codes.shape[-1] == -(-dim // 8)
    found = signs.unpack(codes, scales, dim)
    assert torch.equal(found >= 0, x >= 0)
    # No other length of the same signs is nearer, but for the rounding to half precision.
    error = (x - found).square().sum(-1)
    for factor in (0.98, 1.02):
        assert bool((error <= (x - factor * found).square().sum(-1)).all())
    index = Index((codes, scales), torch.tensor([11, 7]))
    query = torch.randn(2, 9, 1, dim)
    exact = index.rows(query).double() @ found.double().mT * dim**-0.5
    assert_scores(score.signs(query, index, 11), exact, [11, 7], dim, 3e-4)


def test_a_zero_is_positive_and_its_length_zero() -> None:
    codes, scales = signs.pack(torch.zeros(2, 8))
    assert codes.unique().tolist() == [255]
    assert not scales.any()


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_a_rotation_keeps_products(dim: int) -> None:
    turn = signs.rotation(dim, seed=3)
    gap = turn.double().T @ turn.double() - torch.eye(dim, dtype=torch.float64)
    assert float(gap.abs().max()) <= 4 * torch.finfo(torch.float32).eps
    assert torch.equal(turn, signs.rotation(dim, seed=3))
    if dim > 1:
        assert not torch.equal(turn, signs.rotation(dim, seed=4))


@pytest.mark.parametrize("dim", [2, 16, 34])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_four_bits_lose_half_a_step(shift: float, dim: int) -> None:
    x = torch.randn(2, 3, 9, dim) * 4 + shift
    codes, scales = nibbles.pack(x)
    found = nibbles.unpack(codes, scales)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / nibbles.LEVELS
    # The least and the step are half precision: the top level moves by 15 roundings of the step.
    half = torch.finfo(torch.float16).eps
    slack = half * (x.abs().amax(-1, keepdim=True) + 16 * step)
    assert bool(((x - found).abs() <= step / 2 + slack).all())
    index = Index((codes, scales), torch.tensor([9, 4]))
    query = torch.randn(2, 3, 2, dim)
    exact = index.rows(query).double() @ found.double().mT * dim**-0.5
    assert_scores(score.nibbles(query, index, 9), exact, [9, 4], dim)


def test_equal_channels_cost_nothing_and_odd_ones_are_refused() -> None:
    x = torch.randint(-8, 8, (5, 1)).expand(5, 6).float()
    assert torch.equal(nibbles.unpack(*nibbles.pack(x)), x)
    with pytest.raises(ValueError, match="head_dim is 5: must be even"):
        nibbles.pack(torch.zeros(2, 5))


def cut(part: Tensor, counts: list[int], slots: list[int]) -> Tensor:
    """The part with NaN behind each slot's count, and in slots that no sequence is."""
    held = dict(zip(slots, counts, strict=True))
    return poisoned(part, [held.get(slot, 0) for slot in range(len(part))], 0)


def assert_scores(
    found: Tensor, exact: Tensor, counts: list[int], terms: int, more: float = 0.0
) -> None:
    """``found`` is -inf behind the counts, and ``exact`` [B, H, R, n] elsewhere to float32's sums
    and ``more`` of the largest (the sign kernels' tables)."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    for b, count in enumerate(counts):
        assert bool((found[b, ..., count:] == EMPTY).all())
        limit = tolerance(exact[b, ..., :count], torch.float32, terms)
        limit += more * float(exact[b, ..., :count].abs().max())
        assert float((found[b, ..., :count] - exact[b, ..., :count]).abs().max()) <= limit


# ---- choosing ------------------------------------------------------------------------------------
def test_joined_weighs_every_row_alike() -> None:
    scores = 4 * torch.randn(2, 3, 5, 17)
    scores[1, :, :, 9:] = EMPTY
    shares = scores.double().softmax(-1)
    for how, exact in (("sum", shares.sum(2).log()), ("max", shares.amax(2).log())):
        found = choose.joined(scores, how)
        assert torch.equal(found == EMPTY, exact == EMPTY)
        gap = (found - exact).masked_fill(exact == EMPTY, 0.0)
        assert float(gap.abs().max()) <= tolerance(exact, torch.float32, 17)
    louder = scores.clone()
    louder[:, :, 0] += 50.0  # a row's own constant says nothing
    gap = choose.joined(louder) - choose.joined(scores)
    assert float(gap.nan_to_num(0.0).abs().max()) <= 100 * torch.finfo(torch.float32).eps * 8


def test_rows_without_any_page_join_to_nothing() -> None:
    assert choose.joined(torch.full((1, 1, 2, 3), EMPTY)).tolist() == [[[EMPTY] * 3]]


@given(st.data())
@CASES
def test_forced_pages_are_the_first_and_last_of_each_sequence(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    ends = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3))
    starts = [data.draw(st.integers(0, end)) for end in ends]
    first, last = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    joined = torch.zeros(len(ends), 2, n)
    choose.force(joined, torch.tensor(ends), first, last, torch.tensor(starts))
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        pages = list(range(start, end))
        taken = {*pages[:first], *(pages[-last:] if last else [])}
        wanted = [INFINITY if p in taken else 0.0 if p in pages else EMPTY for p in range(n)]
        assert joined[b].tolist() == [wanted] * 2


ROW = st.lists(st.sampled_from([EMPTY, -2.0, -1.0, 0.0, 1.0, INFINITY]), min_size=1, max_size=14)


def best(row: list[float]) -> list[int]:
    """Pages there are, best first, ties to the lowest."""
    return sorted((p for p in range(len(row)) if row[p] > EMPTY), key=lambda p: (-row[p], p))


def picked(found: tuple[Tensor, Tensor], n: int) -> list[int]:
    """The ids of a single row, checked for their form."""
    ids, count = found
    assert ids.dtype == count.dtype == torch.int32
    row, k = ids[0, 0].tolist(), int(count)
    assert row[:k] == sorted(set(row[:k]))
    assert row[k:] == [n] * (len(row) - k)
    return row[:k]


@given(ROW, st.integers(1, 16))
@CASES
def test_top_k_takes_the_best_and_of_equals_the_lowest(row: list[float], k: int) -> None:
    found = picked(choose.top_k(torch.tensor([[row]]), k), len(row))
    assert found == sorted(best(row)[:k])


@given(ROW, st.floats(0.01, 0.99), st.integers(0, 3), st.integers(1, 14))
@CASES
def test_top_p_takes_the_fewest_that_hold_the_share(
    row: list[float], p: float, least: int, most: int
) -> None:
    least = min(least, most)
    found = picked(choose.top_p(torch.tensor([[row]]), p, least, most), len(row))
    order = best(row)
    assert found == sorted(order[: len(found)])
    assert len(found) <= most
    weights = [0.0 if s in (EMPTY, INFINITY) else math.exp(s) for s in row]
    total = sum(weights) or 1.0
    held = sum(weights[t] for t in found) / total
    if least < len(found) < most:
        assert held >= p - 1e-9 or not any(weights)
        last = order[len(found) - 1]
        assert row[last] == INFINITY or held - weights[last] / total < p + 1e-9
    if len(found) == most:
        assert sum(weights[t] for t in order[: most - 1]) / total < p + 1e-9 or most <= max(
            least, sum(s == INFINITY for s in row)
        )


@given(ROW, st.floats(0.1, 3.0), st.integers(1, 14))
@CASES
def test_threshold_takes_what_comes_near_the_best(
    row: list[float], alpha: float, most: int
) -> None:
    found = picked(choose.threshold(torch.tensor([[row]]), alpha, 0, most), len(row))
    plain = [s for s in row if s not in (EMPTY, INFINITY)]
    limit = torch.tensor(max(plain, default=EMPTY)) - alpha
    near = [p for p in best(row) if row[p] > float(limit)]
    assert found == sorted(near[:most])


# ---- what a selection means ----------------------------------------------------------------------
def everything(batch: int, heads: int, n: int, size: int = 1) -> Selection:
    pages = -(-n // size)
    ids = torch.arange(pages, dtype=torch.int32).expand(batch, heads, -1).contiguous()
    return Selection(ids, torch.full((batch, heads), pages, dtype=torch.int32), size)


def some(batch: int, heads: int, n: int, size: int) -> Selection:
    """Pages drawn at random, of random count, and nonsense behind the counts."""
    pages = -(-n // size)
    count = torch.randint(0, pages + 1, (batch, heads), dtype=torch.int32)
    ids = torch.rand(batch, heads, pages).argsort(dim=-1)
    place = torch.arange(pages)
    ids = ids.masked_fill(place >= count[..., None], pages).sort(dim=-1).values
    return Selection(ids.masked_fill(ids == pages, 2**30).int(), count, size)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_chosen_is_dense_attention(dtype: torch.dtype, length: int) -> None:
    query = torch.randn(2, 6, length, 16).to(dtype)
    key, value = (cache_rows(2, 2, 21, width, dtype, "token_major") for width in (16, 24))
    mask = torch.ones(length, 21, dtype=torch.bool).tril(21 - length)
    exact, exact_lse = dense(query, key, value, mask)
    selection = everything(2, 2, 21, 4)
    out, lse, mass = reference(query, KV(key, value), selection)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 3.0 * length).double())
    found, found_lse, found_mass = sparse.gathered(query, KV(key, value), selection, want_mass=True)
    assert float((found - exact).abs().max()) <= tolerance(exact, dtype, 21)
    assert float((found_lse - exact_lse).abs().max()) <= tolerance(exact_lse, torch.float32, 21)
    assert float((found_mass - mass).abs().max()) <= tolerance(mass, torch.float32, 21)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 5])
def test_only_what_is_chosen_counts(length: int, size: int) -> None:
    query = torch.randn(2, 4, length, 16)
    lengths, starts = [37, 18], [0, 3]
    key, value = (poisoned(torch.randn(2, 2, 37, 16), lengths) for _ in range(2))
    kv = KV(key, value, torch.tensor(lengths), torch.tensor(starts))
    selection = some(2, 2, 40, size)
    out, lse, mass = reference(query, kv, selection)
    for b in range(2):
        for h in range(2):
            count = int(selection.count[b, h])
            pages = selection.ids[b, h, :count].tolist()
            chosen = [t for p in pages for t in range(p * size, (p + 1) * size)]
            chosen = [t for t in chosen if starts[b] <= t < lengths[b]]
            rows = slice(2 * h, 2 * h + 2)
            last = lengths[b] - length + torch.arange(length)
            mask = torch.tensor(chosen, dtype=torch.long) <= last[:, None]
            k, v = key[b : b + 1, h : h + 1, chosen], value[b : b + 1, h : h + 1, chosen]
            exact, exact_lse = dense(query[b : b + 1, rows], k, v, mask)
            torch.testing.assert_close(out[b : b + 1, rows], exact)
            torch.testing.assert_close(lse[b : b + 1, rows], exact_lse)
            assert not mass[b, h, count:].any()
            seen = float((exact_lse > EMPTY).sum())
            assert float(mass[b, h].sum()) == pytest.approx(seen)
    found, found_lse, _ = sparse.gathered(query, kv, selection)
    assert float((found - out).abs().max()) <= tolerance(out, torch.float32, 37)
    assert torch.equal(found_lse == EMPTY, lse == EMPTY)


def test_a_log_weight_stands_for_copies_of_a_token() -> None:
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    copies = torch.tensor([1, 3, 1, 2, 1, 1])
    weighted = Selection(
        torch.arange(6, dtype=torch.int32)[None, None],
        torch.full((1, 1), 6, dtype=torch.int32),
        1,
        copies.log()[None, None],
    )
    out, lse, _ = reference(query, KV(key, value), weighted)
    longer = [t.repeat_interleave(copies, 2) for t in (key, value)]
    exact, exact_lse, _ = reference(query, KV(*longer), everything(1, 1, 9))
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)


def test_a_tail_joins_what_it_stands_for() -> None:
    query, key, value = torch.randn(1, 4, 2, 16), *torch.randn(2, 1, 2, 20, 16)
    kv, pages = KV(key, value), torch.arange(5, dtype=torch.int32).expand(1, 2, -1)
    count = torch.full((1, 2), 2, dtype=torch.int32)
    far = Selection(pages[..., :2].contiguous(), count, 4)
    out, lse, _ = sparse.gathered(query, kv, far)
    near = Selection(pages[..., 2:].contiguous(), count + 1, 4, tail=(out, lse))
    found, found_lse, _ = sparse.attend(query, kv, near)
    exact, exact_lse, _ = reference(query, kv, everything(1, 2, 20, 4))
    assert float((found - exact).abs().max()) <= tolerance(exact, torch.float32, 20)
    assert float((found_lse - exact_lse).abs().max()) <= tolerance(exact_lse, torch.float32, 20)


IDS, COUNT = torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((IDS.long(), COUNT), r"ids is torch.int64 \(1, 2, 3\): must be int32"),
        ((IDS[0], COUNT), r"ids is torch.int32 \(2, 3\): must be int32"),
        ((IDS, COUNT[0]), r"count is torch.int32 \(2,\): must be int32 \(1, 2\)"),
        ((IDS, COUNT, 0), "page_tokens is 0: must be 1 or more"),
        ((IDS, COUNT, 1, IDS), r"log_weights is torch.int32 \(1, 2, 3\): must be float32"),
    ],
)
def test_a_selection_names_what_it_is_not(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(*fields)


def test_a_selection_of_another_batch_is_refused() -> None:
    kv = KV(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))
    with pytest.raises(ValueError, match=r"ids is \(1, 2, 3\): must be \[2, 2, pages\]"):
        Selection(IDS, COUNT).check(torch.zeros(2, 4, 1, 8), kv)
