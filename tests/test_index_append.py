"""Rows and the records that they fill, in one launch: nothing else is written or read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.guard import PAGE, allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels import nibbles, signs
from vattn.kernels.append import append
from vattn.kernels.gpu import interpreted
from vattn.kernels.index import Index
from vattn.kernels.index_append import CODES, append_indexed
from vattn.kernels.kv import KV
from vattn.kernels.summaries import outward

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
FORMS = ["bounds", "deviation", "cuboid", "mean", "signs", "nibbles"]


@pytest.fixture(autouse=True)
def poisoned(one_thread: None) -> Iterator[None]:
    """New memory holds NaN."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def records(form: str, keys: Tensor, dtype: torch.dtype, weight: float) -> tuple[Tensor, ...]:
    """The definition: records of pages [Hkv, n, page_tokens, D]."""
    if form in CODES:
        return {"signs": signs, "nibbles": nibbles}[form].pack(keys[:, :, 0])
    keys = keys.float()
    centre = (keys.amin(2) + keys.amax(2)) / 2
    spread, mean = torch.std_mean(keys, dim=2, correction=0)
    return {
        "bounds": lambda: outward(keys.amin(2), keys.amax(2), dtype),
        "deviation": lambda: (mean.to(dtype), (weight * spread).to(dtype)),
        "cuboid": lambda: (centre.to(dtype), (keys - centre[:, :, None]).abs().mean(2).to(dtype)),
        "mean": lambda: (mean.to(dtype),),
    }[form]()


