"""What sparse reading needs of a model, and a toy that learns to look things up in seconds.

Key smearing, k_t <- (1 - a) k_t + a k_(t-1) with one a for each KV head, before the rotary
embedding, lets one layer find "the token behind this one": the circuit that takes a plain model of
this size thousands of steps comes in hundreds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
THETA = 10_000.0
SIZES, SCALE = "sizes", "/scale"  # names in a file of weights


class Reader(Protocol):
    """A causal model whose attention somebody else computes. Hidden states are [B, L, width]."""

    layers: int
    kv_heads: int

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> the first layer's input."""
        ...

    def project(
        self, layer: int, hidden: Tensor, position: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, L, D], key and value [B, Hkv, L, D] of tokens at ``position`` and on;
        ``before`` [B, 1, width] is the input of the token before them, None: there is none."""
        ...

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The next layer's input, from attention's output [B, Hq, L, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output -> [B, L, vocabulary]."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Of a toy; widths are in features."""

    vocab: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 128


class Toy(nn.Module):
    """A Llama with key smearing."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes, self.layers, self.kv_heads = sizes, sizes.layers, sizes.kv_heads
        self.table = nn.Embedding(sizes.vocab, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        nn.init.normal_(self.table.weight, std=0.5)

    def block(self, layer: int) -> Block:
        """A layer's weights."""
        found = self.blocks[layer]
        assert isinstance(found, Block)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """See `Reader`."""
        return self.table(ids)

    def project(
        self, layer: int, hidden: Tensor, position: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Reader`."""
        return self.block(layer).project(hidden, position, before)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `Reader`."""
        block = self.block(layer)
        hidden = hidden + block.out(attended.transpose(1, 2).flatten(2))
        return hidden + block.down(F.gelu(block.up(block.after(hidden))))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Reader`."""
        return self.head(self.norm(hidden))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> logits [B, L, vocabulary], everything read."""
        return dense(self, ids)

    def save(self, path: Path) -> None:
        """Write sizes and weights: matrices in eight bits, with a scale for each row."""
        held: dict[str, Any] = {SIZES: np.array(list(asdict(self.sizes).values()))}
        for name, weights in self.state_dict().items():
            scale = weights.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
            if weights.dim() == 2:
                held[name] = (weights / scale).round().to(torch.int8).numpy()
            held[f"{name}{SCALE}"] = (scale if weights.dim() == 2 else weights).half().numpy()
        np.savez_compressed(path, **held)

    @staticmethod
    def load(path: Path) -> Toy:
        """What `save` wrote, in float32."""
        with np.load(path) as held:
            toy = Toy(Sizes(*held[SIZES].tolist()))
            for name, weights in toy.state_dict().items():
                weights.copy_(torch.from_numpy(held[f"{name}{SCALE}"]))
                if name in held:
                    weights.mul_(torch.from_numpy(held[name]))
        return toy.eval()


class Block(nn.Module):
    """The weights of one layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, dim = sizes.width, sizes.head_dim
        self.dim = dim
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, sizes.heads * dim, bias=False)
        self.k = nn.Linear(width, sizes.kv_heads * dim, bias=False)
        self.v = nn.Linear(width, sizes.kv_heads * dim, bias=False)
        self.out = nn.Linear(sizes.heads * dim, width, bias=False)
        self.up = nn.Linear(width, sizes.ffn, bias=False)
        self.down = nn.Linear(sizes.ffn, width, bias=False)
        self.smear = nn.Parameter(torch.zeros(sizes.kv_heads, 1, 1))

    def project(
        self, hidden: Tensor, position: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Reader`."""
        rows = self.before(hidden)
        q, k, v = (each(rows).unflatten(-1, (-1, self.dim)).transpose(1, 2) for each in self.qkv)
        first = torch.zeros_like(k[:, :, :1])
        if before is not None:
            first = self.k(self.before(before)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        share = torch.sigmoid(self.smear)
        k = (1 - share) * k + share * torch.cat([first, k[:, :, :-1]], 2)
        return rotated(q, position), rotated(k, position), v

    @property
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The three projections."""
        return self.q, self.k, self.v


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of [..., L, D] at ``position`` and on, halves paired."""
    dim = x.shape[-1]
    powers = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(position, position + x.shape[-2], dtype=torch.float64)[:, None] * powers
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def dense(net: Reader, ids: Tensor) -> Tensor:
    """Logits [B, L, vocabulary] of a model that reads everything."""
    hidden = net.embed(ids)
    for layer in range(net.layers):
        q, k, v = net.project(layer, hidden, 0, None)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = net.finish(layer, hidden, attended)
    return net.logits(hidden)
