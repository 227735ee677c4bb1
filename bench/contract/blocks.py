"""The blocks of the grid: shapes, masks, scales, layouts, and values that break kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.contract.call import FLOATS, Call
from bench.contract.grid import Block, Values
from bench.contract.inputs import NAN, Random, laid_out

Three = tuple[Tensor, Tensor, Tensor]

INF = float("inf")
TWO = (torch.float32, torch.bfloat16)

# Batch and heads in front of [rows, width] of query, key and value; native broadcasts them.
FRONTS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "2d": ((), (), ()),
    "3d": ((3,), (3,), (3,)),
    "4d": ((2, 3), (2, 3), (2, 3)),
    "5d": ((2, 1, 3), (2, 1, 3), (2, 1, 3)),
    "q3_kv4": ((3,), (2, 3), (2, 3)),
    "q4_kv3": ((2, 3), (3,), (3,)),
    "q2_kv4": ((), (2, 3), (2, 3)),
    "q4_kv2": ((2, 3), (), ()),
    "batch_of_q": ((1, 3), (2, 3), (2, 3)),
    "batch_of_k": ((2, 3), (1, 3), (2, 3)),
    "batch_of_v": ((2, 3), (2, 3), (1, 3)),
    "one_q_k": ((1, 3), (1, 3), (2, 3)),
    "one_kv_head": ((2, 3), (2, 1), (2, 1)),
    "one_q_head": ((2, 1), (2, 3), (2, 3)),
    "crossed": ((2, 1), (1, 3), (2, 1)),
}
# Query heads, key heads, value heads.
HEADS = ((4, 4, 4), (4, 2, 2), (4, 1, 1), (6, 3, 3), (6, 2, 2), (8, 2, 4), (8, 4, 1), (5, 5, 1))

# Mask shapes by letter, 1 for a dimension that broadcasts.
MASK_SHAPES = (
    *("LS", "1S", "L1", "11", "1LS", "HLS", "H1S"),
    *("11LS", "B1LS", "1HLS", "BHLS", "B11S", "BH1S", "BHL1"),
)


def drawn(random: Random, fronts: Any, rows: Any, widths: Any, dtype: torch.dtype) -> Three:
    """Normal query, key and value of these leading shapes, row counts and widths."""
    parts = zip(fronts, rows, widths, strict=True)
    query, key, value = (random.normal(*front, n, width, dtype=dtype) for front, n, width in parts)
    return query, key, value


def heads_of(batch: int, heads: tuple[int, int, int], rank: int) -> list[tuple[int, ...]]:
    front: tuple[int, ...] = {3: (), 4: (batch,), 5: (batch, 1)}[rank]
    return [(*front, count) for count in heads]


# ---- shapes --------------------------------------------------------------------------------------
def lengths(random: Random, L: int, S: int, causal: bool, heads: Any, dtype: torch.dtype) -> Call:
    qkv = drawn(random, heads_of(2, heads, 4), (L, S, S), (8, 8, 8), dtype)
    return Call(*qkv, causal=causal, gqa=heads[0] != heads[1])


def widths(random: Random, E: int, Ev: int, L: int, causal: bool, gqa: bool, dtype: Any) -> Call:
    front = heads_of(2, (4, 2, 2) if gqa else (2, 2, 2), 4)
    qkv = drawn(random, front, (L, 6, 6), (E, E, Ev), dtype)
    return Call(*qkv, causal=causal, gqa=gqa)


def dims(random: Random, front: str, L: int, mask: str, dtype: torch.dtype) -> Call:
    qkv = drawn(random, FRONTS[front], (L, 5, 5), (8, 8, 8), dtype)
    keep = random.uniform(L, 5) < 0.7 if mask == "bool" else None
    return Call(*qkv, keep, causal=mask == "causal")


def grouped(
    random: Random, heads: Any, rank: int, L: int, mask: str, Ev: int, dtype: torch.dtype
) -> Call:
    qkv = drawn(random, heads_of(2, heads, rank), (L, 7, 7), (8, 8, Ev), dtype)
    keep = None
    if mask == "bool":
        keep = random.uniform(heads[0], L, 7) < 0.7
    return Call(*qkv, keep, causal=mask == "causal", gqa=True)


def one_size(random: Random, axis: str, dtype: torch.dtype, gqa: bool) -> Call:
    """One dimension is 0."""
    sizes = {"B": 2, "H": 4, "L": 3, "S": 5, "E": 8, "Ev": 8} | {axis: 0}
    kv_heads = sizes["H"] // 2 if gqa else sizes["H"]
    fronts = [(sizes["B"], h) for h in (sizes["H"], kv_heads, kv_heads)]
    rows = (sizes["L"], sizes["S"], sizes["S"])
    return Call(*drawn(random, fronts, rows, (sizes["E"], sizes["E"], sizes["Ev"]), dtype), gqa=gqa)


def large(
    random: Random, L: int, S: int, heads: Any, layout: str, D: int, mask: str, dtype: Any
) -> Call:
    """Sizes at which kernels cut rows and keys into tiles, and threads share the work."""
    qkv = drawn(random, heads_of(2, heads, 4), (L, S, S), (D, D, D), dtype)
    key, value = laid_out(qkv[1], layout), laid_out(qkv[2], layout)
    keep = None
    if mask == "padding":
        keep = torch.arange(S) < torch.tensor([S, max(1, S // 3)])[:, None]
        keep = keep[:, None, None]
    return Call(qkv[0], key, value, keep, causal=mask == "causal", gqa=heads[0] != heads[1])


SHAPES = (
    Block(
        "lengths",
        {
            "L": (0, 1, 2, 3, 7, 16, 33),
            "S": (0, 1, 2, 3, 7, 16, 33),
            "causal": (False, True),
            "heads": ((3, 3, 3), (4, 2, 2)),
            "dtype": FLOATS,
        },
        lengths,
    ),
    Block(
        "widths",
        {
            "E": (1, 8, 13, 64, 80),
            "Ev": (1, 8, 13, 64, 80),
            "L": (1, 5),
            "causal": (False, True),
            "gqa": (False, True),
            "dtype": FLOATS,
        },
        widths,
    ),
    Block(
        "dims",
        {"front": tuple(FRONTS), "L": (1, 4), "mask": ("none", "bool", "causal"), "dtype": FLOATS},
        dims,
    ),
    Block(
        "grouped",
        {
            "heads": HEADS,
            "rank": (3, 4, 5),
            "L": (1, 3),
            "mask": ("none", "bool", "causal"),
            "Ev": (8, 5),
            "dtype": TWO,
        },
        grouped,
    ),
    Block(
        "empty",
        {"axis": ("B", "H", "L", "S", "E", "Ev"), "dtype": FLOATS, "gqa": (False, True)},
        one_size,
        lambda values: not (values["axis"] == "H" and values["gqa"]),
        leaves=(),
    ),
    Block(
        "large",
        {
            "L": (1, 3, 65),
            "S": (31, 513, 1100),
            "heads": ((8, 8, 8), (8, 2, 2), (16, 1, 1)),
            "layout": ("bhsd", "cache", "cache_rows"),
            "D": (64, 128),
            "mask": ("none", "padding", "causal"),
            "dtype": (torch.float32, torch.bfloat16, torch.float16),
        },
        large,
        lambda values: values["L"] == 1 or values["S"] > 31,
        leaves=(),
        marks=frozenset({"parallel"}),
        strength=3,
    ),
)


# ---- masks ---------------------------------------------------------------------------------------
def kept(random: Random, shape: tuple[int, ...], pattern: str) -> Tensor:
    """Which keys are attended; every pattern but "random" leaves some rows without any."""
    keep = random.uniform(*shape) < 0.6
    if pattern == "left":  # a first half that nobody sees, as with left padding
        keep[..., : (shape[-1] + 1) // 2] = False
    elif pattern == "right":
        keep[..., shape[-1] // 2 :] = False
    elif pattern == "dead":
        keep[..., -1:, :] = False
    elif pattern == "random":
        keep[..., 0] = True
    return keep


def arranged(mask: Tensor, layout: str) -> Tensor:
    """The same mask as a transposed, sliced or stretched view."""
    if layout == "transposed":
        return mask.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "sliced":
        wide = torch.ones(*mask.shape[:-1], mask.shape[-1] + 3, dtype=mask.dtype)
        return wide[..., 2:-1].copy_(mask)
    if layout == "stride0":
        return mask[:1].clone().expand(mask.shape)
    return mask


def roomy(mask: Tensor) -> Tensor:
    """The mask with spare memory behind it, which torch's CPU kernel reads for float64 tensors."""
    return torch.zeros(2 * mask.numel())[: mask.numel()].view(mask.shape).copy_(mask)


