"""Decoding: a few query tokens of each sequence over all of its keys, split over the whole device.

    query  [B, Hq, L, D]  L <= 16, any strides but 1 in the last dimension
    kv     rows [N, Hkv, S, D] and [N, Hkv, S, Dv], `vattn.kernels.kv`
    tree   bool [L, L] or [B, L, L]: whether query l sees the i-th of the last L rows
    out    [B, Hq, L, Dv] of query's dtype, lse [B, Hq, L] float32, natural log
    logits [B, Hkv, G * L, n] float32, if wanted: what query row g * L + l scores, -inf unseen

Query head h reads KV head h // G, G = Hq / Hkv; the G * L query rows of a KV head are rows of one
tile (several from 65 or 33 on), so that each row of K and V is read once. The keys are dealt out to
programs on the device (`vattn.kernels.splits`): grid and workspace depend on shapes and the device
alone (`vattn.kernels.deals`), and a captured CUDA graph serves any lengths. Parts of a result are
joined in the order of their keys, never by who comes first: the same call gives the same bits.
Lengths and starts must not change while a launch runs, since each program deals the work out
anew; a workspace serves one stream (`vattn.kernels.deals.Workspace`).

Mapped must be, of sequence b, rows [starts, lengths) that a query sees: with a window, the rows
between the sinks and the window are not read. Bytes moved: these rows of K and V once, query and
out once, and at most two partials [rows, Dv + 2] float32 a program; logits twice.
Source: FlashDecoding, https://pytorch.org/blog/flash-decoding/; stream-K,
https://arxiv.org/abs/2301.03598. Definition: `vattn.kernels.scores.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.contract import check_row, rows_like
from vattn.kernels.deals import (
    MOST_BLOCK,
    Workspace,
    check_workspace,
    deal_for,
    tile_of,
    workspace_of,
)
from vattn.kernels.gpu import Device, current, device_of, padded, precision
from vattn.kernels.kv import KV, MOST_TOKENS, scale_stride
from vattn.kernels.online import stored
from vattn.kernels.pairs import pairs_of
from vattn.kernels.parts import ELEMENTS, finish, join, join_elements, keep
from vattn.kernels.scores import CAUSAL, MOST_WINDOW, Scores
from vattn.kernels.splits import (
    Deal,
    begin_of,
    deal,
    find,
    owner,
    parts_of,
    pieces_in,
    tiles_in,
    tiles_of,
)
from vattn.kernels.walk import walk

# What a compiled kernel need not know: a new number must not stall a step that serves. ``tokens``
# has three forms (1, multiples of 16, others), of which the first takes fewer registers.
COUNTS = ["batch", "reserved", "longest", "least", "most", "window", "sink_tokens"]


def decode(
    query: Tensor,
    kv: KV,
    scores: Scores | None = None,
    *,
    tree: Tensor | None = None,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The result of `decode_lse` alone."""
    return decode_lse(
        query, kv, scores, tree=tree, split_tokens=split_tokens, out=out, workspace=workspace
    )[0]


