"""A plain PyTorch Llama with the Hugging Face parameter names, made fast for CPU training.

The forward pass works on a flat ``[batch * length, hidden]`` activation, so that the two
compiled halves of a block keep one shape while the training context grows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the model; widths are in features, ``context`` in bytes."""

    vocab: int = 256
    hidden: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 832
    rope_theta: float = 500_000.0
    context: int = 8192
    eps: float = 1e-5

    def to_hf(self) -> dict:
        """The equivalent ``config.json`` of a Hugging Face ``LlamaForCausalLM``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout as in Hugging Face Llama. x: [rows, heads, dim]."""
    lo, hi = x.chunk(2, dim=-1)
    return x * cos[:, None, :] + torch.cat((-hi, lo), dim=-1) * sin[:, None, :]


def attention_inputs(
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and rotary: [rows, hidden] -> three [rows, heads, head_dim]."""
    h = _rms(x, norm, eps)
    q = _rotate(F.linear(h, wq).view(x.shape[0], -1, head_dim), cos, sin)
    k = _rotate(F.linear(h, wk).view(x.shape[0], -1, head_dim), cos, sin)
    return q, k, F.linear(h, wv).view(x.shape[0], -1, head_dim)


def block_output(
    x: Tensor,
    attended: Tensor,
    wo: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """Output projection, residual and the gated MLP: [rows, hidden] -> [rows, hidden]."""
    x = x + F.linear(attended, wo)
    h = _rms(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


class Attention(nn.Module):
    """Holds the four projection matrices of grouped-query attention."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)


class Mlp(nn.Module):
    """Holds the three matrices of the SwiGLU feed-forward layer."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)


class Norm(nn.Module):
    """The gain of an RMSNorm, ``[hidden]``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))


class Block(nn.Module):
    """One decoder layer's parameters, under the Hugging Face names."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = Mlp(c)
        self.input_layernorm = Norm(c.hidden)
        self.post_attention_layernorm = Norm(c.hidden)


class Body(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.hidden)


class ByteLlama(nn.Module):
    """Causal byte model with tied embeddings; ``forward`` gives logits [batch, length, vocab]."""

    def __init__(self, config: NetConfig, compiled: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self._pre, self._post = attention_inputs, block_output
        if compiled:
            self._pre = torch.compile(attention_inputs, dynamic=False)
            self._post = torch.compile(block_output, dynamic=False)
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        """Fan-in scaling; outputs of residual branches start at zero."""
        for name, p in self.named_parameters():
            if p.dim() != 2:
                continue
            if "embed" in name:
                nn.init.normal_(p, std=0.02)
            elif "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.7 / p.shape[1] ** 0.5)

    def _rope(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every row's angles, each [batch * length, head_dim]."""
        key = (batch, length)
        if key not in self._tables:
            c = self.config
            powers = torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
            angles = torch.arange(length, dtype=torch.float64)[:, None] / c.rope_theta**powers
            angles = torch.cat((angles, angles), dim=-1).repeat(batch, 1)
            self._tables[key] = (angles.cos().float(), angles.sin().float())
        return self._tables[key]

    def forward(self, ids: Tensor, taps: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """ids: [batch, length] byte values -> logits [batch, length, vocab].

        ``taps`` receives every layer's rotated query and key, [batch, heads, length, head_dim].
        """
        c, (batch, length) = self.config, ids.shape
        # Inference has other shapes and needs no gradient: leave the compiled pair to training.
        grad = torch.is_grad_enabled()
        pre = self._pre if grad else attention_inputs
        post = self._post if grad else block_output
        cos, sin = self._rope(batch, length)
        x = self.model.embed_tokens(ids).view(batch * length, c.hidden)
        for index, block in enumerate(self.model.layers):
            a, m = block.self_attn, block.mlp
            q, k, v = pre(
                x,
                block.input_layernorm.weight,
                a.q_proj.weight,
                a.k_proj.weight,
                a.v_proj.weight,
                cos,
                sin,
                c.head_dim,
                c.eps,
            )
            q, k, v = (t.view(batch, length, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
            if taps is not None:
                taps[index] = (q, k)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2).reshape(batch * length, -1)
            x = post(
                x,
                y,
                a.o_proj.weight,
                block.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
                c.eps,
            )
        x = _rms(x, self.model.norm.weight, c.eps)
        return F.linear(x, self.model.embed_tokens.weight).view(batch, length, -1)


def write_config(config: NetConfig, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``."""
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    generation = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
