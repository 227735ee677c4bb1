"""Configurations of `prefill_hopper`: TMA, specialised warps, wgmma that overlaps softmax."""

from __future__ import annotations

from functools import partial

from bench.compiled.call import Call
from bench.compiled.calls.tensors import HEADS, NAMES, rows, scores_by_name, served, view
from bench.compiled.need import TILES, Need
from vattn.kernels.prefill_hopper import prefill_hopper, prefill_hopper_lse

NEEDS = {"prefill_hopper_kernel": Need(matrix=TILES, narrow=0, specialised=(90,))}
TOKENS = 1024


def one(
    dim: int, dtype: str = "bf16", scores: str = "plain", *, ragged: bool = False, lse: bool = False
) -> None:
    """A batch of as many queries each; with lengths, slots and starts if ``ragged``."""
    query = rows(HEADS, TOKENS, dim, NAMES[dtype])
    kv = view(dim, dtype=NAMES[dtype], ragged=ragged)
    run = prefill_hopper_lse if lse else prefill_hopper
    run(query, served(kv) if ragged else kv, scores_by_name(scores))


def call(name: str, *arguments: object, quick: bool = False, **options: object) -> Call:
    """A configuration of Hopper alone."""
    launch = partial(one, *arguments, **options)  # type: ignore[arg-type]
    return Call(f"prefill_hopper/{name}", launch, NEEDS, quick=quick, archs=(90,))


HOPPER = [
    call("bf16/d128/full", 128, quick=True),
    call("bf16/d64/full", 64),
    call("bf16/d256/full", 256),
    call("bf16/d64/causal", 64, scores="causal"),
    call("bf16/d128/causal", 128, scores="causal", lse=True),
    call("bf16/d256/causal", 256, scores="causal"),
    call("bf16/d128/append", 128, scores="append", ragged=True, lse=True),
    call("bf16/d128/window", 128, scores="window", ragged=True),
    call("bf16/d256/softcap", 256, scores="softcap", ragged=True),
    call("fp16/d128/causal", 128, "fp16", "causal"),
]
