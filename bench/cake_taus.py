"""CAKE's two exponents for our shipped model: which it is better than SnapKV by, and by how much.

A layer's share of the budget grows with entropy ** (1 / tau1) * variance ** (1 / tau2) of its
attention; the authors tune both for each model. Here each pair of a grid is tried on novels that
the model was trained on (`perplexity` then reads text that it never saw): 1,500 bytes are evicted
to 6.25 %, and 500 more are guessed. A figure is the loss in bits a byte; ``difference`` is to that
of SnapKV on the same contexts, and ``spread`` the standard error of that over seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.harness import Bench
from bench.kept.cells import Cells
from bench.leaderboard import gathered
from bench.perplexity import CAKE, LEAST, PROMPT, SNAPKV, at_prompts, duel, plan_of, tuned

NEVER = 1e9  # an exponent of nothing: entropy or variance does not count
GRID = [(tau1, tau2) for tau1 in (1.0, 2.0, NEVER) for tau2 in (0.25, 0.5, 1.0, 2.0, NEVER)]
FEW = [(1.0, 1.0), (2.0, 0.5)]
SEEDS = 6


def run(
    bench: Bench,
    state: Annotated[str, typer.Option(help="File of finished cells, to go on from.")] = "",
) -> None:
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    plan = plan_of(bench, "cake_taus", [SNAPKV, CAKE], bench.pick(SEEDS, 1), trained=True)
    plan.budgets = [round(LEAST * PROMPT)]
    cake = at_prompts(plan.makes.pop(CAKE))
    for tau1, tau2 in bench.pick(GRID, FEW):
        plan.makes[f"tau1 {tau1:g}, tau2 {tau2:g}"] = tuned(cake, tau1=tau1, tau2=tau2)
    board = gathered(plan, Cells(Path(state) if state else None))
    best, least = "", float("inf")
    for name in [each for each in plan.makes if each != SNAPKV]:
        fields = duel(plan, board, name)
        if fields["value"] < least:
            best, least = name, fields["value"]
        bench.figure(f"cake_taus/{name}", **{**fields, "target": None})
    bench.note(f"the best of these: {best}")
