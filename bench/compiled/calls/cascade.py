"""Configurations of `cascade` (its prefix kernel; the tail is `decode`'s) and of `combine`."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import BATCH, CONTEXT, NAMES, rows, scores_by_name, served, view
from bench.compiled.need import TILES, Need
from vattn.kernels.cascade import cascade, levels
from vattn.kernels.combine import combine

NEEDS = {"attend_prefix": Need(matrix=TILES, narrow=0)}
# Numbers of 8 bits come to an Ampere's registers as the matrix instruction wants them: in pieces.
PIECES = {"attend_prefix": Need(matrix=TILES, narrow={80: 4})}
SHARED = 2048  # tokens
MEMBERS = 64


def one(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    stored: str | None = None,
    scores: str = "append",
    *,
    slots: bool = False,
) -> None:
    """One query token of each of 64 sequences that share half of their keys."""
    query = rows(32, 1, dim, NAMES[dtype], batch=MEMBERS)
    dtype = stored or dtype
    kv = view(dim, value_dim, NAMES[dtype], batch=MEMBERS, context=CONTEXT, scaled=bool(stored))
    prefixes = levels([(range(MEMBERS), 0, SHARED)], "cpu")
    cascade(query, served(kv) if slots else kv, prefixes, scores_by_name(scores))


def joined(dtype: str, dim: int) -> None:
    """Join eight parts."""
    combine(torch.empty(8, BATCH, 32, dim, dtype=NAMES[dtype]), torch.empty(8, BATCH, 32))


CASCADE = [
    Call("cascade/bf16/d128", partial(one), NEEDS, quick=True),
    Call("cascade/bf16/d64", partial(one, 64), NEEDS),
    Call("cascade/bf16/d192_128", partial(one, 192, 128), NEEDS),
    Call("cascade/bf16/d256/sinks", partial(one, 256, scores="sinks", slots=True), NEEDS),
    Call("cascade/bf16/d128/e4m3", partial(one, stored="e4m3"), PIECES),
    Call("combine/fp32/d128", partial(joined, "fp32", 128), quick=True),
    Call("combine/bf16/d256", partial(joined, "bf16", 256)),
    Call("combine/bf16/d80", partial(joined, "bf16", 80)),
]
