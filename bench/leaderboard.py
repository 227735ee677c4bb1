"""Eviction policies on tasks made here: what they answer, what they give back, what it costs.

    requery    pairs of which a few are asked for again and again (rank^-1.2): 24 questions watched,
               then evicted, then 24 more; 16 of the 48 pairs are never asked for
    pairs      one of 32 keys is asked for behind an evicted context, 4 questions to each
    tracking   chains of variables, likewise
    frequent   the most frequent word of the context
    shipped    our model: pass keys and named numbers in held-out text, 5 questions to a context
    text       our model: the next bytes of held-out text; loss in bits instead of accuracy

Nobody knows the question when the context is evicted, and every token of a question is a step of
decoding that may drop more; a question leaves the cache before the next one comes. The dense row
comes first. ``returned`` is the share of physical bytes given back (`HeadCache.stats`),
``footprint`` the sum over entries of their lifetime after the prompt, against dense; ``error``
that of the logits.
Behind a red gate: a policy that evicted nothing or holds more than its budget; a model that is
wrong without eviction, or a runner that is not the model.

    python -m bench leaderboard                         three seeds
    python -m bench leaderboard --state FILE            what is done is kept, and not done again
    python -m bench leaderboard --plot FILE             accuracy against budget
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from bench.harness import Bench
from bench.kept import recording, roster, scripts
from bench.kept.cells import Cell, Cells, Key, Mean
from bench.kept.playing import Played, play
from bench.kept.roster import CHANCE, COUNTER, FIFO, MASS, ORACLE, STEPS, TOVA, Facts, Grain
from bench.model.net import NetConfig
from bench.toys.net import THETA, Reader, dense

DENSE = "dense"
SHARES = (2, 4, 8, 16)  # of so many tokens, one is kept
JUDGED = 48  # tokens kept in `requery`
ORDER = (FIFO, TOVA, MASS, COUNTER, STEPS, ORACLE)
QUICK = (CHANCE, "Streaming", "SnapKV", MASS, ORACLE)  # beside ORDER in `requery`
QUICK_SECONDS = "<= 180"
LEAST_RIGHT = 0.9  # of the dense row
OFFLINE = 1 << 20  # the seed of what policies are calibrated on
SLACK = 1.0  # rows above the budget, that a question's token may leave


@dataclass(frozen=True)
class Task:
    """A model, what it is asked, and what policies may force."""

    name: str
    model: str
    draw: scripts.Draw
    grain: Grain
    contexts: int  # of a seed
    quick: scripts.Draw | None = None  # something shorter
    text: bool = False
    rope_base: float = THETA

    @property
    def toy(self) -> bool:
        """Whether its model is one."""
        return self.model != "shipped"

    def net(self) -> Reader:
        """The model."""
        return net_of(self.model)


TOY = Grain(sink=0, recent=4, window=16)
TASKS = {
    task.name: task
    for task in (
        Task("requery", "pairs", scripts.requery, Grain(0, 0, 32), 32),
        Task("pairs", "pairs", scripts.toy_script("pairs"), TOY, 32),
        Task("tracking", "tracking", scripts.toy_script("tracking"), TOY, 32),
        Task("frequent", "frequent", scripts.toy_script("frequent"), TOY, 128),
        Task(
            "shipped",
            "shipped",
            scripts.shipped_script(2048),
            Grain(4, 16, 32),
            4,
            scripts.shipped_script(1024),
            rope_base=NetConfig().rope_theta,
        ),
        Task(
            "text",
            "shipped",
            scripts.text_script(1536, 128),
            Grain(4, 32, 32),
            4,
            scripts.text_script(1024, 64),
            text=True,
            rope_base=NetConfig().rope_theta,
        ),
    )
}


@cache
def net_of(name: str) -> Reader:
    """A model by its name."""
    if name != "shipped":
        return scripts.toy(name)
    from bench.toys.shipped import Shipped

    return Shipped()


def run(
    bench: Bench,
    seeds: Annotated[int, typer.Option(help="Seeds; 0: 3, or 1 (requery: 3).")] = 0,
    state: Annotated[str, typer.Option(help="File of finished cells, to go on from.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against budget here.")] = None,
    tasks: Annotated[list[str], typer.Option(help="Tasks; all by default.")] = [],
    policies: Annotated[list[str], typer.Option(help="Policies; all by default.")] = [],
) -> None:
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    begin = time.perf_counter()
    known = Cells(Path(state) if state else None)
    boards = {}
    for name in tasks or TASKS:
        plan = Plan(bench, TASKS[name], seeds, policies)
        board = boards[name] = gathered(plan, known)
        show(plan, board)
        figures(bench, plan, board)
    if "requery" in boards:
        order(bench, boards["requery"])
    if left := roster.left_out():
        bench.note(f"not on the board, as they need what no task has: {', '.join(left)}")
    if bench.quick and not (tasks or policies or state):
        seconds = time.perf_counter() - begin
        bench.figure("leaderboard/seconds", seconds, "s", gate=True, target=QUICK_SECONDS)
    if plot is not None:
        from bench.kept.drawing import draw

        draw(plot, {name: lines(TASKS[name], board) for name, board in boards.items()})


class Plan:
    """What is run of a task."""

    def __init__(
        self, bench: Bench, task: Task, seeds: int, policies: list[str], contexts: int = 0
    ) -> None:
        self.task, sure = task, task.name == "requery"
        self.draw = (task.quick if bench.quick else None) or task.draw
        self.seeds = range(bench.seed, bench.seed + (seeds or (3 if sure else bench.pick(3, 1))))
        self.contexts = contexts or (
            task.contexts if sure else bench.pick(task.contexts, max(1, task.contexts // 8))
        )
        every = roster.roster()
        short = [name for name in (*QUICK, *(ORDER if sure else ())) if name in every]
        wanted = policies or bench.pick(list(every), short)
        self.makes = {name: every[name] for name in dict.fromkeys(wanted)}
        self.context = self.script(self.seeds[0]).context
        budgets = [self.context // share for share in bench.pick(SHARES, () if sure else (8,))]
        self.budgets = sorted([*budgets, *([JUDGED] if sure else [])], reverse=True)

    @cache  # noqa: B019 - a plan lives as long as its task runs
    def script(self, seed: int) -> scripts.Script:
        return self.draw(self.task.net(), seed, self.contexts)

    @cache  # noqa: B019
    def dense(self, seed: int) -> Played:
        return play(self.task.net(), None, self.script(seed))

    @cache  # noqa: B019
    def future(self, seed: int) -> Tensor:
        return recording.future(self.task.net(), self.script(seed))

    @cache  # noqa: B019
    def replay(self, seed: int) -> tuple[Tensor, ...]:
        script = self.script(seed)
        return recording.replay(self.task.net(), script.closed or script.prompt)

    @cache  # noqa: B019
    def offline(self) -> scripts.Script:
        """What policies are calibrated on: a script that is not on the board."""
        return self.draw(self.task.net(), OFFLINE, self.contexts)

    @cache  # noqa: B019
    def retrieval(self) -> tuple[tuple[int, int], ...]:
        grain = self.task.grain
        return recording.retrieval(self.task.net(), self.offline(), grain.sink, grain.recent)

    @cache  # noqa: B019
    def lazy(self) -> float:
        return recording.lazy(self.offline().prompt, max(1, self.task.grain.sink))

    @cache  # noqa: B019
    def guess(self) -> tuple[Tensor, Tensor]:
        return recording.guess(self.task.net(), self.offline().prompt)

    def rows(self) -> Iterator[tuple[str, int]]:
        """Policies and budgets, the dense one first; those without a budget once."""
        yield DENSE, 0
        for budget in self.budgets:
            for name in self.makes:
                if budget == self.budgets[0] or not roster.adaptive(name):
                    yield name, budget

    def cell(self, key: Key) -> Cell:
        """Play a script."""
        script, whole = self.script(key.seed), self.dense(key.seed)
        if key.policy == DENSE:
            return Cell.of(key, whole, whole)
        facts = Facts(
            script.context,
            self.task.rope_base,
            self.lazy,
            partial(self.future, key.seed),
            self.retrieval,
            partial(self.replay, key.seed),
            self.guess,
        )
        evictor = self.makes[key.policy](key.budget, self.task.grain, facts)
        return Cell.of(key, play(self.task.net(), evictor, script), whole)


Board = dict[tuple[str, int], Mean]


def gathered(plan: Plan, known: Cells) -> Board:
    """All cells of a task."""
    rows, board = list(plan.rows()), {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        shown = bar.add_task(plan.task.name, total=len(rows) * len(plan.seeds))
        for name, budget in rows:
            cells = []
            for seed in plan.seeds:
                key = Key(plan.task.name, name, budget, seed, plan.contexts, plan.context)
                cells.append(known.get(key, partial(plan.cell, key)))
                bar.update(shown, advance=1, description=f"{plan.task.name} {name} {budget}")
            for each in plan.budgets if roster.adaptive(name) else [budget]:
                board[name, each] = Mean(tuple(cells))
    return board


# ---- what is shown -------------------------------------------------------------------------------
def worth(task: Task, mean: Mean) -> float:
    """Percent of the questions that are right; of text, the loss in bits."""
    return mean.of("loss") / math.log(2) if task.text else 100 * mean.accuracy


def figures(bench: Bench, plan: Plan, board: Board) -> None:
    """One figure a policy: its mean over all budgets, with each budget beside it."""
    task, unit = plan.task, "bits a byte" if plan.task.text else "% right"
    sound = partial(check, plan, board)
    bench.figure(f"leaderboard/{task.name}/{DENSE}", worth(task, board[DENSE, 0]), unit, gate=sound)
    for name in plan.makes:
        means = {budget: board[name, budget] for budget in plan.budgets}
        each = {budget: worth(task, mean) for budget, mean in means.items()}
        facts = ("returned", "footprint", "error", "held")
        bench.figure(
            f"leaderboard/{task.name}/{name}",
            sum(each.values()) / len(each),
            unit,
            gate=partial(active, plan, name, means),
            at=each,
            means={fact: {b: mean.of(fact) for b, mean in means.items()} for fact in facts},
            evicted={b: sum(c.evicted for c in mean.cells) for b, mean in means.items()},
            by_seed={b: [c.right / c.asked for c in mean.cells] for b, mean in means.items()},
        )


def order(bench: Bench, board: Board) -> None:
    """The order that the papers claim, at `JUDGED` tokens."""
    found = [(name, board[name, JUDGED]) for name in ORDER if (name, JUDGED) in board]
    scores = [(name, 100 * mean.accuracy) for name, mean in found]
    steps = [b - a for (_, a), (_, b) in pairwise(scores)]

    def ordered() -> bool:
        missing = set(ORDER) - {name for name, _ in scores}
        assert not missing, f"not on the roster: {', '.join(sorted(missing))}"
        assert min(steps) > 0, " ".join(f"{name} {score:.1f}" for name, score in scores)
        return True

    bench.figure(
        "leaderboard/order",
        lambda: min(steps),
        "points between neighbours",
        gate=ordered,
        target=">= 1",
        right=dict(scores),
    )


def show(plan: Plan, board: Board) -> None:
    """A task's policies, the best first."""
    task = plan.task
    judged = plan.budgets[-1]
    heads = [f"1/{plan.context / budget:.3g}" for budget in plan.budgets]
    unit = "bits" if task.text else "% right"
    facts = ("returned", "footprint", "error")
    table = Table(
        f"{task.name}, {plan.context} tokens: {unit}",
        *heads,
        *(f"{fact} {heads[-1]}" for fact in facts),
        box=SIMPLE_HEAD,
    )
    whole = worth(task, board[DENSE, 0])
    table.add_row(DENSE, *[f"{whole:.3g}"] * len(heads), "0", "1", "0", style="bold")
    names = sorted(plan.makes, key=lambda each: board[each, judged].of("loss"))
    for name in names:
        values = [f"{worth(task, board[name, budget]):.3g}" for budget in plan.budgets]
        last = [f"{board[name, judged].of(fact):.3f}" for fact in facts]
        style = {CHANCE: "dim", ORACLE: "italic"}.get(name)
        table.add_row(name, *values, *last, style=style)
    Console(stderr=True, width=140).print(table)


