"""Running probes against an implementation, and the report of what differs."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.contract.call import Attend
from bench.contract.cases import Probe
from bench.contract.judge import Differs


@dataclass(frozen=True)
class Difference:
    """One probe that an implementation fails; the label runs it again by itself."""

    probe: Probe
    seed: int
    text: str

    def __str__(self) -> str:
        return f"{self.probe.label} --seed {self.seed}: {self.text}"


@dataclass
class Report:
    """What was checked and what differs, by family."""

    seed: int
    checks: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def families(self) -> dict[str, dict[str, float]]:
        found = Counter(each.probe.family for each in self.differences)
        return {
            family: {
                "checks": count,
                "differences": found[family],
                "seconds": round(self.seconds[family], 2),
            }
            for family, count in self.checks.items()
        }

    def digest(self, most: int = 40) -> str:
        """The differences in words: how many of each kind, then the first of them."""
        kinds = Counter(f"{d.probe.family}/{d.probe.check}" for d in self.differences)
        lines = [f"{count:6d} differences in {kind}" for kind, count in kinds.most_common()]
        lines += [str(each) for each in self.differences[:most]]
        if len(self.differences) > most:
            lines.append(f"... and {len(self.differences) - most} more")
        return "\n".join(lines)


def examine(
    attend: Attend,
    probes: Iterable[Probe],
    seed: int,
    *,
    until: int | None = None,
) -> Report:
    """Run every probe, or until that many differences are found."""
    report = Report(seed)
    with quiet():
        for probe in probes:
            begin = time.perf_counter()
            text = attempt(attend, probe)
            spent = time.perf_counter() - begin
            report.checks[probe.family] += 1
            report.seconds[probe.family] = report.seconds.get(probe.family, 0.0) + spent
            if text is not None:
                report.differences.append(Difference(probe, seed, text))
                if until is not None and len(report.differences) >= until:
                    break
    return report


def attempt(attend: Attend, probe: Probe) -> str | None:
    """None, or what differs: an exception where torch has a result is a difference too."""
    try:
        probe.run(attend)
    except Differs as found:
        return str(found)
    except Exception as error:  # an implementation may fail in any way
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """One thread (tiny products gain nothing from more), no warnings, global state put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