@dataclass
class Case:
    """A cache that is NaN where no row counts, an index that is NaN, and new rows."""

    form: str = "bounds"
    lengths: tuple[int, ...] = (5, 0, 30)
    counts: tuple[int, ...] = (11, 9, 0)
    slots: tuple[int, ...] | None = None
    page_tokens: int = 8
    tokens: int = 11
    heads: int = 2
    dim: int = 16
    value_dim: int = 12
    capacity: int = 48
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float16
    token_major: bool = False
    place: str = "cpu"

    def make(self) -> tuple[Tensor, Tensor, KV, Index]:
        slots = self.slots or tuple(range(len(self.lengths)))
        key, value = (self.blank(max(slots) + 1, d) for d in (self.dim, self.value_dim))
        for slot, length in zip(slots, self.lengths, strict=True):
            for rows in (key, value):
                rows[slot, :, :length] = torch.randn_like(rows[slot, :, :length].float())
        new = [
            torch.randn(len(self.lengths), self.heads, self.tokens, d).to(self.dtype)
            for d in (self.dim, self.value_dim)
        ]
        many = self.capacity // self.page_tokens
        sample = records(self.form, torch.zeros(1, 1, 1, self.dim), self.stored, 1.0)
        parts = tuple(
            torch.full(
                (max(slots) + 1, many, self.heads, part.shape[-1]),
                float("nan") if part.is_floating_point() else 199,
                dtype=part.dtype,
                device=self.place,
            ).transpose(1, 2)
            for part in sample
        )
        make = {"dtype": torch.int64 if self.slots else torch.int32, "device": self.place}
        at = None if self.slots is None else torch.tensor(self.slots, **make)
        kv = KV(key, value, torch.tensor(self.lengths, **make), slots=at)
        held = torch.tensor([n // self.page_tokens for n in self.lengths], **make)
        return new[0].to(self.place), new[1].to(self.place), kv, Index(parts, held, at)

    def blank(self, sequences: int, dim: int) -> Tensor:
        shape = (sequences, self.heads, self.capacity, dim)
        if self.token_major:
            shape = (sequences, self.capacity, self.heads, dim)
        rows = torch.full(shape, float("nan"), dtype=self.dtype, device=self.place)
        return rows.transpose(1, 2) if self.token_major else rows


def assert_right(case: Case, room: tuple[int, ...] | None = None, weight: float = 0.5) -> None:
    new_key, new_value, kv, index = case.make()
    keys, values, parts = kv.key.clone(), kv.value.clone(), [p.clone() for p in index.parts]
    line = {"dtype": torch.int32, "device": case.place}
    counts = torch.tensor(case.counts, **line)
    limit = None if room is None else torch.tensor(room, **line)
    append_indexed(
        new_key, new_value, kv, index, case.form, page_tokens=case.page_tokens, weight=weight,
        counts=counts, room=limit, advance=True,
    )  # fmt: skip
    other = KV(keys, values, torch.tensor(case.lengths, **line), slots=kv.slots)
    append(new_key, new_value, other, counts=counts, room=limit, advance=True)
    assert kv.lengths.tolist() == other.lengths.tolist()
    for mine, right in ((kv.key, keys), (kv.value, values)):
        assert torch.equal(mine.nan_to_num(7e3), right.nan_to_num(7e3))
    assert index.counts.tolist() == (kv.lengths // case.page_tokens).tolist()
    for b, before in enumerate(case.lengths):
        slot, size = (case.slots[b] if case.slots else b), case.page_tokens
        first, end = before // size, int(kv.lengths[b]) // size
        pages = keys[slot, :, first * size : end * size].unflatten(1, (end - first, size))
        if end > first:
            found = records(case.form, pages, case.stored, weight)
            for part, right in zip(parts, found, strict=True):
                part[slot, :, first:end] = right
    for mine, right in zip(index.parts, parts, strict=True):
        assert torch.equal(mine.isnan(), right.isnan())
        mine, right = mine.float().nan_to_num(7e3), right.float().nan_to_num(7e3)
        assert (mine - right).abs().max() <= ulps(case)


def ulps(case: Case) -> float:
    """Bounds and codes are exact; sums of rows may round the other way. The interpreter cuts bits
    of a bfloat16 off where a device rounds."""
    cut = case.stored == torch.bfloat16 and case.place == "cpu" and interpreted()
    if case.form in ("bounds", *CODES) and not cut:
        return 1e-3 if case.form == "signs" else 0.0
    return 8 * torch.finfo(case.stored).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_rows_and_records(form: str, dtype: torch.dtype, place: str) -> None:
    size = 1 if form in CODES else 8
    assert_right(Case(form, page_tokens=size, dtype=dtype, place=place))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_slots_layouts_and_odd_sizes(form: str, place: str) -> None:
    size = 1 if form in CODES else 6
    case = Case(
        form, (17, 3), (4, 11), (2, 0), page_tokens=size, dim=20, value_dim=1, token_major=True,
        capacity=24, place=place,
    )  # fmt: skip
    assert_right(case)
    assert_right(case, room=(18, 40))


@pytest.mark.parametrize("form", ["bounds", "mean", "nibbles"])
@pytest.mark.parametrize("place", PLACES)
def test_one_token_at_a_time_gives_what_all_at_once_do(form: str, place: str) -> None:
    """Sixteen steps fill the same records as one launch, whatever brought the rows."""
    size = 1 if form in CODES else 8
    case = Case(form, (3,), (13,), page_tokens=size, tokens=13, capacity=16, heads=1, place=place)
    new_key, new_value, kv, index = case.make()
    again = KV(kv.key.clone(), kv.value.clone(), kv.lengths.clone())
    other = Index(tuple(p.clone() for p in index.parts), index.counts.clone())
    append_indexed(new_key, new_value, kv, index, form, page_tokens=size, advance=True)
    for i in range(13):
        one = slice(i, i + 1)
        append_indexed(
            new_key[:, :, one], new_value[:, :, one], again, other, form, page_tokens=size,
            advance=True,
        )  # fmt: skip
    assert torch.equal(kv.key, again.key)
    assert index.counts.tolist() == other.counts.tolist() == [16 // size]
    for mine, right in zip(index.parts, other.parts, strict=True):
        assert torch.equal(mine.float().nan_to_num(7e3), right.float().nan_to_num(7e3))


@pytest.mark.parametrize("place", PLACES)
def test_bounds_hold_in_low_precision(place: str) -> None:
    """However a number is rounded, no key is outside."""
    case = Case(stored=torch.bfloat16, lengths=(0,), counts=(40,), tokens=40, place=place)
    new_key, new_value, kv, index = case.make()
    append_indexed(new_key, new_value, kv, index, "bounds", page_tokens=8, advance=True)
    a, b = (part[:, :, :5, None].double() for part in index.parts)
    keys = new_key.double().unflatten(2, (5, 8))
    assert (a - b <= keys).all()
    assert (keys <= a + b).all()


@pytest.mark.parametrize("place", PLACES)
def test_lengths_stay_without_advance(place: str) -> None:
    new_key, new_value, kv, index = Case(place=place).make()
    before = kv.lengths.clone(), index.counts.clone()
    append_indexed(new_key, new_value, kv, index, "bounds", page_tokens=8)
    assert torch.equal(kv.lengths, before[0])
    assert torch.equal(index.counts, before[1])
    assert kv.key[0, :, 15].isfinite().all()


def test_offsets_beyond_two_to_the_31() -> None:
    """Heads and sequences more than 2^31 elements apart, rows and records 2^24."""
    key, value, a, b = (
        torch.frombuffer(mmap.mmap(-1, 1 << 40, flags=SPARSE), dtype=torch.float16).as_strided(
            (2, 2, 40, 16), (1 << 37, 1 << 33, 1 << 24, 1)
        )
        for _ in range(4)
    )
    new = torch.randn(2, 2, 24, 16).half()
    kv = KV(key, value, torch.zeros(2, dtype=torch.int32))
    append_indexed(new, new, kv, Index((a, b)), "bounds", page_tokens=8)
    assert torch.equal(key[:, :, :24], new)
    right = records("bounds", new.unflatten(2, (3, 8))[1], torch.float16, 1.0)
    assert torch.equal(a[1, :, :3], right[0])
    assert torch.equal(b[1, :, :3], right[1])


# ---- nothing is touched that is not there ----


def write_fenced() -> None:
    """Run in a child: rows 16 to 48 are there, and the records of pages 1 and 2 of 16 tokens."""
    key, value = (fenced((2, 64, 2, 32), torch.float32).transpose(1, 2) for _ in range(2))
    a, b = (fenced((2, 8, 2, 512), torch.float32).transpose(1, 2) for _ in range(2))
    for rows in (key, value):
        allow(rows.transpose(1, 2)[1, 16:48]).normal_()
    for part in (a, b):
        assert part.stride(2) * 4 == PAGE
        allow(part.transpose(1, 2)[1, 1:3])
    new = torch.randn(1, 2, 20, 32)
    kv = KV(key, value, torch.tensor([20]), slots=torch.tensor([1]))
    index = Index((a[..., :32], b[..., :32]), slots=torch.tensor([1]))
    counts, room = torch.tensor([19]), torch.tensor([48])
    append_indexed(new, new, kv, index, "bounds", page_tokens=16, counts=counts, room=room)
    held = key[1, :, 16:32]
    centre = outward(held.amin(1), held.amax(1), torch.float32)[0]
    assert torch.equal(a[1, :, 1, :32], centre)
    assert torch.equal(key[1, :, 20:39], new[0, :, :19])


def test_no_row_is_touched_that_is_not_there() -> None:
    code, said = outcome("tests.test_index_append:write_fenced")
    assert code == 0, said


def test_what_is_refused() -> None:
    new_key, new_value, kv, index = Case().make()
    for form, size, message in [
        ("bounds", 129, "page_tokens 129"),
        ("mean", 8, "form 'mean'"),
        ("signs", 1, "form 'signs'"),
        ("median", 8, "must be one of bounds, deviation, cuboid, mean, signs, nibbles"),
    ]:
        with pytest.raises(ValueError, match=message):
            append_indexed(new_key, new_value, kv, index, form, page_tokens=size)
    for change, message in [
        ({"lengths": None}, r"kv\.lengths is None"),
        ({"key": kv.key.to(torch.float8_e5m2), "value": kv.value.to(torch.float8_e5m2)}, "cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            append_indexed(new_key, new_value, replace(kv, **change), index, "bounds")
    with pytest.raises(ValueError, match="new_key is"):
        append_indexed(new_key[:2], new_value, kv, index, "bounds", page_tokens=8)
    with pytest.raises(ValueError, match="counts is"):
        append_indexed(
            new_key, new_value, kv, index, "bounds", page_tokens=8, counts=torch.zeros(3)
        )
