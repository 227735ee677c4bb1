"""Seeded random inputs in any memory layout, with NaN wherever no element lives."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

NAN = float("nan")
SPARE = 5  # rows of a cache that are not part of the view


class Random:
    """Draws made from one seed and a name, so that every case can be drawn again by itself."""

    def __init__(self, seed: int, name: str) -> None:
        self._generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn_as = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self._generator, dtype=drawn_as).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator)

    def permutation(self, count: int) -> list[int]:
        return [int(i) for i in torch.randperm(count, generator=self._generator)]

    def seed(self) -> int:
        """A seed for a global generator."""
        return int(self.integers(0, 1 << 31, 1))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor equal to ``values`` [..., rows, width] whose memory is laid out as named."""
    return LAYOUTS[layout](values)


def _poisoned(values: Tensor, *shape: int) -> Tensor:
    fill = NAN if values.dtype.is_floating_point else 1
    return torch.full(shape, fill, dtype=values.dtype)


def _token_major(values: Tensor) -> Tensor:
    """[B, H, S, E] over memory [B, S, H, E]."""
    return values.transpose(-3, -2).contiguous().transpose(-3, -2)


def _wide(values: Tensor) -> Tensor:
    """The last stride is 2."""
    base = _poisoned(values, *values.shape[:-1], 2 * values.shape[-1])
    view = base[..., ::2]
    return view.copy_(values)


def _transposed(values: Tensor) -> Tensor:
    """[..., S, E] over memory [..., E, S]."""
    return values.transpose(-2, -1).contiguous().transpose(-2, -1)


def _cache(values: Tensor) -> Tensor:
    """A view of the first rows of a cache [.., 2, H, S + spare, E]; K and V share its memory."""
    *batch, heads, rows, width = values.shape
    base = _poisoned(values, *batch, 2, heads, rows + SPARE, width)
    return base.select(-4, 0).narrow(-2, 0, rows).copy_(values)


def _cache_rows(values: Tensor) -> Tensor:
    """A view of the first rows of a token-major cache [.., S + spare, 2, H, E]."""
    *batch, heads, rows, width = values.shape
    base = _poisoned(values, *batch, rows + SPARE, 2, heads, width)
    return base.narrow(-4, 0, rows).select(-3, 1).transpose(-3, -2).copy_(values)


def _expanded(values: Tensor) -> Tensor:
    """Stride 0 in the first dimension; equal to ``values`` only where its entries repeat."""
    return values[:1].clone().expand(values.shape)


def _offset(values: Tensor) -> Tensor:
    """Contiguous, starting one element into its storage."""
    base = _poisoned(values, values.numel() + 1)
    return base[1:].view(values.shape).copy_(values)


def _negated(values: Tensor) -> Tensor:
    """A view that holds the negative of its memory."""
    return torch._neg_view(-values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhsd": lambda values: values.contiguous(),
    "bshd": _token_major,
    "wide": _wide,
    "transposed": _transposed,
    "cache": _cache,
    "cache_rows": _cache_rows,
    "expanded": _expanded,
    "offset": _offset,
    "negated": _negated,
}
