"""The memory map and its history as a picture (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vattn.report import size
from vattn.show import KINDS, RESERVED, RETAINED, SHARED, TAIL, USED, Band, MemoryMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, FAINT, GRID = "#ffffff", "#22303c", "#8896a3", "#e6eaee"
CURVE: dict[str, Any] = {"color": "#c0504d", "lw": 1.3, "ls": ":"}  # other amounts
COLORS = {USED: "#2f6db5", SHARED: "#8257b8", TAIL: "#f0a13a", RETAINED: "#aeb8c2"}
_MOST_BANDS = 24
_MOST_GRID_PAGES = 160
# A level that would flatten the curves to less than this share of the picture is only named.
_LEAST_SHARE = 0.4


@dataclass(frozen=True)
class History:
    """How the memory grew: points ``(x, mapped bytes, used bytes)``.

    ``levels`` are constant amounts to compare with, ``curves`` other amounts along the same x, and
    ``marks`` names for some x.
    """

    x_name: str
    points: Sequence[tuple[float, int, int]]
    levels: Mapping[str, int] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, int]]] = field(default_factory=dict)
    marks: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reads:
    """What one layer of a sequence read, and where it lay.

    ``shares`` [steps, spans] from 0 to 1: how much of each span of ``page_tokens`` tokens was read
    at each step; ``slow`` the same shape: the share of it that lay in the slow tier, or None.
    """

    layer: int
    page_tokens: int
    shares: NDArray[np.float32]
    slow: NDArray[np.float32] | None = None


def draw(
    path: Path,
    memory: MemoryMap,
    history: History | None,
    reads: Reads | None = None,
    *,
    title: str,
) -> None:
    """Write the picture as PNG (or whatever ``path`` ends in): the map above, below it the history
    and what was read."""
    bands = memory.bands[:_MOST_BANDS]
    map_height = 1.1 + 0.42 * max(1, len(bands))
    heights = [map_height] + ([3.2] if history else []) + ([3.6] if reads else [])
    with sheet(path, sum(heights) + 1.5, title) as figure:
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_map(axes[0], memory, bands)
        if history:
            _draw_history(axes[1], history)
        if reads:
            _draw_reads(axes[-1], reads)


@contextmanager
def sheet(path: Path, height: float, title: str) -> Iterator[Figure]:
    """A figure in our colours, of so many inches, written to ``path`` when it is drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, height), facecolor=PAPER, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        yield figure
        figure.savefig(path, dpi=130, facecolor=PAPER)


