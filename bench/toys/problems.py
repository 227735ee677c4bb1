"""Problems that a toy learns: what a context says, and what is asked of it.

    pairs       "k v" among filler; asked k, answered v                     (MQAR; RULER, multikey)
    tracking    "x v", "y x", "z y" among filler; asked z, told y x v   (RULER, variable track.)
    frequent    words of a Zipf law; asked for the most frequent one        (RULER, frequent words)

The first two need one token for each they tell; the last needs the mass of many. A row of a batch
is a context of ``context`` tokens, then questions, each of ``ask`` tokens and its answer of
``tell``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Contexts [B, context], questions with answers [B, questions, ask + tell]; token ids."""

    context: Tensor
    questions: Tensor


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    ``draw(rng, batch, context, load, questions)`` makes a batch; ``load`` is how much a context
    says (pairs, chains; of `frequent` how many words there are); a share of ``enough``
    tokens right is learned.
    """

    name: str
    vocab: int
    ask: int
    tell: int
    layers: int
    load: int
    enough: float
    draw: Callable[[Generator, int, int, int, int], Batch]


def pairs(rng: Generator, batch: int, context: int, load: int, questions: int) -> Batch:
    """Keys are tokens 0 .. 127, values 128 .. 255, filler 256 .. 319."""
    rows, asked = [], []
    for _ in range(batch):
        keys, values = rng.permutation(128)[:load], rng.integers(128, 256, load)
        rows.append(scattered(rng, np.stack([keys, values], 1), context, (256, 320)))
        some = rng.permutation(load)[:questions]
        asked.append(np.stack([keys[some], values[some]], 1))
    return batched(rows, asked)


def tracking(rng: Generator, batch: int, context: int, load: int, questions: int) -> Batch:
    """Chains of three: names are tokens 0 .. 127, values 128 .. 255, filler 256 .. 319."""
    rows, asked = [], []
    for _ in range(batch):
        names = rng.permutation(128)[: 3 * load].reshape(load, 3)
        chains = np.concatenate([rng.integers(128, 256, (load, 1)), names], 1)
        steps = np.stack([chains[:, [at + 1, at]] for at in range(3)], 1)
        rows.append(chained(rng, steps, context, (256, 320)))
        asked.append(chains[rng.permutation(load)[:questions], ::-1])
    return batched(rows, asked)


def frequent(rng: Generator, batch: int, context: int, load: int, questions: int) -> Batch:
    """Words are tokens 0 .. 63; the question is 64, the only one there is. Of rank r there are
    ~ r^-0.7: the first is half as frequent again as the second."""
    shares = np.arange(1, load + 1) ** -0.7
    counts = np.floor(context * shares / shares.sum()).astype(np.int64)
    counts[0] += context - counts.sum()
    rows, asked = [], []
    for _ in range(batch):
        words = rng.permutation(64)[:load]
        rows.append(rng.permutation(np.repeat(words, counts)))
        asked.append(np.array([[64, words[0]]]))
    return batched(rows, asked)


def scattered(rng: Generator, table: Ints, context: int, filler: tuple[int, int]) -> Ints:
    """The table's rows at random places of a context, in order."""
    width = table.shape[1]
    starts = np.sort(rng.permutation(context - len(table) * (width - 1))[: len(table)])
    starts = starts + np.arange(len(table)) * (width - 1)
    row = rng.integers(*filler, context)
    row[starts[:, None] + np.arange(width)] = table
    return row


def chained(rng: Generator, steps: Ints, context: int, filler: tuple[int, int]) -> Ints:
    """Steps [chains, length, 2] at random places, those of a chain one behind the other."""
    chains, length = steps.shape[:2]
    order = rng.permutation(np.repeat(np.arange(chains), length))
    turn = np.zeros(chains, np.int64)
    table = np.empty((chains * length, 2), np.int64)
    for at, chain in enumerate(order):
        table[at] = steps[chain, turn[chain]]
        turn[chain] += 1
    return scattered(rng, table, context, filler)


def batched(rows: list[Ints], asked: list[Ints]) -> Batch:
    """Rows side by side."""
    return Batch(torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(asked)))


PROBLEMS = {
    each.name: each
    for each in (
        Problem("pairs", 320, 1, 1, 2, 32, 0.97, pairs),
        Problem("tracking", 320, 1, 3, 2, 12, 0.95, tracking),
        Problem("frequent", 65, 1, 1, 2, 16, 0.92, frequent),
    )
}
