"""Accuracy when little is read: our model and toys, every selector, budgets of 1/4 to 1/32.

The shipped model recalls pass keys and named numbers; toys that train in minutes look up one of
many keys (`pairs`), follow chains (`tracking`) and name the most frequent word (`frequent`), see
`bench.toys.problems`. A context is read whole, then every token of a question and of its answer is
a step of decoding that reads what the selector chooses; several questions are asked of a context.
A figure is the share of questions whose whole answer is right.

The dense row comes first and everything is measured against it; `random` reads as much by chance;
`exact`, and `sampled` (half of its budget exact, half a weighted sample of the rest), read all of K
to choose, and say what an index can reach at best. Behind a red gate: a selector that read more
than its budget, or nothing; a model that is wrong without a selector; a task that reading by chance
solves.

    python -m bench tasks                    three seeds, with a progress bar
    python -m bench tasks --state FILE       the same; what is done is kept and not done again
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bench.harness import Bench
from bench.toys.net import HERE, Reader, Toy, dense
from bench.toys.problems import PROBLEMS
from bench.toys.reading import Asked, Prefill, answer, prefill
from vattn import policies
from vattn.policies.infinigen import skew
from vattn.selector import Selector

SHARES = (4, 8, 16, 32)
JUDGED = 8  # the share whose loss has a target
LOSS_TARGET = "<= 1"
ORACLE, CHANCE = "exact", "random"
BY_CHANCE = 0.5  # most that reading by chance may reach where one place holds the answer
SHIPPED_CONTEXT, TOY_CONTEXT = 2048, 512
LEAST_RIGHT = 0.9  # of the dense row
FINE = 4  # channels of `Graded` in four bits, of 32
READS_K = ("exact", "sampled")  # to choose: what an index can reach, not an index


@dataclass(frozen=True)
class Grain:
    """Of the selectors of one task, in tokens."""

    page: int
    sink: int
    recent: int

    def of(self, budget: int, page: int) -> dict[str, Any]:
        """Arguments of a selector."""
        forced = {"sink_tokens": self.sink, "recent_tokens": self.recent}
        return {"budget_tokens": budget, "page_tokens": page, **forced}


@dataclass(frozen=True, eq=False)
class Task:
    """A model and what it is asked: ``ask(seed, contexts)`` makes questions to new contexts."""

    name: str
    net: Reader
    context: int
    grain: Grain
    ask: Callable[[int, int], Asked]


@dataclass(frozen=True)
class Cell:
    """Questions of one seed under one selector: how many were right, and tokens read of those
    there."""

    task: str
    selector: str
    share: int
    seed: int
    right: int
    asked: int
    read: int
    there: int


def run(
    bench: Bench,
    contexts: Annotated[int, typer.Option(help="Contexts a seed; 0: 12, or 1.")] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds; 0: 3, or 1.")] = 0,
    state: Annotated[str, typer.Option(help="File of finished cells, to go on from.")] = "",
    only: Annotated[list[str], typer.Option(help="Tasks; all by default.")] = [],
) -> None:
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    contexts = contexts or bench.pick(12, 1)
    drawn = range(bench.seed, bench.seed + (seeds or bench.pick(3, 1)))
    shares = bench.pick(SHARES, (JUDGED, SHARES[-1]))
    names = only or ["shipped", *PROBLEMS]
    known = Known(Path(state) if state else None)
    for name in names:
        task = task_of(name)
        cells = list(measured(bench, task, shares, drawn, contexts, known))
        whole = accuracy(cells, "dense", 1)
        sound = check(task, cells)
        for selector, share in dict.fromkeys((c.selector, c.share) for c in cells):
            some = [c for c in cells if (c.selector, c.share) == (selector, share)]
            bench.figure(
                f"tasks/{name}/{selector}" + (f"/{share}" if share > 1 else ""),
                100 * accuracy(cells, selector, share),
                "% right",
                gate=sound if share == 1 else active(some),
                questions=sum(c.asked for c in some),
                read_share=sum(c.read for c in some) / sum(c.there for c in some),
                by_seed=[100 * c.right / c.asked for c in some],
            )
        fair = {c.selector for c in cells} - {"dense", CHANCE, *READS_K}
        best = max(sorted(fair), key=lambda each: accuracy(cells, each, JUDGED))
        bench.figure(
            f"tasks/{name}/loss_of_best/{JUDGED}",
            100 * (whole - accuracy(cells, best, JUDGED)),
            "points",
            gate=sound,
            target=LOSS_TARGET,
            selector=best,
        )


def selectors(task: Task, budget: int) -> dict[str, Selector]:
    """Every selector at a budget in tokens."""
    grain = task.grain
    pages: dict[str, Any] = {
        CHANCE: policies.Random,
        "window": policies.Window,
        "quest": policies.Quest,
        "deviation": policies.MeanDeviation,
        "cuboid": policies.Cuboid,
    }
    tokens: dict[str, Any] = {
        "signs": policies.Signs,
        "nibbles": policies.Nibbles,
        ORACLE: policies.Exact,
    }
    found: dict[str, Selector] = {
        name: kind(**grain.of(budget, grain.page)) for name, kind in pages.items()
    }
    single = grain.of(budget, 1)
    found |= {name: kind(**single) for name, kind in tokens.items()}
    queries, keys = recorded(task)
    half = policies.Exact(**grain.of(budget // 2, 1))
    return found | {
        "graded": policies.Graded.calibrate(torch.stack(keys), fine=FINE, **single),
        "estimated": policies.Estimated(**grain.of(budget, max(grain.page, min(16, budget // 8)))),
        "infinigen": policies.InfiniGen(map=skew(queries, keys, 0.3), **single),
        "sampled": policies.Sampled(base=half, sample=0.99, **single),
    }


@cache
def recorded(task: Task) -> tuple[list[Tensor], list[Tensor]]:
    """Queries [Hq, n, D] and keys [Hkv, n, D] of each layer, of a context never asked about."""
    known = prefill(task.net, task.ask(-1, 1).context)
    return [q[0] for q in known.queries], [k[0] for k in known.keys]


# ---- tasks ---------------------------------------------------------------------------------------
def task_of(name: str) -> Task:
    """A task by its name."""
    if name == "shipped":
        from bench.toys.shipped import Shipped

        return Task(name, Shipped(), SHIPPED_CONTEXT, Grain(8, 4, 8), ask_shipped)
    toy = Toy.load(HERE / f"{name}.npz")
    return Task(name, toy, TOY_CONTEXT, Grain(4, 0, 4), lambda *seen: ask_toy(name, *seen))


def ask_shipped(seed: int, contexts: int) -> Asked:
    """Five questions to each of some contexts of held-out text."""
    from bench.model.data import held_out
    from bench.toys.shipped import context_of

    rng, text = random.Random(f"tasks/{seed}"), held_out()
    made = [context_of(text, SHIPPED_CONTEXT, rng) for _ in range(contexts)]
    asked = [each for _, questions in made for each in questions]
    longest = max(len(question + told) for question, told in asked)
    tokens = [list((question + told).ljust(longest)) for question, told in asked]
    return Asked(
        torch.tensor([list(context) for context, _ in made]),
        torch.tensor([i for i, (_, questions) in enumerate(made) for _ in questions]),
        torch.tensor(tokens),
        torch.tensor([len(question) for question, _ in asked]),
        torch.tensor([len(question + told) for question, told in asked]),
    )


def ask_toy(name: str, seed: int, contexts: int) -> Asked:
    """Eight questions to each of 4 contexts for one of the shipped model's, or one to 32."""
    problem = PROBLEMS[name]
    rng = np.random.default_rng([seed + 1, len(name)])
    contexts *= 32 if name == "frequent" else 4
    batch = problem.draw(rng, contexts, TOY_CONTEXT, problem.load, 8)
    tokens = batch.questions.flatten(0, 1)
    return Asked(
        batch.context,
        torch.arange(contexts).repeat_interleave(batch.questions.shape[1]),
        tokens,
        torch.full((len(tokens),), problem.ask),
        torch.full((len(tokens),), problem.ask + problem.tell),
    )


