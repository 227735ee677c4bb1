"""Decoding over a selection: exact, for any pages, and never a row that is not chosen."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.decoding import SMALL, spread
from tests.decoding import Case as Cache
from tests.guard import PAGE, allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels.gpu import A100, B200, H100, Device, pretend
from vattn.kernels.kv import FP8, KV
from vattn.kernels.selection import Selection, reference
from vattn.kernels.sparse_decode import attend, plan_for, workspace_for
from vattn.kernels.sparse_walk import lanes_for

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
BEHIND = 2**31 - 1  # what stands behind the count: no page


@pytest.fixture(autouse=True)
def small_device(one_thread: None) -> Iterator[None]:
    """New memory holds NaN, and a launch has few programs."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pretend(SMALL):
        yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case(Cache):
    """A cache, and for each KV head of it pages at random; ``most`` are reserved."""

    heads: int = 2
    kv_heads: int = 1
    page_tokens: int = 8
    most: int = 12
    full: bool = False
    weighted: bool = False

    def choose(self) -> Selection:
        batch, size = len(self.lengths), self.page_tokens
        ids = torch.full((batch, self.kv_heads, self.most), BEHIND, dtype=torch.int32)
        count = torch.zeros(ids.shape[:2], dtype=torch.int32)
        for b, length in enumerate(self.lengths):
            pages = torch.arange(self.starts[b] // size if self.starts else 0, -(-length // size))
            for h in range(self.kv_heads):
                most = min(self.most, len(pages))
                n = most if self.full else int(torch.randint(most + 1, ()))
                order = torch.randperm(len(pages))[:n]
                ids[b, h, :n], count[b, h] = pages[order].sort().values.int(), n
        weights = torch.full(ids.shape, float("nan")) if self.weighted else None
        if weights is not None:
            weights[torch.arange(self.most) < count[..., None]] = torch.randn(int(count.sum()))
            weights = weights.to(self.place)
        return Selection(ids.to(self.place), count.to(self.place), size, weights)


def assert_right(query: Tensor, kv: KV, chosen: Selection, scale: float | None = None) -> None:
    out, lse, mass = attend(query, kv, chosen, scale=scale, want_mass=True)
    right, right_lse, right_mass = reference(query, kv, chosen, scale=scale)
    assert out.dtype == query.dtype
    assert lse.dtype == mass.dtype == torch.float32
    terms = chosen.ids.shape[2] * chosen.page_tokens
    assert (out.double() - right).abs().max() <= tolerance(right, query.dtype, terms)
    assert torch.equal(lse == float("-inf"), right_lse == float("-inf"))
    gap = (lse.double() - right_lse)[right_lse.isfinite()].abs()
    limit = tolerance(right_lse, torch.float32, query.shape[3])
    assert gap.numel() == 0 or gap.max() <= limit
    # A weight is off by as much as its logarithm.
    rows = query[0, :, :, 0].numel() // kv.key.shape[1]
    assert torch.allclose(mass.double(), right_mass, rtol=0, atol=2 * rows * limit)
    seeing = (right_lse.unflatten(1, (kv.key.shape[1], -1)).isfinite()).sum((2, 3))
    assert torch.allclose(mass.sum(-1), seeing.float(), atol=2 * rows * limit)
    behind = torch.arange(mass.shape[2], device=mass.device) >= chosen.count[..., None]
    assert (mass[behind] == 0).all()


CASES = {
    "pages of 8": Case(heads=4, kv_heads=2),
    "single tokens": Case(page_tokens=1, most=70),
    "pages of 16, half, token-major": Case(
        page_tokens=16, dtype=torch.float16, token_major=True, tokens=2
    ),
    "bfloat16": Case(page_tokens=16, dtype=torch.bfloat16, full=True),
    "pages that are no power of two": Case(page_tokens=12, dim=24, value_dim=40),
    "a page of several tiles": Case(
        page_tokens=96, most=1, dim=128, value_dim=64, full=True, lengths=[90]
    ),
    "such a page that is cut": Case(
        page_tokens=100, most=2, dim=128, value_dim=64, full=True, lengths=[130]
    ),
    "groups of 3, three tokens": Case(heads=6, kv_heads=2, tokens=3, lengths=[90, 2]),
    "more tokens than rows": Case(tokens=4, lengths=[2, 40], page_tokens=4, full=True),
    "slots and starts": Case(lengths=[90, 130], slots=[3, 1], starts=[61, 5], page_tokens=16),
    "weights": Case(weighted=True, tokens=2),
    "weights of tokens": Case(weighted=True, page_tokens=1, most=40, lengths=[100]),
    "nothing chosen": Case(most=0),
    "nothing there": Case(lengths=[0, 70], full=True),
    "two tiles of query rows": Case(heads=33, tokens=2, dim=16, value_dim=8, lengths=[40]),
    "one element a row": Case(dim=1, value_dim=1, lengths=[40]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, place: str) -> None:
    case = replace(CASES[name], place=place)
    query, kv, _, _ = case.make()
    assert_right(query, kv, case.choose())


@pytest.mark.parametrize("place", PLACES)
def test_the_mass_changes_nothing(place: str) -> None:
    case = Case(lengths=[60, 20], place=place)
    query, kv, _, _ = case.make()
    chosen = case.choose()
    out, lse, mass = attend(query, kv, chosen)
    assert mass is None
    weighed = attend(query, kv, chosen, want_mass=True)
    assert all(torch.equal(a, b) for a, b in zip((out, lse), weighed[:2], strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.9, 3.0])
@pytest.mark.parametrize("place", PLACES)
def test_scales(scale: float, place: str) -> None:
    case = Case(lengths=[60], place=place, dtype=torch.float16)
    query, kv, _, _ = case.make()
    assert_right(query, kv, case.choose(), scale)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_eight_bits(dtype: torch.dtype, place: str) -> None:
    case = Case(lengths=[60, 9], dtype=torch.float16, full=True, place=place)
    query, kv, _, _ = case.make()
    scales = torch.tensor([0.7], device=place), torch.tensor([1.3], device=place)
    kv = replace(
        kv, key=kv.key.to(dtype), value=kv.value.to(dtype), key_scale=scales[0],
        value_scale=scales[1],
    )  # fmt: skip
    assert_right(query, kv, case.choose())


@pytest.mark.parametrize("place", PLACES)
def test_the_number_of_programs_does_not_matter(place: str) -> None:
    case = Case(lengths=[200, 17], most=25, full=True, place=place)
    query, kv, _, _ = case.make()
    chosen = case.choose()
    for processors in (1, 3):
        with pretend(Device(80, processors, 163 << 10)):
            assert_right(query, kv, chosen)


@pytest.mark.parametrize("place", PLACES)
def test_one_launch_gives_what_two_give_again_and_again(place: str) -> None:
    case = Case(lengths=[199, 70], most=24, full=True, place=place)
    query, kv, _, _ = case.make()
    chosen = case.choose()
    one = workspace_for(query, kv, chosen, one_launch=True)
    two = workspace_for(query, kv, chosen, one_launch=False)
    assert (one.arrived is None, two.arrived is None) == (False, True)
    first = attend(query, kv, chosen, want_mass=True)
    for workspace in (one, two, one):
        again = attend(query, kv, chosen, want_mass=True, workspace=workspace)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert int(one.arrived.abs().sum()) == 0
    for name, wrong in [
        ("partials", one.partials[:-1]),
        ("tops", one.tops.double()),
        ("arrived", one.arrived[:-1]),
    ]:
        with pytest.raises(ValueError, match=rf"workspace\.{name} is .*pass workspace_for"):
            attend(query, kv, chosen, workspace=replace(one, **{name: wrong}))


@pytest.mark.parametrize("place", PLACES)
def test_the_number_of_reserved_ids_does_not_matter(place: str) -> None:
    """A budget that is not used up gives the same bits as one that is."""
    case = Case(lengths=[199, 150], most=20, full=True, weighted=True, place=place)
    query, kv, _, _ = case.make()
    chosen = case.choose()
    more = Selection(
        torch.nn.functional.pad(chosen.ids, (0, 300), value=BEHIND),
        chosen.count,
        chosen.page_tokens,
        torch.nn.functional.pad(chosen.log_weights, (0, 300), value=float("nan")),
    )
    with pretend(Device(80, 40, 163 << 10)):
        few, many = (attend(query, kv, each, want_mass=True) for each in (chosen, more))
    assert all(torch.equal(a, b) for a, b in zip(few[:2], many[:2], strict=True))
    assert torch.equal(few[2], many[2][..., : few[2].shape[2]])


@pytest.mark.parametrize("place", PLACES)
def test_all_pages_are_dense_attention(place: str) -> None:
    case = Case(lengths=[90, 33], most=12, full=True, heads=4, kv_heads=2, place=place)
    query, kv, _, _ = case.make()
    out, lse, _ = attend(query, kv, case.choose())
    by_tokens = replace(case, page_tokens=1, most=90)
    single, single_lse, _ = attend(query, kv, by_tokens.choose())
    for b, length in enumerate(case.lengths):
        keys, values = (t[b, :, :length].double() for t in (kv.key, kv.value))
        dense = torch.nn.functional.scaled_dot_product_attention(
            query[b].double(), keys, values, enable_gqa=True
        )
        for found in (out, single):
            assert (found[b] - dense).abs().max() <= tolerance(dense, query.dtype, length)
    assert torch.allclose(lse, single_lse, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_chooses_once_for_all_heads(place: str) -> None:
    """Ids, counts and weights of any strides, and counts of a cache of any."""
    case = Case(
        heads=4, kv_heads=2, lengths=[90, 70], slots=[2, 0], starts=[3, 9], full=True, place=place
    )
    query, kv, _, _ = case.make()
    one = replace(case, kv_heads=1, weighted=True).choose()
    ids = torch.stack([one.ids, one.ids], -1)[..., 0]
    assert ids.stride(2) == 2
    lines = (one.count, one.log_weights)
    count, weights = (line.expand(-1, 2, *line.shape[2:]) for line in lines)
    shared = Selection(ids.expand(-1, 2, -1), count, one.page_tokens, weights)
    assert_right(query, spread(kv, "strided"), shared)


@pytest.mark.parametrize("place", PLACES)
def test_the_result_has_the_strides_of_the_query(place: str) -> None:
    case = Case(tokens=2, heads=4, value_dim=8, lengths=[30, 2], place=place)
    query, kv, _, _ = case.make()
    chosen = case.choose()
    moved = query.transpose(1, 2).contiguous().transpose(1, 2)
    out, _, _ = attend(moved, kv, chosen)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, attend(query, kv, chosen)[0])


def test_offsets_beyond_two_to_the_31() -> None:
    """Heads and sequences more than 2^31 elements apart, rows 2^24."""
    key, value = (
        torch.frombuffer(mmap.mmap(-1, 1 << 40, flags=SPARSE), dtype=torch.float16).as_strided(
            (2, 2, 40, 16), (1 << 37, 1 << 33, 1 << 24, 1)
        )
        for _ in range(2)
    )
    for tensor in (key, value):
        tensor.copy_(torch.randn(tensor.shape))
    query = torch.randn(2, 4, 1, 16).half()
    case = Case(lengths=[40, 33], heads=4, kv_heads=2, full=True, most=5)
    assert_right(query, KV(key, value, torch.tensor(case.lengths)), case.choose())


def test_lanes_hold_every_token_of_a_page_once() -> None:
    for page_tokens in (1, 3, 8, 12, 16, 24, 64, 100, 256):
        lanes = lanes_for(64, page_tokens)
        assert lanes.entries * lanes.lanes == 64
        assert lanes.chunks * lanes.lanes >= page_tokens > (lanes.chunks - 1) * lanes.lanes
    assert lanes_for(64, 16).entries == 4


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda device: str(device.arch))
def test_tiles_hold_the_rows_of_a_group(device: Device) -> None:
    for tokens in (1, 16):
        case = Case(heads=8, kv_heads=2, tokens=tokens, dim=128, dtype=torch.bfloat16)
        query, kv, _, _ = case.make()
        plan = plan_for(device, query, kv, case.choose())
        assert plan.jobs * plan.rows >= 4 * tokens
        assert plan.jobs == 1


# ---- nothing is read that is not chosen ----


def fenced_case(ids: list[int]) -> tuple[Tensor, KV, Selection]:
    """Rows 16 to 32 and 48 to 60 of 64 are there, in the second of three slots."""
    key, value = (fenced((3, 64, 2, 32), torch.float32).transpose(1, 2) for _ in range(2))
    assert key.stride(2) * 16 * 4 == PAGE
    for tensor in (key, value):
        rows = tensor.transpose(1, 2)[1]
        allow(rows[16:32]).normal_()
        allow(rows[48:64]).normal_()
        rows[60:64] = float("nan")
    query = torch.randn(1, 4, 2, 32)
    at = [torch.tensor([n]) for n in (60, 16, 1)]
    pages = torch.tensor([[[*ids, 9, 2]] * 2], dtype=torch.int32)
    count = torch.full((1, 2), len(ids), dtype=torch.int32)
    return query, KV(key, value, *at), Selection(pages, count, 8)


def read_fenced() -> None:
    """Run in a child: pages 2, 3, 6 and 7 are there, half of the last one, and 0 is before the
    start."""
    assert_right(*fenced_case([0, 2, 3, 6, 7]))


def read_a_page_too_many() -> None:
    attend(*fenced_case([2, 3, 4]))


def test_no_row_is_touched_that_is_not_chosen() -> None:
    code, said = outcome("tests.test_sparse_decode:read_fenced")
    assert code == 0, said


def test_a_stray_read_would_be_seen() -> None:
    assert outcome("tests.test_sparse_decode:read_a_page_too_many")[0] == -signal.SIGSEGV


def test_what_is_refused() -> None:
    query, kv, _, _ = Case(lengths=[20, 3]).make()
    chosen = Case(lengths=[20, 3]).choose()
    with pytest.raises(ValueError, match="ids is"):
        attend(query, kv, Selection(chosen.ids[:1], chosen.count[:1], 8))
    with pytest.raises(ValueError, match=r"query is torch\.float16 and key torch\.float32"):
        attend(query.half(), kv, chosen)
    with pytest.raises(ValueError, match="stride 2 in its last dimension"):
        attend(query.repeat_interleave(2, -1)[..., ::2], kv, chosen)
