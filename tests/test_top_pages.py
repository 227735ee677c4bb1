"""The kernel chooses what `choose` does: the best pages, the lowest of equals, ascending."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.places import PLACES
from vattn.kernels import choose, top_pages

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
RULES = {"top_k": (9,), "top_p": (0.7, 2, 30), "threshold": (2.5, 2, 30)}
EMPTY = float("-inf")


@pytest.fixture(autouse=True)
def poisoned(one_thread: None) -> Iterator[None]:
    """New memory holds what no page number is."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["held", "streamed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Keys in registers, or in a workspace of several blocks."""
    held = ((64, 4),) if request.param == "held" else ()
    monkeypatch.setattr(top_pages, "HELD", held)
    monkeypatch.setattr(top_pages, "STREAMED", (32, 4))
    return str(request.param)


def make(place: str, rows: int = 2, n: int = 50, heads: int = 1) -> tuple[Tensor, Tensor]:
    """Scores of two sequences, the second one shorter, and their pages."""
    pages = torch.tensor([n, n // 2 + 1], device=place)
    scores = 3 * torch.randn(2, heads, rows, n, device=place)
    return scores.masked_fill(
        (torch.arange(n, device=place) >= pages[:, None])[:, None, None], EMPTY
    ), pages


def assert_chosen(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    for mine, other in zip(found, right, strict=True):
        assert mine.dtype == torch.int32
        assert mine.tolist() == other.tolist()


def assert_best(found: tuple[Tensor, Tensor], joined: Tensor) -> None:
    """By the law alone: no page that was left out beats one that was taken."""
    ids, count = found
    n = joined.shape[-1]
    for b, h in torch.cartesian_prod(*map(torch.arange, ids.shape[:2])).tolist():
        held = int(count[b, h])
        mine = ids[b, h, :held].long()
        assert (mine.diff() > 0).all()
        assert (ids[b, h, held:] == n).all()
        left = torch.ones(n, dtype=torch.bool, device=ids.device)
        left[mine] = False
        if held and left.any():
            assert joined[b, h, mine].min() >= joined[b, h, left].max() - 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", PLACES)
def test_one_row_with_ties(rule: str, form: str, place: str) -> None:
    """Whole numbers, both zeros among them: many are equal."""
    scores = make(place, 1)[0].round()
    found = getattr(top_pages, rule)(scores, *RULES[rule], join=None)
    assert_chosen(found, getattr(choose, rule)(scores[:, :, 0].clone(), *RULES[rule]))


@pytest.mark.parametrize("join", ["sum", "max"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", PLACES)
def test_joined_and_forced(rule: str, join: choose.Join, form: str, place: str) -> None:
    scores, pages = make(place)
    starts = torch.tensor([0, 3], device=place)
    joined = choose.force(choose.joined(scores.double(), join), pages, 2, 1, starts)
    forced = {"pages": pages, "first": 2, "last": 1, "starts": starts}
    found = getattr(top_pages, rule)(scores, *RULES[rule], join=join, **forced)
    assert_best(found, joined)
    right = getattr(choose, rule)(joined, *RULES[rule])
    assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("k", [0, 1, 25, 26, 27, 50, 99])
@pytest.mark.parametrize("place", PLACES)
def test_any_number_of_pages(k: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_pages, "HELD", ((64, 4),))
    scores, pages = make(place)
    joined = choose.force(choose.joined(scores.double()), pages, 0, 0)
    found = top_pages.top_k(scores, k, pages=pages)
    assert found[0].shape == (2, 1, min(k, 50))
    assert found[1].flatten().tolist() == [min(k, 50), min(k, 26)]
    assert_best(found, joined)


@pytest.mark.parametrize("place", PLACES)
def test_pages_of_a_sequence_without_any(place: str, form: str) -> None:
    scores = torch.full((2, 1, 2, 40), EMPTY, device=place)
    scores[1, :, :, 3] = 7.0
    pages = torch.tensor([0, 40], dtype=torch.int32, device=place)
    for rule, numbers in RULES.items():
        ids, count = getattr(top_pages, rule)(scores, *numbers, pages=pages, first=1, last=1)
        assert count.flatten().tolist() == [0, 3]
        assert (ids[0] == 40).all()
        assert ids[1, 0, :3].tolist() == [0, 3, 39]


@pytest.mark.parametrize("place", PLACES)
def test_forced_pages_need_no_scores(place: str) -> None:
    """The page that is growing has no record: whatever stands in its place is not looked at, but
    for a NaN."""
    scores, pages = make(place, rows=1, n=40)
    scores[0, 0, 0, 39] = EMPTY
    ids, count = top_pages.top_k(scores, 1, pages=pages, last=1)
    assert (ids.flatten().tolist(), count.flatten().tolist()) == ([39, 20], [1, 1])


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("place", PLACES)
def test_equal_masses_are_counted(p: float, place: str) -> None:
    """Eight equal pages hold an eighth each."""
    scores = torch.full((1, 1, 1, 20), EMPTY, device=place)
    scores[..., 4:12] = 2.0
    ids, count = top_pages.top_p(scores, p, 0, 20)
    assert int(count) == 8 * p
    assert ids[0, 0, : int(count)].tolist() == list(range(4, 4 + int(8 * p)))
    least, some = top_pages.top_p(scores, p, 2, 5)
    assert least.shape == (1, 1, 5)
    assert int(some) == min(5, max(2, int(8 * p)))


@pytest.mark.parametrize("place", PLACES)
def test_far_apart_rows_weigh_alike(place: str) -> None:
    """Logits of a thousand overflow nothing: a row counts by its softmax."""
    scores = torch.zeros(1, 1, 2, 30, device=place)
    scores[0, 0, 0] -= 3000 * torch.rand(30, device=place)
    scores[0, 0, 0, 5] = 2000.0
    scores[0, 0, 1, 7] = 1.0
    ids, _ = top_pages.top_k(scores, 2)
    assert ids.flatten().tolist() == [5, 7]


@pytest.mark.parametrize("place", PLACES)
def test_scores_of_any_strides(place: str, form: str) -> None:
    scores, pages = make(place, heads=2)
    moved = torch.full((2, 2, 2, 60), float("nan"), device=place).transpose(1, 2)
    moved[..., 5:55] = scores
    line = torch.stack([pages, pages * 0], -1)[:, 0]
    for each in (moved[..., 5:55], scores.expand(2, 2, 2, 50)):
        assert_chosen(top_pages.top_k(each, 7, pages=line), top_pages.top_k(scores, 7, pages=pages))


def test_offsets_beyond_two_to_the_31(form: str) -> None:
    """Rows, heads and sequences more than 2^31 elements apart."""
    scores = torch.frombuffer(mmap.mmap(-1, 1 << 40, flags=SPARSE), dtype=torch.float32).as_strided(
        (2, 2, 2, 40), (1 << 36, 1 << 34, 1 << 32, 1)
    )
    scores.copy_(torch.randn(scores.shape))
    assert_best(top_pages.top_k(scores, 5), choose.joined(scores.double()))


def test_empty_batches() -> None:
    ids, count = top_pages.top_k(torch.empty(2, 3, 1, 0), 4)
    assert (ids.shape, count.tolist()) == ((2, 3, 0), [[0] * 3] * 2)


def test_what_is_refused() -> None:
    scores, pages = make("cpu")
    for call, message in [
        (lambda: top_pages.top_k(scores.double(), 3), r"scores is torch\.float64"),
        (lambda: top_pages.top_k(scores[0], 3), "must be float32 .batch"),
        (lambda: top_pages.top_k(scores, 3, join=None), "join=None of 2 rows"),
        (lambda: top_pages.top_k(scores, 3, join="mean"), "join='mean' of 2 rows"),
        (lambda: top_pages.top_k(scores, -1), "is -1, least 0"),
        (lambda: top_pages.top_k(scores, 3, pages=pages[:1]), "pages is"),
        (lambda: top_pages.top_k(scores, 3, starts=pages.float()), r"starts is torch\.float32"),
        (lambda: top_pages.top_k(scores[..., ::2], 3), "stride 2 in its last dimension"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
