"""Configurations of `backward`."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import CONTEXT, HEADS, KV_HEADS, NAMES, rows, scores_by_name
from bench.compiled.need import TILES, Need
from vattn.kernels.backward import backward, backward_sinks

NEEDS = {"key_kernel": Need(matrix=TILES), "query_kernel": Need(matrix=TILES)}
# dK and dV of 256 columns leave room for 32 keys on Hopper: too few rows for wgmma.
LARGE = {**NEEDS, "key_kernel": Need(matrix={**TILES, 90: "mma"})}
FLOAT32 = {"key_kernel": Need(), "query_kernel": Need()}


def one(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    scores: str = "causal",
    mask: torch.dtype | None = None,
) -> None:
    """Gradients of a square of tokens."""
    query = rows(HEADS, CONTEXT, dim, NAMES[dtype])
    out = rows(HEADS, CONTEXT, value_dim or dim, NAMES[dtype])
    key = rows(KV_HEADS, CONTEXT, dim, NAMES[dtype])
    value = rows(KV_HEADS, CONTEXT, value_dim or dim, NAMES[dtype])
    lse = torch.empty(query.shape[:3])
    chosen = scores_by_name(scores)
    hidden = None if mask is None else torch.empty(CONTEXT, CONTEXT, dtype=mask)
    run = backward if chosen.sink_logits is None else backward_sinks
    run(out, query, key, value, out, lse, chosen, mask=hidden)


BACKWARD = [
    Call("backward/bf16/d128/causal", partial(one), NEEDS, quick=True),
    Call("backward/bf16/d128/full", partial(one, scores="plain"), NEEDS),
    Call("backward/fp16/d128/causal", partial(one, dtype="fp16"), NEEDS),
    Call("backward/fp32/d128/causal", partial(one, dtype="fp32"), FLOAT32),
    Call("backward/bf16/d64/causal", partial(one, 64), NEEDS),
    Call("backward/bf16/d80/causal", partial(one, 80), NEEDS),
    Call("backward/bf16/d192_128/causal", partial(one, 192, 128), NEEDS),
    Call("backward/bf16/d256/causal", partial(one, 256), NEEDS),
    Call("backward/bf16/d128/sinks", partial(one, scores="sinks"), NEEDS),
    Call("backward/bf16/d256/softcap", partial(one, 256, scores="softcap"), LARGE),
    Call("backward/bf16/d128/alibi", partial(one, scores="alibi"), NEEDS),
    Call("backward/bf16/d128/sink_logits", partial(one, scores="sink_logits"), NEEDS),
    Call("backward/bf16/d128/mask_bool", partial(one, scores="plain", mask=torch.bool), NEEDS),
]
