"""Configurations of `prefill`, with and without a mask."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import (
    BATCH,
    CONTEXT,
    HEADS,
    NAMES,
    counts,
    rows,
    scores_by_name,
    served,
    view,
)
from bench.compiled.need import TILES, Need
from vattn.kernels.prefill import prefill

NEEDS = {"prefill_kernel": Need(matrix=TILES, narrow=0)}
# A tile of the mask's list is one number: where its keys lie depends on it.
LISTED = {"prefill_kernel": Need(matrix=TILES, dependent_loads=64)}
FLOAT32 = {
    "prefill_kernel": Need(narrow=0)
}  # products in float32 are not made of matrix instructions
TOKENS = 1024


def one(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    scores: str = "causal",
    *,
    tokens: int = TOKENS,
    heads: int = HEADS,
    ragged: bool = False,
    token_major: bool = False,
) -> None:
    """A batch of as many queries each."""
    query = rows(heads, tokens, dim, NAMES[dtype], token_major=token_major)
    kv = view(dim, value_dim, NAMES[dtype], ragged=ragged, token_major=token_major)
    prefill(query, served(kv) if ragged else kv, scores_by_name(scores))


def packed(scores: str) -> None:
    """Queries of several sequences side by side, of a cache with slots."""
    query = torch.empty(4096, HEADS, 128, dtype=torch.bfloat16)
    kv = served(view())
    starts = counts(BATCH + 1)
    prefill(query, kv, scores_by_name(scores), query_starts=starts, most_tokens=TOKENS)


def masked(dtype: torch.dtype, shape: tuple[int, int, int, int], tokens: int = TOKENS) -> None:
    """Under a mask of ``shape``."""
    query = rows(HEADS, tokens, 128)
    kv = view(128, heads=HEADS, ragged=False)
    prefill(query, kv, mask=torch.empty(shape, dtype=dtype))


PREFILL = [
    Call("prefill/bf16/d128/full", partial(one, scores="plain"), NEEDS, quick=True),
    Call("prefill/bf16/d128/causal", partial(one), NEEDS),
    Call("prefill/fp16/d128/causal", partial(one, dtype="fp16"), NEEDS),
    Call("prefill/fp32/d128/causal", partial(one, dtype="fp32"), FLOAT32),
    Call("prefill/fp32/d256/causal", partial(one, 256, dtype="fp32"), FLOAT32),
    Call("prefill/bf16/d64/causal", partial(one, 64), NEEDS),
    Call("prefill/bf16/d80/causal", partial(one, 80), NEEDS),
    Call("prefill/bf16/d96/causal", partial(one, 96), NEEDS),
    Call("prefill/bf16/d192_128/causal", partial(one, 192, 128), NEEDS),
    Call("prefill/bf16/d256/causal", partial(one, 256), NEEDS),
    Call("prefill/bf16/d128/chunk", partial(one, scores="append", tokens=16, ragged=True), NEEDS),
    Call("prefill/bf16/d128/sinks", partial(one, scores="sinks", ragged=True), NEEDS),
    Call("prefill/bf16/d256/softcap", partial(one, 256, scores="softcap", ragged=True), NEEDS),
    Call("prefill/bf16/d128/alibi", partial(one, scores="alibi", token_major=True), NEEDS),
    Call("prefill/bf16/d64/sink_logits", partial(one, 64, scores="sink_logits"), NEEDS),
    Call("prefill/bf16/d128/packed", partial(packed, "append"), NEEDS),
    Call(
        "prefill/bf16/d128/mask_bool",
        partial(masked, torch.bool, (BATCH, HEADS, TOKENS, CONTEXT)),
        LISTED,
    ),
    Call(
        "prefill/bf16/d128/mask_padding",
        partial(masked, torch.bool, (BATCH, 1, 1, CONTEXT)),
        LISTED,
    ),
    Call(
        "prefill/bf16/d128/mask_float",
        partial(masked, torch.bfloat16, (1, HEADS, TOKENS, CONTEXT)),
        LISTED,
    ),
]
