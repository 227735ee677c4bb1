"""The CPU choice of pages: what `choose` defines, ties to the lowest page, and no page twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from vattn.kernels import choose, choose_stream, index_stream, nibbles, signs
from vattn.kernels.index import Index
from vattn.kernels.stream import available

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
EMPTY = float("-inf")
JOINS: list[choose.Join] = ["sum", "max"]


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def joined(scores: Tensor, join: choose.Join) -> Tensor:
    """`choose.joined` in float64."""
    return choose.joined(scores.double(), join)


def assert_best(
    scores: Tensor,
    k: int,
    join: choose.Join = "sum",
    *,
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
    found: tuple[Tensor, Tensor] | None = None,
    loose: float = 1e-5,
) -> None:
    """The pages chosen are the k best in float64, give or take ``loose`` in the logarithm."""
    options = {"pages": pages, "first": first, "last": last, "starts": starts}
    ids, count = found or choose_stream.top_k(scores, k, join=join, **options)
    batch, heads, _, n = scores.shape
    all_pages = torch.full((batch,), n) if pages is None else pages
    exact = choose.force(joined(scores, join), all_pages, first, last, starts)
    right, right_count = choose.top_k(exact, k)
    assert ids.dtype == count.dtype == torch.int32
    assert ids.shape == right.shape
    assert torch.equal(count, right_count)
    for b in range(batch):
        for h in range(heads):
            some = int(count[b, h])
            mine, best = ids[b, h, :some].long(), right[b, h, :some].long()
            assert ids[b, h, some:].eq(n).all()
            assert (mine.diff() > 0).all()
            taken = torch.zeros(n, dtype=torch.bool)
            taken[mine] = True
            assert taken[best[exact[b, h, best] == choose.FORCED]].all()
            least = exact[b, h, best].min() if some else choose.FORCED
            if least < choose.FORCED:
                assert exact[b, h, mine].min() >= least - loose * (1 + least.abs())


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("n", [1, 7, 300, 5000, 40000])
def test_the_best_of_random_scores(n: int, rows: int, join: choose.Join) -> None:
    scores = torch.randn(2, 2, rows, n) * 3
    for k in (1, n // 20 + 3, n, n + 5):
        assert_best(scores, k, join)


@pytest.mark.parametrize("join", JOINS)
def test_forced_pages_starts_and_ends(join: choose.Join) -> None:
    scores = torch.randn(3, 2, 4, 200)
    pages, starts = torch.tensor([200, 5, 90], dtype=torch.int32), torch.tensor([0, 3, 40])
    for first, last in ((0, 0), (1, 2), (4, 30), (300, 1)):
        for k in (3, 50, 200):
            options = {"pages": pages, "first": first, "last": last, "starts": starts}
            assert_best(scores, k, join, **options)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("n", [64, 40000])
def test_ties_go_to_the_lowest_page(n: int, join: choose.Join) -> None:
    scores = torch.randn(1, 1, 4, 8)[..., torch.randint(8, (n,))]
    exact = joined(scores, join)[0, 0]
    for k in (1, 5, n // 3, n):
        ids, count = choose_stream.top_k(scores, k, join=join)
        best = torch.sort(exact, descending=True, stable=True).indices[:k].sort().values
        assert int(count) == k
        assert torch.equal(ids[0, 0].long(), best)


def test_equal_scores_give_the_first_pages() -> None:
    ids, _ = choose_stream.top_k(torch.zeros(1, 2, 4, 50000), 2048)
    assert torch.equal(ids, torch.arange(2048, dtype=torch.int32).expand(1, 2, 2048))


@pytest.mark.parametrize("join", JOINS)
def test_order_holds_where_shares_underflow(join: choose.Join) -> None:
    """One page takes nearly all; the others' order is a matter of logarithms."""
    scores = torch.randn(1, 2, 4, 30000) * 40
    scores[..., 123] = 900.0
    for k in (2, 3000, 20000):
        assert_best(scores, k, join)


def test_pages_without_a_score_are_left_out() -> None:
    scores = torch.randn(1, 2, 4, 100)
    scores[..., 30:] = EMPTY
    scores[:, 1] = EMPTY
    ids, count = choose_stream.top_k(scores, 50)
    assert count.tolist() == [[30, 0]]
    assert torch.equal(ids[0, 0, :30], torch.arange(30, dtype=torch.int32))
    assert_best(scores, 50, last=3)


def test_scores_of_any_stride() -> None:
    scores = torch.randn(2, 3, 4, 50)
    turned = scores.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    assert torch.equal(choose_stream.top_k(turned, 7)[0], choose_stream.top_k(scores, 7)[0])


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 0)])
def test_nothing_to_choose(k: int, n: int) -> None:
    ids, count = choose_stream.top_k(torch.randn(2, 2, 4, n), k)
    assert ids.shape == (2, 2, 0)
    assert count.eq(0).all()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("form", ["summaries", "signs", "nibbles"])
def test_from_an_index_as_from_its_scores(form: index_stream.Form, join: choose.Join) -> None:
    x, query = torch.randn(2, 2, 20000, 32), torch.randn(2, 8, 1, 32)
    parts = {"summaries": lambda x: (x.half(),), "signs": signs.pack, "nibbles": nibbles.pack}
    index = Index(parts[form](x), torch.tensor([20000, 700]))
    scores = index_stream.scores(form, query, index, 20000)
    pages = torch.tensor([20000, 701])
    options = {"pages": pages, "first": 4, "last": 33}
    for k in (500, 5000):
        found = choose_stream.top_k_index(form, query, index, 20000, k, join=join, **options)
        ids, count = choose_stream.top_k(scores, k, join=join, **options)
        assert torch.equal(found[1], count)
        assert torch.equal(found[0], ids)
        assert_best(scores, k, join, found=found, **options)
        torch.set_num_threads(10)
        many = choose_stream.top_k_index(form, query, index, 20000, k, join=join, **options)
        torch.set_num_threads(2)
        assert torch.equal(many[0], ids)


def test_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        choose_stream.top_k(torch.randn(2, 2, 4, 9).double(), 3)
    with pytest.raises(ValueError, match="last dimension"):
        choose_stream.top_k(torch.randn(2, 2, 9, 4).mT, 3)