def _draw_map(axes: Axes, memory: MemoryMap, bands: Sequence[Band]) -> None:
    from matplotlib.patches import Patch

    per_page = memory.tokens_per_page
    mapped = max((band.mapped_end for band in bands), default=0)
    end = min(memory.lane_pages, max(8, round(mapped * 1.12) + 1))
    for y, band in enumerate(bands):
        axes.barh(y, end * per_page, height=0.62, color="#f3f5f7", edgecolor="#d5dbe1", lw=0.6)
        page = 0
        for kind, count in band.runs:
            if kind != RESERVED:
                axes.barh(
                    y, count * per_page, left=page * per_page, height=0.62, color=COLORS[kind]
                )
            page += count
    if end <= _MOST_GRID_PAGES:
        lines = [page * per_page for page in range(1, end)]
        axes.vlines(lines, -0.31, len(bands) - 0.69, color=PAPER, lw=0.5, alpha=0.8)
    axes.set_yticks(
        range(len(bands)),
        [f"{b.owner}\n{b.tokens:,} tokens, {b.lanes}" for b in bands],
        fontsize=8.5,
    )
    axes.set_ylim(max(len(bands), 1) - 0.4, -0.6)
    axes.set_xlim(0, end * per_page)
    axes.set_xlabel("virtual address within a lane, in tokens")
    hidden = len(memory.bands) - len(bands)
    reach = f"each lane is reserved to {memory.lane_pages * per_page:,.0f} tokens"
    more = f"; {hidden} more bands not drawn" if hidden else ""
    axes.set_title(
        f"Pages of {size(memory.page_bytes)} ({per_page:g} tokens of a lane); {reach}{more}",
        loc="left",
        fontsize=10,
        color=FAINT,
    )
    present = {kind for band in bands for kind, _ in band.runs}
    patches = [Patch(color=COLORS[k], label=KINDS[k]) for k in COLORS if k in present]
    patches.append(Patch(facecolor="#f3f5f7", edgecolor="#c5ccd3", label=KINDS[RESERVED]))
    axes.figure.legend(
        handles=patches,
        loc="outside upper right",
        ncols=len(patches),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_history(axes: Axes, history: History) -> None:
    xs, mapped, used = _columns(history)
    step = "post" if history.marks else None
    drawn = "steps-post" if history.marks else "default"
    axes.fill_between(xs, mapped, step=step, color=COLORS[USED], alpha=0.18, lw=0)
    for name, ys, color in (("mapped", mapped, COLORS[USED]), ("used", used, COLORS[TAIL])):
        label = f"{name} ({size(ys[-1])} at the end)"
        axes.plot(xs, ys, drawstyle=drawn, color=color, lw=1.7, label=label)
    low, top = min(used), max(mapped)
    for name, curve in history.curves.items():
        axes.plot(*zip(*curve, strict=True), label=name, **CURVE)
        top = max(top, *(y for _, y in curve))
    # Where little changes, look closely: the axis then starts above 0 and says so.
    bottom = low - (top - low) / 2 if low > top / 2 else 0
    seen = bottom + (top - bottom) / _LEAST_SHARE
    for i, (name, level) in enumerate(sorted(history.levels.items(), key=lambda item: item[1])):
        if level <= seen:
            label, top = f"{name} ({size(level)})", max(top, level)
            axes.axhline(level, color=INK, lw=1.1, ls=("--", "-.")[i % 2], label=label)
        else:
            axes.plot([], [], " ", label=f"{name} ({size(level)}, above this picture)")
    axes.set_ylim(bottom, top + (top - bottom) * 0.12 if top > bottom else bottom + 1)
    axes.set_xlim(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1)
    ticks = _byte_ticks(bottom, top)
    axes.set_yticks(ticks, _byte_labels(ticks))
    axes.set_xlabel(history.x_name)
    cut = ", axis cut below" if bottom else ""
    axes.set_title(f"Memory over time{cut}", loc="left", fontsize=10, color=FAINT)
    if history.marks:
        axes.set_xticks(
            [x + 0.5 for x in history.marks], list(history.marks.values()), fontsize=8.5
        )
        axes.tick_params(axis="x", length=0)
    axes.legend(loc="best", frameon=False, fontsize=9)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_reads(axes: Axes, reads: Reads) -> None:
    """Steps to the right, tokens upwards: dark where all KV heads read, warm what lay in a file."""
    import matplotlib as mpl

    steps, spans = reads.shares.shape
    extent = (0, steps, 0, spans * reads.page_tokens)
    where = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    if reads.slow is not None:
        tint = mpl.colors.LinearSegmentedColormap.from_list("slow", [PAPER, COLORS[TAIL]])
        axes.imshow(reads.slow.T, cmap=tint, vmin=0, vmax=1.6, **where)
    ink = mpl.colors.LinearSegmentedColormap.from_list("read", [COLORS[USED] + "00", "#16324f"])
    axes.imshow(reads.shares.T, cmap=ink, vmin=0, vmax=1, **where)
    axes.set_xlabel("decode step")
    axes.set_ylabel("token")
    part = float(reads.shares.mean())
    tier = "" if reads.slow is None else "; on orange ground: in the slow tier"
    axes.set_title(
        f"Tokens that layer {reads.layer} read, the darker by the more KV heads ({part:.0%} of "
        f"all){tier}",
        loc="left",
        fontsize=10,
        color=FAINT,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _columns(history: History) -> tuple[list[float], list[int], list[int]]:
    """x, mapped and used; the last step of a history of steps gets a width as well."""
    points = list(history.points)
    if history.marks:
        points.append((points[-1][0] + 1, *points[-1][1:]))
    return [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]


def _byte_ticks(bottom: float, top: float) -> list[int]:
    """Four to eight round amounts of bytes from ``bottom`` to ``top``: steps of a power of two."""
    step = 1 << max(0, int((top - bottom) / 4).bit_length() - 1)
    first = -(-int(bottom) // step) * step
    return list(range(first, int(top) + step, step))


def _byte_labels(ticks: Sequence[int]) -> list[str]:
    """The ticks in the unit of the largest, with the decimals that their step needs."""
    unit = max(0, ticks[-1].bit_length() - 1) // 10
    step = ticks[-1] - ticks[-2] if len(ticks) > 1 else 1 << (10 * unit)
    decimals = min(3, max(0, 10 * unit - step.bit_length() + 1))
    name = ("B", "KiB", "MiB", "GiB", "TiB")[unit]
    return [f"{tick / (1 << (10 * unit)):.{decimals}f} {name}" for tick in ticks]