def masked(
    random: Random, shape: str, kind: str, layout: str, pattern: str, L: int, gqa: bool, dtype: Any
) -> Call:
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    qkv = drawn(random, heads_of(2, heads, 4), (L, 9, 9), (8, 8, 8), dtype)
    sizes = {"B": 2, "H": 4, "L": L, "S": 9, "1": 1}
    mask = kept(random, tuple(sizes[letter] for letter in shape), pattern)
    if kind != "bool":
        biases = random.normal(*mask.shape).masked_fill(~mask, -INF)
        mask = biases.to(dtype if kind == "same" else torch.float32)
    if kind == "float32" and dtype == torch.float64:
        mask = roomy(mask)
    return Call(*qkv, arranged(mask, layout), gqa=gqa)


def odd_mask(random: Random, entry: str, rank: int, L: int, gqa: bool, dtype: Any) -> Call:
    """Mask entries that are no ordinary bias, in the last row (and elsewhere for "one")."""
    heads = (4, 2, 2) if gqa else (4, 4, 4)
    qkv = drawn(random, heads_of(2, heads, rank), (L, 9, 9), (8, 8, 8), dtype)
    least = torch.finfo(dtype).min
    mask = random.normal(L, 9, dtype=dtype)
    fills = {"-inf": -INF, "min": least, "+inf": INF, "nan": NAN, "-1e4": -1e4}
    if entry in fills:
        mask[-1] = fills[entry]
    elif entry == "one_nan":
        mask[-1, 3] = NAN
    elif entry == "one_inf":
        mask[-1, 3] = INF
    elif entry == "some_min":
        mask[:, 2:] = least
    elif entry == "all_dead":
        mask[:] = -INF
    return Call(*qkv, mask, gqa=gqa)


