"""Loss on held-out text against budget, for every eviction policy.

Our shipped model reads 1,500 bytes of a novel that it never saw; they are evicted to a budget; then
500 bytes more are guessed, byte by byte, as steps of decoding, at which policies that decode drop
what they will. A figure is the loss at a fifth of the prompt, in bits a byte; the table has all
budgets. `worse` is how much more than the dense loss that is.

H2O and CAKE are there twice: `at prompts` drops behind the prompt alone, as SnapKV does. Policies
that drop at steps hold their budget all the time, others grow: see ``footprint`` in the table
before comparing.

What H2O loses, and CAKE beside SnapKV, is told of more contexts, pair by pair: ``difference`` is in
bits, ``spread`` a standard error over seeds. CAKE's authors tune how much a layer's entropy and
variance count for each model; `tuned` is what `cake_taus` found for this one, on text that it was
trained on.

Text of this kind is guessed from the last words for the most part: what is told apart here is how
much harm a policy does, not what it can recall (see `leaderboard` for that).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.harness import Bench
from bench.kept import roster, scripts
from bench.kept.cells import Cells, Mean
from bench.kept.roster import CHANCE, MASS, Grain, Make
from bench.leaderboard import DENSE, Board, Plan, Task, active, check, gathered, show
from bench.model.net import NetConfig
from vattn.evictor import Evictor
from vattn.evictors import cake

PROMPT, SCORED, SHORT = 1500, 500, 96  # bytes; the last: scored by a quick run
CONTEXTS, FEW = 8, 2
DUELS = 12  # seeds, each of so many contexts
SHARES = (0.5, 0.25, 0.2, 0.125, 0.0625)
FIFTH, LEAST = 0.2, 0.0625
CAKE, SNAPKV, AT_PROMPTS, OF_ALL = "CAKE", "SnapKV", ", at prompts", ", of all text"
TAUS = 2.0, 0.5  # of `cake_taus`
TUNED = f"CAKE, tuned to {TAUS}, at prompts"
NEVER = 1 << 30  # steps from one eviction to the next
QUICK = (CHANCE, "Streaming", MASS, SNAPKV, CAKE)
WITHIN = "<= 2"  # percent that H2O may lose at a fifth


def run(
    bench: Bench,
    state: Annotated[str, typer.Option(help="File of finished cells, to go on from.")] = "",
    policies: Annotated[list[str], typer.Option(help="Policies; all by default.")] = [],
    shares: Annotated[list[float], typer.Option(help="Budgets beside a fifth, in shares.")] = [],
) -> None:
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    plan, known = planned(bench, policies, shares), Cells(Path(state) if state else None)
    board = gathered(plan, known)
    show(plan, board)
    fifth = round(FIFTH * PROMPT)
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
    wanted = [
        act for act, names in ((lost, {MASS}), (versus, {CAKE, SNAPKV})) if names <= {*plan.makes}
    ]
    if wanted:
        more = plan_of(bench, "perplexity", [], bench.pick(DUELS, 1))  # both read its prompts
        for act in wanted:
            act(bench, more, known)


def planned(bench: Bench, policies: list[str], shares: list[float]) -> Plan:
    """What is run."""
    known = roster.roster()
    names = policies or bench.pick(list(known), [name for name in QUICK if name in known])
    plan = plan_of(bench, "perplexity", names)
    wanted = sorted({*shares, FIFTH} if shares else bench.pick(SHARES, (FIFTH, LEAST)))
    plan.budgets = [round(share * PROMPT) for share in reversed(wanted)]
    for name in [each for each in (MASS, CAKE) if each in plan.makes]:
        plan.makes[name + AT_PROMPTS] = at_prompts(plan.makes[name])
    return plan


def plan_of(
    bench: Bench, name: str, policies: list[str], seeds: int = 1, *, trained: bool = False
) -> Plan:
    """Prompts and steps of text."""
    long, short = (
        scripts.text_script(PROMPT, scored, trained=trained) for scored in (SCORED, SHORT)
    )
    base = NetConfig().rope_theta
    task = Task(name, "shipped", long, Grain(4, 32, 32), CONTEXTS, short, text=True, rope_base=base)
    return Plan(bench, task, seeds, policies, bench.pick(CONTEXTS, FEW))


def at_prompts(make: Make) -> Make:
    """The same policy, dropping behind the prompt alone."""
    return lambda *given: replace(make(*given), every=NEVER)


def lost(bench: Bench, plan: Plan, known: Cells) -> None:
    """What H2O loses at a fifth of the prompt, and at a fifth of all text, which is what its
    authors' code takes a share of."""
    make, whole_text = roster.roster()[MASS], PROMPT + bench.pick(SCORED, SHORT)
    plan.budgets = [round(FIFTH * PROMPT)]
    plan.makes = {
        MASS: make,
        MASS + AT_PROMPTS: at_prompts(make),
        MASS + OF_ALL: lambda _, *given: make(round(FIFTH * whole_text), *given),
    }
    board = gathered(plan, known)
    whole = board[DENSE, 0]
    for name in plan.makes:
        mean = board[name, plan.budgets[0]]
        bench.figure(
            f"perplexity/worse/{name}/20 %",
            worse(mean, whole),
            "% of the dense loss",
            gate=partial(check, plan, board),
            target=WITHIN,
            spread=100 * mean.less(whole)[1] / bits(whole),
            contexts=len(plan.seeds) * plan.contexts,
        )


def versus(bench: Bench, plan: Plan, known: Cells) -> None:
    """CAKE against SnapKV where little is kept. SnapKV keeps every token that comes behind the
    prompt, so CAKE does here, too: both hold as much all the time."""
    made = roster.roster()
    ours = at_prompts(made[CAKE])
    plan.budgets = [round(LEAST * PROMPT)]
    plan.makes = {SNAPKV: made[SNAPKV], CAKE + AT_PROMPTS: ours, TUNED: tuned(ours)}
    board = gathered(plan, known)
    for name in (CAKE + AT_PROMPTS, TUNED):
        bench.figure(f"perplexity/{name}/6.25 %", **duel(plan, board, name))


def tuned(make: Make, tau1: float = TAUS[0], tau2: float = TAUS[1]) -> Make:
    """The same CAKE with other exponents."""

    def made(*given: Any) -> Evictor:
        evictor = make(*given)
        assert isinstance(evictor, cake.CAKE)
        return replace(evictor, tau1=tau1, tau2=tau2)

    return made


def duel(plan: Plan, board: Board, name: str) -> dict[str, Any]:
    """A policy's loss at the only budget beside SnapKV's, as `Bench.figure` takes it."""
    ours, peer = board[name, plan.budgets[0]], board[SNAPKV, plan.budgets[0]]
    difference, spread = ours.less(peer)
    return {
        "value": bits(ours),
        "unit": "bits a byte",
        "gate": partial(check, plan, board),
        "target": "ratio >= 1",
        "peer": SNAPKV,
        "peer_value": bits(peer),
        "difference": difference,
        "spread": spread,
        "contexts": len(plan.seeds) * plan.contexts,
        "footprints": (ours.of("footprint"), peer.of("footprint")),
    }


def bits(mean: Mean) -> float:
    """The loss of a cell in bits a byte."""
    return mean.of("loss") / math.log(2)


def worse(mean: Mean, dense: Mean) -> float:
    """By how many percent a loss exceeds the dense one."""
    return 100 * (mean.of("loss") / dense.of("loss") - 1)
