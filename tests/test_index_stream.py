"""The CPU scores of an index: the definition in float64, and records that may not be touched."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.guard import PAGE, allow, fenced, outcome
from vattn.kernels import index_stream, nibbles, signs
from vattn.kernels.index import Index
from vattn.kernels.stream import available
from vattn.kernels.summaries import outward

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
FORMS: list[index_stream.Form] = ["summaries", "signs", "nibbles"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMPTY = float("-inf")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=["whole", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a head's records in one chunk; and in many, on two threads."""
    if request.param == "chunks":
        torch.set_num_threads(2)
        monkeypatch.setattr(index_stream, "CHUNK", 37)
        monkeypatch.setattr(index_stream, "THREAD_BYTES", 1)


def parts_of(form: str, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Records of x [..., D]."""
    if form == "signs":
        return signs.pack(x)
    if form == "nibbles":
        return nibbles.pack(x)
    return x.to(dtype), torch.rand_like(x).to(dtype)


def laid_out(part: Tensor, rows: str) -> Tensor:
    """A part among bytes that are NaN in any float type, heads before records or behind them."""
    slots, heads, records, width = part.shape
    shape = (slots, heads, records + 3, width)
    if rows == "token_major":
        shape = (slots, records + 3, heads, width)
    base = torch.empty(shape, dtype=part.dtype)
    base.untyped_storage().fill_(255)
    found = base.transpose(1, 2) if rows == "token_major" else base
    return found[:, :, :records].copy_(part)


def exact(form: str, query: Tensor, index: Index, n: int, scale: float) -> tuple[Tensor, Tensor]:
    """Scores in float64, and of each the sum of its terms' sizes."""
    rows = index.rows(query).double()
    slots = range(index.batch) if index.slots is None else index.slots.tolist()
    counts = [n] * index.batch if index.counts is None else index.counts.tolist()
    found, size = (torch.full((*rows.shape[:3], n), EMPTY).double() for _ in range(2))
    for b, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        count = min(count, n)
        some = [part[slot, :, :count] for part in index.parts]
        if form == "summaries":
            a, spread = some[0].double(), [part.double() for part in some[1:]]
        elif form == "signs":
            a, spread = signs.unpack(*some, query.shape[3]).double(), []
        else:
            a, spread = nibbles.unpack(*some).double(), []
        found[b, ..., :count] = rows[b] @ a.mT * scale
        size[b, ..., :count] = rows[b].abs() @ a.abs().mT * abs(scale)
        for part in spread:
            found[b, ..., :count] += rows[b].abs() @ part.mT * scale
            size[b, ..., :count] += rows[b].abs() @ part.mT * abs(scale)
    return found, size


def assert_exact(
    form: index_stream.Form, query: Tensor, index: Index, n: int, scale: float
) -> None:
    out = index_stream.scores(form, query, index, n, scale=scale)
    right, size = exact(form, query, index, n, scale)
    assert out.dtype == torch.float32
    assert out.shape == right.shape
    assert torch.equal(out == EMPTY, right == EMPTY)
    there = right.isfinite()
    gap = (out.double() - right)[there].abs()
    limit = torch.full_like(right, tolerance(size[there], torch.float32, query.shape[3]))
    if form == "signs":
        limit += steps_of(query, index, n) * abs(scale)
    assert (gap <= limit[there]).all(), (gap - limit[there]).max().item()


def steps_of(query: Tensor, index: Index, n: int) -> Tensor:
    """What tables of 14 bits may lose: half a step for each nibble, of 16383 that reach over twice
    the largest sum of four channels."""
    dim = query.shape[3]
    padded = torch.nn.functional.pad(index.rows(query).double().abs(), (0, -dim % 8))
    fours = padded.unflatten(-1, (-1, 4)).sum(-1)
    lost = fours.amax(-1) * fours.shape[-1] / 16383
    largest = [
        torch.cat([index.read(b, n)[0][1].flatten(), torch.zeros(1)]).max()
        for b in range(index.batch)
    ]
    return lost[..., None] * torch.stack(largest)[:, None, None, None]


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["head_major", "token_major"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [2, 20, 64, 128, 200])
def test_exact(dim: int, form: index_stream.Form, rows: str, cut: None) -> None:
    query, x = torch.randn(3, 6, 2, dim), torch.randn(4, 2, 150, dim)
    parts = tuple(laid_out(part, rows) for part in parts_of(form, x))
    counts, slots = torch.tensor([150, 3, 0], dtype=torch.int32), torch.tensor([3, 0, 1])
    assert_exact(form, query, Index(parts, counts, slots), 150, dim**-0.5)
    assert_exact(form, query, Index(parts, counts, slots), 77, -0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("both", [True, False])
def test_summaries_of_each_dtype(both: bool, dtype: torch.dtype, cut: None) -> None:
    for dim in (32, 30):
        parts = parts_of("summaries", torch.randn(2, 2, 99, dim), dtype)
        index = Index(parts if both else parts[:1])
        assert_exact("summaries", torch.randn(2, 4, 1, dim).to(dtype), index, 99, 1.0)


def test_parts_of_different_dtypes() -> None:
    parts = torch.randn(1, 2, 40, 32).bfloat16(), torch.rand(1, 2, 40, 32)
    assert_exact("summaries", torch.randn(1, 4, 1, 32), Index(parts), 40, 1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_rows_of_a_group(heads: int, form: index_stream.Form) -> None:
    index = Index(parts_of(form, torch.randn(1, 1, 70, 32)))
    assert_exact(form, torch.randn(1, heads, 1, 32), index, 70, 1.0)


def test_signs_of_a_query_with_an_outlier_and_of_no_query() -> None:
    query = torch.randn(1, 4, 1, 128)
    query[..., 7] = 100.0
    query[:, 3] = 0.0
    index = Index(parts_of("signs", torch.randn(1, 2, 64, 128)))
    assert_exact("signs", query, index, 64, 1.0)
    assert index_stream.scores("signs", query, index, 64)[0, 1, 1].eq(0).all()


def test_bounds_stay_bounds() -> None:
    """No key of a page scores more than its page, but for rounding."""
    keys, query = torch.randn(1, 2, 40, 16, 64).bfloat16(), torch.randn(1, 4, 1, 64)
    index = Index(outward(keys.amin(3), keys.amax(3), torch.bfloat16))
    found = index_stream.scores("summaries", query, index, 40, scale=1.0)
    most = torch.einsum("bhrd,bhptd->bhrpt", index.rows(query), keys.float()).amax(-1)
    assert (found >= most - 1e-4).all()


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_records(form: index_stream.Form) -> None:
    parts = parts_of(form, torch.randn(1, 2, 10, 16))
    query = torch.randn(1, 4, 1, 16)
    assert index_stream.scores(form, query, Index(parts), 0).shape == (1, 2, 2, 0)
    none = Index(parts, torch.zeros(1, dtype=torch.int64))
    assert index_stream.scores(form, query, none, 10).eq(EMPTY).all()


@pytest.mark.parametrize("form", FORMS)
def test_bits_do_not_depend_on_threads(
    form: index_stream.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_stream, "THREAD_BYTES", 1)
    index = Index(parts_of(form, torch.randn(2, 2, 9000, 32)))
    query = torch.randn(2, 4, 1, 32)
    torch.set_num_threads(2)
    two = index_stream.scores(form, query, index, 9000)
    torch.set_num_threads(1)
    assert torch.equal(index_stream.scores(form, query, index, 9000), two)


def test_refused_with_the_reason() -> None:
    query = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="must be one or two of width 16"):
        index_stream.scores("summaries", query, Index((torch.randn(1, 2, 5, 8),)), 5)
    wide = Index(parts_of("signs", torch.randn(1, 2, 1, 2056)))
    with pytest.raises(ValueError, match="at most 2048"):
        index_stream.scores("signs", torch.randn(1, 4, 1, 2056), wide, 1)


# ---- nothing is touched that is not there --------------------------------------------------------


def fenced_index(form: str) -> Index:
    """Records that fill whole pages of memory, up to the count and not one more."""
    width = {"summaries": 32, "signs": 512, "nibbles": 128}[form]
    count = PAGE // (width // 8 if form == "signs" else width // 2 if form == "nibbles" else 128)
    parts = parts_of(form, torch.randn(1, 1, count, width))
    held = []
    for part in parts:
        size = part.numel() * part.itemsize
        per_page = max(1, PAGE // size)
        room = fenced((2, 1, count * per_page, part.shape[3]), part.dtype)
        page = allow(room[1])[:, : count * per_page]
        # The count's last record is the page's last: nothing may be read behind it.
        page[:, -count:] = part[0]
        held.append(room[:, :, -count:] if per_page > 1 else room)
    return Index(tuple(held), torch.tensor([count]), torch.tensor([1]))


def read_fenced() -> None:
    """Run in a child: the records that there are, of one slot of two."""
    for form in FORMS:
        index = fenced_index(form)
        n = int(index.counts[0])
        dim = {"summaries": 32, "signs": 512, "nibbles": 128}[form]
        assert_exact(form, torch.randn(1, 4, 1, dim), index, n + 40, 1.0)


def read_a_record_too_many() -> None:
    index = fenced_index("signs")
    more = Index(index.parts, index.counts + 1, index.slots)
    index_stream.scores("signs", torch.randn(1, 4, 1, 512), more, 1000)


def test_no_record_is_touched_that_is_not_there() -> None:
    code, said = outcome("tests.test_index_stream:read_fenced")
    assert code == 0, said


def test_the_fence_holds() -> None:
    code, _ = outcome("tests.test_index_stream:read_a_record_too_many")
    assert code == -signal.SIGSEGV
