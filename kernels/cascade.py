"""Attention of many sequences that begin with the same rows: these are read once for all of them.

    query     [B, Hq, L, D]  the last L tokens of each sequence
    kv        rows [N, Hkv, S, D] and [N, Hkv, S, Dv], `vattn.kernels.kv`
    prefixes  groups of sequences and the rows [begin, end) that are the same in all of a group,
              one `Prefixes` or several, outer ones first (a prefix of a prefix)
    out       [B, Hq, L, Dv] of query's dtype, lse [B, Hq, L] float32, natural log

    parts   of each level: all members' query rows against the first member's rows
    tail    each sequence's own rows behind its last prefix: `decode`, `prefill` for L > 16
    out     parts and tail joined by their log-sum-exp: `combine`

The result is what `decode` gives without prefixes, whatever the scores: a row of a tile keeps its
member's positions. Sink logits are counted once, in the tail. Nothing depends on a value on the
device: a captured CUDA graph serves other groups, prefixes and lengths of the same shapes.

Mapped must be, of a group's first member, rows [max(begin, least start of a member), end), and of
each sequence what `decode` reads behind its prefixes. Rows [begin, end) of other members are not
read; whoever makes the prefixes vouches that they are equal (`vattn.prefix` compares pages).

Bytes moved: `traffic`. Sources: Hydragen, https://arxiv.org/abs/2402.05099; cascade inference in
FlashInfer, https://flashinfer.ai/2024/02/02/cascade-inference.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vattn.kernels.cascade_prefix import attend_prefix
from vattn.kernels.combine import combine
from vattn.kernels.decode import decode_lse
from vattn.kernels.gpu import Device, current, device_of, padded, precision
from vattn.kernels.kv import FP8, KV, MOST_TOKENS, scale_stride
from vattn.kernels.online import stored
from vattn.kernels.prefill import prefill_lse
from vattn.kernels.scores import CAUSAL, MOST_WINDOW, Scores

# A part of fewer tokens costs more to join than it saves by running beside others.
LEAST_PART = 256
MOST_PARTS = 32
# Numbers of int32 in 16 bytes.
LINE = 4


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Groups of sequences with rows in common; one level of them.

    Args:
        members: int32 [M], places in the batch, group after group, each at most once. The first of
            a group is the one whose rows are read.
        firsts: int32 [P + 1], where each group's members begin; equal ones are an empty group.
        begins, ends: int32 [P], the rows that a group shares, at most its members' lengths.
        most_members: no group has more, now or when a captured graph is replayed.
        most_tokens: no group shares more rows.

    Raises:
        ValueError: shapes, dtypes or devices differ from these.
    """

    members: Tensor
    firsts: Tensor
    begins: Tensor
    ends: Tensor
    most_members: int
    most_tokens: int

    def __post_init__(self) -> None:
        groups = self.begins.shape[0] if self.begins.dim() == 1 else 0
        for name, size in (("members", None), ("firsts", groups + 1), ("ends", groups)):
            tensor: Tensor = getattr(self, name)
            if tensor.dim() != 1 or size not in (None, tensor.shape[0]):
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} and begins {tuple(self.begins.shape)}: must "
                    "be [groups], firsts one longer"
                )
        for name in ("members", "firsts", "begins", "ends"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype}: must be int32 and contiguous")
            if tensor.device != self.members.device:
                raise ValueError(f"{name} is on {tensor.device}, members on {self.members.device}")
        if self.most_members < 0 or self.most_tokens < 0:
            raise ValueError(
                f"most_members={self.most_members}, most_tokens={self.most_tokens}: must be >= 0"
            )


Group = tuple[Sequence[int], int, int]


def levels(groups: Iterable[Group], device: torch.device | str) -> list[Prefixes]:
    """Prefixes on ``device`` from (members, begin, end) of each group, outer groups first, as
    `vattn.prefix.shared_prefixes` gives them. A sequence is at most once in each level."""
    rows: list[list[Group]] = []
    taken: list[set[int]] = []
    for group in groups:
        free = next((i for i, t in enumerate(taken) if t.isdisjoint(group[0])), len(rows))
        if free == len(rows):
            rows.append([])
            taken.append(set())
        rows[free].append(group)
        taken[free].update(group[0])
    lines = _packed([line for level in rows for line in _lines(level)], device)
    made = []
    for i, level in enumerate(rows):
        members, firsts, begins, ends = lines[4 * i : 4 * i + 4]
        most_members = max(len(group[0]) for group in level)
        most_tokens = max(end - begin for _, begin, end in level)
        made.append(Prefixes(members, firsts, begins, ends, most_members, most_tokens))
    return made


