"""The CPU kernel of sparse attention: the definition in float64, and rows that it may not touch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.decoding import Case
from tests.guard import PAGE, allow, fenced, outcome
from vattn.kernels import sparse, sparse_stream
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection, reference
from vattn.kernels.stream import available

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMPTY = float("-inf")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not yet written holds NaN, workspaces as well."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(params=["whole", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a head's list in one chunk; and in many, on two threads."""
    if request.param == "chunks":
        torch.set_num_threads(2)
        monkeypatch.setattr(sparse_stream, "CHUNK", 19)
        monkeypatch.setattr(sparse_stream, "THREAD_BYTES", 1)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``make``, an `empty` function of torch, with bytes that are NaN in every float type."""

    def filled(*args: Any, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        tensor.untyped_storage().fill_(255)
        return tensor

    return filled


@dataclass
class Choice:
    """A selection of a `Case`'s sequences: every page with a chance of ``share``."""

    page_tokens: int = 8
    share: float = 0.4
    weighted: bool = False
    case: Case = field(default_factory=Case)

    def make(self) -> tuple[Tensor, KV, Selection]:
        query, kv, _, _ = self.case.make()
        pages = -(-self.case.reserved // self.page_tokens)
        shape = (kv.batch, kv.key.shape[1], pages)
        there = torch.tensor(self.case.lengths)[:, None, None] > self.page_tokens * torch.arange(
            pages
        )
        taken = (torch.rand(shape) < self.share) & there
        count = taken.sum(-1, dtype=torch.int32)
        ids = torch.where(taken, torch.arange(pages), pages).sort(-1).values
        # Behind the count lies what must not be read.
        ids = ids.masked_fill(torch.arange(pages) >= count[..., None], 2**30).int()
        weights = torch.randn(shape) if self.weighted else None
        return query, kv, Selection(ids, count, self.page_tokens, weights)


def assert_exact(query: Tensor, kv: KV, selection: Selection, scale: float | None = None) -> None:
    out, lse, mass = sparse_stream.attend(query, kv, selection, scale=scale, want_mass=True)
    right, right_lse, right_mass = reference(query, kv, selection, scale=scale)
    assert out.dtype == query.dtype
    assert out.shape == right.shape
    assert lse.dtype == torch.float32
    assert mass is not None
    terms = selection.ids.shape[2] * selection.page_tokens
    error = (out.double() - right).abs().max().item()
    assert error <= tolerance(right, query.dtype, terms), error
    assert torch.equal(lse == EMPTY, right_lse == EMPTY)
    gap = (lse.double() - right_lse)[right_lse.isfinite()].abs()
    limit = tolerance(right_lse, torch.float32, query.shape[3])
    assert gap.numel() == 0 or gap.max().item() <= limit
    assert (mass.double() - right_mass).abs().max().item() <= limit * query.shape[1]
    seen = right_lse.isfinite().unflatten(1, (kv.key.shape[1], -1)).sum((2, 3))
    torch.testing.assert_close(mass.sum(-1), seen.float(), atol=1e-4, rtol=0)
    plain, plain_lse, none = sparse_stream.attend(query, kv, selection, scale=scale)
    assert none is None
    assert torch.equal(plain, out)
    assert torch.equal(plain_lse, lse)


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("token_major", [False, True], ids=["head_major", "token_major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_tokens", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_exact(
    tokens: int, page_tokens: int, dtype: torch.dtype, token_major: bool, cut: None
) -> None:
    case = Case(tokens=tokens, dtype=dtype, token_major=token_major)
    assert_exact(*Choice(page_tokens, case=case).make())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (7, 16), (16, 7), (24, 40), (128, 80)])
def test_any_sizes(dim: int, value_dim: int, dtype: torch.dtype, cut: None) -> None:
    case = Case(dim=dim, value_dim=value_dim, dtype=dtype, tokens=2)
    assert_exact(*Choice(case=case).make())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("page_tokens", [1, 5])
def test_slots_starts_and_ragged_lengths(page_tokens: int, weighted: bool, cut: None) -> None:
    case = Case(
        lengths=[150, 3, 77], starts=[33, 0, 76], slots=[4, 0, 2], tokens=2, token_major=weighted
    )
    assert_exact(*Choice(page_tokens, 0.7, weighted, case).make())


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(1, 1, 1), (7, 1, 1), (5, 5, 16)])
def test_rows_of_a_group(heads: int, kv_heads: int, tokens: int, cut: None) -> None:
    case = Case(heads=heads, kv_heads=kv_heads, tokens=tokens)
    assert_exact(*Choice(share=0.9, weighted=True, case=case).make())


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scales(scale: float) -> None:
    query, kv, selection = Choice().make()
    assert_exact(query, kv, selection, scale)
    scales = [torch.tensor([0.5]), torch.tensor([2.0, 0.25])]
    for key_scale, value_scale in (scales, reversed(scales)):
        assert_exact(query, replace(kv, key_scale=key_scale, value_scale=value_scale), selection)


