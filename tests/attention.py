"""What the tests of the CPU attention kernels share: inputs as a cache holds them, and the bound.

Inputs lie in memory poisoned with NaN; results are compared with float64.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels.contract import reference

ROWS = ["head_major", "token_major", "odd_strides"]
MASKS = {
    "none": None,
    "shared": (0, 0, 1, 1),
    "per_key": (1, 0, 0, 1),
    "per_head_key": (0, 1, 0, 1),
    "per_batch": (1, 0, 1, 1),
    "per_head": (1, 1, 1, 1),
    "per_query": (0, 0, 1, 0),
    "two_dims": (1, 1),
}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, where rows lie, which mask and scale."""

    batch: int = 2
    kv_heads: int = 3
    groups: int = 4
    length: int = 1
    keys: int = 37
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    rows: str = "head_major"
    mask: str = "none"
    kind: str = "bool"
    scale: float | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask, drawn anew from torch's seed."""
        heads = self.kv_heads * self.groups
        query = torch.randn(self.batch, heads, self.length, self.dim).to(self.dtype)
        shape = (self.batch, self.kv_heads, self.keys)
        key = cache_rows(*shape, self.dim, self.dtype, self.rows)
        value = cache_rows(*shape, self.value_dim, self.dtype, self.rows)
        return query, key, value, self.make_mask((self.batch, heads, self.length, self.keys))

    def make_mask(self, full: tuple[int, int, int, int]) -> Tensor | None:
        keep = MASKS[self.mask]
        if keep is None:
            return None
        limits = full[-len(keep) :]
        shape = [size if kept else 1 for size, kept in zip(limits, keep, strict=True)]
        mask = torch.rand(shape) < 0.6
        if self.kind == "bool":
            return mask
        dtype = torch.float32 if self.kind == "float32" else self.dtype
        return torch.randn(shape).masked_fill(~mask, float("-inf")).to(dtype)


def fresh_seed() -> int:
    """Seed torch anew; pytest prints the seed with a failing test."""
    value = secrets.randbits(32)
    torch.manual_seed(value)
    print("seed", value)
    return value


def cache_rows(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, rows: str
) -> Tensor:
    """Random rows [batch, heads, tokens, dim] inside a larger range that is NaN elsewhere."""
    shape = {
        "head_major": (batch, 2, heads, tokens + 5, dim),
        "token_major": (batch, 2, tokens + 5, heads, dim),
        "odd_strides": (batch, 3, heads + 1, tokens + 5, dim + 3),
    }[rows]
    base = torch.full(shape, float("nan"), dtype=dtype)
    if rows == "token_major":
        found = base[:, 1, :tokens].transpose(1, 2)
    else:
        found = base[:, 1, :heads, :tokens, :dim]
    return found.copy_(torch.randn(batch, heads, tokens, dim))


def tolerance(exact: Tensor, dtype: torch.dtype, terms: int) -> float:
    """What rounding allows: two roundings of the result, and sums of ``terms`` in float32."""
    size = max([1.0, *exact[exact.isfinite()].abs().flatten().tolist()])
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return size * (2 * torch.finfo(dtype).eps + 4 * max(terms, 16) ** 0.5 * sums)


def assert_exact(case: Case, kernel) -> None:
    """``kernel`` (an `..._lse` function) agrees with float64 in its result and log-sum-exp."""
    query, key, value, mask = case.inputs()
    out, lse = kernel(query, key, value, mask, scale=case.scale)
    exact, exact_lse = reference(query, key, value, mask, scale=case.scale)
    assert out.dtype == case.dtype
    assert out.shape == exact.shape
    assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
    assert lse.shape == exact_lse.shape
    error = (out.double() - exact).abs().max().item() if out.numel() else 0.0
    assert error <= tolerance(exact, case.dtype, case.keys), error
    assert torch.equal(lse == float("-inf"), exact_lse == float("-inf"))
    gap = (lse.double() - exact_lse)[exact_lse.isfinite()].abs()
    # Scores are sums of exact products, whatever the dtype; torch's exp of half types is short.
    limit = tolerance(exact_lse, lse.dtype, case.dim) + (1e-4 if case.dtype.itemsize == 2 else 0.0)
    assert gap.numel() == 0 or gap.max().item() <= limit, gap.max().item()
