"""What a decode step's launch is made of: tile, programs, workspace. Pure functions of shapes and
the device: nothing depends on a length, so that a captured CUDA graph serves any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels.gpu import Device, device_of, padded
from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores
from vattn.kernels.splits import Deal, tiles_of

MOST_BLOCK = 128


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time, ``rows`` query rows and ``block`` tokens of K and V, and how
    many ``programs`` a processor holds."""

    rows: int
    block: int
    warps: int
    stages: int
    programs: int

    @property
    def registers(self) -> int:
        """Registers a thread that so many programs of a processor leave to each."""
        return min(255, (64 << 10) // (32 * self.warps * self.programs))


def tile_for(device: Device, rows: int, dim: int, value_dim: int, itemsize: int) -> Tile:
    """The tile for ``rows`` query rows a KV head.

    A tile of K and V is 32 KiB, of which two are on their way: that covers the memory's latency
    with two programs a processor (4.3 TB/s x 0.7 us = 23 KB a processor). A tile of 8-bit numbers
    is half as large, so that they fit the registers once they are wide, and four are on their way.
    """
    width = padded(dim) + padded(value_dim)
    most_rows = 64 if padded(value_dim) <= 128 and itemsize > 1 else 32
    tile_rows = min(most_rows, padded(rows))
    size = 16 << 10 if itemsize == 1 else 32 << 10
    block = max(16, min(MOST_BLOCK, padded(size // (width * itemsize) + 1) // 2))
    stages = 5 if itemsize == 1 else 3
    shared = (stages - 1) * block * width * itemsize
    shared += 2 * tile_rows * (padded(dim) + block) + (2 << 10)  # the query, weights, sums
    programs = max(1, min(2, device.shared_bytes // shared))
    if device.arch >= 100 and rows >= 16:  # found by compilation: other tiles spill there
        if tile_rows == 32:
            return Tile(tile_rows, max(16, block // 2), 4, stages, programs)
        return Tile(tile_rows, block, 8, stages, programs if tile_rows == 16 else 1)
    return Tile(tile_rows, block, 4, stages, programs)


def least_tokens(rows: int, dim: int, value_dim: int, itemsize: int) -> int:
    """Tokens that a program takes at least: its partial is then at most 3 % of what it reads, but
    where that asks for more than 512 tokens."""
    partial, token = 4 * rows * (value_dim + 2), (dim + value_dim) * itemsize
    return min(512, max(128, -(-100 * partial // (3 * token))))


def deal_for(
    device: Device, query: Tensor, kv: KV, scores: Scores, split_tokens: int | None = None
) -> Deal:
    """How the work on these shapes is dealt out, whatever the lengths."""
    batch, heads, tokens, dim = query.shape
    _, kv_heads, reserved, value_dim = kv.value.shape
    rows = heads // kv_heads * tokens
    tile = tile_for(device, rows, dim, value_dim, kv.key.element_size())
    jobs = kv_heads * -(-rows // tile.rows)
    most = tiles_of(reserved, 0, tokens, scores, tile.block)
    if split_tokens is not None:
        fixed = split_tokens // tile.block
        return Deal(
            min(device.processors * tile.programs, batch * jobs * -(-most // fixed)),
            jobs, tile.block, 1, fixed, -(-most // fixed),
        )  # fmt: skip
    least = least_tokens(min(rows, tile.rows), dim, value_dim, kv.key.element_size())
    least = -(-least // tile.block)
    programs = min(device.processors * tile.programs, batch * jobs * max(least, most) // least)
    return Deal(programs, jobs, tile.block, least)


@dataclass(frozen=True)
class Workspace:
    """Memory of a decode step, for calls of the same shapes on one stream.

    Two launches that may run at the same time need a workspace each, and lengths must not change
    while a launch runs: parts would be joined that are not of one step. A launch that was broken
    off, or for which this did not hold, can leave ``arrived`` other than 0, and so all later
    results wrong: `clear` it then.

    Args:
        partials: float32 [P, rows, Dv].
        tops: float32 [P, 2, rows], a part's maximum and sum.
        arrived: int32 [P], 0 between the calls; None: results are joined by a second launch.
    """

    partials: Tensor
    tops: Tensor
    arrived: Tensor | None = None

    def clear(self) -> None:
        """Zero ``arrived``, in the order of the stream."""
        if self.arrived is not None:
            self.arrived.zero_()


def workspace_for(
    query: Tensor,
    kv: KV,
    scores: Scores | None = None,
    *,
    split_tokens: int | None = None,
    one_launch: bool | None = None,
) -> Workspace:
    """Memory for the parts of calls with these shapes.

    With ``one_launch`` the program that finishes a job last joins its parts; without it a second
    kernel does. None chooses one launch where that program has at most 256 KiB to join and a part
    at most 16 rows: more rows need the registers that joining takes.
    """
    scores = Scores() if scores is None else scores
    dealt = deal_for(device_of(query), query, kv, scores, split_tokens)
    return workspace_of(query, kv, dealt, one_launch)


def workspace_of(query: Tensor, kv: KV, dealt: Deal, one_launch: bool | None) -> Workspace:
    """`workspace_for` a call that is ``dealt`` out already."""
    places, rows, value_dim = _part_shape(device_of(query), query, kv, dealt)
    if one_launch is None:
        jobs = max(1, query.shape[0] * dealt.jobs)
        parts = dealt.most if dealt.fixed else dealt.programs // jobs + 2
        one_launch = rows <= 16 and parts * rows * value_dim * 4 <= 256 << 10
    return Workspace(
        query.new_empty((places, rows, value_dim), dtype=torch.float32),
        query.new_empty((places, 2, rows), dtype=torch.float32),
        query.new_zeros((places // 2 + 1,), dtype=torch.int32) if one_launch else None,
    )


def check_workspace(workspace: Workspace, query: Tensor, kv: KV, dealt: Deal) -> None:
    """Raise ValueError unless all parts of a call that is ``dealt`` out so fit in."""
    places, rows, value_dim = _part_shape(device_of(query), query, kv, dealt)
    for name, shape, dtype in (
        ("partials", (places, rows, value_dim), torch.float32),
        ("tops", (places, 2, rows), torch.float32),
        ("arrived", (places // 2 + 1,), torch.int32),
    ):
        held: Tensor | None = getattr(workspace, name)
        if held is None and name == "arrived":
            continue
        if (
            held is None
            or held.dim() != len(shape)
            or held.shape[0] < shape[0]
            or held.shape[1:] != shape[1:]
            or held.dtype != dtype
            or held.device != query.device
            or not held.is_contiguous()
        ):
            found = None if held is None else f"{held.dtype} {tuple(held.shape)} on {held.device}"
            raise ValueError(
                f"workspace.{name} is {found}: must be contiguous {dtype} {shape}, or more of the "
                f"first, on {query.device}; pass workspace_for(...) of this call's query, kv, "
                "scores and split_tokens"
            )


def _part_shape(device: Device, query: Tensor, kv: KV, dealt: Deal) -> tuple[int, int, int]:
    """Parts that a call writes at most, and rows and columns of each."""
    jobs = query.shape[0] * max(1, dealt.jobs)
    places = jobs * dealt.most if dealt.fixed else 2 * dealt.programs
    return places, tile_of(device, query, kv)[1], kv.value.shape[3]


def tile_of(device: Device, query: Tensor, kv: KV) -> tuple[Tile, int]:
    """The tile, and how many of its rows a part has."""
    rows = query.shape[1] // kv.key.shape[1] * query.shape[2]
    dims = query.shape[3], kv.value.shape[3]
    tile = tile_for(device, rows, *dims, kv.key.element_size())
    return tile, min(rows, tile.rows)
