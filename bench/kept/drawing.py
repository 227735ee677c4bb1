"""The picture of `leaderboard`: a panel for each task, value against the share that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.kept.roster import CHANCE, COUNTER, FIFO, MASS, ORACLE, STEPS, TOVA
from vattn.picture import FAINT, INK, PAPER

REST = "#b9c3cc"
COLORS = {
    CHANCE: FAINT,
    FIFO: "#e0a030",
    TOVA: "#8257b8",
    MASS: "#2f6db5",
    COUNTER: "#2a9d8f",
    STEPS: "#d1495b",
    "SnapKV": "#7a5c3e",
    ORACLE: INK,
}
# Unit, the dense value, and of each policy (share kept, value).
Panel = tuple[str, float, Mapping[str, list[tuple[float, float]]]]


def draw(path: Path, panels: Mapping[str, Panel]) -> None:
    """Named lines for what the papers compare, thin grey ones for all others, dots for dense."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), facecolor=PAPER, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every[len(panels) :]:
        axes.axis("off")
    for axes, (title, (unit, dense, lines)) in zip(every, panels.items(), strict=False):
        axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
        for name, points in sorted(lines.items(), key=lambda line: line[0] in COLORS):
            shares, values = zip(*sorted(points), strict=True)
            named = name in COLORS
            axes.plot(
                [100 * share for share in shares],
                values,
                color=COLORS.get(name, REST),
                linewidth=1.6 if named else 0.7,
                marker="o" if named else None,
                markersize=3,
                linestyle="--" if name in (ORACLE, CHANCE) else "-",
                label=name if named else None,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_title(title, color=INK)
        axes.set_xlabel("% of the tokens kept")
        axes.set_ylabel(unit)
        axes.grid(color=FAINT, alpha=0.2)
        if unit.startswith("bits"):
            axes.invert_yaxis()
    labels: dict[str, Any] = {}
    for axes in every:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=8,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=140)