def _mask_makes_sense(values: Values) -> bool:
    shape, layout = values["shape"], values["layout"]
    if layout == "stride0" and len(shape) < 3:
        return False
    return values["dtype"] != torch.float32 or values["kind"] != "float32"


MASK_AXES = {
    "shape": MASK_SHAPES,
    "kind": ("bool", "same", "float32"),
    "layout": ("plain", "transposed", "sliced", "stride0"),
    "pattern": ("random", "left", "right", "dead"),
    "L": (1, 5),
    "gqa": (False, True),
}
MASKS = (
    Block("masks", {**MASK_AXES, "dtype": TWO}, masked, _mask_makes_sense),
    Block(
        "mask_dtypes",
        {**MASK_AXES, "layout": ("plain",), "dtype": (torch.float16, torch.float64)},
        masked,
        _mask_makes_sense,
    ),
    Block(
        "mask_gradients",
        {**MASK_AXES, "kind": ("same", "float32"), "layout": ("plain", "transposed"), "dtype": TWO},
        masked,
        _mask_makes_sense,
        leaves=("query", "key", "value", "mask"),
    ),
    Block(
        "mask_entries",
        {
            "entry": (
                *("-inf", "min", "+inf", "nan", "one_nan", "one_inf"),
                *("some_min", "all_dead", "-1e4"),
            ),
            "rank": (3, 4),
            "L": (1, 3),
            "gqa": (False, True),
            "dtype": FLOATS,
        },
        odd_mask,
        leaves=(),
    ),
)
