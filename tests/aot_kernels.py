"""Kernels that the compile gate must refuse, and one that it must not.

`main` compiles them for sm_90 and prints what the gate says, and which kernels of ours it would
compile, as JSON; in a process of its own, since the tests' process interprets kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory

import torch
import triton
import triton.language as tl

from bench.aot import failures
from bench.compiled.call import Call
from bench.compiled.calls import CALLS as OURS
from bench.compiled.need import ROWS, Need
from bench.compiled.plan import plan
from bench.compiled.workers import compile_all
from bench.harness import Bench

DIM, TILE = 128, 64
STRICT = {"_attend": Need(matrix=ROWS, narrow=0)}


@triton.jit
def _attend(
    query,
    rows,
    table,
    out,
    row_stride,
    tokens,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Sum of (query @ row) row over ``tokens`` rows; through a table of tiles if PAGED."""
    i, d, n = tl.arange(0, 16), tl.arange(0, DIM), tl.arange(0, TILE)
    q = tl.load(query + i[:, None] * DIM + d[None, :])
    acc = tl.zeros([16, DIM], tl.float32)
    for first in range(0, tokens, TILE):
        row = first + n
        if PAGED:
            row = tl.load(table + first // TILE) * TILE + n
        k = tl.load(rows + row[:, None].to(tl.int64) * row_stride + d[None, :])
        s = tl.dot(q, tl.trans(k))
        acc = tl.dot(s.to(k.dtype), k, acc)
    tl.store(out + i[:, None] * DIM + d[None, :], acc)


@triton.jit
def _refused(out):
    tl.static_assert(False, "this kernel is never compiled")


def attend(
    row_stride: int = 512, paged: bool = False, stages: int = 3, registers: int = 255
) -> None:
    """Launch `_attend` in one of its forms."""
    query = torch.empty(16, DIM, dtype=torch.bfloat16)
    rows = torch.empty(4 * TILE * row_stride, dtype=torch.bfloat16)
    table, out = torch.empty(4, dtype=torch.int32), torch.empty(16, DIM)
    _attend[(1,)](
        query, rows, table, out, row_stride, 4 * TILE, DIM, TILE, paged,
        num_warps=4, num_stages=stages, maxnreg=registers,
    )  # fmt: skip


def refused() -> None:
    _refused[(1,)](torch.empty(16))


def dies() -> None:
    """The compiler aborts: here the process ends as soon as anything would be compiled."""
    if triton.knobs.compilation.listener is not None:
        os._exit(7)
    attend(stages=2)


FORMS: dict[str, Callable[[], object]] = {
    "good": attend,
    "paged": partial(attend, paged=True),
    "narrow": partial(attend, row_stride=513),
    "spills": partial(attend, registers=40),
    "large": partial(attend, stages=16),
    "refused": refused,
    "dies": dies,
}
CALLS = {name: Call(name, launch, STRICT, archs=(90,)) for name, launch in FORMS.items()}


def main() -> None:
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        jobs, results = plan(CALLS, (80, 90))
        for done in compile_all(jobs, calls=__name__):
            results += done
    said = failures(Bench(), results, CALLS)
    asked, _ = plan(OURS, (80, 90, 100))
    bad = {name: [line for line in said if f"{name} sm_90" in line] for name in CALLS}
    print(json.dumps({"bad": bad, "asked": [[job.arch, *sorted(job.keys)] for job in asked]}))