def _lines(groups: list[Group]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Members, firsts, begins and ends of a level."""
    return (
        [member for members, _, _ in groups for member in members],
        [0, *accumulate(len(members) for members, _, _ in groups)],
        [begin for _, begin, _ in groups],
        [end for _, _, end in groups],
    )


def _packed(lines: list[list[int]], device: torch.device | str) -> list[Tensor]:
    """Lines of int32 on ``device``, by one copy for which the host does not wait. Each begins at a
    multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not."""
    sizes = [-(-len(line) // LINE) * LINE for line in lines]
    begins = [0, *accumulate(sizes)]
    pinned = torch.device(device).type == "cuda"
    held = torch.zeros(begins[-1], dtype=torch.int32, pin_memory=pinned)
    numbers = held.numpy()
    for begin, line in zip(begins, lines, strict=False):
        numbers[begin : begin + len(line)] = line
    there = held.to(device, non_blocking=True)
    return [there[b : b + len(line)] for b, line in zip(begins, lines, strict=False)]


# ---- tiles and traffic -------------------------------------------------------------------------
class Tile(NamedTuple):
    """Query rows and keys that a program takes at a time, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(device: Device, rows: int, dim: int, itemsize: int, *, costly: bool = False) -> Tile:
    """The tile for ``rows`` query rows a group and KV head, of at most ``dim`` elements, with
    ``costly`` scores or not: the largest that compiles without a spilled register."""
    hopper = device.arch >= 90
    if itemsize == 4:
        full = Tile(16, 16, 4, 2)
    elif dim <= 128:
        full = Tile(128, 64 if hopper else 32, 4 if dim <= 64 else 8, 3)
    else:
        full = Tile(64, 32, 8, 2) if hopper else Tile(32, 32, 4, 2)
    if costly and not hopper:
        full = full._replace(rows=max(16, full.rows // 2), warps=4)
    fewer = min(full.rows, padded(rows))
    return Tile(fewer, full.keys, min(full.warps, max(4, fewer // 16)), full.stages)


def costly(kv: KV, scores: Scores) -> bool:
    """Whether rows or scores go through more than products, and so through more registers."""
    return kv.key.dtype in FP8 or scores.softcap is not None or scores.alibi is not None


def parts_for(device: Device, programs: int, most_tokens: int) -> int:
    """Into how many parts the keys of each of ``programs`` row tiles are cut: enough for all
    processors."""
    wanted = -(-device.processors // max(1, programs))
    return max(1, min(wanted, MOST_PARTS, most_tokens // LEAST_PART))


class Traffic(NamedTuple):
    """Bytes of K and V that are read ``unshared`` and ``shared``, and of ``partials`` that the
    latter writes and reads again."""

    unshared: int
    shared: int
    partials: int


def traffic(
    lengths: Sequence[int],
    groups: Sequence[Group],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    itemsize: int,
    tokens: int = 1,
    device: Device,
) -> Traffic:
    """What a cascade moves for sequences of ``lengths`` with ``groups`` (D = Dv = ``dim``)."""
    row_bytes = 2 * kv_heads * dim * itemsize
    saved = sum((len(members) - 1) * (end - begin) for members, begin, end in groups)
    partials = 0
    for level in levels(groups, "cpu"):
        rows = level.most_members * tokens * heads // kv_heads
        tile = tile_for(device, rows, dim, itemsize)
        programs = len(level.begins) * kv_heads * -(-rows // tile.rows)
        parts = parts_for(device, programs, level.most_tokens)
        partials += 2 * parts * len(level.members) * heads * tokens * (dim + 1) * 4
    # The tail is a part as well.
    partials += 2 * len(lengths) * heads * tokens * (dim + 1) * 4 if groups else 0
    total = sum(lengths)
    return Traffic(total * row_bytes, (total - saved) * row_bytes, partials)


# ---- launcher ----------------------------------------------------------------------------------
def cascade(
    query: Tensor,
    kv: KV,
    prefixes: Prefixes | Sequence[Prefixes],
    scores: Scores | None = None,
) -> Tensor:
    """The result of `cascade_lse` alone."""
    return cascade_lse(query, kv, prefixes, scores)[0]


def cascade_lse(
    query: Tensor,
    kv: KV,
    prefixes: Prefixes | Sequence[Prefixes],
    scores: Scores | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few last tokens: (out [B, Hq, L, Dv], lse [B, Hq, L]).

    Args:
        query: [B, Hq, L, D].
        kv: where K and V lie, the rows of these L tokens among them.
        prefixes: what sequences share; with an empty list nothing is. In a later level a
            sequence's prefix begins where that of an earlier one ends.
        scores: scale, causality, window and what else scores go through.

    Raises:
        ValueError: shapes, dtypes or devices break the contract.
    """
    kv, scores = kv.dense(), Scores() if scores is None else scores.dense()
    each = [prefixes] if isinstance(prefixes, Prefixes) else list(prefixes)
    if query.dim() != 4:
        raise ValueError(f"query is {tuple(query.shape)}: must be [B, heads, tokens, head_dim]")
    kv.check_query(query)
    scores.check(query, kv.batch)
    for level in each:
        if level.members.device != query.device:
            raise ValueError(f"prefixes are on {level.members.device}, query on {query.device}")
    device = device_of(query)
    if not each or query.numel() == 0:
        attend = decode_lse if query.shape[2] <= MOST_TOKENS else prefill_lse
        return attend(query, kv, scores)
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = kv.key.shape[1], kv.value.shape[3]
    cuts = []
    for level in each:
        rows = max(1, level.most_members * tokens * heads // kv_heads)
        tile = tile_for(
            device, rows, max(dim, value_dim), query.element_size(), costly=costly(kv, scores)
        )
        row_tiles = -(-rows // tile.rows)
        programs = level.begins.shape[0] * kv_heads * row_tiles
        cuts.append((tile, row_tiles, parts_for(device, programs, level.most_tokens)))
    parts = 1 + sum(splits for _, _, splits in cuts)
    outs = query.new_empty((parts, batch, heads, tokens, value_dim), dtype=torch.float32)
    lses = query.new_full(outs.shape[:-1], float("-inf"), dtype=torch.float32)
    if kv.starts is None:
        tails = torch.zeros(batch, dtype=torch.int32, device=query.device)
    else:
        tails = kv.starts.to(torch.int32, copy=True)
    done = 0
    with current(query):
        for level, (tile, row_tiles, splits) in zip(each, cuts, strict=True):
            some = slice(done, done + splits)
            _launch(
                query, kv, scores, level, tile, row_tiles, splits, outs[some], lses[some], tails
            )
            done += splits
    tail = KV(kv.key, kv.value, kv.lengths, tails, kv.slots, kv.key_scale, kv.value_scale)
    if tokens <= MOST_TOKENS:
        _, lses[-1] = decode_lse(query, tail, scores, out=outs[-1])
    else:
        outs[-1], lses[-1] = prefill_lse(query, tail, scores)
    out, lse = combine(outs, lses)
    return out.to(query.dtype), lse


def _launch(
    query: Tensor,
    kv: KV,
    scores: Scores,
    level: Prefixes,
    tile: Tile,
    row_tiles: int,
    splits: int,
    outs: Tensor,
    lses: Tensor,
    tails: Tensor,
) -> None:
    batch, heads, tokens, dim = query.shape
    _, kv_heads, reserved, value_dim = kv.value.shape
    programs = level.begins.shape[0] * kv_heads * splits * row_tiles
    if not programs:
        return
    alibi = scores.alibi
    form, (key, value) = stored(device_of(query), kv.key, kv.value)
    attend_prefix[(programs,)](
        query, key, value, outs, lses, tails,
        level.members, level.firsts, level.begins, level.ends,
        kv.lengths, kv.starts, kv.slots, kv.key_scale, kv.value_scale, alibi,
        *query.stride()[:3], *kv.key.stride()[:2], *kv.value.stride()[:2],
        scale_stride(kv.key_scale), scale_stride(kv.value_scale),
        alibi.stride(0) if alibi is not None and alibi.dim() == 2 else 0,
        batch, reserved, tokens, row_tiles, splits,
        scores.factor(dim), scores.softcap or 0.0,
        min(scores.window or 0, MOST_WINDOW), min(scores.sink_tokens, MOST_WINDOW),
        GROUPS=heads // kv_heads, HEADS=kv_heads,
        KEY_ROW=kv.key.stride(2), VALUE_ROW=kv.value.stride(2), D=dim, DV=value_dim,
        BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, STAGES=tile.stages,
        CAUSAL=CAUSAL[scores.causal], WINDOW=scores.window is not None,
        SOFTCAP=scores.softcap is not None,
        PRECISION=precision(query),
        STORED=form, num_warps=tile.warps,
    )  # fmt: skip
