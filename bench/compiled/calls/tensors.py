"""Tensors for launches that never run: any contents, real shapes, strides and alignment."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores

NAMES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
HEADS, KV_HEADS, CONTEXT, BATCH = 32, 8, 4096, 4


def rows(
    heads: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = BATCH,
    token_major: bool = False,
) -> Tensor:
    """[batch, heads, tokens, dim]; the heads of a token side by side if ``token_major``."""
    if token_major:
        return torch.empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    return torch.empty(batch, heads, tokens, dim, dtype=dtype)


def view(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = BATCH,
    heads: int = KV_HEADS,
    context: int = CONTEXT,
    token_major: bool = False,
    ragged: bool = True,
    scaled: bool = False,
) -> KV:
    """K and V of a batch; with lengths on the device if ``ragged``, as a cache gives them."""
    key = rows(heads, context, dim, dtype, batch=batch, token_major=token_major)
    value = rows(heads, context, value_dim or dim, dtype, batch=batch, token_major=token_major)
    scale = torch.empty(heads) if scaled else None
    return KV(key, value, counts(batch) if ragged else None, key_scale=scale, value_scale=scale)


def served(kv: KV) -> KV:
    """The same with all that a server adds: slots, and first rows that were given back."""
    return replace(kv, slots=counts(kv.batch), starts=counts(kv.batch))


def counts(length: int) -> Tensor:
    """int32 [length]."""
    return torch.empty(length, dtype=torch.int32)


def scores_by_name(name: str, heads: int = HEADS) -> Scores:
    """A way to score, by the name that configurations have."""
    slopes = torch.empty(heads)
    known = {
        "plain": Scores(),
        "causal": Scores(causal="top_left"),
        "append": Scores(causal="bottom_right"),
        "window": Scores(causal="bottom_right", window=1024),
        "sinks": Scores(causal="bottom_right", window=1024, sink_tokens=4),
        "softcap": Scores(causal="bottom_right", softcap=50.0),
        "alibi": Scores(causal="bottom_right", alibi=slopes),
        "sink_logits": Scores(causal="bottom_right", sink_logits=slopes),
    }
    return known[name]
