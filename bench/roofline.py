"""What each attention call moves, computes and at least takes; what our split decode adds to it.

The floor is of the data sheet (bench/shapes.py). ``reached_us`` puts rates in its place that others
have measured, in their words:

    H200    4.3 TB/s, 790 TFLOP/s    "~4.3 TB/s copy", "~790 measured matmul"
    H100    3.0 TB/s, 660 TFLOP/s    "3000 GB/s", "660 TFLOPS", on an H800: deepseek-ai/FlashMLA

Nothing is timed here: bytes are counted, and the parts of a split decode come from the launcher's
own rule, for 132 processors. A part is written once and read once; it is small enough for L2, and
counted once. The gates: bytes are those of the tensors, every tile is dealt out exactly once.
"""

from __future__ import annotations

import torch

from bench.harness import Bench
from bench.shapes import DECODE, H100, H200, SHAPES, Peak, Shape
from vattn.kernels import gpu
from vattn.kernels.deals import deal_for, tile_of
from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores
from vattn.kernels.splits import splits, tiles_of

REACHED = (Peak("H200", 4.3e12, 790e12), Peak("H100", 3.0e12, 660e12))
LONG = 4096  # keys from which on parts must be small beside K and V
SHARE = "<= 3"


def run(bench: Bench) -> None:
    for shape in SHAPES:
        floor(bench, shape)
    for shape in DECODE:
        parts(bench, shape)


def floor(bench: Bench, shape: Shape) -> None:
    """The least time on an H200; bytes, FLOP and other devices beside it."""
    query, kv = tensors(shape)
    held = kv.key.nbytes + kv.value.nbytes + 2 * query.nbytes
    ragged = len(set(shape.lengths)) > 1
    bench.figure(
        f"roofline/{shape.kind}/{shape.name}",
        shape.floor_us(H200),
        "us",
        gate=shape.nbytes < held if ragged else shape.nbytes == held,
        bytes=shape.nbytes,
        flop=shape.flop,
        flop_per_byte=round(shape.flop / shape.nbytes, 1),
        h100_us=round(shape.floor_us(H100), 1),
        reached_us={peak.name: round(shape.floor_us(peak), 1) for peak in REACHED},
    )


def parts(bench: Bench, shape: Shape) -> None:
    """Bytes of a decode step's parts, in percent of the bytes of K and V."""
    query, kv = tensors(shape)
    scores = Scores(causal="bottom_right" if shape.causal else None)
    dealt = deal_for(gpu.H100, query, kv, scores)
    tile, rows = tile_of(gpu.H100, query, kv)
    tiles = [tiles_of(length, 0, shape.queries, scores, tile.block) for length in shape.lengths]
    found = splits(tiles, dealt)
    kept = sum(split.partial is not None for split in found)
    written = kept * rows * (shape.dim + 2) * 4
    bench.figure(
        f"roofline/parts/{shape.name}",
        100 * written / shape.kv_bytes,
        "% of K and V",
        gate=sum(split.end - split.first for split in found) == dealt.jobs * sum(tiles),
        target=SHARE if max(shape.lengths) >= LONG else None,
        programs=len({split.program for split in found}),
        parts=kept,
        bytes=written,
    )


def tensors(shape: Shape) -> tuple[torch.Tensor, KV]:
    """Query, K and V without memory."""
    dim, half = shape.dim, torch.bfloat16
    sizes = shape.batch, shape.kv_heads, max(shape.lengths), dim
    query = torch.empty(shape.batch, shape.heads, shape.queries, dim, dtype=half, device="meta")
    rows = torch.empty(sizes, dtype=half, device="meta")
    return query, KV(rows, rows)
