"""Recall of indexes: how much of the attention do they find, at 1/8, 1/16, 1/32 of the tokens?

    recorded    the shipped model (5 layers, 2 KV heads of 32 channels) on a novel it never saw
    synthetic   128 channels: outliers, rotary embedding, mean keys, like neighbours, a sink, power
                laws; 8 settings, each with heads drawn by the seeds

`recall` is the softmax mass of the tokens that an index chooses, divided by the mass of the best
choice of as many tokens; all choices hold 4 sinks and the 32 last tokens, and serve all query heads
of a KV head. `lost` is 1 - recall, against Quest's. Bytes are those of the index for each token and
KV head; what Exact and SparQ read of K itself counts as such. Policies that are calibrated offline
saw another text, or another sequence. The table adds recall of the mass beyond the sinks and the
last tokens, the worst scene, and the relative error of the output against dense attention.

The gate of a figure: no choice is larger than the budget, none weighs more than the best, and the
sparse kernel's log-sum-exp gives the chosen tokens' mass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import vattn
from bench.harness import Bench
from bench.indexes import INDEXES
from bench.recall_scene import Contest, Found
from bench.recorded import SETTINGS, Scene, recorded, synthetic

SHIPPED = Path(vattn.__file__).parent / "assets" / "model"
PARTS = (8, 16, 32)  # of so many tokens, one is read
BEST = "Graded 8+80"
RIVAL = {"recorded": "Quest 4", "synthetic": "Quest 16"}  # 32 bytes a token and KV head each
TARGET = ">= 0.95"


def run(
    bench: Bench,
    model: Annotated[Path, typer.Option(help="Model directory.")] = SHIPPED,
    tokens: Annotated[int, typer.Option(help="Tokens to choose from.")] = 8192,
    seeds: Annotated[int, typer.Option(help="Texts, and heads of each setting.")] = 3,
    only: Annotated[str, typer.Option(help="Indexes whose name holds this.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw recall against bytes here.")] = None,
) -> None:
    if bench.peer("transformers") is None:
        return bench.skip("transformers is not installed")
    tokens, seeds = bench.pick((tokens, seeds), (4096, 1))
    tables = {}
    with one_thread():
        for name, scenes in {
            "recorded": each_recorded(bench, model, tokens, seeds),
            "synthetic": each_synthetic(bench, tokens, seeds),
        }.items():
            rows = tables[name] = gathered(scenes, only)
            show(name, rows)
            figures(bench, name, rows)
    if plot is not None:
        from bench.recall_draw import draw

        draw(plot, {n: {k: r for k, r in t.items() if r.bytes} for n, t in tables.items()})
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Nothing is timed, and products this small keep a second thread waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each_recorded(bench: Bench, model: Path, tokens: int, seeds: int) -> Iterator[Scene]:
    for seed in range(bench.seed, bench.seed + seeds):
        yield from recorded(model, tokens, bench.pick(16, 6), seed)


def each_synthetic(bench: Bench, tokens: int, seeds: int) -> Iterator[Scene]:
    for seed in range(bench.seed, bench.seed + seeds):
        for name in list(SETTINGS)[: bench.pick(len(SETTINGS), 2)]:
            yield synthetic(name, tokens, bench.pick(16, 6), seed)


@dataclass
class Row:
    """What was found of one index in all scenes."""

    bytes: float
    dim: int
    found: dict[int, list[Found]] = field(default_factory=lambda: {part: [] for part in PARTS})
    scenes: list[str] = field(default_factory=list)

    def mean(self, part: int, what: str) -> float:
        """The mean over scenes of a field of `Found`."""
        values = [getattr(found, what) for found in self.found[part]]
        return sum(values) / len(values)

    def worst(self, part: int) -> tuple[float, str]:
        """The least recall of a scene, and the scene."""
        recalls = [found.recall for found in self.found[part]]
        return min(zip(recalls, self.scenes, strict=True))

    def numbers(self) -> dict[str, Any]:
        """All means, for the JSON lines."""
        kinds = ("recall", "mass", "beyond", "error", "read")
        return {f"{kind}_{part}": self.mean(part, kind) for kind in kinds for part in PARTS}

    def sound(self) -> bool:
        """Raise AssertionError for the first scene in which something is wrong."""
        for part in PARTS:
            for scene, found in zip(self.scenes, self.found[part], strict=True):
                assert not found.wrong, f"{scene}, 1/{part}: {found.wrong}"
        return True


def gathered(scenes: Iterator[Scene], only: str) -> dict[str, Row]:
    """A row for each index."""
    rows: dict[str, Row] = {}
    for scene in scenes:
        contest = Contest(scene)
        budgets = [scene.tokens // part for part in PARTS]
        best = contest.found(INDEXES["Exact"](scene), budgets, None)
        for name, make in INDEXES.items():
            if only not in name:
                continue
            within = make(scene)
            size = contest.bytes_read(within(budgets[0]))
            row = rows.setdefault(name, Row(size, scene.dim))
            row.scenes.append(scene.name)
            for part, found in zip(PARTS, contest.found(within, budgets, best), strict=True):
                row.found[part].append(found)
    return rows


def figures(bench: Bench, data: str, rows: dict[str, Row]) -> None:
    """Recall at 1/16 of each index; what the best loses, against Quest."""
    for name, row in rows.items():
        bench.figure(
            f"recall/{data}/{name}, {row.bytes:g} B",
            partial(row.mean, 16, "recall"),
            "of the best",
            gate=row.sound,
            target=TARGET if name == BEST else None,
            bytes=row.bytes,
            bits_a_channel=8 * row.bytes / row.dim,
            scenes=len(row.scenes),
            worst=row.worst(16),
            **row.numbers(),
        )
    rival = RIVAL[data]
    if {BEST, rival} <= rows.keys():
        bench.figure(
            f"recall/{data}/lost",
            lambda: 1 - rows[BEST].mean(16, "recall"),
            "of the best",
            gate=lambda: rows[BEST].sound() and rows[rival].sound(),
            peer=f"{rival}, {rows[rival].bytes:g} B",
            peer_value=1 - rows[rival].mean(16, "recall"),
            target="ratio >= 1",
        )


def show(data: str, rows: dict[str, Row]) -> None:
    """All that was found, for the reader; the least bytes first."""
    head = ["recall 1/8", "1/16", "1/32", "beyond 1/16", "worst 1/16", "read", "error 1/8", "1/16"]
    table = Table(data, "B", "bits", *head, "1/32", box=SIMPLE_HEAD)
    for name, row in sorted(rows.items(), key=lambda item: item[1].bytes):
        errors = [f"{row.mean(part, 'error'):.3f}" for part in PARTS]
        recalls = [f"{row.mean(part, 'recall'):.3f}" for part in PARTS]
        numbers = [row.mean(16, "beyond"), row.worst(16)[0], row.mean(16, "read")]
        more = [f"{number:.3f}" for number in numbers]
        bits = f"{8 * row.bytes / row.dim:.2f}"
        table.add_row(name, f"{row.bytes:g}", bits, *recalls, *more, *errors)
    Console(stderr=True, width=140).print(table)
