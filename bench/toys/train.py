"""Train the toys: ``python -m bench.toys.train [pairs tracking frequent]``, a minute each.

Contexts and what they say double as the toy learns: a stage ends when it is nearly right.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench.toys.net import HERE, Sizes, Toy
from bench.toys.problems import PROBLEMS, Batch, Problem

CONTEXT = 512
ROWS = 4096  # tokens of a step, about
LAST_STEPS = 120  # of the last stage, whose rate falls to 0


@dataclass(frozen=True)
class Stage:
    """A length of contexts and how much they say."""

    context: int
    load: int


def stages(problem: Problem, context: int = CONTEXT) -> list[Stage]:
    """From easy to the problem itself."""
    found = [Stage(context >> by, max(2, problem.load >> by)) for by in range(4, -1, -1)]
    if problem.name == "frequent":
        return [Stage(each.context, problem.load) for each in found[2:]]
    return found


def loss_of(toy: Toy, batch: Batch, ask: int) -> tuple[Tensor, Tensor]:
    """Mean loss of the answers' tokens, and the share of them that are right."""
    ids = torch.cat([batch.context, batch.questions.flatten(1)], 1)
    logits = toy(ids[:, :-1])[:, batch.context.shape[1] - 1 :]
    width = batch.questions.shape[2]
    # Predictions of question i's token t stand in column i * width + t.
    logits = logits.unflatten(1, (-1, width))[:, :, ask:]
    wanted = batch.questions[:, :, ask:]
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
    return loss, (logits.argmax(-1) == wanted).float().mean()


def train(problem: Problem, *, seed: int = 0, seconds: float = 240.0, show: bool = True) -> Toy:
    """A toy that solves a problem, or what it has learned in so many seconds of processor time."""
    rng = np.random.default_rng(seed)
    toy = Toy(Sizes(problem.vocab, problem.layers), seed)
    adam = torch.optim.AdamW(toy.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    begin = time.process_time()
    with Progress(*columns, disable=not show) as bar:
        for number, stage in enumerate(plan := stages(problem)):
            last = number == len(plan) - 1
            task = bar.add_task(f"{problem.name} {stage}", total=1.0)
            mean, step, left = 0.0, 0, LAST_STEPS
            while left and time.process_time() - begin < seconds:
                batch = problem.draw(
                    rng, max(4, ROWS // stage.context), stage.context, stage.load, 8
                )
                loss, right = loss_of(toy, batch, problem.ask)
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
                adam.step()
                step += 1
                mean += (float(right) - mean) * max(0.05, 1 / step)
                learned = step > 20 and mean > problem.enough
                if learned and not last:
                    break
                if last and (learned or left < LAST_STEPS):
                    left -= 1
                    for group in adam.param_groups:
                        group["lr"] = 3e-3 * left / LAST_STEPS
                bar.update(task, completed=mean, description=f"{problem.name} {stage} {mean:.3f}")
    return toy.eval()


def main(names: list[str]) -> None:
    """Train and write the toys of these names, or all."""
    torch.set_num_threads(1)
    for name in names or PROBLEMS:
        train(PROBLEMS[name]).save(HERE / f"{name}.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
