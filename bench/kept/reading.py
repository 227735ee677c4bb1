"""A model of `bench.toys.net` whose K and V an evictor keeps.

    prompt ──► each layer appended, scored, evicted ──► feed(token) ──► feed(token) ──► ...
                                                        └─ mark ─────── rewind ─┘

A prompt attends to all of itself before anything goes, so that what its layers compute is the same
under every evictor: `read` does it once, and each `Reading` is given the result. What follows are
steps of decoding over `vattn.eviction.Eviction`; without an evictor, over the `HeadCache` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.toys.net import Reader, Toy
from bench.toys.shipped import Shipped
from vattn.eviction import Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache

PAGE_BYTES = 4096  # small models: 32 rows of 32 channels in float32


@dataclass(frozen=True, eq=False)
class Part:
    """A layer of a prompt: its input [B, n, width], query [B, Hq, n, D], key and value
    [B, Hkv, n, D], and attention's output [B, Hq, n, D]."""

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids [B, n], every layer, and the logits [B, vocabulary] behind the last token."""

    ids: Tensor
    parts: list[Part]
    logits: Tensor


@torch.no_grad()
def read(net: Reader, ids: Tensor) -> Prompt:
    """Read prompts [B, n] whole."""
    parts, hidden = [], net.embed(ids)
    for layer in range(net.layers):
        q, k, v = net.project(layer, hidden, 0, None)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(Part(hidden, q, k, v, out))
        hidden = net.finish(layer, hidden, out)
    return Prompt(ids, parts, net.logits(hidden[:, -1:])[:, 0])


def outputs_of(net: Reader) -> list[Tensor] | None:
    """The weight behind attention of each layer, where it is known."""
    if isinstance(net, Toy):
        return [net.block(layer).out.weight.detach() for layer in range(net.layers)]
    if isinstance(net, Shipped):
        weights = (net.block(layer).self_attn.o_proj.weight for layer in range(net.layers))
        return [each.detach() for each in weights]
    return None


@dataclass(frozen=True, eq=False)
class Mark:
    """A place in the text to come back to."""

    position: int
    last: list[Tensor]  # each layer's input of the token before it, [B, 1, width]


class Reading:
    """One prompt under one evictor, and what follows it.

    Args:
        net: the model.
        evictor: what to keep; None: everything.
        prompt: what `read` returned.
        room: most tokens that follow.
    """

    def __init__(self, net: Reader, evictor: Evictor | None, prompt: Prompt, room: int) -> None:
        batch, length = prompt.ids.shape
        dim = prompt.parts[0].key.shape[3]
        self.net, self.position, self.footprint = net, length, 0.0
        self.heads = HeadCache(
            net.layers,
            net.kv_heads,
            dim,
            length + room,
            batch=batch,
            dtype="float32",
            page_bytes=PAGE_BYTES,
            device="cpu",
        )
        self.eviction = None if evictor is None else Eviction(self.heads, evictor, outputs_of(net))
        self.last = [part.hidden[:, -1:] for part in prompt.parts]
        for layer, part in enumerate(prompt.parts):
            self._append(layer, part.key, part.value)
            if self.eviction is not None:
                self.eviction.attend(part.query, layer, hidden=part.hidden, attended=part.attended)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read tokens [B, L] behind all others; returns logits [B, L, vocabulary]."""
        net, hidden = self.net, self.net.embed(tokens)
        for layer in range(net.layers):
            q, k, v = net.project(layer, hidden, self.position, self.last[layer])
            self.last[layer] = hidden[:, -1:]
            self._append(layer, k, v)
            if self.eviction is None:
                out = self.heads.attend_lse(q, layer)[0]
            else:
                out = self.eviction.attend(q, layer, hidden=hidden)
            hidden = net.finish(layer, hidden, out)
        self.position += tokens.shape[1]
        self.footprint += self.held() * tokens.shape[1]
        return net.logits(hidden)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> None:
        (self.eviction or self.heads).append(layer, k, v)

    def follow(self, evictor: Evictor) -> None:
        """Another evictor from now on, with its own budget."""
        assert self.eviction is not None
        self.eviction.follow(evictor)

    def mark(self) -> Mark:
        """This place."""
        return Mark(self.position, list(self.last))

    def rewind(self, mark: Mark) -> None:
        """Forget what came behind a mark; what was evicted meanwhile stays evicted."""
        gone = self.position - mark.position
        if gone:
            for layer in range(self.net.layers):
                (self.eviction or self.heads).crop(layer, gone)
        self.position, self.last = mark.position, list(mark.last)

    def held(self) -> float:
        """Rows that a KV head of a layer holds, on average."""
        each = [float(self.heads.held(layer).mean()) for layer in range(self.net.layers)]
        return sum(each) / len(each)

    def evicted(self) -> int:
        """Rows that were evicted, in all."""
        return 0 if self.eviction is None else sum(kept.evicted for kept in self.eviction.kept())

    def mapped(self) -> int:
        """Physical bytes behind what is held."""
        self.heads.release()
        return self.heads.stats().mapped_bytes

    def close(self) -> None:
        """Give everything back."""
        self.heads.close()
