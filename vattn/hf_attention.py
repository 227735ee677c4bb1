"""The attention function that transformers calls under the name "vattn", and its mask function.

An attention name without a mask function makes transformers build no mask at all: padded rows come
out wrong, without an error and without a warning. `register` therefore always sets both.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from vattn.allocator.errors import VattnError
from vattn.kernels.packed import pack_mask, pack_rows
from vattn.sdpa import scaled_dot_product_attention

logger = logging.get_logger(__name__)

NAME = "vattn"
HIDDEN = "vattn_hidden"  # what an attention module calls its input, where somebody asks for it

# Arguments that change the result and that this function does not compute. Every other unknown
# argument (position_ids, use_cache, cu_seq_lens_q, ...) is already in the mask, or is no concern.
REFUSED = ("position_bias", "score_mod", "block_mask", "attn_bias", "alibi", "head_mask")

# Scores held at once by the explicit path, in float32 elements (64 MiB).
SCORES = 1 << 24
# Tokens of a half-precision K or V turned into float32 at once: a block that stays in the L2 cache.
BLOCK_TOKENS = 1024


class UnsupportedError(VattnError, NotImplementedError):
    """A model, layer or argument that this integration does not serve; the message has a remedy."""


def register() -> None:
    """Make `attn_implementation="vattn"` known to transformers: the function and its mask.

    Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `AttentionInterface` asks.

    Shapes: query [B, Hq, L, D], key and value [B, Hkv, S, D], mask bool or float, broadcastable to
    [B, Hq, L, S]; `s_aux` [Hq] holds the logit of each head's sink. Returns ([B, L, Hq, D]
    contiguous, None). No mask means causal for L > 1 (the queries are the first L keys) and
    everything for L = 1, as in transformers' own sdpa function.

    Raises UnsupportedError for a bias that this function would have to ignore.
    """
    _refuse(kwargs)
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "`vattn` attention returns no attention weights (None). "
            'Use attn_implementation="eager" to look at them.'
        )
    length = query.shape[2]
    reader = getattr(key, "vattn_reader", None)  # see `hf_sparse` and `hf_kept`
    if reader is not None:
        window = sliding_window is not None and sliding_window < key.shape[2]
        refused = {"softcap": softcap, "s_aux": s_aux is not None, "dropout": dropout}
        refused["sliding_window"] = window and attention_mask is None
        reader.hidden = module.__dict__.pop(HIDDEN, None)  # see `hf_kept.with_hidden`
        reader.module = weakref.ref(module)  # see `hf_press`
        chosen = reader.attend(query, attention_mask, scaling, refused)
        if chosen is not None:
            return chosen.transpose(1, 2).contiguous(), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = length > 1 and attention_mask is None and causal
    if causal and key.shape[2] > length:
        # A prefill into an empty static cache: the rows behind the queries are not written yet.
        key, value = key[:, :, :length], value[:, :, :length]
    if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        attention_mask = _window_mask(query, key, sliding_window, causal)
        causal = False
    if softcap is None and s_aux is None:
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            dropout,
            causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = explicit(query, key, value, attention_mask, causal, scale, softcap, s_aux, dropout)
    return out.transpose(1, 2).contiguous(), None


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend with what no fused kernel takes: capped scores, a sink logit per head.

    Scores, softmax and sums are float32 whatever the inputs are. Memory is bounded by blocks of
    queries; K and V are read in place (half precision: converted a block of tokens at a time).
    Shapes as in `attention`; returns [B, Hq, L, D] in the query's dtype.
    """
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    if sinks is not None:
        sinks = sinks.reshape(-1, groups)
    step = max(1, SCORES // max(1, batch * heads * key.shape[2]))
    blocks = []
    for first in range(0, length, step):
        last = min(first + step, length)
        # Under a causal mask no query of this block sees a key at or behind `last`.
        seen = slice(0, last) if causal else slice(None)
        keep = _causal_mask(first, last, query.device) if causal else mask
        if not causal and mask is not None and mask.shape[-2] != 1:
            keep = mask[..., first:last, :]
        rows = pack_rows(query[:, :, first:last], groups)
        packed = pack_mask(keep, groups, last - first)
        out = [
            _attend_rows(
                rows[b],
                key[b, :, seen],
                value[b, :, seen],
                None if packed is None else packed[min(b, packed.shape[0] - 1)],
                (scale, softcap, dropout),
                sinks,
            )
            for b in range(batch)
        ]
        blocks.append(torch.stack(out).reshape(batch, heads, last - first, -1))
    return torch.cat(blocks, dim=2).to(query.dtype)


def _attend_rows(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[float, float | None, float],
    sinks: Tensor | None,
) -> Tensor:
    """Attend [H, R, D] rows of one sequence to its [H, S, D] K and V; returns [H, R, D] float32."""
    scale, softcap, dropout = options
    rows = rows.float() * scale
    spans = _spans(key)
    scores = torch.cat([torch.bmm(rows, key[:, s].float().transpose(1, 2)) for s in spans], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    top = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        # A sink is one more key with this logit and a value of zero: it only joins the sum.
        sink = sinks.float().repeat_interleave(rows.shape[1] // sinks.shape[1], dim=1)[..., None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    # A row that may attend to nothing has no weight at all, and is zero as in torch.
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    weights = torch.nn.functional.dropout(weights, dropout)
    parts = [torch.bmm(weights[..., s], value[:, s].float()) for s in spans]
    return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]


def _spans(key: Tensor) -> list[slice]:
    """Cut the tokens of a half-precision K into blocks; float32 is read in place, in one piece."""
    tokens = key.shape[1]
    if key.dtype == torch.float32 or torch.compiler.is_compiling() or tokens <= BLOCK_TOKENS:
        return [slice(0, tokens)]
    return [slice(i, i + BLOCK_TOKENS) for i in range(0, tokens, BLOCK_TOKENS)]


def _causal_mask(first: int, last: int, device: torch.device) -> Tensor:
    """Mask queries first..last (top-left aligned) against keys 0..last: [last - first, last]."""
    queries = torch.arange(first, last, device=device)
    return queries[:, None] >= torch.arange(last, device=device)[None, :]


def _window_mask(query: Tensor, key: Tensor, window: int, causal: bool) -> Tensor:
    """Mask [L, S] of a sliding window for a call that came without one.

    transformers puts the window into the mask it builds; this serves callers that build none.
    """
    length, tokens = query.shape[2], key.shape[2]
    if length > 1 and not causal:
        raise UnsupportedError(
            f"sliding_window={window} over {tokens} keys without a mask and without causality: "
            "pass the attention mask (call vattn.hf.register() before the model builds its masks)"
        )
    # Causal: the queries are all the keys. One query: it is the last key.
    queries = torch.arange(tokens - length, tokens, device=query.device)[:, None]
    keys = torch.arange(tokens, device=query.device)[None, :]
    return (keys <= queries) & (keys > queries - window)


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"attn_implementation={NAME!r} cannot honour `{name}` and will not ignore it; "
                'use attn_implementation="sdpa" or "eager" for this model'
            )
    if kwargs.get("cache") is not None:
        raise UnsupportedError(
            f"attn_implementation={NAME!r} does not serve continuous batching "
            '(`generate_batch`); use attn_implementation="sdpa" there, or `generate`'
        )