def test_all_pages_are_dense_attention() -> None:
    query, kv, selection = Choice(share=1.0, case=Case(tokens=4)).make()
    out, _, _ = sparse_stream.attend(query, kv, selection)
    for b, length in enumerate([150, 3]):
        key, value = kv.key[b : b + 1, :, :length], kv.value[b : b + 1, :, :length]
        mask = torch.arange(length) <= (length - 4 + torch.arange(4))[:, None]
        seen = mask.any(-1)
        found = torch.nn.functional.scaled_dot_product_attention(
            query[b : b + 1, :, seen], key, value, mask[seen], enable_gqa=True
        )
        torch.testing.assert_close(out[b : b + 1, :, seen], found)
        assert out[b, :, ~seen].eq(0).all()


def test_agrees_with_the_gathering_form() -> None:
    query, kv, selection = Choice(weighted=True, case=Case(tokens=3)).make()
    ours = sparse_stream.attend(query, kv, selection, want_mass=True)
    for mine, other in zip(
        ours, sparse.gathered(query, kv, selection, want_mass=True), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [0, 4])
def test_nothing_chosen_is_zero(entries: int) -> None:
    query, kv, _, _ = Case().make()
    ids = torch.full((2, 2, entries), 2**31 - 1, dtype=torch.int32)
    selection = Selection(ids, torch.zeros(2, 2, dtype=torch.int32), 8)
    out, lse, mass = sparse_stream.attend(query, kv, selection, want_mass=True)
    assert out.eq(0).all()
    assert lse.eq(EMPTY).all()
    assert mass is not None
    assert mass.eq(0).all()


def test_pages_beyond_the_end_and_before_the_start_are_nothing() -> None:
    query, kv, _, _ = Case(lengths=[150, 3], starts=[40, 0]).make()
    ids = torch.tensor([0, 1, 18, 19, 2**28], dtype=torch.int32).expand(2, 2, 5)
    selection = Selection(ids, torch.full((2, 2), 5, dtype=torch.int32), 8)
    assert_exact(query, kv, selection)


def test_a_page_may_be_chosen_twice_and_in_any_order() -> None:
    query, kv, _, _ = Case(tokens=2).make()
    ids = torch.tensor([5, 0, 5, 18], dtype=torch.int32).repeat(2, 2, 1)
    assert_exact(query, kv, Selection(ids, torch.full((2, 2), 4, dtype=torch.int32), 8))


def test_a_weight_of_minus_infinity_leaves_a_page_out() -> None:
    query, kv, selection = Choice(page_tokens=3, share=1.0).make()
    weights = torch.zeros(selection.ids.shape)
    weights[..., 1::2] = EMPTY
    assert_exact(query, kv, replace(selection, log_weights=weights))


def test_queries_lists_and_results_of_any_stride() -> None:
    query, kv, selection = Choice(case=Case(tokens=3)).make()
    plain = sparse_stream.attend(query, kv, selection)[0]
    for order in ((0, 2, 1, 3), (2, 0, 1, 3)):
        given = query.permute(order).contiguous().permute(*(order.index(i) for i in range(4)))
        assert torch.equal(sparse_stream.attend(given, kv, selection)[0], plain)
    lists = Selection(
        selection.ids.mT.contiguous().mT, selection.count.mT.contiguous().mT, selection.page_tokens
    )
    assert torch.equal(sparse_stream.attend(query, kv, lists)[0], plain)