# ---- measuring -----------------------------------------------------------------------------------
class Known:
    """Cells that are done, kept in a file of one JSON object a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.cells = [Cell(**json.loads(line)) for line in lines]

    def find(self, like: Cell) -> Cell | None:
        """A cell of the same task, selector, share, seed and number of questions."""
        wanted = (like.task, like.selector, like.share, like.seed, like.asked)
        for cell in self.cells:
            if (cell.task, cell.selector, cell.share, cell.seed, cell.asked) == wanted:
                return cell
        return None

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        self.cells.append(cell)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")


def measured(
    bench: Bench, task: Task, shares: tuple[int, ...], seeds: range, contexts: int, known: Known
) -> Iterator[Cell]:
    """All cells of a task, the dense ones first."""
    plan: list[tuple[str, int, Selector | None]] = [("dense", 1, None)]
    for share in shares:
        some = selectors(task, task.context // share)
        plan += [(name, share, selector) for name, selector in some.items()]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        shown = bar.add_task(task.name, total=len(plan) * len(seeds))
        prepared: dict[int, tuple[Asked, Prefill]] = {}
        for name, share, selector in plan:
            for seed in seeds:
                bar.update(shown, advance=1, description=f"{task.name} {name} 1/{share}")
                if seed not in prepared:
                    asked = task.ask(seed, contexts)
                    prepared[seed] = asked, prefill(task.net, asked.context)
                asked, read = prepared[seed]
                blank = Cell(task.name, name, share, seed, 0, len(asked.of), 0, 0)
                cell = known.find(blank)
                if cell is None:
                    found = answer(task.net, read, asked, selector)
                    right = int(found.right.sum())
                    cell = Cell(
                        task.name, name, share, seed, right, blank.asked, found.read, found.there
                    )
                    known.add(cell)
                yield cell


def accuracy(cells: list[Cell], selector: str, share: int) -> float:
    """Share of the questions of all seeds that are right."""
    some = [c for c in cells if (c.selector, c.share) == (selector, share)]
    return sum(c.right for c in some) / sum(c.asked for c in some)


# ---- gates ---------------------------------------------------------------------------------------
def active(cells: list[Cell]) -> Callable[[], bool]:
    """A selector read something, and no more than its budget."""

    def gate() -> bool:
        for cell in cells:
            share = cell.read / cell.there
            assert 0 < share <= 1 / cell.share, f"read {share:.4f}, budget 1/{cell.share}"
        return True

    return gate


def check(task: Task, cells: list[Cell]) -> Callable[[], bool]:
    """The dense row is the model's own, and right; and chance does not solve the task."""

    def gate() -> bool:
        asked = task.ask(-1, 1)
        with torch.no_grad():
            known = prefill(task.net, asked.context)
            ours = answer(task.net, known, asked, None).logits
            ids = torch.cat([asked.context[asked.of], asked.tokens], 1)
            whole = dense(task.net, ids)[:, asked.context.shape[1] :]
        apart = float((ours - whole).abs().max() / whole.abs().max())
        assert apart < 1e-4, f"logits in two parts differ by {apart} of the largest"
        right = accuracy(cells, "dense", 1)
        assert right >= LEAST_RIGHT, f"the model is right in {right:.3f} of the questions only"
        if task.name != "frequent":
            chance = accuracy(cells, CHANCE, JUDGED)
            assert chance < BY_CHANCE, f"reading by chance answers {chance:.3f} of the questions"
        return True

    return gate
