"""What policies are told of a model and of the future: attention that was recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.kept.playing import EVERYTHING, play
from bench.kept.reading import Prompt, Reading, read
from bench.kept.scripts import Script
from bench.toys.net import Reader
from vattn.eviction import SCORE
from vattn.evictor import Evictor, Seen, Step
from vattn.evictors.duo_attention import DuoAttention
from vattn.kernels.columns import logits
from vattn.kernels.kv import KV
from vattn.selector import Caps

LEAST = 1e-9  # attention below this is none


@dataclass(frozen=True, kw_only=True)
class Recorder(Evictor):
    """Drops nothing and sums up attention of decode steps."""

    budget: float | int = EVERYTHING

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    watches: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        return torch.zeros_like(seen.score)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        return score + step.weights.sum(2)


def future(net: Reader, script: Script) -> Tensor:
    """Attention that the questions of a script give each token where nothing is dropped: [layers,
    B, Hkv, tokens]. Tokens of questions stand where each question has its own, and have the sum."""
    batch, context = script.prompt.ids.shape
    room = script.asked.shape[2]
    reading = Reading(net, Recorder(), script.prompt, room)
    try:
        start = reading.mark()
        found = torch.zeros(net.layers, batch, net.kv_heads, context + room)
        for asked in script.asked:
            for token in asked.unbind(1)[:-1]:
                reading.feed(token[:, None])
            for layer in range(net.layers):
                mass = reading.heads.track(layer, SCORE)
                found[layer, :, :, : mass.shape[2]] += mass
                mass.zero_()
            reading.rewind(start)
        return found
    finally:
        reading.close()


def replay(net: Reader, prompt: Prompt) -> tuple[Tensor, ...]:
    """The most attention that any query pays to each token of a prompt while the model is told the
    prompt once more: [B, Hkv, tokens] for each layer."""
    length = prompt.ids.shape[1]
    twice = read(net, torch.cat([prompt.ids, prompt.ids], 1))
    found = []
    for part in twice.parts:
        query = part.query[:, :, length:].unflatten(1, (net.kv_heads, -1)).flatten(0, 1)
        kv = KV(*(side.flatten(0, 1)[:, None] for side in (part.key, part.value)))
        most = torch.zeros(len(query), length)
        for _, scores in logits(query, kv):
            most = most.maximum(scores.softmax(-1)[..., :length].amax((1, 2)))
        found.append(most.unflatten(0, part.key.shape[:2]))
    return tuple(found)


def guess(net: Reader, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """A linear map from a layer's input to the log of `replay`'s scores, fitted by least squares:
    weights [layers, Hkv, width] and biases [layers, Hkv]."""
    weights, biases = [], []
    for part, mass in zip(prompt.parts, replay(net, prompt), strict=True):
        rows = part.hidden.detach().flatten(0, 1)
        wanted = mass.clamp_min(LEAST).log().transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
        ridge = 1e-3 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
        found = torch.linalg.solve(rows.mT @ rows + ridge, rows.mT @ wanted.double()).float()
        weights.append(found[:-1].mT)
        biases.append(found[-1])
    return torch.stack(weights), torch.stack(biases)


def lazy(prompt: Prompt, sink: int) -> float:
    """Between the attention that the lazier half of the layers gives to the ends of a prompt, its
    first tokens and its last quarter, and that of the others; of the last query."""
    found, length = [], prompt.ids.shape[1]
    for part in prompt.parts:
        heads = part.key.shape[1]
        query = part.query[:, :, -1:].unflatten(1, (heads, -1))
        scores = (query.squeeze(3) @ part.key.mT) * part.key.shape[3] ** -0.5
        weights = scores.softmax(-1).mean((0, 1, 2))
        found.append(float(weights[:sink].sum() + weights[-(length // 4) :].sum()))
    found.sort(reverse=True)
    half = max(1, len(found) // 2)
    return (found[half - 1] + found[half]) / 2


def retrieval(net: Reader, script: Script, sink: int, recent: int) -> tuple[tuple[int, int], ...]:
    """(layer, KV head) of the half of all heads which hurt most where they alone forget the middle
    of the text."""
    heads = [(layer, head) for layer in range(net.layers) for head in range(net.kv_heads)]
    losses = {}
    for one in heads:
        others = tuple(each for each in heads if each != one)
        evictor = DuoAttention(sink_tokens=sink, recent_tokens=recent, retrieval=others)
        losses[one] = play(net, evictor, script).loss
    heads.sort(key=lambda each: losses[each], reverse=True)
    return tuple(sorted(heads[: max(1, len(heads) // 2)]))
