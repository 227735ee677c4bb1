"""Joining partial attention by log-sum-exp: any cut of the keys gives the whole answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.attention import fresh_seed
from vattn.kernels.contract import reference as attention
from vattn.kernels.merge import join, merge, reference


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def parts(cuts: list[int], keys: int, mask: torch.Tensor | None = None):
    query, key, value = (
        torch.randn(2, 4, 3, 8),
        torch.randn(2, 2, keys, 8),
        torch.randn(2, 2, keys, 5),
    )
    edges = [0, *cuts, keys]
    found = [
        attention(query, key[:, :, a:b], value[:, :, a:b], None if mask is None else mask[..., a:b])
        for a, b in pairwise(edges)
    ]
    outs, lses = (torch.stack(side) for side in zip(*found, strict=True))
    return outs, lses, attention(query, key, value, mask)


@pytest.mark.parametrize("cuts", [[], [1], [7, 8], [3, 3, 12], [0, 17], [17]])
def test_any_cut_gives_the_whole(cuts: list[int]) -> None:
    outs, lses, (out, lse) = parts(cuts, 17)
    found, sums = merge(outs, lses)
    torch.testing.assert_close(found, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(sums, lse, atol=1e-12, rtol=0)


def test_float32_sums_of_half_results() -> None:
    outs, lses, (out, lse) = parts([5, 9], 17)
    found, sums = merge(outs.bfloat16(), lses.float())
    assert found.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    torch.testing.assert_close(found.double(), out, atol=0.02, rtol=0)
    torch.testing.assert_close(sums.double(), lse, atol=1e-5, rtol=0)


def test_parts_that_see_nothing_are_not_read() -> None:
    mask = torch.rand(2, 4, 3, 17) < 0.7
    mask[..., 5:9] = False
    mask[0, 1, 2] = False
    outs, lses, (out, lse) = parts([5, 9], 17, mask)
    outs = outs.masked_fill((lses == float("-inf"))[..., None], float("nan"))
    found, sums = merge(outs, lses)
    torch.testing.assert_close(found, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(sums, lse, atol=1e-12, rtol=0)
    assert found[0, 1, 2].eq(0).all()
    assert sums[0, 1, 2] == float("-inf")


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_large_sums_do_not_overflow(shift: float) -> None:
    outs, lses = torch.randn(3, 4, 8), torch.randn(3, 4)
    found, sums = merge(outs, lses + shift)
    exact, _ = reference(outs, lses)
    torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=0)
    assert sums.isfinite().all()


def test_a_nan_part_is_seen() -> None:
    outs, lses = torch.randn(2, 4, 8), torch.randn(2, 4)
    outs[1, 2] = float("nan")
    found, _ = merge(outs, lses)
    assert found[2].isnan().all()
    assert not found[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("dim", [5, 8, 13, 64, 136])
@pytest.mark.parametrize("many", [1, 2, 5])
def test_parts_that_lie_apart(many: int, dim: int) -> None:
    outs, lses = torch.randn(many, 3, 4, dim), 30 * torch.randn(many, 3, 4)
    lses[torch.rand(lses.shape) < 0.3] = float("-inf")
    lses[:, 1, 2] = float("-inf")
    outs = outs.masked_fill((lses == float("-inf"))[..., None], float("nan"))
    out, lse = join(list(zip(outs.unbind(0), lses.unbind(0), strict=True)))
    whole, total = reference(outs.nan_to_num(0.0), lses)
    torch.testing.assert_close(out.double(), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-5)
    assert bool((out[1, 2] == 0).all())


def test_a_sum_that_is_no_number_stays_none() -> None:
    outs, lses = torch.ones(2, 3, 8), torch.tensor([[float("nan"), 0.0, float("-inf")]] * 2)
    out, lse = join(list(zip(outs.unbind(0), lses.unbind(0), strict=True)))
    whole, total = merge(outs, lses)
    torch.testing.assert_close(lse, total, equal_nan=True)
    torch.testing.assert_close(out, whole, equal_nan=True)


def test_parts_of_other_shapes_and_types() -> None:
    out, lse = torch.randn(2, 16), torch.randn(2)
    with pytest.raises(ValueError, match="must be of one shape"):
        join([(out, lse), (torch.randn(3, 16), lse)])
    strided = torch.randn(16, 2).T
    found, total = join([(out, lse), (strided, lse)])
    torch.testing.assert_close(found, (out + strided) / 2)
    torch.testing.assert_close(total, lse + torch.tensor(2.0).log())
    assert join([(out.bfloat16(), lse)])[0].dtype == torch.bfloat16
