"""What a score goes through between <q, k> and softmax, and which keys a query sees.

    position of query l      p = l                       causal="top_left", or not causal
                             p = lengths[b] - L + l      causal="bottom_right"
    s = scale * <q, k>       then, in this order
    s = softcap * tanh(s / softcap)                      Gemma 2, https://arxiv.org/abs/2408.00118
    s = s - slope_h * |p - j|                            ALiBi, https://arxiv.org/abs/2108.12409
    s = -inf where j > p                                 causal
    s = -inf where j <= p - window and j >= sink_tokens  StreamingLLM, https://arxiv.org/abs/2309.17453
    softmax over the keys and one more score sink_logits[h] that has no value: gpt-oss,
                                                         https://arxiv.org/abs/2508.10925

ALiBi's distance is counted from the bottom-right position, whether causal or not. A log-sum-exp
that a kernel returns includes the sink's score; it is the log of the weights' denominator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

Causal = Literal["top_left", "bottom_right"]
LOG2E = 1.4426950408889634
# How kernels are told about causality.
CAUSAL = {None: 0, "top_left": 1, "bottom_right": 2}
# A window or a sink beyond this is one without end: positions stay int32.
MOST_WINDOW = 1 << 30


@dataclass(frozen=True, eq=False)
class Scores:
    """The map from products of rows to scores.

    Args:
        scale: None is 1 / sqrt(D); any finite number.
        causal: how a query's position is counted, None if it sees all keys.
        window: last keys that a query sees, its own among them; needs ``causal``.
        sink_tokens: first keys that it sees whatever the window is.
        softcap: largest score; None: none.
        alibi: float32 [Hq] or [B, Hq] slopes.
        sink_logits: float32 [Hq].

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    scale: float | None = None
    causal: Causal | None = None
    window: int | None = None
    sink_tokens: int = 0
    softcap: float | None = None
    alibi: Tensor | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        if self.causal not in (None, "top_left", "bottom_right"):
            raise ValueError(f"causal={self.causal!r}: must be None, 'top_left' or 'bottom_right'")
        if self.scale is not None and not isfinite(self.scale):
            raise ValueError(f"scale={self.scale}: must be finite, or None for 1 / sqrt(head_dim)")
        if self.window is not None and (self.window < 1 or self.causal is None):
            raise ValueError(
                f"window={self.window}, causal={self.causal!r}: a window is at least 1 and causal"
            )
        if self.sink_tokens < 0 or (self.sink_tokens and self.window is None):
            raise ValueError(
                f"sink_tokens={self.sink_tokens}: must be >= 0, and 0 without a window"
            )
        if self.softcap is not None and not (isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap={self.softcap}: must be a positive number, or None")
        for name, dims in (("alibi", (1, 2)), ("sink_logits", (1,))):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.dim() not in dims):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}: must be float32 [heads]"
                )

    def factor(self, dim: int) -> float:
        """The scale of rows of ``dim`` elements."""
        return dim**-0.5 if self.scale is None else float(self.scale)

    def dense(self) -> Scores:
        """The same with slopes and sinks whose elements lie side by side: itself if they do."""
        strided = {
            name: tensor.contiguous()
            for name in ("alibi", "sink_logits")
            if (tensor := getattr(self, name)) is not None and not tensor.is_contiguous()
        }
        return replace(self, **strided) if strided else self

    def check(self, query: Tensor, batch: int) -> None:
        """Raise ValueError unless slopes and sinks suit the query's heads and device."""
        heads = query.shape[1]
        shapes = {"alibi": ((heads,), (batch, heads)), "sink_logits": ((heads,),)}
        for name, allowed in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) not in allowed or tensor.device != query.device:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be ({heads},) on "
                    f"{query.device}"
                )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    length: int | None = None,
    start: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in float64 for one sequence.

    query [Hq, L, D], key [Hkv, S, D], value [Hkv, S, Dv], of which rows ``start`` to ``length``
    count; mask [L, S] or [Hq, L, S], bool (True = attend) or float (added).
    Returns (out [Hq, L, Dv], lse [Hq, L]); a row that sees nothing is 0 with -inf.
    """
    length = key.shape[1] if length is None else length
    groups = query.shape[0] // key.shape[0]
    tokens = query.shape[1]
    key, value = (t[:, start:length].double().repeat_interleave(groups, 0) for t in (key, value))
    s = query.double() @ key.mT * scores.factor(query.shape[-1])
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    j = torch.arange(start, length, device=query.device)
    last = torch.arange(tokens, device=query.device)[:, None] + length - tokens
    p = last - length + tokens if scores.causal == "top_left" else last
    if scores.alibi is not None:
        s = s - scores.alibi.double()[:, None, None] * (last - j).abs()
    hidden = torch.zeros_like(last - j, dtype=torch.bool)
    if scores.causal is not None:
        hidden |= j > p
    if scores.window is not None:
        hidden |= (j <= p - scores.window) & (j >= scores.sink_tokens)
    s = s.masked_fill(hidden, float("-inf"))
    if mask is not None:
        mask = mask[..., start:length]
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.double()
    if scores.sink_logits is not None:
        sink = scores.sink_logits.double()[:, None, None].expand(-1, tokens, 1)
        s = torch.cat([s, sink], -1)
        value = torch.cat([value, value.new_zeros(value.shape[0], 1, value.shape[2])], 1)
    empty = (s == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(s, -1).masked_fill(empty, 0.0) if s.shape[-1] else s
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:2], float("-inf"))
    return weights @ value, lse
