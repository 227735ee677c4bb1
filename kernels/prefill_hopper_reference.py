"""The schedule of the Hopper prefill in torch, on the CPU: same steps, masks, rings and barriers.

A program is three roles and the copies that are on their way, each a generator that yields what it
waits for. Whichever may go on goes on, in an order that a seed draws: the result must not depend on
it, nobody may wait for ever, and no tile may change between the issue of a product and its wait.
Sums are float64, so that the result differs from `scores.reference` by rounding alone.

Index arithmetic is the kernel's own (prefill_hopper_tiles.py); the rest follows, line by line,
prefill_hopper_roles.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, nan

import torch
from torch import Tensor

from vattn.kernels.prefill_hopper_tiles import CONSUMERS, ROWS, Tile, issue_parity, steps_of, turn
from vattn.kernels.scores import LOG2E, Scores

Condition = Callable[[], bool]
Role = Iterator[Condition]


def always() -> bool:
    """What a role waits for that only lets others go on."""
    return True


class Barrier:
    """An mbarrier: a phase ends with ``count`` arrivals; a wait for a parity passes when the last
    phase that ended has it (PTX ISA, mbarrier.test_wait)."""

    def __init__(self, count: int) -> None:
        self._count = self._missing = count
        self._ended = 0

    def arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._missing, self._ended = self._count, self._ended + 1

    def passed(self, parity: int) -> Condition:
        return lambda: self._ended % 2 != parity


class Ring:
    """Slots for tiles of ``rows`` [keys, D]; a box beyond them is filled with zeros."""

    def __init__(self, rows: Tensor, tile: Tile) -> None:
        self.rows, self.block = rows, tile.keys
        self.tiles = [torch.full((tile.keys, rows.shape[1]), nan) for _ in range(tile.stages)]
        self.full = [Barrier(1) for _ in range(tile.stages)]
        self.empty = [Barrier(CONSUMERS) for _ in range(tile.stages)]

    def slot(self, i: int) -> tuple[int, int]:
        at, parity = turn.fn(i, len(self.tiles))
        return at, parity

    def arrived(self, i: int) -> Condition:
        at, parity = self.slot(i)
        return self.full[at].passed(parity)

    def box(self, tile: int) -> Tensor:
        held = self.rows[tile * self.block : (tile + 1) * self.block]
        assert held.shape[0], "a box without a row that exists"
        return torch.cat([held, held.new_zeros(self.block - held.shape[0], held.shape[1])])


@dataclass
class Program:
    """What roles share: ``plan`` is `steps_of`'s, ``flying`` are the copies on their way."""

    keys: Ring
    values: Ring
    plan: tuple[int, int, int, int]
    scores: Scores
    factor: float
    turns: list[Barrier]
    flying: list[Role] = field(default_factory=list)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    tile: Tile,
    *,
    length: int,
    start: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """One head of one sequence: query [L, D], key and value [S, D]; (out [L, D], lse [L]).

    Raises RuntimeError if the roles wait for each other, AssertionError if a tile is overwritten
    while a product reads it.
    """
    tokens, dim = query.shape
    keys = max(length - start, 0)
    diagonal = {None: None, "top_left": -start, "bottom_right": keys - tokens}[scores.causal]
    scale = scores.factor(dim)
    signed = query.double() * ((scale > 0) - (scale < 0))
    results = []
    for row in range(0, tokens, ROWS * CONSUMERS):
        rows = min(tokens - row, ROWS * CONSUMERS)
        program = Program(
            Ring(key[start : start + keys].double(), tile),
            Ring(value[start : start + keys].double(), tile),
            steps_of.fn(row, rows, keys, diagonal, scores.window, tile.keys),
            scores,
            abs(scale) or 1.0,
            [Barrier(1) for _ in range(CONSUMERS)] if tile.alternate else [],
        )
        done: dict[int, tuple[Tensor, Tensor]] = {}
        firsts = [row + g * ROWS for g in range(CONSUMERS)]
        positions = [first + (diagonal or 0) for first in firsts]
        consumers = [
            consume(signed[first : first + ROWS], position, keys, program, done, g)
            for g, (first, position) in enumerate(zip(firsts, positions, strict=True))
        ]
        run([produce(program), *consumers], program.flying, random.Random(seed))
        results += [done[g] for g in range(CONSUMERS)]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def run(roles: list[Role], flying: list[Role], draw: random.Random) -> None:
    """Let roles go on in any order until none is left."""
    waiting: list[tuple[Role, Condition]] = [(role, always) for role in roles]
    while waiting or flying:
        waiting += [(copy, always) for copy in flying]
        flying.clear()
        ready = [at for at, (_, condition) in enumerate(waiting) if condition()]
        if not ready:
            raise RuntimeError(f"{len(waiting)} roles wait for each other")
        role, _ = waiting.pop(draw.choice(ready))
        condition = next(role, None)
        if condition is not None:
            waiting.append((role, condition))


