"""What is asked of a model that forgets, drawn by a seed.

    context ──► evicted ──► question ──► forgotten ──► question ──► ...        needles, tracking,
                                                                               frequent, shipped
    context ──► watched questions ──► evicted ──► questions                    requery
    context ──► evicted ──► text                                               text

A question's tokens leave the cache before the next one comes, so that every answer comes from the
context; what they drove out of it stays out. In `requery` a few pairs are asked for again and
again: the queries follow rank^-1.2 over 32 of 48 pairs; the other 16 are never asked for, so that
nothing in K or V tells which matter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bench.kept.reading import Prompt, read
from bench.toys.net import HERE, Reader, Toy
from bench.toys.problems import PROBLEMS, scattered

TOY_CONTEXT = 512
REQUERY_CONTEXT, PAIRS, ASKED_FOR, QUERIES, ZIPF = 416, 48, 32, 24, 1.2
QUESTIONS = 4  # to a toy's context


@dataclass(frozen=True, eq=False)
class Script:
    """A prompt and what follows.

    Args:
        prompt: what is read first, B contexts.
        asked: [Q, B, L] token ids of the questions with their answers.
        scored: [Q, B, L] bool, tokens that the model has to know.
        watched: [W, B, L] questions that go before; an evictor sees them, and evicts behind them.
        closed: `prompt` and the watched questions as one prompt, for evictors that choose at
            prompts only.
        single: every scored token is a question of its own.
    """

    prompt: Prompt
    asked: Tensor
    scored: Tensor
    watched: Tensor | None = None
    closed: Prompt | None = None
    single: bool = False

    @property
    def context(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.ids.shape[1]


class Draw(Protocol):
    """Makes a script for some contexts by a seed."""

    def __call__(self, net: Reader, seed: int, contexts: int) -> Script: ...


def toy(name: str) -> Toy:
    """A toy that was trained."""
    return Toy.load(HERE / f"{name}.npz")


def toy_script(name: str) -> Draw:
    """Several questions to each context of a toy's problem."""
    problem = PROBLEMS[name]

    def draw(net: Reader, seed: int, contexts: int) -> Script:
        rng = np.random.default_rng([seed, len(name), 7])
        batch = problem.draw(rng, contexts, TOY_CONTEXT, problem.load, QUESTIONS)
        asked = batch.questions.transpose(0, 1)
        scored = torch.zeros_like(asked, dtype=torch.bool)
        scored[..., problem.ask :] = True
        return Script(read(net, batch.context), asked, scored)

    return draw


def requery(net: Reader, seed: int, contexts: int) -> Script:
    """A few pairs asked for again and again: some watched, then as many asked."""
    rng = np.random.default_rng([seed, 1206])
    shares = np.arange(1, ASKED_FOR + 1) ** -ZIPF
    rows, asked = [], []
    for _ in range(contexts):
        keys, values = rng.permutation(128)[:PAIRS], rng.integers(128, 256, PAIRS)
        table = np.stack([keys, values], 1)
        rows.append(scattered(rng, table, REQUERY_CONTEXT, (256, 320)))
        ranked = rng.permutation(PAIRS)[:ASKED_FOR]
        asked.append(table[ranked[rng.choice(ASKED_FOR, 2 * QUERIES, p=shares / shares.sum())]])
    ids = torch.from_numpy(np.stack(rows))
    both = torch.from_numpy(np.stack(asked))
    watched, rest = both[:, :QUERIES], both[:, QUERIES:]
    questions = rest.transpose(0, 1)
    scored = torch.zeros_like(questions, dtype=torch.bool)
    scored[..., 1] = True
    closed = read(net, torch.cat([ids, watched.flatten(1)], 1))
    # The value of a watched query is not fed: its key alone is a question.
    return Script(read(net, ids), questions, scored, watched[..., :1].transpose(0, 1), closed)


def shipped_script(length: int) -> Draw:
    """Five questions to each context of held-out text; shorter ones end in spaces."""

    def draw(net: Reader, seed: int, contexts: int) -> Script:
        from bench.model.data import held_out
        from bench.toys.shipped import context_of

        rng, text = random.Random(f"kept/{seed}"), held_out()
        made = [context_of(text, length, rng) for _ in range(contexts)]
        each = [questions for _, questions in made]
        longest = max(len(q + a) for questions in each for q, a in questions)
        asked = torch.tensor([[list((q + a).ljust(longest)) for q, a in some] for some in each])
        place = torch.arange(longest)
        ends = torch.tensor([[[len(q), len(q + a)] for q, a in some] for some in each])
        scored = (place >= ends[..., :1]) & (place < ends[..., 1:])
        context = torch.tensor([list(context) for context, _ in made])
        return Script(read(net, context), asked.transpose(0, 1), scored.transpose(0, 1))

    return draw


def text_script(prompt: int, scored: int, *, trained: bool = False) -> Draw:
    """Held-out text, or the novels that the model was ``trained`` on: ``prompt`` bytes read, then
    every byte of ``scored`` more guessed."""

    def draw(net: Reader, seed: int, contexts: int) -> Script:
        from bench.model.data import held_out, training_texts

        rng = random.Random(f"text/{seed}")
        text = training_texts()[0] if trained else held_out()
        starts = [rng.randrange(len(text) - prompt - scored) for _ in range(contexts)]
        ids = torch.tensor([list(text[at : at + prompt + scored]) for at in starts])
        asked = ids[None, :, prompt:]
        known = torch.ones_like(asked, dtype=torch.bool)
        return Script(read(net, ids[:, :prompt]), asked, known, single=True)

    return draw
