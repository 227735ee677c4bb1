"""Decoding over a selection: the chosen pages are read where they lie, split over the device.

    query      [B, Hq, L, D]    any strides but 1 in the last dimension
    kv         rows [N, Hkv, S, D] and [N, Hkv, S, Dv], `vattn.kernels.kv`
    selection  ids [B, Hkv, K], count [B, Hkv], log_weights [B, Hkv, K], `vattn.kernels.selection`
    out        [B, Hq, L, Dv] of query's dtype, lse [B, Hq, L] float32, natural log
    mass       [B, Hkv, K] float32, if wanted

The G * L query rows of a KV head are rows of one tile (several from 65 or 33 on). The ids of every
(sequence, KV head) are one job: `vattn.kernels.splits` deals them out by their number as `decode`
deals out keys, on the device; grid and workspace depend on shapes alone, and a captured CUDA graph
serves any lengths, ids and counts. Parts are joined in the order of the ids: the same call gives
the same bits, whatever K the ids are reserved for.

A page is a run of rows, a row a run of 128-bit loads; single tokens (page_tokens = 1) are gathered
row by row. The mass has no atomics: while the keys are there, the log of each page's sum is kept,
[rows, K] float32; once the log-sum-exp of a row is known, the sum over the rows is written.

Mapped must be the rows of the chosen pages within [starts, lengths). Bytes moved: these rows of K
and V once, 4 of a page's id, query and out once, and at most two partials [rows, Dv + 2] float32 a
program; with the mass another 8 a page and query row. Definition: `vattn.kernels.selection`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.contract import check_row, rows_like
from vattn.kernels.deals import Tile, Workspace, tile_for
from vattn.kernels.gpu import Device, current, device_of, padded, precision
from vattn.kernels.kv import KV, scale_stride
from vattn.kernels.online import LOG2E, stored
from vattn.kernels.parts import ELEMENTS, finish, join_elements, keep
from vattn.kernels.selection import Selection
from vattn.kernels.sparse_walk import Lanes, lanes_for, walk_chosen
from vattn.kernels.splits import base_of, begin_of, deal, find, owner, parts_of, pieces_in

# Tokens that a program takes at least: a tile or two, since a selection is short.
LEAST_TOKENS = 128
# Of a tile: found by compilation, more of them spill with the mass and weights of single tokens.
MOST_BLOCK = 64
# Entries and rows whose mass a program sums at a time.
MASS_BLOCK, MASS_ROWS = 128, 8
COUNTS = ["batch", "reserved", "most", "least"]


def attend(
    query: Tensor,
    kv: KV,
    selection: Selection,
    *,
    scale: float | None = None,
    want_mass: bool = False,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend to the chosen tokens: (out [B, Hq, L, Dv], lse [B, Hq, L], mass [B, Hkv, K] or None).

    Args:
        query, kv, selection, want_mass: see above; a selection's tail is left to the caller.
        scale: of the scores; None: 1 / sqrt(D).
        workspace: of `workspace_for` with the same shapes; None: new, and a second launch joins the
            parts.

    Raises:
        ValueError: shapes, dtypes or devices do not suit; see `Selection` and `KV`.
    """
    selection.check(query, kv)
    check_row("query", query)
    kv, selection = kv.dense(), _dense(selection)
    out = rows_like(query, kv.value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    mass = query.new_empty(selection.ids.shape, dtype=torch.float32) if want_mass else None
    if lse.numel() == 0:
        return out, lse, None if mass is None else mass.zero_()
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    plan = plan_for(device_of(query), query, kv, selection)
    if workspace is None:
        workspace = workspace_for(query, kv, selection, one_launch=False)
    else:
        _check_workspace(workspace, plan, kv)
    with current(query):
        _launch(query, kv, selection, (out, lse, mass), scale, plan, workspace)
    return out, lse, mass


# ---- the kernels ----


@triton.jit(do_not_specialize=COUNTS)
def sparse_decode(
    query, key, value, out, lse, partials, tops, arrived, sums_of, ids, counts, log_weights,
    lengths, starts, slots, key_scale, value_scale,
    query_b, query_h, query_l, key_n, key_h, value_n, value_h, out_b, out_h, out_l,
    ids_b, ids_h, value_scale_h, key_scale_h, batch, reserved, most, tokens, least, scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ELEMENTS: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    # To `splits`, a sequence is the ids of one KV head of one sequence.
    sequences = (batch * HEADS, ROW_TILES, counts, None, most, tokens, 0, 0)
    results = (out, lse, value_scale, None, out_b, out_h, out_l, value_scale_h, tokens)
    dealt = deal(tl.num_programs(0), least, sequences, RULE)
    program = tl.program_id(0)
    if program >= dealt[0]:
        return
    at = begin_of(program, dealt)
    end = begin_of(program + 1, dealt)
    index, base = find(at, sequences, RULE)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    while at < end:
        pieces = pieces_in(index, sequences, RULE)
        job = (at - base) // pieces
        begin = base + job * pieces
        stop = tl.minimum(end, begin + pieces)
        b = index // HEADS
        head = index % HEADS
        mine = job * ROWS + row
        count = tl.load(counts + index)
        m, total, acc = walk_chosen(
            at - begin, stop - begin, b, head, index, mine, query, key, value, ids, log_weights,
            sums_of, lengths, starts, slots, key_scale, count, most,
            query_b, query_h, query_l, key_n, key_h, value_n, value_h, ids_b, ids_h, key_scale_h,
            reserved, tokens, scale, GROUPS, KEY_ROW, VALUE_ROW, PAGE, LANES, D, DV,
            BLOCK, BLOCK_D, BLOCK_DV, WIDEN, PRECISION, STAGES,
        )  # fmt: skip
        places = parts_of(begin, pieces, index * ROW_TILES + job, 0, dealt, RULE)
        parts, zeroth, next_place, step = places
        if parts == 1:
            inside = (d < DV)[None, :]
            finish(
                m[:, None], total[:, None], acc, mine[:, None], d[None, :], inside, True,
                b, head, results, GROUPS, HEADS,
            )  # fmt: skip
        else:
            nth = program - owner(begin, dealt)
            place = tl.where(nth == 0, zeroth, next_place + (nth - 1) * step)
            keep(m, total, acc, partials, tops, place, ROWS, DV)
            if arrived is not None:
                # As in `decode`: all threads have written before one releases the part; the last
                # one acquires what the others released.
                tl.debug_barrier()
                counter = arrived + zeroth // 2
                if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                    tl.store(counter, 0)
                    for first in range(0, ROWS * DV, ELEMENTS):
                        element = first + tl.arange(0, ELEMENTS)
                        join_elements(
                            element, partials, tops, places, job * ROWS, b, head, results,
                            ROWS, GROUPS, HEADS, DV,
                        )  # fmt: skip
        at = stop
        if stop == base + pieces * ROW_TILES:
            index += 1
            base = stop


@triton.jit(do_not_specialize=[*COUNTS, "tokens", "programs"])
def join_selected(
    partials, tops, out, lse, counts, value_scale,
    out_b, out_h, out_l, value_scale_h, batch, most, tokens, programs, least,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr,
    DV: tl.constexpr, ELEMENTS: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Join the parts of ELEMENTS results of a job that has several; leave others alone."""
    sequences = (batch * HEADS, ROW_TILES, counts, None, most, tokens, 0, 0)
    results = (out, lse, value_scale, None, out_b, out_h, out_l, value_scale_h, tokens)
    CHUNKS: tl.constexpr = (ROWS * DV + ELEMENTS - 1) // ELEMENTS
    line = tl.program_id(0) // CHUNKS
    index = line // ROW_TILES
    job = line % ROW_TILES
    dealt = deal(programs, least, sequences, RULE)
    pieces = pieces_in(index, sequences, RULE)
    begin = base_of(index, sequences, RULE) + job * pieces
    places = parts_of(begin, pieces, line, 0, dealt, RULE)
    if places[0] > 1:
        element = tl.program_id(0) % CHUNKS * ELEMENTS + tl.arange(0, ELEMENTS)
        join_elements(
            element, partials, tops, places, job * ROWS, index // HEADS, index % HEADS, results,
            ROWS, GROUPS, HEADS, DV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most", "tokens"])
def page_mass(
    sums_of, lse, counts, mass, most, tokens,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass of BLOCK entries of a KV head: a sum over its query rows, in their order."""
    blocks = (most + BLOCK - 1) // BLOCK
    index = tl.program_id(0) // blocks
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (index // HEADS).to(tl.int64)
    head = index % HEADS
    rows = GROUPS * tokens
    held = entry < tl.load(counts + index)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        query_head = b * (HEADS * GROUPS) + head * GROUPS + row % GROUPS
        at_lse = lse + query_head * tokens + row // GROUPS
        whole = tl.load(at_lse, mask=row < rows, other=0.0) * LOG2E
        whole = tl.where(whole == float("-inf"), 0.0, whole)
        at = sums_of + (index.to(tl.int64) * rows + row)[:, None] * (most * CHUNKS)
        read = (row < rows)[:, None] & held[None, :]
        for chunk in range(CHUNKS):
            part = tl.load(at + (entry * CHUNKS + chunk)[None, :], mask=read, other=float("-inf"))
            total += tl.sum(tl.exp2(part - whole[:, None]), 0)
    tl.store(mass + index.to(tl.int64) * most + entry, total, mask=entry < most)


# ---- the launcher ----


@dataclass(frozen=True)
class Plan:
    """A launch, as far as shapes and the device decide it.

    Args:
        tile: what a program holds at a time.
        lanes: how pages lie in a tile.
        jobs: tiles of query rows of a KV head.
        rows: query rows of each.
        pieces: tiles of ids, or longer pages, of a job at most.
        least: pieces that a program takes at least, if there are as many.
        programs: programs of the launch.
    """

    tile: Tile
    lanes: Lanes
    jobs: int
    rows: int
    pieces: int
    least: int
    programs: int


def plan_for(device: Device, query: Tensor, kv: KV, selection: Selection) -> Plan:
    """The launch for these shapes, whatever lengths, ids and counts are."""
    rows = query.shape[1] // kv.key.shape[1] * query.shape[2]
    tile = _tile(device, rows, query.shape[3], kv)
    lanes = lanes_for(tile.block, selection.page_tokens)
    jobs = -(-rows // tile.rows)
    pieces = max(1, -(-selection.ids.shape[2] // lanes.entries))
    least = max(1, LEAST_TOKENS // (lanes.entries * selection.page_tokens))
    most = query.shape[0] * kv.key.shape[1] * jobs * max(least, pieces) // least
    programs = min(device.processors * tile.programs, most)
    return Plan(tile, lanes, jobs, min(rows, tile.rows), pieces, least, programs)


def _tile(device: Device, rows: int, dim: int, kv: KV) -> Tile:
    """That of `decode`, with less in it where addresses take the registers."""
    itemsize = max(2, kv.key.element_size())
    tile = tile_for(device, rows, dim, kv.value.shape[3], itemsize)
    if itemsize == 4:
        return replace(tile, rows=16, block=max(16, min(MOST_BLOCK, tile.block // 2)), warps=4)
    tile = replace(tile, block=min(MOST_BLOCK, tile.block))
    return replace(tile, warps=8, programs=1) if tile.rows >= 32 else tile


def workspace_for(
    query: Tensor, kv: KV, selection: Selection, *, one_launch: bool | None = None
) -> Workspace:
    """Memory for the parts of calls with these shapes, on one stream.

    With ``one_launch`` the program that finishes a job last joins its parts; without it a second
    kernel does. None chooses one launch where that program has at most 256 KiB to join and a part
    at most 16 rows.
    """
    plan = plan_for(device_of(query), query, kv, selection)
    parts, tops = _part_shapes(plan, kv)
    if one_launch is None:
        each = plan.programs // max(1, query.shape[0] * kv.key.shape[1] * plan.jobs) + 2
        one_launch = plan.rows <= 16 and 4 * each * parts[1] * parts[2] <= 256 << 10
    return Workspace(
        query.new_empty(parts, dtype=torch.float32),
        query.new_empty(tops, dtype=torch.float32),
        query.new_zeros((plan.programs + 1,), dtype=torch.int32) if one_launch else None,
    )


def _part_shapes(plan: Plan, kv: KV) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of partials and tops: two parts a program."""
    return (2 * plan.programs, plan.rows, kv.value.shape[3]), (2 * plan.programs, 2, plan.rows)


def _check_workspace(workspace: Workspace, plan: Plan, kv: KV) -> None:
    """Raise ValueError unless all parts fit in."""
    parts, tops = _part_shapes(plan, kv)
    shapes = {"partials": parts, "tops": tops, "arrived": (plan.programs + 1,)}
    for name, shape in shapes.items():
        held: Tensor | None = getattr(workspace, name)
        if held is None:
            continue
        right = held.dtype == (torch.int32 if name == "arrived" else torch.float32)
        right = right and held.device == kv.key.device and held.is_contiguous()
        if not right or held.shape[0] < shape[0] or tuple(held.shape[1:]) != shape[1:]:
            raise ValueError(
                f"workspace.{name} is {held.dtype} {tuple(held.shape)} on {held.device}: must be "
                f"contiguous {shape}, or more of the first, on {kv.key.device}; pass "
                "workspace_for(...) of this call's query, kv and selection"
            )


def _launch(
    query: Tensor,
    kv: KV,
    selection: Selection,
    results: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    plan: Plan,
    workspace: Workspace,
) -> None:
    out, lse, mass = results
    device, ids = device_of(query), selection.ids
    batch, heads, tokens, dim = query.shape
    _, kv_heads, reserved, value_dim = kv.value.shape
    groups, most, indices = heads // kv_heads, ids.shape[2], batch * kv_heads
    tile, lanes = plan.tile, plan.lanes
    sums_of = None
    if mass is not None:
        sums_of = lse.new_empty((indices, groups * tokens, most * lanes.chunks))
    how, (key, value) = stored(device, kv.key, kv.value)
    looked_at = next(n for n in (32, 256, 1024) if indices <= n or n == 1024)
    shared = {
        "GROUPS": groups,
        "HEADS": kv_heads,
        "ROW_TILES": plan.jobs,
        "ROWS": plan.rows,
        "DV": value_dim,
        "ELEMENTS": min(ELEMENTS, triton.next_power_of_2(plan.rows * value_dim)),
        "RULE": (0, False, lanes.entries, 0, looked_at),
    }
    strides = (*out.stride()[:3], scale_stride(kv.value_scale))
    sparse_decode[(plan.programs,)](
        query, key, value, out, lse, workspace.partials, workspace.tops, workspace.arrived,
        sums_of, ids, selection.count, selection.log_weights,
        kv.lengths, kv.starts, kv.slots, kv.key_scale, kv.value_scale,
        *query.stride()[:3], *key.stride()[:2], *value.stride()[:2], *strides[:3],
        *ids.stride()[:2], strides[3], scale_stride(kv.key_scale),
        batch, reserved, most, tokens, plan.least, scale,
        KEY_ROW=key.stride(2), VALUE_ROW=value.stride(2), PAGE=selection.page_tokens,
        LANES=(lanes.entries, lanes.lanes, lanes.chunks), D=dim,
        BLOCK_M=tile.rows, BLOCK=tile.block, BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        WIDEN=how, PRECISION=precision(query), STAGES=tile.stages,
        num_warps=tile.warps, maxnreg=tile.registers, **shared,
    )  # fmt: skip
    if plan.pieces > 1 and workspace.arrived is None:
        chunks = -(-plan.rows * value_dim // shared["ELEMENTS"])
        join_selected[(indices * plan.jobs * chunks,)](
            workspace.partials, workspace.tops, out, lse, selection.count, kv.value_scale,
            *strides, batch, most, tokens, plan.programs, plan.least, num_warps=4, **shared,
        )  # fmt: skip
    if mass is not None and most:
        page_mass[(indices * -(-most // MASS_BLOCK),)](
            sums_of, lse, selection.count, mass, most, tokens,
            GROUPS=groups, HEADS=kv_heads, CHUNKS=lanes.chunks,
            ROWS=MASS_ROWS, BLOCK=MASS_BLOCK, num_warps=4,
        )  # fmt: skip


def _dense(selection: Selection) -> Selection:
    """Ids, counts and weights whose elements lie side by side; without the tail, which is the
    caller's to join."""
    ids, weights = selection.ids, selection.log_weights
    return Selection(
        ids if ids.stride(2) == 1 or ids.shape[2] <= 1 else ids.contiguous(),
        selection.count.contiguous(),
        selection.page_tokens,
        None if weights is None else weights.contiguous(),
    )