def decode_lse(
    query: Tensor,
    kv: KV,
    scores: Scores | None = None,
    *,
    tree: Tensor | None = None,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    logits: Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few last tokens: (out [B, Hq, L, Dv], lse [B, Hq, L]).

    Args:
        query: [B, Hq, L, D], L at most 16.
        kv: where K and V lie, the rows of these L tokens among them.
        scores: scale, causality, window and what else scores go through.
        tree: bool [L, L] or [B, L, L]: which of the last L rows a query sees; all before it sees.
        split_tokens: keys are cut at multiples of it, and nowhere else: the bits of a sequence's
            result then do not depend on the other sequences. None: cut where it balances.
        out: where the result goes, of query's dtype or float32; None: new, with the strides of a
            query of Dv elements.
        logits: float32 contiguous [B, Hkv, G * L, n] where scores go, scaled and all, -inf where a
            query does not see: evidence for policies. n: all lengths at least, at most ``S``.
        workspace: of `workspace_for` with the same query, kv, scores and split_tokens; None: new,
            and a second launch joins the parts.

    Raises:
        ValueError: shapes, dtypes or devices break the contract.
    """
    kv, scores = kv.dense(), Scores() if scores is None else scores.dense()
    _check(query, kv, scores, tree)
    device = device_of(query)
    if split_tokens is not None and (split_tokens < 1 or split_tokens % MOST_BLOCK):
        raise ValueError(f"split_tokens={split_tokens}: must be a multiple of {MOST_BLOCK}")
    out = rows_like(query, kv.value.shape[3]) if out is None else out
    _check_out(out, query, kv)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if logits is not None:
        _check_logits(logits, query, kv)
        logits.fill_(-torch.inf)
    if lse.numel() == 0:
        return out, lse
    dealt = deal_for(device, query, kv, scores, split_tokens)
    if workspace is None:
        workspace = workspace_of(query, kv, dealt, one_launch=False)
    else:
        check_workspace(workspace, query, kv, dealt)
    with current(query):
        _launch(query, kv, scores, tree, (out, lse, logits), dealt, workspace)
    return out, lse


# ---- the kernel ----


@triton.jit(do_not_specialize=COUNTS)
def _decode(
    query, key, value, out, lse, logits, partials, tops, arrived, lengths, starts, slots,
    key_scale, value_scale, alibi, sink_logits, tree,
    query_b, query_h, query_l, key_n, key_h, value_n, value_h, out_b, out_h, out_l,
    value_scale_h, key_scale_h, alibi_b, tree_b,
    batch, reserved, longest, tokens, least, most, scale, softcap, window, sink_tokens,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ELEMENTS: tl.constexpr,
    PAIRS: tl.constexpr, WIDEN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    FIXED: tl.constexpr = RULE[3]
    sequences = (batch, HEADS * ROW_TILES, lengths, starts, reserved, tokens, window, sink_tokens)
    results = (out, lse, value_scale, sink_logits, out_b, out_h, out_l, value_scale_h, tokens)
    dealt = deal(tl.num_programs(0), least, sequences, RULE)
    program = tl.program_id(0)
    if program >= dealt[0]:
        return
    at = begin_of(program, dealt)
    end = begin_of(program + 1, dealt)
    sequence, base = find(at, sequences, RULE)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    while at < end:
        pieces = pieces_in(sequence, sequences, RULE)
        job = (at - base) // pieces
        begin = base + job * pieces
        stop = tl.minimum(end, begin + pieces)
        if FIXED:
            stop = at + 1
        tile = at - begin
        last = stop - begin
        if FIXED:
            tile = tile * FIXED
            last = tl.minimum(tile + FIXED, tiles_in(sequence, sequences, RULE))
        head = job // ROW_TILES
        mine = job % ROW_TILES * ROWS + row
        told = logits
        if logits is not None:
            told += (sequence * HEADS + head).to(tl.int64) * (GROUPS * tokens) * longest
        m, total, acc = walk(
            tile, last, sequence, head, mine, query, key, value, slots, key_scale, alibi, tree,
            query_b, query_h, query_l, key_n, key_h, value_n, value_h, key_scale_h, alibi_b, tree_b,
            scale, softcap, sequences, told, longest, GROUPS, KEY_ROW, VALUE_ROW, D, DV, BLOCK_D,
            BLOCK_DV, PAIRS, WIDEN, SOFTCAP, PRECISION, STAGES, RULE,
        )  # fmt: skip

        # ---- the result, or a part of it ----
        places = parts_of(begin, pieces, sequence * (HEADS * ROW_TILES) + job, most, dealt, RULE)
        parts, zeroth, next_place, step = places
        if parts == 1:
            inside = (d < DV)[None, :]
            finish(
                m[:, None], total[:, None], acc, mine[:, None], d[None, :], inside, True,
                sequence, head, results, GROUPS, HEADS,
            )  # fmt: skip
        else:
            nth = at - begin
            if not FIXED:
                nth = program - owner(begin, dealt)
            place = tl.where(nth == 0, zeroth, next_place + (nth - 1) * step)
            keep(m, total, acc, partials, tops, place, ROWS, DV)
            if arrived is not None:
                # The part is written by all threads before one of them releases it; the last one
                # acquires what the others released.
                tl.debug_barrier()
                counter = arrived + zeroth // 2
                if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                    tl.store(counter, 0)
                    for first in range(0, ROWS * DV, ELEMENTS):
                        element = first + tl.arange(0, ELEMENTS)
                        join_elements(
                            element, partials, tops, places, job % ROW_TILES * ROWS, sequence,
                            head, results, ROWS, GROUPS, HEADS, DV,
                        )  # fmt: skip
        at = stop
        if stop == base + pieces * (HEADS * ROW_TILES):
            sequence += 1
            base = stop


# ---- the launcher ----


def _launch(
    query: Tensor,
    kv: KV,
    scores: Scores,
    tree: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor | None],
    dealt: Deal,
    workspace: Workspace,
) -> None:
    out, lse, logits = results
    device = device_of(query)
    tile, rows = tile_of(device, query, kv)
    batch, heads, tokens, dim = query.shape
    _, kv_heads, reserved, value_dim = kv.value.shape
    held, key, value = _held(device, query, kv)
    # Logits take some registers: better fewer programs on a processor than a spilled one.
    told = logits is not None
    warps = tile.warps * 2 if told and query.dtype == torch.float32 else tile.warps
    each = 1 if held[0] is None else 2
    looked_at = next(n for n in (32, 256, 1024) if batch <= n or n == 1024)
    rule = (CAUSAL[scores.causal], scores.window is not None, tile.block, dealt.fixed, looked_at)
    window = min(scores.window or 0, MOST_WINDOW)
    sink_tokens = min(scores.sink_tokens, MOST_WINDOW)
    shared = {
        "GROUPS": heads // kv_heads,
        "HEADS": kv_heads,
        "ROW_TILES": dealt.jobs // kv_heads,
        "ROWS": rows,
        "DV": value_dim,
        # Pairs take more registers: what joins in the same kernel gets along with fewer.
        "ELEMENTS": min(ELEMENTS // each, triton.next_power_of_2(rows * value_dim)),
        "RULE": rule,
    }
    strides = (*out.stride()[:3], scale_stride(kv.value_scale))
    _decode[(dealt.programs,)](
        query, key, value, out, lse, logits,
        workspace.partials, workspace.tops, workspace.arrived,
        kv.lengths, kv.starts, kv.slots, kv.key_scale, kv.value_scale,
        scores.alibi, scores.sink_logits, None if tree is None else tree.view(torch.uint8),
        *query.stride()[:3], *key.stride()[:2], *value.stride()[:2], *strides,
        scale_stride(kv.key_scale),
        scores.alibi.stride(0) if scores.alibi is not None and scores.alibi.dim() == 2 else 0,
        tree.stride(0) if tree is not None and tree.dim() == 3 else 0,
        batch, reserved, 0 if logits is None else logits.shape[3], tokens, dealt.least, dealt.most,
        scores.factor(dim), scores.softcap or 0.0, window, sink_tokens,
        KEY_ROW=key.stride(2), VALUE_ROW=value.stride(2), D=dim,
        BLOCK_M=tile.rows, BLOCK_D=padded(dim // each), BLOCK_DV=each * padded(value_dim // each),
        PAIRS=held[0], WIDEN=held[1], SOFTCAP=scores.softcap is not None,
        PRECISION=precision(query), STAGES=tile.stages, num_warps=warps,
        maxnreg=255 if told else tile.registers, **shared,
    )  # fmt: skip
    most_pieces = dealt.most if dealt.fixed else tiles_of(reserved, 0, tokens, scores, tile.block)
    if workspace.arrived is None and most_pieces > 1:
        chunks = -(-rows * value_dim // shared["ELEMENTS"])
        join[(batch * dealt.jobs * chunks,)](
            workspace.partials, workspace.tops, out, lse, kv.lengths, kv.starts,
            kv.value_scale, scores.sink_logits, *strides,
            batch, reserved, tokens, window, sink_tokens, dealt.programs, dealt.least, dealt.most,
            num_warps=4, **shared,
        )  # fmt: skip


def _held(device: Device, query: Tensor, kv: KV) -> tuple[tuple[str | None, str], Tensor, Tensor]:
    """How the kernel makes what it reads numbers (of pairs, of single numbers), and K and V so."""
    pairs = pairs_of(device, query, kv.key, kv.value)
    if pairs is not None:
        return (pairs[0], ""), *pairs[1:]
    single, (key, value) = stored(device, kv.key, kv.value)
    return (None, single), key, value


def _check_out(out: Tensor, query: Tensor, kv: KV) -> None:
    shape = (*query.shape[:3], kv.value.shape[3])
    right = out.dtype in (query.dtype, torch.float32) and out.device == query.device
    if tuple(out.shape) != shape or not right or (out.stride(3) != 1 and shape[3] > 1):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device} with strides {out.stride()}: "
            f"must be {query.dtype} or float32 {shape} on {query.device}, its last stride 1"
        )


def _check_logits(logits: Tensor, query: Tensor, kv: KV) -> None:
    kv_heads, reserved = kv.key.shape[1:3]
    lines = (query.shape[0], kv_heads, query.shape[1] // kv_heads * query.shape[2])
    right = logits.dtype == torch.float32 and logits.device == query.device
    known = reserved if kv.lengths is None else 0
    fits = logits.dim() == 4 and known <= logits.shape[3] <= reserved
    if not (right and fits and logits.shape[:3] == lines and logits.is_contiguous()):
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)} on {logits.device}: must be "
            f"contiguous float32 {(*lines, 'n')} on {query.device}, n from the longest length to "
            f"{reserved}"
        )


def _check(query: Tensor, kv: KV, scores: Scores, tree: Tensor | None) -> None:
    if query.dim() != 4:
        raise ValueError(f"query is {tuple(query.shape)}: must be [B, heads, tokens, head_dim]")
    kv.check_query(query)
    scores.check(query, kv.batch)
    tokens = query.shape[2]
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"{tokens} query tokens: must be at most {MOST_TOKENS}; pass more to prefill"
        )
    check_row("query", query)
    if tree is not None:
        _check_tree(tree, query, scores)


def _check_tree(tree: Tensor, query: Tensor, scores: Scores) -> None:
    batch, _, tokens, _ = query.shape
    shapes = (tokens, tokens), (batch, tokens, tokens)
    if tree.dtype != torch.bool or tuple(tree.shape) not in shapes or tree.device != query.device:
        raise ValueError(
            f"tree is {tree.dtype} {tuple(tree.shape)} on {tree.device}: must be bool {shapes[0]} "
            f"or {shapes[1]} on {query.device}"
        )
    if not tree.is_contiguous():
        raise ValueError(f"tree has strides {tree.stride()}: pass tree.contiguous()")
    if scores.causal == "top_left":
        raise ValueError("tree with causal='top_left': a tree is over the last tokens")
