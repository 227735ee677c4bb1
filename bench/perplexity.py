"""Loss on held-out text against budget, for every eviction policy.

Our shipped model reads 1,500 bytes of a novel that it never saw; they are evicted to a budget; then
500 bytes more are guessed, byte by byte, as steps of decoding, at which policies that decode drop
what they will. A figure is the loss at a fifth of the prompt, in bits a byte; the table has all
budgets. `worse` is how much more than the dense loss that is.

H2O and CAKE are there twice: `at prompts` drops behind the prompt alone, as SnapKV does. Policies
that drop at steps hold their budget all the time, others grow: see ``footprint`` in the table
before comparing.

Text of this kind is guessed from the last words for the most part: what is told apart here is how
much harm a policy does, not what it can recall (see `leaderboard` for that).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.harness import Bench
from bench.kept import roster, scripts
from bench.kept.cells import Cells, Mean
from bench.kept.roster import CHANCE, MASS, Grain, Make
from bench.leaderboard import DENSE, Board, Plan, Task, active, check, gathered, show
from bench.model.net import NetConfig

PROMPT, SCORED, SHORT = 1500, 500, 96  # bytes; the last: scored by a quick run
CONTEXTS, FEW = 8, 2
SHARES = (0.5, 0.25, 0.2, 0.125, 0.0625)
FIFTH, LEAST = 0.2, 0.0625
CAKE, SNAPKV, AT_PROMPTS = "CAKE", "SnapKV", ", at prompts"
NEVER = 1 << 30  # steps from one eviction to the next
QUICK = (CHANCE, "Streaming", MASS, SNAPKV, CAKE)
WITHIN = "<= 2"  # percent that H2O may lose at a fifth


def run(
    bench: Bench,
    state: Annotated[str, typer.Option(help="File of finished cells, to go on from.")] = "",
    policies: Annotated[list[str], typer.Option(help="Policies; all by default.")] = [],
) -> None:
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    plan = planned(bench, policies)
    board = gathered(plan, Cells(Path(state) if state else None))
    show(plan, board)
    fifth, least = (round(share * PROMPT) for share in (FIFTH, LEAST))
    whole = board[DENSE, 0]
    sound = partial(check, plan, board)
    bench.figure(f"perplexity/{DENSE}", bits(whole), "bits a byte", gate=sound)
    for name in plan.makes:
        means = {budget: board[name, budget] for budget in plan.budgets}
        bench.figure(
            f"perplexity/{name}",
            bits(means[fifth]),
            "bits a byte",
            gate=partial(active, plan, name, means),
            at={budget: bits(mean) for budget, mean in means.items()},
            worse_percent={budget: worse(mean, whole) for budget, mean in means.items()},
            returned={budget: mean.of("returned") for budget, mean in means.items()},
            error={budget: mean.of("error") for budget, mean in means.items()},
        )
    for name in [each for each in (MASS, MASS + AT_PROMPTS) if each in plan.makes]:
        bench.figure(
            f"perplexity/worse/{name}/20 %",
            worse(board[name, fifth], whole),
            "% of the dense loss",
            gate=sound,
            target=WITHIN,
        )
    if {CAKE, SNAPKV} <= plan.makes.keys():
        versus(bench, plan, board, least)


def planned(bench: Bench, policies: list[str]) -> Plan:
    """What is run."""
    task = Task(
        "perplexity",
        "shipped",
        scripts.text_script(PROMPT, SCORED),
        Grain(4, 32, 32),
        CONTEXTS,
        scripts.text_script(PROMPT, SHORT),
        text=True,
        rope_base=NetConfig().rope_theta,
    )
    known = roster.roster()
    names = policies or bench.pick(list(known), [name for name in QUICK if name in known])
    shares = bench.pick(SHARES, (FIFTH, LEAST))
    plan = Plan(bench, task, 1, names, bench.pick(CONTEXTS, FEW))
    plan.budgets = [round(share * PROMPT) for share in shares]
    for name in [each for each in (MASS, CAKE) if each in plan.makes]:
        plan.makes[name + AT_PROMPTS] = at_prompts(plan.makes[name])
    return plan


def at_prompts(make: Make) -> Make:
    """The same policy, dropping behind the prompt alone."""
    return lambda *given: replace(make(*given), every=NEVER)


def versus(bench: Bench, plan: Plan, board: Board, budget: int) -> None:
    """CAKE against SnapKV where little is kept. SnapKV keeps every token that comes behind the
    prompt, so CAKE does here, too: both hold as much all the time."""
    ours, peer = board[CAKE + AT_PROMPTS, budget], board[SNAPKV, budget]
    bench.figure(
        f"perplexity/{CAKE}{AT_PROMPTS}/6.25 %",
        bits(ours),
        "bits a byte",
        gate=partial(check, plan, board),
        target="ratio >= 1",
        peer=SNAPKV,
        peer_value=bits(peer),
        footprints=(ours.of("footprint"), peer.of("footprint")),
    )


def bits(mean: Mean) -> float:
    """The loss of a cell in bits a byte."""
    return mean.of("loss") / math.log(2)


def worse(mean: Mean, dense: Mean) -> float:
    """By how many percent a loss exceeds the dense one."""
    return 100 * (mean.of("loss") / dense.of("loss") - 1)
