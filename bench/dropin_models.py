"""The models of `bench sdpa_dropin`: small, of the shapes that real ones have, random weights.

Each is a module and the inputs of one call. `F.scaled_dot_product_attention` is looked up at every
call, as model code does, so that a patch decides what they run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
BATCH, TOKENS, OTHERS, LONG = 3, 33, 21, 1024


@dataclass(frozen=True)
class Subject:
    """A module, the inputs of a call, and whether gradients of all of it are compared; `slow`:
    under --quick in float32 only, and compiled without them. `kernels`: so large that kernels of
    ours serve a part of it; smaller calls, and those with gradients, are torch's."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    gradients: bool = True
    slow: bool = False
    kernels: bool = False

    def run(self, dtype: torch.dtype, *, rounded: torch.dtype, call: Any = None) -> list[Tensor]:
        """The output, then the gradients of inputs and parameters, computed in ``dtype``.

        Weights and inputs are first rounded to ``rounded``: every dtype starts from the same
        numbers. ``call`` makes what is called out of the module: torch.compile, say.
        """
        module = copy.deepcopy(self.module).to(rounded).to(dtype)
        inputs = [
            t.detach().to(rounded).to(dtype, copy=True).requires_grad_(self.gradients)
            if t.is_floating_point()
            else t
            for t in self.inputs
        ]
        wanted = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
        with contextlib.nullcontext() if self.gradients else torch.no_grad():
            out = (module if call is None else call(module))(*inputs)
        if not self.gradients:
            return [out]
        generator = torch.Generator().manual_seed(out.numel())
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


class Encoder(nn.Module):
    """torch's own encoder, causal and with padded keys; padded positions are set to zero."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        # Said, not left to torch to find out: looking into the mask does not compile.
        out = self.layers(x, self.causal, src_key_padding_mask=padding, is_causal=True)
        return out.masked_fill(padding[..., None], 0.0)


class Attention(nn.Module):
    """nn.MultiheadAttention of x over y, with a mask for each head and padded keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        out, _ = self.inner(x, y, y, key_padding_mask=padding, attn_mask=bias, need_weights=False)
        return out


class Vision(nn.Module):
    """A ViT-like layer: attention among kept patches, then with a learned bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        masks = kept[:, None, None, :], self.bias.masked_fill(~kept[:, None, None, :], -torch.inf)
        for qkv, out, norm, mask in zip(self.qkv, self.out, self.norm[:2], masks, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm[2](x))))


class Decoder(nn.Module):
    """A layer with grouped queries. With ``prompt``, a prefill and then one token at a time, each
    over a longer part of one preallocated cache; without, all tokens at once."""

    def __init__(
        self,
        heads: int = 4 * KV_HEADS,
        kv_heads: int = KV_HEADS,
        dim: int = HEAD_DIM,
        prompt: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.prompt = heads, kv_heads, dim, prompt
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (heads + 2 * kv_heads) * dim, bias=False)
        self.out = nn.Linear(heads * dim, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.prompt is None:
            q, k, v = self.project(x)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return x + self.out(mixed.transpose(1, 2).flatten(2))
        cache = x.new_full((2, x.shape[0], self.kv_heads, x.shape[1], self.dim), torch.nan)
        outs = [self.step(x[:, : self.prompt], cache, 0)]
        outs += [self.step(x[:, at : at + 1], cache, at) for at in range(self.prompt, x.shape[1])]
        return torch.cat(outs, dim=1)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values [B, heads, L, D]."""
        rows = self.qkv(self.norm(x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        return rows.split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def step(self, x: Tensor, cache: Tensor, at: int) -> Tensor:
        """Write the rows of ``x`` at ``at`` and attend to everything up to there."""
        q, k, v = self.project(x)
        end = at + x.shape[1]
        cache[0, :, :, at:end], cache[1, :, :, at:end] = k, v
        mixed = F.scaled_dot_product_attention(
            q, cache[0, :, :, :end], cache[1, :, :, :end], is_causal=at == 0, enable_gqa=True
        )
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Logits(nn.Module):
    """A transformers model as a function of token ids and their mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits * mask[..., None]


def subjects(seed: int) -> list[Subject]:
    """Every model but ours."""
    torch.manual_seed(seed)
    x, y = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, OTHERS, WIDTH)
    lengths = torch.tensor([TOKENS, TOKENS - 9, 1])
    padding = torch.arange(TOKENS) >= lengths[:, None]
    other_padding = torch.arange(OTHERS) >= torch.tensor([OTHERS, 5, 1])[:, None]
    bias = torch.randn(BATCH * HEADS, TOKENS, TOKENS)
    other_bias = torch.randn(BATCH * HEADS, TOKENS, OTHERS)
    rows, long = torch.randn(2, 40, WIDTH), torch.randn(2, LONG, WIDTH)
    decoder = Decoder(heads=16, kv_heads=2, dim=64, prompt=LONG - 4)
    return [
        Subject("encoder/train", Encoder().train(), (x, padding)),
        Subject("encoder/eval", Encoder().eval(), (x, padding), gradients=False),
        Subject("attention/self", Attention(), (x, x.clone(), bias, as_bias(padding))),
        Subject("attention/cross", Attention(), (x, y, other_bias, as_bias(other_padding))),
        Subject("vision", Vision(), (x, ~padding)),
        Subject("decoder/train", Decoder(), (rows,)),
        Subject("decoder/cache", decoder, (long,), gradients=False, kernels=True),
    ]


def as_bias(padding: Tensor) -> Tensor:
    """A padding mask as what is added to scores: torch wants both masks of one kind."""
    return torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
