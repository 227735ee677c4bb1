"""Keys, values and queries to choose from: recorded from a model, or made to resemble one.

A *scene* is what one layer holds of one sequence, and queries at places near its end:

    key, value   [Hkv, n, D]   after the rotary embedding
    query        [Q, Hq, D]    query i is of token places[i] and sees the tokens up to it
    known_keys, known_queries  [Hkv, m, D], [Hq, m, D] of another sequence of the same layer, for
                               policies that are calibrated offline
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor, Tensor]  # query, key and value, [heads, n, D] each
ROOM = 1024  # queries are of the last so many tokens


@dataclass(frozen=True, eq=False)
class Scene:
    """See above."""

    name: str
    key: Tensor
    value: Tensor
    query: Tensor
    places: Tensor
    known_keys: Tensor
    known_queries: Tensor

    @property
    def tokens(self) -> int:
        return self.key.shape[1]

    @property
    def dim(self) -> int:
        return self.key.shape[2]


# ---- recorded ------------------------------------------------------------------------------------
def recorded(model: Path, tokens: int, queries: int, seed: int) -> Iterator[Scene]:
    """Each layer of a byte-level model that reads a novel it never saw, from a place drawn by the
    seed; what is known is of the King James Bible."""
    from transformers import LlamaForCausalLM

    from bench.model.data import held_out, training_texts

    net = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    novel, bible = held_out(), training_texts()[1]
    starts = [int(torch.randint(len(t) - tokens, (), generator=draw)) for t in (novel, bible)]
    seen, known = (
        layers(net, text[start : start + tokens])
        for text, start in zip((novel, bible), starts, strict=True)
    )
    places = torch.arange(tokens - min(ROOM, tokens // 4), tokens)
    places = places[torch.randperm(len(places), generator=draw)[:queries]].sort().values
    for number, ((query, key, value), (known_query, known_key, _)) in enumerate(
        zip(seen, known, strict=True)
    ):
        asked = query[:, places].transpose(0, 1).contiguous()
        name = f"layer {number}, seed {seed}"
        yield Scene(name, key, value, asked, places, known_key, known_query[:, ::4])


@torch.no_grad()
def layers(net: Any, text: bytes) -> list[Layer]:
    """Query, key and value of each layer for a text, after the rotary embedding."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: dict[int, Layer] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **how: Any
    ) -> Any:
        found[module.layer_idx] = query[0].clone(), key[0].clone(), value[0].clone()
        return sdpa_attention_forward(module, query, key, value, *rest, **how)

    AttentionInterface.register("bench_recorded", attend)
    net.set_attn_implementation("bench_recorded")
    net.model(torch.tensor([list(text)]), use_cache=False)
    return [found[layer] for layer in sorted(found)]


