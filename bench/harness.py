"""What a benchmark holds in its hands: options, timing, peers, gates, figures.

    def run(bench: Bench, sequences: int = 256) -> None:
        plan = ...
        sample = bench.measure(plan.step, clock="thread", repeat=bench.pick(2000, 200))
        bench.figure("plan_step/256", sample, "us", gate=agrees(plan), target="<= 10")

A figure is shown only when its correctness gate is green; behind a red gate its value is null,
the failure is named, and the command exits with code 1. A missed target is shown, not an error.
"""

from __future__ import annotations

import importlib
import json
import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.machine import versions
from bench.timing import Comparison, Ratio, Sample, compare, measure, race

__all__ = ["Bench", "Comparison", "Figure", "Ratio", "Sample", "compare", "measure", "race"]

Stat = Literal["p50", "p99", "min", "max"]
Gate = bool | Callable[[], object]
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
TARGET = re.compile(r"(?P<ratio>ratio )?(?P<sign><=|>=) (?P<limit>[0-9.e+-]+)")
WIDTH_PIPED = 140
SIGNS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Figure:
    """One line of output. ``ratio`` is ours against the peer: above 1, ours is better."""

    name: str
    value: float | None
    unit: str
    stat: str | None = None
    spread: list[float] | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    ratio_spread: list[float] | None = None
    gate: str = "green"
    target: str | None = None
    met: bool | None = None
    n: int | None = None
    quick: bool = False
    seed: int = 0
    note: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(vars(self), allow_nan=False, default=plain)


class Bench:
    """The options of one run and the figures it has produced."""

    def __init__(self, *, quick: bool = False, as_json: bool = False, seed: int = 0) -> None:
        self.quick = quick
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.figures: list[Figure] = []
        self.missing: dict[str, str] = {}
        self.skipped: str | None = None
        self._as_json = as_json
        self._stderr = Console(stderr=True)

    @property
    def exit_code(self) -> int:
        """1 when any gate was red, or when nothing was measured and no reason given; else 0."""
        if not self.figures:
            return int(self.skipped is None)
        return int(any(figure.gate != "green" for figure in self.figures))

    def pick(self, full: Any, quick: Any) -> Any:
        """The second value under ``--quick``, else the first."""
        return quick if self.quick else full

    def peer(self, module: str) -> ModuleType | None:
        """Import an optional rival; when it is not there, say why and return None."""
        try:
            return importlib.import_module(module)
        except Exception as error:  # a rival may fail in any way while it loads
            self.missing[module] = f"{type(error).__name__}: {error}"
            self.note(f"peer {module} is left out: {self.missing[module]}")
            return None

    def note(self, text: str) -> None:
        """A remark for the reader, kept out of the JSON lines."""
        self._stderr.print(text, style="dim", markup=False, highlight=False)

    def skip(self, reason: str) -> None:
        """Say why this machine cannot run the benchmark (no CUDA device, say)."""
        self.skipped = reason
        self.note(f"skipped: {reason}")

    def measure(self, fn: Callable[..., object], **options: Any) -> Sample:
        """`timing.measure` with a progress bar."""
        return self.race({"ours": fn}, **options)["ours"]

    def compare(
        self, ours: Callable[..., object], peer: Callable[..., object], **options: Any
    ) -> Comparison:
        """`timing.compare` with a progress bar."""
        both = self.race({"ours": ours, "peer": peer}, **options)
        return self.versus(both["ours"], both["peer"])

    def versus(self, ours: Sample, peer: Sample) -> Comparison:
        """Pair two samples of one `race`."""
        return Comparison(ours, peer, Ratio.of(ours, peer, seed=self.seed))

    def race(
        self,
        contestants: Mapping[str, Callable[..., object]],
        *,
        warmup: int = 3,
        repeat: int = 30,
        **options: Any,
    ) -> dict[str, Sample]:
        """`timing.race` with a progress bar, drawn between rounds and by no other thread."""
        shown = self._stderr.is_terminal
        with Progress(
            console=self._stderr, auto_refresh=False, transient=True, disable=not shown
        ) as bar:
            task = bar.add_task(", ".join(contestants), total=warmup + repeat)
            stride = max(1, (warmup + repeat) // 50)
            turn = 0

            def tick() -> None:
                nonlocal turn
                turn += 1
                if turn % stride == 0:
                    bar.update(task, completed=turn, refresh=True)

            return race(
                contestants,
                warmup=warmup,
                repeat=repeat,
                tick=tick if shown else None,
                **options,
            )

    def figure(
        self,
        name: str,
        value: Sample | Comparison | float | Callable[[], Sample | Comparison | float],
        unit: str,
        *,
        gate: Gate,
        target: str | None = None,
        peer: str | None = None,
        peer_value: float | None = None,
        stat: Stat = "p50",
        **extra: Any,
    ) -> Figure:
        """Check the gate, then record and show one figure.

        ``gate`` is a truth value, or a function that returns one or raises AssertionError.
        ``value`` is timings (``unit`` one of s, ms, us, ns) or a plain number in ``unit``; as a
        function it is called behind the gate only, so that nothing is timed on a wrong result.
        ``target`` is "<= 10" (in ``unit``) or "ratio >= 3.5" (against the peer). A plain
        ``peer_value`` gives the ratio peer_value / value, for numbers of which less is better.
        ``extra`` goes into the JSON as is.
        """
        limit = Target.parse(target)
        verdict = judge(gate)
        figure = Figure(
            name=name,
            value=None,
            unit=unit,
            peer=peer,
            gate=verdict,
            target=target,
            quick=self.quick,
            seed=self.seed,
            note=f"peer {peer}: {self.missing[peer]}" if peer in self.missing else None,
            versions=versions(),
        )
        if verdict == "green":
            numbers = reduce(value() if callable(value) else value, unit, stat, peer_value)
            met = limit.met(numbers["value"], numbers["ratio"]) if limit else None
            figure = Figure(**{**vars(figure), **numbers, "met": met, "extra": extra})
        self.figures.append(figure)
        if self._as_json:
            print(figure.as_json(), flush=True)
        return figure

    def show(self) -> None:
        """Print the figures as a table, unless they were printed as JSON already."""
        if self._as_json or not self.figures:
            return
        table = Table(
            "figure", "value", "spread", "peer", "ratio", "gate", "target", box=SIMPLE_HEAD
        )
        for figure in self.figures:
            table.add_row(*row(figure), style=None if figure.gate == "green" else "red")
        Console(width=None if sys.stdout.isatty() else WIDTH_PIPED).print(table)


@dataclass(frozen=True)
class Target:
    """A stated limit: on the value, or on the ratio to the peer."""

    on_ratio: bool
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str | None) -> Target | None:
        if text is None:
            return None
        found = TARGET.fullmatch(text)
        if found is None:
            raise ValueError(f'target {text!r} is not "<= 10" or "ratio >= 3.5"')
        return cls(found["ratio"] is not None, found["sign"], float(found["limit"]))

    def met(self, value: float, ratio: float | None) -> bool | None:
        """Whether the target is met; None when there is no peer to compare with."""
        measured = ratio if self.on_ratio else value
        return None if measured is None else bool(SIGNS[self.sign](measured, self.limit))


