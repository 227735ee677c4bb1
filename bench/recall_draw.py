"""The picture of `recall`: mass found at 1/16 of the tokens against bytes of the index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vattn.picture import FAINT, INK, PAPER

KINDS = {"page": "#2f6db5", "token": "#d1495b", "both": "#8257b8"}
PAGES = ("Quest", "MeanDeviation", "Cuboid", "Landmark", "Clusters")
NEAR, LINE = 2.2, 1.12  # labels stand apart by one of these ratios: of bytes, of loss
LEAST = 1e-4  # a loss below this is none, and not drawn
BOTH = ("TwoStage", "Twilight", "Sampled")


class Drawn(Protocol):
    """What is drawn of an index."""

    bytes: float

    def mean(self, part: int, what: str) -> float: ...

    def worst(self, part: int) -> tuple[float, str]: ...


def draw(path: Path, tables: Mapping[str, Mapping[str, Drawn]]) -> None:
    """One panel for each table: a dot is the mean, its line goes to the worst scene."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 * len(tables), 5.4), facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, tables.items(), strict=True):
        labels = []
        for name, row in rows.items():
            color = KINDS[kind(name)]
            y, most = 1 - row.mean(16, "recall"), 1 - row.worst(16)[0]
            if y < LEAST:
                continue
            axes.plot([row.bytes] * 2, [most, y], color=color, alpha=0.35, linewidth=1.5)
            axes.plot(row.bytes, y, "o", color=color, markersize=5)
            labels.append((name, row.bytes, y))
        for name, x, height in spread(labels):
            axes.text(x * 1.07, height, name, fontsize=7, color=INK, va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.invert_yaxis()
        axes.set_xlim(right=2.5 * axes.get_xlim()[1])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.axhline(0.05, color=FAINT, linewidth=0.8, linestyle=":")
        axes.axvline(20, color=FAINT, linewidth=0.8, linestyle=":")
        axes.set_title(f"{title}: 1/16 of the tokens", color=INK)
        axes.set_xlabel("bytes of the index a token and KV head")
        axes.set_ylabel("mass lost, of the best choice of as many tokens")
        axes.grid(color=FAINT, alpha=0.2)
    figure.savefig(path, dpi=140)


def spread(labels: Sequence[tuple[str, float, float]]) -> Iterator[tuple[str, float, float]]:
    """Labels at (bytes, y), moved towards less loss where one would cover another."""
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(labels, key=lambda label: -label[2]):
        height = y
        for other, taken in placed:
            if x / NEAR < other < x * NEAR and taken / LINE < height < taken * LINE:
                height = taken / LINE
        placed.append((x, height))
        yield name, x, height


def kind(name: str) -> str:
    """Whether an index chooses pages, tokens, or one after the other."""
    if name.startswith(BOTH):
        return "both"
    return "page" if name.startswith(PAGES) or name == "Exact 16" else "token"