# ---- synthetic -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """What makes keys hard to index (facts of models' keys; none of it is independent noise).

    Args:
        outliers: channels of constant sign, ``loud`` times as large as the others; in the half of
            the channels that the rotary embedding turns slowly, where models have them.
        offset: size of the mean key of the other channels.
        alike: correlation of neighbouring tokens (autoregressive).
        base: of the rotary embedding.
        tail: exponent of the power law by which a query favours 256 tokens.
        peak: strength of its favour.
        sink: attention that the first token takes; its value is small.
    """

    outliers: int = 3
    loud: float = 20.0
    offset: float = 1.0
    alike: float = 0.9
    base: float = 1e4
    tail: float = 1.0
    peak: float = 12.0
    sink: float = 0.3


SETTINGS = {
    "plain": Setting(),
    "louder outliers": Setting(outliers=4, loud=30.0),
    "unlike neighbours": Setting(alike=0.5),
    "very alike neighbours": Setting(alike=0.97),
    "slow rotation": Setting(base=1e6),
    "flat tail": Setting(tail=0.5),
    "large offset": Setting(outliers=2, loud=10.0, offset=2.0),
    "steep": Setting(peak=24.0),
}
DIM, KV_HEADS, GROUPS, FAVOURED = 128, 2, 4, 256


def synthetic(name: str, tokens: int, queries: int, seed: int) -> Scene:
    """A scene of a setting. The seed draws a head (its outliers, its means) and two sequences."""
    setting, head = SETTINGS[name], Head.drawn(SETTINGS[name], seed)
    key, value, query, places = head.sequence(setting, tokens, queries, 2 * seed + 1)
    known, _, asked, _ = head.sequence(setting, tokens, 512, 2 * seed + 2)
    known_queries = asked.transpose(0, 1).contiguous()
    return Scene(f"{name}, seed {seed}", key, value, query, places, known, known_queries)


@dataclass(frozen=True, eq=False)
class Head:
    """Means of the keys and of the queries before the rotary embedding: [KV_HEADS, DIM]."""

    key: Tensor
    query: Tensor

    @staticmethod
    def drawn(setting: Setting, seed: int) -> Head:
        draw = torch.Generator().manual_seed(seed)
        key, query = torch.randn(2, KV_HEADS, DIM, generator=draw)
        key *= setting.offset
        for row in key:
            slow = torch.randperm(DIM // 4, generator=draw)[: setting.outliers] + DIM // 4
            slow += DIM // 2 * torch.randint(2, slow.shape, generator=draw)
            size = setting.loud * (0.5 + torch.rand(slow.shape, generator=draw))
            row[slow] = size * row[slow].sign()
        return Head(key, query)

    def sequence(
        self, setting: Setting, tokens: int, queries: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key, value, query and places of a scene."""
        draw = torch.Generator().manual_seed(seed)
        both = neighbours(2 * KV_HEADS, tokens, setting.alike, draw)
        at = torch.arange(tokens)
        key = rotary(both[:KV_HEADS] + self.key[:, None], at, setting.base)
        room = min(ROOM, tokens // 4)
        places = tokens - 1 - torch.randint(room, (queries,), generator=draw).sort().values
        mean = rotary(self.query[:, None].expand(-1, queries, -1), places, setting.base)
        query = mean[:, :, None] + torch.randn(KV_HEADS, queries, GROUPS, DIM, generator=draw)
        query += favours(setting, key, queries, tokens - room - 1, draw)
        key[:, 0] = sink(setting.sink, key, query)
        value = both[KV_HEADS:]
        value[:, 0] *= 0.05
        return key, value, query.transpose(0, 1).flatten(1, 2).contiguous(), places


def neighbours(rows: int, tokens: int, alike: float, draw: torch.Generator) -> Tensor:
    """Normal numbers [rows, tokens, DIM] of unit variance, each like those of the token before."""
    x = torch.randn(rows, tokens, DIM, generator=draw)
    fresh = (1 - alike * alike) ** 0.5
    for t in range(1, tokens):
        x[:, t].mul_(fresh).add_(x[:, t - 1], alpha=alike)
    return x


def rotary(x: Tensor, at: Tensor, base: float) -> Tensor:
    """x [..., n, D] turned by the rotary embedding of positions ``at`` [n], in half-split form."""
    half = x.shape[-1] // 2
    angle = at[:, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def favours(
    setting: Setting, key: Tensor, queries: int, before: int, draw: torch.Generator
) -> Tensor:
    """What makes queries like tokens before a place, the first most: [KV_HEADS, Q, GROUPS, D]."""
    liked = torch.randint(1, before, (KV_HEADS, queries, FAVOURED), generator=draw)
    away = key - key.mean(1, keepdim=True)
    away = away / away.norm(dim=-1, keepdim=True)
    heads = torch.arange(KV_HEADS)[:, None, None]
    weight = torch.arange(1, FAVOURED + 1) ** -setting.tail
    noise = torch.randn(KV_HEADS, queries, GROUPS, FAVOURED, generator=draw)
    return setting.peak * (weight * (noise / 2).exp()) @ away[heads, liked]


def sink(share: float, key: Tensor, query: Tensor) -> Tensor:
    """A key [KV_HEADS, D] along the mean query, that on average takes ``share`` of the mass."""
    rows = query.flatten(1, 2)
    others = (rows @ key[:, 1:].mT * DIM**-0.5).logsumexp(-1).mean(-1)
    logit = others + torch.tensor(share / (1 - share)).log()
    mean = rows.mean(1)
    return mean * (logit * DIM**0.5 / mean.square().sum(-1))[:, None]