def copy(i: int, tile: int, ring: Ring, program: Program) -> Role:
    at, parity = ring.slot(i)
    yield ring.empty[at].passed(parity ^ 1)
    ring.tiles[at] = torch.full_like(ring.box(tile), nan)

    def landing() -> Role:
        ring.tiles[at] = ring.box(tile)
        ring.full[at].arrive()
        yield always

    program.flying.append(landing())


def produce(program: Program) -> Role:
    last, _, _, total = program.plan
    if total:
        yield from copy(0, last, program.keys, program)
        for i in range(1, total):
            yield from copy(i, last - i, program.keys, program)
            yield from copy(i - 1, last - i + 1, program.values, program)
        yield from copy(total - 1, last - total + 1, program.values, program)


def consume(
    q: Tensor,
    position: int,
    keys: int,
    program: Program,
    done: dict[int, tuple[Tensor, Tensor]],
    place: int,
) -> Role:
    """A consumer of the rows that exist of its 64; leaves (out, lse) in ``done[place]``."""
    last, edge, inner, steps = program.plan
    k, v = program.keys, program.values
    p = position + torch.arange(q.shape[0])[:, None]
    m, total = q.new_full((q.shape[0], 1), -inf), q.new_zeros(q.shape[0], 1)
    acc, w = torch.zeros_like(q), q.new_zeros(q.shape[0], k.block)
    factor = LOG2E if program.scores.softcap is not None else program.factor * LOG2E
    if steps:
        yield k.arrived(0)
    for i in range(steps + 1):
        now, behind = k.slot(i)[0], v.slot(max(i - 1, 0))[0]
        if program.turns and 0 < i < steps:
            yield program.turns[place].passed(issue_parity.fn(i, place))
        if i < steps:
            s = q @ k.tiles[now].mT
        if i:
            yield v.arrived(i - 1)
            product = w @ v.tiles[behind]
        if program.turns and 0 < i < steps:
            program.turns[1 - place].arrive()
        if i < steps:
            yield always
            assert torch.equal(s, q @ k.tiles[now].mT), "K was overwritten under a product"
            k.empty[now].arrive()
            s = scored(s, program)
            if i == 0 or not edge <= i < inner:
                s = s.masked_fill(~seen(p, (last - i) * k.block, keys, program), -inf)
            m_new = torch.maximum(m, s.amax(1, keepdim=True))
            shift = torch.where(m_new == -inf, 0.0, m_new * factor)
            shrink, new = torch.exp2(m * factor - shift), torch.exp2(s * factor - shift)
            m, total = m_new, total * shrink + new.sum(1, keepdim=True)
        if i + 1 < steps:
            yield k.arrived(i + 1)
        if i:
            yield always
            assert torch.equal(product, w @ v.tiles[behind]), "V was overwritten under a product"
            v.empty[behind].arrive()
            acc = acc + product
        if i < steps:
            acc, w = acc * shrink, new
    natural = (m * factor + torch.log2(total)) / LOG2E
    done[place] = acc / torch.where(total == 0.0, 1.0, total), natural[:, 0]


def scored(s: Tensor, program: Program) -> Tensor:
    """What the kernel keeps of products: themselves, or natural scores under a softcap."""
    softcap = program.scores.softcap
    return s if softcap is None else softcap * torch.tanh(s * program.factor / softcap)


def seen(p: Tensor, first: int, keys: int, program: Program) -> Tensor:
    """Whether queries at positions p [M, 1] see the keys of the tile from ``first`` on."""
    j = first + torch.arange(program.keys.block)
    visible = (j < keys).expand(p.shape[0], -1)
    if program.scores.causal is not None:
        visible = visible & (j <= p)
    if program.scores.window is not None:
        visible = visible & (j > p - program.scores.window)
    return visible