def plain(value: Any) -> Any:
    """A numpy number as Python's own; anything else in words."""
    return value.item() if isinstance(value, np.generic) else str(value)


def judge(gate: Gate) -> str:
    """ "green", or "red" with the reason."""
    try:
        passed = gate() if callable(gate) else gate
    except AssertionError as error:
        return f"red: {error}" if str(error) else "red"
    return "green" if passed else "red"


def reduce(
    value: Sample | Comparison | float, unit: str, stat: Stat, peer_value: float | None
) -> dict[str, Any]:
    """The numeric fields of a figure."""
    if isinstance(value, (Sample, Comparison)) and unit not in SECONDS:
        raise ValueError(f"unit {unit!r} of a timing is not one of {', '.join(SECONDS)}")
    if isinstance(value, Comparison):
        ours = reduce(value.ours, unit, stat, None)
        ratio = value.ratio
        peer_time = getattr(value.peer, stat) / SECONDS[unit]
        spread = [ratio.low, ratio.high]
        return {**ours, "peer_value": peer_time, "ratio": ratio.value, "ratio_spread": spread}
    numbers: dict[str, Any] = {"ratio": None}
    if isinstance(value, Sample):
        scale = SECONDS[unit]
        numbers |= {
            "value": getattr(value, stat) / scale,
            "stat": stat,
            "spread": [quartile / scale for quartile in value.iqr],
            "n": value.n,
        }
    else:
        numbers["value"] = float(value)
    if peer_value is not None:
        numbers["peer_value"] = float(peer_value)
        numbers["ratio"] = peer_value / numbers["value"] if numbers["value"] else None
    return numbers


def row(figure: Figure) -> list[str]:
    """The cells of a figure in the table."""

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    def span(pair: list[float] | None) -> str:
        return f"{number(pair[0])} .. {number(pair[1])}" if pair else ""

    stat = f" {figure.stat}" if figure.stat else ""
    value = "hidden" if figure.value is None else f"{number(figure.value)} {figure.unit}{stat}"
    peer = figure.peer or ""
    if figure.peer_value is not None:
        peer += f" {number(figure.peer_value)}"
    elif figure.note:
        peer += " (not installed)"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x {span(figure.ratio_spread)}"
    met = {None: "", True: " met", False: " missed"}[figure.met]
    return [
        figure.name,
        value,
        span(figure.spread),
        peer,
        ratio.strip(),
        figure.gate,
        f"{figure.target or ''}{met}",
    ]
