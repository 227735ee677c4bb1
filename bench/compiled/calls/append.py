"""Configurations of `append`."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import BATCH, KV_HEADS, NAMES, counts, rows, served, view
from bench.compiled.need import Need
from vattn.kernels.append import append

WIDE = {"append_rows": Need(narrow=0)}
LOADS = {"append_rows": Need()}  # scales, and counts of packed rows, are single numbers


def one(dim: int, new: str, stored: str, tokens: int, *, token_major: bool = False) -> None:
    """Append ``tokens`` rows a sequence and advance the lengths."""
    fresh = rows(KV_HEADS, tokens, dim, NAMES[new])
    kv = view(dim, dtype=NAMES[stored], token_major=token_major, scaled=stored != new)
    append(fresh, fresh, kv, advance=True, dropped=torch.empty(BATCH, dtype=torch.int64))


def packed(tokens: int) -> None:
    """Append packed rows, with all that the batch may bring."""
    fresh = torch.empty(tokens, KV_HEADS, 128, dtype=torch.bfloat16)
    append(fresh, fresh, served(view()), starts=counts(BATCH + 1), room=counts(BATCH))


APPEND = [
    Call("append/bf16/d128", partial(one, 128, "bf16", "bf16", 1), WIDE, quick=True),
    Call(
        "append/bf16/d80/token_major", partial(one, 80, "bf16", "bf16", 512, token_major=True), WIDE
    ),
    Call("append/fp32/d64", partial(one, 64, "fp32", "fp32", 512), WIDE),
    Call("append/bf16/d256", partial(one, 256, "bf16", "bf16", 512), WIDE),
    Call("append/bf16_to_e4m3/d128", partial(one, 128, "bf16", "e4m3", 1), LOADS, quick=True),
    Call("append/fp32_to_e5m2/d128", partial(one, 128, "fp32", "e5m2", 512), LOADS),
    Call("append/packed/d128", partial(packed, 2048), LOADS),
]
