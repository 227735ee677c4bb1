"""Configurations of the paged decode that ours is compared with (bench/paged.py)."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import BATCH, CONTEXT, HEADS, KV_HEADS, counts
from bench.compiled.need import ROWS, Need
from bench.paged import BLOCK_TOKENS, paged_decode

# Addresses are made from the table: that is what it is here for.
NEEDS = {"paged_kernel": Need(matrix=ROWS, dependent_loads=64)}


def one(dim: int, constant: bool = False) -> None:
    """One query token of each of four sequences."""
    blocks = CONTEXT // BLOCK_TOKENS
    rows = torch.empty(BATCH * blocks, BLOCK_TOKENS, KV_HEADS, dim, dtype=torch.bfloat16)
    query = torch.empty(BATCH, HEADS, dim, dtype=torch.bfloat16)
    table = torch.empty(BATCH, blocks, dtype=torch.int32)
    paged_decode(query, rows, rows, table, counts(BATCH), constant=constant)


PAGED = [
    Call("paged/bf16/d128", partial(one, 128), NEEDS, quick=True),
    Call("paged/bf16/d128/constant", partial(one, 128, True), NEEDS, quick=True),
    Call("paged/bf16/d64", partial(one, 64), NEEDS),
]
