"""Which tokens a sparse kernel reads: a list of pages for each sequence and KV head.

    ids          [B, Hkv, K] int32    page numbers, ascending; behind ``count`` nothing is read
    count        [B, Hkv]    int32    pages chosen, 0 .. K
    page_tokens                       page p holds tokens p * page_tokens .. (p + 1) * page_tokens
                                      of its sequence, as far as it has them; 1: single tokens
    log_weights  [B, Hkv, K] float32  added to the score of every token of the page (-log of the
                                      probability that a sampled token was drawn), or None
    tail         (out, lse)           an estimate of what tokens that are not chosen give, float32
                                      [B, Hq, L, Dv] and [B, Hq, L], joined by log-sum-exp; or None

Query row (h, l) of L new tokens sees the chosen tokens t with ``starts <= t <= length - L + l``:
causal, aligned bottom-right. Rows that see nothing are 0, with log-sum-exp -inf.

    out   [B, Hq, L, Dv]       softmax over the chosen tokens (and the tail), times V
    lse   [B, Hq, L] float32   log of the sum of exp(score + log_weight), natural
    mass  [B, Hkv, K] float32  the softmax weights of a page's tokens among those chosen, summed
                               over the rows that share the KV head: entries behind ``count`` are
                               0, the others sum to the number of rows that see anything
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY
from vattn.kernels.kv import KV


@dataclass(frozen=True, eq=False)
class Selection:
    """Pages to read; see above.

    Raises:
        ValueError: shapes or dtypes are none of the above; the message names them.
    """

    ids: Tensor
    count: Tensor
    page_tokens: int = 1
    log_weights: Tensor | None = None
    tail: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 3 or self.ids.dtype != torch.int32:
            raise ValueError(
                f"ids is {self.ids.dtype} {tuple(self.ids.shape)}: must be int32 [batch, KV heads, "
                "pages]"
            )
        if self.count.shape != self.ids.shape[:2] or self.count.dtype != torch.int32:
            raise ValueError(
                f"count is {self.count.dtype} {tuple(self.count.shape)}: must be int32 "
                f"{tuple(self.ids.shape[:2])}"
            )
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens is {self.page_tokens}: must be 1 or more")
        weights = self.log_weights
        if weights is not None and (
            weights.shape != self.ids.shape or weights.dtype != torch.float32
        ):
            raise ValueError(
                f"log_weights is {weights.dtype} {tuple(weights.shape)}: must be float32 "
                f"{tuple(self.ids.shape)}"
            )
        for name in ("count", "log_weights"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.ids.device:
                raise ValueError(f"{name} is on {tensor.device} and ids on {self.ids.device}")

    def check(self, query: Tensor, kv: KV) -> None:
        """Raise ValueError unless this chooses from ``kv`` for ``query`` [B, Hq, L, D]."""
        kv.check_query(query)
        if query.dim() != 4:
            raise ValueError(f"query is {tuple(query.shape)}: must be [batch, heads, tokens, dim]")
        want = (kv.batch, kv.key.shape[1])
        if self.ids.shape[:2] != want:
            raise ValueError(
                f"ids is {tuple(self.ids.shape)}: must be [{want[0]}, {want[1]}, pages]"
            )
        if self.ids.device != query.device:
            raise ValueError(f"ids is on {self.ids.device} and query on {query.device}")


def reference(
    query: Tensor, kv: KV, selection: Selection, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in float64, one sequence and KV head at a time: (out, lse, mass), without the
    tail."""
    batch, heads, length, dim = query.shape
    kv_heads, groups = kv.key.shape[1], heads // kv.key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    wide = query.double()
    out = wide.new_zeros(batch, heads, length, kv.value.shape[3])
    lse = wide.new_full((batch, heads, length), EMPTY)
    mass = wide.new_zeros(selection.ids.shape)
    for b in range(batch):
        slot = b if kv.slots is None else int(kv.slots[b])
        end = kv.key.shape[2] if kv.lengths is None else int(kv.lengths[b])
        start = 0 if kv.starts is None else int(kv.starts[b])
        for h in range(kv_heads):
            tokens, entry = chosen(selection, b, h, start, end)
            if not len(tokens):
                continue
            k, v = (t[slot, h, tokens].double() for t in (kv.key, kv.value))
            if kv.key_scale is not None:
                k = k * kv.key_scale[min(h, len(kv.key_scale) - 1)]
            if kv.value_scale is not None:
                v = v * kv.value_scale[min(h, len(kv.value_scale) - 1)]
            rows = slice(h * groups, (h + 1) * groups)
            scores = wide[b, rows] @ k.T * scale
            if selection.log_weights is not None:
                scores = scores + selection.log_weights[b, h, entry].double()
            last = end - length + torch.arange(length, device=query.device)
            scores = scores.masked_fill(tokens > last[:, None], EMPTY)
            sums = scores.logsumexp(-1)
            weights = (scores - sums.masked_fill(sums == EMPTY, 0.0)[..., None]).exp()
            out[b, rows], lse[b, rows] = weights @ v, sums
            mass[b, h].index_add_(0, entry, weights.sum((0, 1)))
    return out, lse, mass


def chosen(selection: Selection, b: int, h: int, start: int, end: int) -> tuple[Tensor, Tensor]:
    """The tokens of ``start .. end`` that sequence b reads for KV head h, and the entry of ``ids``
    that each stands for: int64 [n] each."""
    count, size = int(selection.count[b, h]), selection.page_tokens
    pages = selection.ids[b, h, :count].long()
    tokens = (pages[:, None] * size + torch.arange(size, device=pages.device)).flatten()
    entry = torch.arange(count, device=pages.device).repeat_interleave(size)
    inside = (tokens >= start) & (tokens < end)
    return tokens[inside], entry[inside]