def lines(task: Task, board: Board) -> tuple[str, float, dict[str, list[tuple[float, float]]]]:
    """For the picture: what is measured, the dense value, and (share, value) of each policy."""
    found: dict[str, list[tuple[float, float]]] = {}
    for (name, budget), mean in board.items():
        if name != DENSE:
            share = budget / mean.cells[0].key.context
            found.setdefault(name, []).append((share, worth(task, mean)))
    unit = "bits a byte" if task.text else "% right"
    return unit, worth(task, board[DENSE, 0]), found


# ---- gates ---------------------------------------------------------------------------------------
def active(plan: Plan, name: str, means: dict[int, Mean]) -> bool:
    """A policy evicted at every budget, and holds no more than that."""
    adaptive = roster.adaptive(name)
    for budget, mean in means.items():
        for cell in mean.cells:
            assert cell.evicted > 0, f"nothing was evicted at {budget} of {plan.context} tokens"
            assert adaptive or cell.held <= budget + SLACK, f"{cell.held} rows held of {budget}"
    return True


def check(plan: Plan, board: Board) -> bool:
    """The dense row is the model's own, and right; chance does not solve the task."""
    task, net = plan.task, plan.task.net()
    script = plan.script(plan.seeds[0])
    first = script.asked[0]
    with torch.no_grad():
        ids = torch.cat([script.prompt.ids, first], 1)
        whole = dense(net, ids)[:, script.context - 1 : -1]
    ours = plan.dense(plan.seeds[0]).logits[: int(script.scored[0].sum())]
    apart = float((ours - whole[script.scored[0]]).abs().max() / whole.abs().max())
    assert apart < 1e-4, f"logits differ from the model's own by {apart} of the largest"
    if task.text:
        return True
    right = board[DENSE, 0].accuracy
    assert right >= LEAST_RIGHT, f"the model is right in {right:.3f} of the questions only"
    least = plan.budgets[-1]
    if (CHANCE, least) in board and task.name != "frequent":
        chance = board[CHANCE, least].accuracy
        assert chance < right / 2, f"keeping by chance answers {chance:.3f} of the questions"
    return True
