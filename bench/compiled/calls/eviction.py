"""Configurations of what eviction runs on a device."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import BATCH, NAMES, rows, served, view
from bench.compiled.need import ROWS, Need
from vattn.kernels import columns_kernel, compact_kernel

SUMS = {"row_sums": Need(matrix=ROWS), "key_sums": Need(matrix=ROWS)}
# Row numbers come in small loads, and rows from where they say.
MOVED = {"close_gaps": Need(narrow=16, dependent_loads=16)}


def sums(dim: int = 128, dtype: str = "bf16", *, heads: tuple[int, int] = (32, 8)) -> None:
    """Sums of attention over an observation window."""
    kv = served(view(dim, dtype=NAMES[dtype], heads=heads[1]))
    columns_kernel.launch(rows(heads[0], 32, dim, NAMES[dtype]), kv, 4096, None)


def moved(dim: int = 128, dtype: str = "bf16", *, token_major: bool = False) -> None:
    """A quarter of the rows of each head."""
    kv = served(view(dim, dtype=NAMES[dtype], token_major=token_major))
    heads = kv.key.shape[1]
    kept = torch.empty(BATCH, heads, 1024, dtype=torch.int64)
    compact_kernel.launch(kv, kept, torch.empty(BATCH, heads, dtype=torch.int64))


EVICTION = [
    Call("columns/bf16/d128", partial(sums), SUMS, quick=True),
    Call("columns/fp16/d64", partial(sums, 64, "fp16"), SUMS),
    Call("columns/bf16/d256", partial(sums, 256, heads=(16, 2)), SUMS),
    Call("columns/bf16/d80", partial(sums, 80), SUMS),
    Call("columns/fp32/d128", partial(sums, 128, "fp32")),
    Call("compact/bf16/d128", partial(moved), MOVED, quick=True),
    Call("compact/bf16/d128/token_major", partial(moved, token_major=True), MOVED),
    Call("compact/e4m3/d128", partial(moved, dtype="e4m3"), MOVED),
    Call("compact/fp32/d256", partial(moved, 256, "fp32"), MOVED),
    Call("compact/bf16/d80", partial(moved, 80), MOVED),
]