def test_bits_do_not_depend_on_threads_or_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_stream, "THREAD_BYTES", 1)
    case = Case(lengths=[4000, 3777, 3000], reserved=4096, dtype=torch.bfloat16)
    query, kv, selection = Choice(case=case).make()
    torch.set_num_threads(2)
    two = sparse_stream.attend(query, kv, selection, want_mass=True)
    torch.set_num_threads(1)
    one = sparse_stream.attend(query, kv, selection, want_mass=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    alone = sparse_stream.attend(
        query[1:2],
        KV(kv.key[1:2], kv.value[1:2], kv.lengths[1:2]),
        Selection(selection.ids[1:2], selection.count[1:2], 8),
        want_mass=True,
    )
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, one, strict=True))


def test_nan_is_seen_where_it_is_chosen() -> None:
    query, kv, selection = Choice(page_tokens=1, share=0.5).make()
    chosen = int(selection.ids[0, 1, 0])
    left = next(t for t in range(150) if t not in selection.ids[0, 0].tolist())
    kv.value[0, 1, chosen] = float("nan")
    kv.value[0, 0, left] = float("nan")
    out, _, _ = sparse_stream.attend(query, kv, selection)
    assert out[0, 2:].isnan().all()
    assert not out[0, :2].isnan().any()
    assert not out[1].isnan().any()


def test_refused_with_the_reason() -> None:
    query, kv, selection = Choice().make()
    eight = KV(kv.key.to(torch.float8_e4m3fn), kv.value.to(torch.float8_e4m3fn), kv.lengths)
    with pytest.raises(ValueError, match="this kernel takes float32, bfloat16, float16"):
        sparse_stream.attend(query, eight, selection)
    with pytest.raises(ValueError, match=r"must be \[2, 2, pages\]"):
        sparse_stream.attend(query, kv, Selection(selection.ids[:1], selection.count[:1], 8))


# ---- nothing is touched that is not there --------------------------------------------------------


def fenced_kv() -> tuple[Tensor, KV, list[int]]:
    """Pages of 16 rows; of the second of three slots pages 1 and 3 are there, to the byte, and of
    page 4 the first half of what the length says."""
    key, value = (fenced((3, 128, 2, 32), torch.float32).transpose(1, 2) for _ in range(2))
    assert key.stride(2) * 16 * 4 == PAGE
    for tensor in (key, value):
        for page in (1, 3, 4):
            allow(tensor.transpose(1, 2)[1, 16 * page : 16 * page + 16]).normal_()
    at = [torch.tensor([n]) for n in (80, 16, 1)]
    return torch.randn(1, 4, 2, 32), KV(key, value, *at), [0, 1, 3, 4, 5]


def select(pages: list[int], page_tokens: int) -> Selection:
    ids = torch.tensor(pages, dtype=torch.int32).expand(1, 2, len(pages))
    return Selection(ids, torch.full((1, 2), len(pages), dtype=torch.int32), page_tokens)


def read_fenced() -> None:
    """Run in a child: pages before the start, between those chosen and behind the end are not."""
    query, kv, pages = fenced_kv()
    for chunk in (512, 16):
        sparse_stream.CHUNK = chunk
        assert_exact(query, kv, select(pages, 16))
        assert_exact(query, kv, select([16, 31, 48, 79], 1))


def read_a_page_too_many() -> None:
    query, kv, pages = fenced_kv()
    sparse_stream.attend(query, kv, select([1, 2, *pages[2:]], 16))


def read_a_row_behind() -> None:
    query, kv, pages = fenced_kv()
    sparse_stream.attend(query, replace(kv, lengths=kv.lengths + 1), select(pages, 16))


def test_no_row_is_touched_that_is_not_chosen() -> None:
    code, said = outcome("tests.test_sparse_stream:read_fenced")
    assert code == 0, said


@pytest.mark.parametrize("stray", ["read_a_page_too_many", "read_a_row_behind"])
def test_the_fence_holds(stray: str) -> None:
    code, _ = outcome(f"tests.test_sparse_stream:{stray}")
    assert code == -signal.SIGSEGV
