"""Our shipped model as a `Reader`, and contexts with several questions each.

A context is held-out text with a pass key and named numbers planted in it; the questions are those
of `bench.model.tasks`, each asked right behind the context.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import vattn
from bench.model import tasks
from bench.model.net import Block, ByteLlama, NetConfig, attention_inputs, block_output

MODEL = Path(vattn.__file__).parent / "assets" / "model"
NAMES = 4  # named numbers in a context


class Shipped:
    """The shipped model's layers, in float32."""

    def __init__(self, folder: Path = MODEL) -> None:
        from safetensors.torch import load_file

        self.net = ByteLlama(NetConfig()).eval()
        weights = load_file(folder / "model.safetensors")
        self.net.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
        self.config = self.net.config
        self.layers, self.kv_heads = self.config.layers, self.config.kv_heads

    def block(self, layer: int) -> Block:
        """A layer's weights."""
        found = self.net.model.layers[layer]
        assert isinstance(found, Block)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """See `Reader`."""
        return self.net.model.embed_tokens(ids)

    def project(
        self, layer: int, hidden: Tensor, position: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Reader`."""
        block, c = self.block(layer), self.config
        batch, length, _ = hidden.shape
        cos, sin = (table[position:] for table in self.net._rope(1, position + length))
        each = block.self_attn
        weights = each.q_proj.weight, each.k_proj.weight, each.v_proj.weight
        found = attention_inputs(
            hidden.flatten(0, 1),
            block.input_layernorm.weight,
            *weights,
            cos.repeat(batch, 1),
            sin.repeat(batch, 1),
            c.head_dim,
            c.eps,
        )
        q, k, v = (rows.unflatten(0, (batch, length)).transpose(1, 2) for rows in found)
        return q, k, v

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `Reader`."""
        block = self.block(layer)
        return block_output(
            hidden,
            attended.transpose(1, 2).flatten(2),
            block.self_attn.o_proj.weight,
            block.post_attention_layernorm.weight,
            block.mlp.gate_proj.weight,
            block.mlp.up_proj.weight,
            block.mlp.down_proj.weight,
            self.config.eps,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Reader`."""
        body = self.net.model
        normed = F.rms_norm(hidden, hidden.shape[-1:], body.norm.weight, self.config.eps)
        return F.linear(normed, body.embed_tokens.weight)


def context_of(
    text: bytes, length: int, rng: random.Random
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A context of exactly ``length`` bytes, and its questions with their answers."""
    names = rng.sample(tasks.NAMES, NAMES)
    numbers = [tasks.digits(rng, tasks.NUMBER_DIGITS) for _ in names]
    key = tasks.digits(rng, tasks.PASS_DIGITS)
    said = [tasks.lookup_statement(*each) for each in zip(names, numbers, strict=True)]
    said.append(tasks.passkey_statement(key))
    asked = [tasks.lookup_query(name) for name in names] + [tasks.passkey_query()]
    rng.shuffle(said)
    start = rng.randrange(len(text) - length)
    excerpt = text[start : start + length - sum(map(len, said))]
    # Everything said lies in the first half: no answer comes from recent tokens.
    cuts = sorted(rng.sample(range(32, len(excerpt) // 2), len(said)))
    pieces = [excerpt[a:b] for a, b in zip([0, *cuts], [*cuts, len(excerpt)], strict=True)]
    context = pieces[0] + b"".join(
        each.encode() + piece for each, piece in zip(said, pieces[1:], strict=True)
    )
    answers = [*numbers, key]
    return context, [(q.encode(), a.encode()) for q, a in zip(asked, answers, strict=True)]
