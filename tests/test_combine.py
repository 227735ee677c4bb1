"""Joining partial attention on a device: the same as the CPU's `merge`, whose contract it has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.places import PLACES
from vattn.kernels.combine import combine
from vattn.kernels.contract import reference as attention
from vattn.kernels.merge import merge, reference


@pytest.fixture(autouse=True)
def poisoned(one_thread: None) -> Iterator[None]:
    """New memory holds NaN."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def parts(n: int, shape: tuple[int, ...], dtype: torch.dtype, place: str) -> tuple[Tensor, Tensor]:
    outs = torch.randn(n, *shape).to(dtype)
    return outs.to(place), (3 * torch.randn(n, *shape[:-1])).to(place)


def assert_joined(outs: Tensor, lses: Tensor, found: tuple[Tensor, Tensor]) -> None:
    unread = (lses == float("-inf"))[..., None]
    out, lse = reference(outs.masked_fill(unread, 0.0), lses)
    assert found[0].dtype == outs.dtype
    assert found[0].shape == outs.shape[1:]
    assert found[1].dtype == torch.float32
    error = (found[0].double() - out).abs().max().item()
    assert error <= tolerance(out, outs.dtype, outs.shape[0]), error
    assert torch.equal(found[1] == float("-inf"), lse == float("-inf"))
    gap = (found[1].double() - lse)[lse.isfinite()].abs()
    assert gap.numel() == 0 or gap.max().item() <= tolerance(lse, torch.float32, outs.shape[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "shape"), [(1, (3, 8)), (2, (2, 4, 1, 64)), (5, (37, 80)), (7, (3, 1)), (3, (2, 256))]
)
def test_exact(n: int, shape: tuple[int, ...], dtype: torch.dtype, place: str) -> None:
    outs, lses = parts(n, shape, dtype, place)
    assert_joined(outs, lses, combine(outs, lses))


@pytest.mark.parametrize("place", PLACES)
def test_parts_that_see_nothing_are_not_read(place: str) -> None:
    outs, lses = parts(4, (50, 12), torch.float32, place)
    lses[torch.rand(lses.shape) < 0.5] = float("-inf")
    lses[:, 7] = float("-inf")
    outs[lses == float("-inf")] = float("nan")
    out, lse = combine(outs, lses)
    assert_joined(outs, lses, (out, lse))
    assert out[7].eq(0).all()
    assert lse[7] == float("-inf")
    again = combine(outs, lses)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.parametrize("place", PLACES)
def test_any_cut_gives_the_whole(place: str) -> None:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 5)
    edges = [0, 3, 3, 12, 17]
    found = [attention(query, key[:, :, a:b], value[:, :, a:b]) for a, b in pairwise(edges)]
    outs, lses = (torch.stack(side).float().to(place) for side in zip(*found, strict=True))
    out, lse = combine(outs, lses)
    right, right_lse = attention(query, key, value)
    torch.testing.assert_close(out.cpu().double(), right, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), right_lse, atol=4e-6, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_a_cascade_of_joins_is_one_join(place: str) -> None:
    outs, lses = parts(6, (9, 16), torch.float32, place)
    halves = [combine(outs[i : i + 3], lses[i : i + 3]) for i in (0, 3)]
    again = combine(*(torch.stack(side) for side in zip(*halves, strict=True)))
    for a, b in zip(again, combine(outs, lses), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_sums_do_not_overflow(shift: float, place: str) -> None:
    outs, lses = parts(3, (4, 8), torch.float32, place)
    out, lse = combine(outs, lses + shift)
    right, right_lse = merge(outs, lses)
    torch.testing.assert_close(out, right, atol=5e-3, rtol=0)
    torch.testing.assert_close(lse - shift, right_lse, atol=5e-3, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_a_nan_part_is_seen(place: str) -> None:
    outs, lses = parts(2, (4, 8), torch.float32, place)
    outs[1, 2] = float("nan")
    out, _ = combine(outs, lses)
    assert out[2].isnan().all()
    assert not out[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("place", PLACES)
def test_any_strides_and_more_than_65535_rows(place: str) -> None:
    outs, lses = parts(2, (70_001, 3), torch.float32, place)
    assert_joined(outs, lses, combine(outs, lses))
    turned = outs[:, :600].mT.contiguous().mT
    side_by_side = lses[:, :600].T.contiguous().T
    assert_joined(turned, side_by_side, combine(turned, side_by_side))
    ranks = parts(4, (2, 4, 8), torch.float32, place)
    moved = ranks[0].transpose(1, 2), ranks[1].transpose(1, 2)
    assert_joined(*moved, combine(*moved))


def test_float64_takes_torch_and_nothing_to_join_is_empty() -> None:
    outs, lses = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for found, right in zip(combine(outs, lses), merge(outs, lses), strict=True):
        assert torch.equal(found, right)
    out, lse = combine(torch.randn(3, 0, 8), torch.randn(3, 0))
    assert (out.shape, lse.shape) == ((0, 8), (0,))


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (torch.zeros(2, 3, 8), torch.zeros(3, 2), "must be .n, ..., Dv. and .n, ..."),
        (torch.zeros(0, 3, 8), torch.zeros(0, 3), "outs has no part"),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3).half(), "lses torch.float16"),
        (torch.zeros(2, 3, 8).int(), torch.zeros(2, 3), "outs is torch.int32"),
    ],
)
def test_what_is_refused(outs: Tensor, lses: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(outs, lses)
