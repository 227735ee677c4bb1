"""More blocks of the grid: scales, memory layouts, and values at the edge of a dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.contract.blocks import INF, TWO, drawn, heads_of, kept
from bench.contract.call import FLOATS, Call
from bench.contract.grid import Block
from bench.contract.inputs import LAYOUTS, NAN, Random, laid_out

SCALES: dict[str, Any] = {
    "none": None,
    "zero": 0.0,
    "int0": 0,
    "small": 1e-3,
    "negative": -0.7,
    "int": 2,
    "tensor": torch.tensor(0.37),
    "far": -1e4,
}


def scaled(random: Random, scale: str, mask: str, L: int, gqa: bool, dtype: torch.dtype) -> Call:
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    qkv = drawn(random, heads_of(2, heads, 4), (L, 6, 6), (8, 8, 8), dtype)
    keep = kept(random, (2, 1, 1, 6), "random") if mask == "bool" else None
    return Call(*qkv, keep, causal=mask == "causal", scale=SCALES[scale], gqa=gqa)


def placed(
    random: Random, query: str, cache: str, mask: str, L: int, gqa: bool, dtype: torch.dtype
) -> Call:
    """Query in one memory layout, key and value in another."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    qkv = drawn(random, heads_of(2, heads, 4), (L, 7, 7), (8, 8, 8), dtype)
    keep = kept(random, (2, 1, 1, 7), "random") if mask == "bool" else None
    views = laid_out(qkv[0], query), laid_out(qkv[1], cache), laid_out(qkv[2], cache)
    return Call(*views, keep, causal=mask == "causal", gqa=gqa)


def loud(random: Random, factor: float, mask: str, L: int, gqa: bool, dtype: torch.dtype) -> Call:
    """Logits far apart: a softmax close to a choice."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    query, key, value = drawn(random, heads_of(2, heads, 4), (L, 24, 24), (16, 16, 16), dtype)
    keep = kept(random, (2, 1, 1, 24), "right") if mask == "bool" else None
    return Call(query * factor, key * factor, value, keep, causal=mask == "causal", gqa=gqa)


def brim(random: Random, fill: tuple[torch.dtype, float], E: int, L: int, causal: bool) -> Call:
    """All entries at a size whose dot products leave the range of the dtype."""
    dtype, value = fill
    query, keys = (torch.full((1, 2, rows, E), value, dtype=dtype) for rows in (L, 9))
    return Call(query, keys, keys.clone(), causal=causal)


def chosen(random: Random, kind: str, L: int, gqa: bool, dtype: torch.dtype) -> Call:
    """Every row attends to one key, so that the result is a row of V, bit for bit."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    qkv = drawn(random, heads_of(2, heads, 4), (L, 8, 8), (8, 8, 8), dtype)
    keep = torch.zeros(2, 1, L, 8, dtype=torch.bool)
    keep.scatter_(-1, random.integers(0, 8, 2, 1, L, 1), True)
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -INF).to(dtype)
    return Call(*qkv, mask, gqa=gqa)


def even(random: Random, S: int, L: int, gqa: bool, dtype: torch.dtype) -> Call:
    """Equal logits over a power of two keys: the mean of small integers, exact in every dtype."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    fronts = heads_of(2, heads, 4)
    query = torch.zeros(*fronts[0], L, 8, dtype=dtype)
    key = random.normal(*fronts[1], S, 8, dtype=dtype)
    value = random.integers(-4, 5, *fronts[2], S, 8).to(dtype) * S
    return Call(query, key, value, gqa=gqa)


def hidden(
    random: Random, where: str, mask: str, rank: int, L: int, gqa: bool, dtype: torch.dtype
) -> Call:
    """NaN or infinity in key or value rows that the mask hides from every query."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    query, key, value = drawn(random, heads_of(2, heads, rank), (L, 8, 8), (8, 8, 8), dtype)
    wrong = INF if where.endswith("inf") else NAN
    if where.startswith(("k", "both")):
        key[..., 5:, :] = wrong
    if where.startswith(("v", "both")):
        value[..., 5:, :] = wrong
    if mask == "causal":
        return Call(query, key, value, causal=True, gqa=gqa)
    keep = (torch.arange(8) < 5).expand(L, 8)
    if mask == "float":
        return Call(
            query, key, value, torch.zeros(L, 8).masked_fill(~keep, -INF).to(dtype), gqa=gqa
        )
    return Call(query, key, value, keep, gqa=gqa)


def cleaned(call: Call) -> Call:
    """The call without what the mask hides."""

    def zeroed(each: Tensor) -> Tensor:
        return each.masked_fill(~torch.isfinite(each), 0.0)

    return replace(call, key=zeroed(call.key), value=zeroed(call.value))


def broken(random: Random, where: str, L: int, gqa: bool, dtype: torch.dtype) -> Call:
    """One NaN or infinity that is attended to."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    query, key, value = drawn(random, heads_of(2, heads, 4), (L, 8, 8), (8, 8, 8), dtype)
    target = {"q": query, "k": key, "v": value}[where[0]]
    target[1, 1, -1, 2] = INF if where.endswith("inf") else NAN
    return Call(query, key, value, gqa=gqa)


VALUES = (
    Block(
        "scale",
        {
            "scale": tuple(SCALES),
            "mask": ("none", "bool", "causal"),
            "L": (1, 5),
            "gqa": (False, True),
            "dtype": FLOATS,
        },
        scaled,
    ),
    Block(
        "layout",
        {
            "query": tuple(name for name in LAYOUTS if not name.startswith("cache")),
            "cache": tuple(LAYOUTS),
            "mask": ("none", "bool", "causal"),
            "L": (1, 3),
            "gqa": (False, True),
            "dtype": TWO,
        },
        placed,
    ),
    Block(
        "loud",
        {
            "factor": (3.0, 8.0, 30.0),
            "mask": ("none", "bool", "causal"),
            "L": (1, 5),
            "gqa": (False, True),
            "dtype": FLOATS,
        },
        loud,
        leaves=(),
    ),
    Block(
        "brim",
        {
            "fill": (
                (torch.float16, 256.0),
                (torch.float16, 6e4),
                (torch.bfloat16, 133120.0),
                (torch.bfloat16, 1e15),
                (torch.float32, 1e15),
            ),
            "E": (64, 80),
            "L": (1, 9),
            "causal": (False, True),
        },
        brim,
        leaves=(),
    ),
    Block(
        "chosen",
        {"kind": ("bool", "float"), "L": (1, 5), "gqa": (False, True), "dtype": FLOATS},
        chosen,
        marks=frozenset({"bits"}),
    ),
    Block(
        "even",
        {"S": (1, 2, 4, 16, 64), "L": (1, 5), "gqa": (False, True), "dtype": FLOATS},
        even,
        marks=frozenset({"bits"}),
    ),
    Block(
        "hidden",
        {
            "where": ("k", "v", "both", "k_inf", "v_inf"),
            "mask": ("bool", "float", "causal"),
            "rank": (3, 4),
            "L": (1, 4),
            "gqa": (False, True),
            "dtype": TWO,
        },
        hidden,
        truth=cleaned,
        leaves=(),
        strength_quick=3,  # where torch hides NaN hangs on the mask, the rows and one more
    ),
    Block(
        "broken",
        {
            "where": ("q", "k", "v", "v_inf"),
            "L": (1, 4),
            "gqa": (False, True),
            "dtype": FLOATS,
        },
        broken,
        leaves=(),
    ),
)
