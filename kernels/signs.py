"""Scores of tokens from one bit a channel: the sign of each channel, and one length.

    parts   codes [N, Hkv, P, ceil(D / 8)] uint8   bit c % 8 of byte c // 8 is set where x_c >= 0
            scales [N, Hkv, P, 1] float16          x . sign(x) / D = mean |x_c|, which makes
                                                   scale * sign(x) the nearest such vector to x
    score   scale_t * sum_c (+q_c where the bit is set, -q_c elsewhere) * scale, float32

x is the key, or the key after an orthogonal map that spreads outlier channels over all (`rotation`)
and minus a mean that all keys share: neither changes a softmax if the query is mapped alike.
18 bytes a token and head at D = 128. Bytes read: the records once for all query rows that share a
KV head. Source: the sign codes of RaBitQ (arXiv 2405.12497).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.index import Index


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode [..., D]: codes [..., ceil(D / 8)] uint8 and scales [..., 1] float16."""
    dim = x.shape[-1]
    bits = (x >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -dim % 8)).unflatten(-1, (-1, 8))
    powers = (1 << torch.arange(8, device=x.device)).to(torch.uint8)
    codes = (bits * powers).sum(-1, dtype=torch.uint8)
    scales = x.float().abs().mean(-1, keepdim=True).clamp_max(torch.finfo(torch.float16).max)
    return codes, scales.half()


def unpack(codes: Tensor, scales: Tensor, dim: int) -> Tensor:
    """What a record stands for: [..., D] float32."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.uint8)
    bits = (codes[..., None] >> shifts & 1).flatten(-2)[..., :dim]
    return (bits.float() * 2 - 1) * scales.float()


def rotation(dim: int, *, seed: int = 0) -> Tensor:
    """A random orthogonal map [D, D] float32, the same for the same seed: x @ rotation(D)."""
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def scores(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """Score the first ``records`` records: query [B, Hq, L, D] -> [B, Hkv, Hq / Hkv * L, records]
    float32, -inf where a sequence has no record. In torch's operations, for any device.

    Raises:
        ValueError: the query or the parts do not suit.
    """
    check(query, index)
    dim = query.shape[-1]
    rows = index.rows(query).float() * (dim**-0.5 if scale is None else scale)
    out = index.blank(rows, records)
    for b in range(index.batch):
        (codes, scales), n = index.read(b, records)
        out[b, :, :, :n] = rows[b] @ unpack(codes, scales, dim).mT
    return out


def check(query: Tensor, index: Index) -> None:
    """Raise ValueError unless the parts are sign codes for ``query``."""
    found = [(p.shape[3], p.dtype) for p in index.parts]
    want = [(-(-query.shape[-1] // 8), torch.uint8), (1, torch.float16)]
    if found != want:
        raise ValueError(f"parts are {found} (width, dtype): must be {want}")
