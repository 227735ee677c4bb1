"""A script played under an evictor: what the model said, and what was held meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kept.reading import Mark, Reading
from bench.kept.scripts import Script
from bench.toys.net import Reader
from vattn.evictor import Evictor
from vattn.evictors.combined import Wrapper

EVERYTHING = 1 << 40  # a budget that no prompt reaches


@dataclass(frozen=True, eq=False)
class Played:
    """What came of a script.

    Args:
        logits: [N, vocabulary] where a token was to be known.
        right: of the questions, how many were answered without a mistake.
        asked: questions.
        loss: nats a token that was to be known.
        mapped: physical bytes behind K and V when the first question was asked.
        held: rows of a KV head then, on average.
        footprint: rows that a KV head held, summed over the tokens fed behind the prompt.
        evicted: rows that went, in all layers, heads and contexts.
    """

    logits: Tensor
    right: int
    asked: int
    loss: float
    mapped: int
    held: float
    footprint: float
    evicted: int


def decides_at_steps(evictor: Evictor | None) -> bool:
    """Whether an evictor that sees questions one after the other can choose behind the last."""
    if evictor is None:
        return True
    evidence = evictor.caps.evidence
    if "mass" in evidence and not (evictor.watches or "offline" in evidence):
        return False  # it sees attention of prompts alone
    always = evictor.decodes and evictor.every == 1
    return always and not (evictor.cascades or evictor.joint or evictor.adaptive)


def resized(evictor: Evictor, budget: int, recent: int = 0) -> Evictor:
    """The same evictor with another budget, and ``recent`` more last tokens in it."""
    if isinstance(evictor, Wrapper):
        return replace(evictor, base=resized(evictor.base, budget, recent))
    last = evictor.recent_tokens + recent
    return replace(evictor, budget=budget, recent_tokens=last)


def play(net: Reader, evictor: Evictor | None, script: Script) -> Played:
    """Read the prompt, watch, evict, ask."""
    room = script.asked.shape[2] + (0 if script.watched is None else 1)
    if script.watched is not None and not decides_at_steps(evictor):
        reading, start = _closed(net, evictor, script, room)
    else:
        reading, start = _open(net, evictor, script, room)
    try:
        mapped, held = reading.mapped(), reading.held()
        found = torch.stack([_question(reading, start, asked, script) for asked in script.asked])
        return _judged(script, found, reading, mapped, held)
    finally:
        reading.close()


def _open(net: Reader, evictor: Evictor | None, script: Script, room: int) -> tuple[Reading, Mark]:
    """The prompt, evicted behind it, or behind the last watched question."""
    if script.watched is None:
        reading = Reading(net, evictor, script.prompt, room)
        return reading, reading.mark()
    waiting = None if evictor is None else resized(evictor, EVERYTHING)
    reading = Reading(net, waiting, script.prompt, room)
    start, last = reading.mark(), len(script.watched) - 1
    for at, tokens in enumerate(script.watched):
        if at == last and evictor is not None:
            reading.follow(evictor)
        reading.feed(tokens)
        reading.rewind(start)
    return reading, start


def _closed(
    net: Reader, evictor: Evictor | None, script: Script, room: int
) -> tuple[Reading, Mark]:
    """The prompt and the watched questions at once; the latter are kept, and then forgotten."""
    assert script.closed is not None
    more = script.closed.ids.shape[1] - script.context
    if evictor is not None and not evictor.adaptive:
        assert isinstance(evictor.budget, int)
        evictor = resized(evictor, evictor.budget + more, more)
    reading = Reading(net, evictor, script.closed, room)
    start = Mark(script.context, [part.hidden[:, -1:] for part in script.prompt.parts])
    reading.rewind(start)
    return reading, start


def _question(reading: Reading, start: Mark, asked: Tensor, script: Script) -> Tensor:
    """Logits [B, L, vocabulary] that precede each token of a question [B, L]."""
    found = [script.prompt.logits[:, None]]
    for token in asked.unbind(1)[:-1]:
        found.append(reading.feed(token[:, None]))
    reading.rewind(start)
    return torch.cat(found, 1)


def _judged(script: Script, found: Tensor, reading: Reading, mapped: int, held: float) -> Played:
    """Found [Q, B, L, vocabulary] against what was to be known."""
    wrong = (found.argmax(-1) != script.asked) & script.scored
    logits, wanted = found[script.scored], script.asked[script.scored]
    if script.single:
        right, asked = int(script.scored.sum() - wrong.sum()), int(script.scored.sum())
    else:
        right, asked = int((~wrong.any(2)).sum()), wrong[..., 0].numel()
    return Played(
        logits,
        right,
        asked,
        float(F.cross_entropy(logits, wanted)),
        mapped,
        held,
        reading.footprint,
        reading.evicted(),
    )


def apart(ours: Tensor, dense: Tensor) -> float:
    """Error of logits relative to the dense ones, after the mean that softmax ignores is gone."""
    ours, dense = (each - each.mean(-1, keepdim=True) for each in (ours, dense))
    return float((ours - dense).norm() / dense.norm())
