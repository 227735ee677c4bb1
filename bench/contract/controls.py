"""The mutation score: the share of flawed implementations that the suite tells from a right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.contract.call import Attend
from bench.contract.cases import Probe
from bench.contract.flaws import Flaw
from bench.contract.flaws_use import USE
from bench.contract.flaws_values import VALUES
from bench.contract.honest import implementation
from bench.contract.runner import Difference, examine

FLAWS = {flaw.name: flaw for flaw in (*VALUES, *USE)}


@dataclass(frozen=True)
class Verdict:
    """Whether a control was seen, and by which probe first."""

    flaw: Flaw
    seen: Difference | None

    def __str__(self) -> str:
        return f"{self.flaw.name:40s} {self.seen or 'NOT SEEN'}"


def control(flaw: Flaw) -> Attend:
    return implementation(flaw.compute, overrides=flaw.overrides)


def mutate(probes: Sequence[Probe], seed: int, flaws: Sequence[Flaw] = ()) -> list[Verdict]:
    """Run each control until the first difference, where it is expected first."""
    verdicts = []
    for flaw in flaws or FLAWS.values():
        likely = [probe for probe in probes if flaw.look in probe.label]
        others = [probe for probe in probes if flaw.look not in probe.label]
        found = examine(control(flaw), likely + others, seed, until=1).differences
        verdicts.append(Verdict(flaw, found[0] if found else None))
    return verdicts


def score(verdicts: Sequence[Verdict]) -> float:
    return sum(verdict.seen is not None for verdict in verdicts) / len(verdicts)
