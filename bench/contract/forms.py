"""The few calls that every law and every refusal is tried on: one for each kind of kernel path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.contract.call import Call
from bench.contract.cases import Case
from bench.contract.inputs import Random, laid_out

Form = Callable[[Random, torch.dtype], Call]


def heads(random: Random, dtype: torch.dtype) -> Call:
    """Multi-head attention, fused in torch."""
    return Call(*_drawn(random, dtype, (4, 4), (3, 5)))


def causal(random: Random, dtype: torch.dtype) -> Call:
    return Call(*_drawn(random, dtype, (4, 4), (6, 6)), causal=True)


def masked(random: Random, dtype: torch.dtype) -> Call:
    """Grouped heads and a bool mask with a row that attends to nothing."""
    keep = random.uniform(2, 1, 3, 7) < 0.6
    keep[0, 0, 1] = False
    return Call(*_drawn(random, dtype, (4, 2), (3, 7)), keep, gqa=True)


def biased(random: Random, dtype: torch.dtype) -> Call:
    """A float mask, one for every head."""
    bias = random.normal(1, 4, 3, 5, dtype=dtype)
    return Call(*_drawn(random, dtype, (4, 4), (3, 5)), bias)


def decode(random: Random, dtype: torch.dtype) -> Call:
    """One query token, 4 query heads to a KV head, K and V as views into a token-major cache."""
    query, key, value = _drawn(random, dtype, (8, 2), (1, 19), 16)
    return Call(query, laid_out(key, "cache_rows"), laid_out(value, "cache_rows"), gqa=True)


def flat(random: Random, dtype: torch.dtype) -> Call:
    """Three dimensions: plain maths in torch."""
    query, key, value = _drawn(random, dtype, (4, 4), (3, 6))
    return Call(query[0], key[0], value[0])


def long(random: Random, dtype: torch.dtype) -> Call:
    """`decode` over enough keys that kernels of their own, split over cores, are worth it."""
    query, key, value = (t[:1] for t in _drawn(random, dtype, (16, 2), (1, 1100), 128))
    return Call(query, laid_out(key, "cache_rows"), laid_out(value, "cache_rows"), gqa=True)


def _drawn(
    random: Random,
    dtype: torch.dtype,
    heads: tuple[int, int],
    rows: tuple[int, int],
    width: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value of two sequences."""
    query, key, value = (random.normal(2, heads[i], rows[i], width, dtype=dtype) for i in (0, 1, 1))
    return query, key, value


SMALL: tuple[Form, ...] = (heads, causal, masked, biased, decode, flat)


def form_case(form: Form, family: str, seed: int, dtype: torch.dtype) -> Case:
    name = f"{form.__name__}[{str(dtype).removeprefix('torch.')}]"
    return Case(family, name, seed, lambda random: form(random, dtype))
