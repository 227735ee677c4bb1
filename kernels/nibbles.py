"""Scores of tokens from four bits a channel: sixteen levels between a token's least and largest.

    parts   codes [N, Hkv, P, D / 2] uint8     channel 2i in the low four bits of byte i, 2i+1 in
                                               the high ones
            scales [N, Hkv, P, 2] float16      (step, least):  k_c ~ least + step * code_c
    score   (q . k~) * scale, float32

68 bytes a token and head at D = 128; D is even. The same format holds some channels alone (Double
Sparsity's labels): then D counts these, and the query is cut to them. Bytes read: the records once
for all query rows that share a KV head. Sources: Twilight (arXiv 2502.02770), Double Sparsity
(arXiv 2408.07092).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.index import Index

LEVELS = 15


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode [..., D]: codes [..., D / 2] uint8 and scales [..., 2] float16. Raises ValueError for
    an odd D."""
    if x.shape[-1] % 2:
        raise ValueError(f"head_dim is {x.shape[-1]}: must be even for four-bit codes")
    x = x.float()
    least = x.amin(-1, keepdim=True).half()
    step = ((x.amax(-1, keepdim=True) - least.float()) / LEVELS).half()
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    codes = ((x - least.float()) * inverse).round().clamp(0, LEVELS).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, torch.cat([step, least], -1)


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """What a record stands for: [..., D] float32."""
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    return scales[..., 1:].float() + scales[..., :1].float() * both


def scores(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """Score the first ``records`` records: query [B, Hq, L, D] -> [B, Hkv, Hq / Hkv * L, records]
    float32, -inf where a sequence has no record. In torch's operations, for any device.

    Raises:
        ValueError: the query or the parts do not suit.
    """
    check(query, index)
    rows = index.rows(query).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = index.blank(rows, records)
    for b in range(index.batch):
        (codes, scales), n = index.read(b, records)
        out[b, :, :, :n] = rows[b] @ unpack(codes, scales).mT
    return out


def check(query: Tensor, index: Index) -> None:
    """Raise ValueError unless the parts are four-bit codes for ``query``."""
    found = [(p.shape[3], p.dtype) for p in index.parts]
    want = [(query.shape[-1] // 2, torch.uint8), (2, torch.float16)]
    if found != want or query.shape[-1] % 2:
        raise ValueError(f"parts are {found} (width, dtype): must be {want}")
