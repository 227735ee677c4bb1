"""What an eviction policy kept, as a picture (matplotlib): tokens, and memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vattn.picture import COLORS, CURVE, FAINT, GRID, INK, PAPER, History, sheet
from vattn.report import size
from vattn.show import USED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vattn.keeps import KeepLog

# A legend on the right above a plot, in one line.
_ABOVE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.0, 1.0),
    "ncols": 3,
    "frameon": False,
    "fontsize": 9,
    "handlelength": 1.4,
}
_COLUMNS = 1200  # of the picture; longer texts are averaged
_KEPT, _EARLY, _LATE, _NEVER = COLORS[USED], "#fbe3c4", "#d9741a", "#edf0f3"


def draw_kept(path: Path, log: KeepLog, history: History, *, title: str) -> None:
    """Write the picture as PNG (or whatever ``path`` ends in): the tokens of each head above, below
    them the rows and bytes held."""
    heads = log.eviction.heads
    height = min(9.0, 1.2 + 0.16 * heads.layers * heads.kv_heads)
    with sheet(path, height + 4.4, title) as figure:
        tokens, memory = figure.subplots(2, 1, height_ratios=[height, 2.9])
        _draw_tokens(tokens, log)
        _draw_memory(memory, log, history)


def colours(lifetimes: NDArray[np.float64]) -> NDArray[np.float64]:
    """A colour of each token and head, [heads, tokens, 3]: kept, dropped by a step (the darker the
    later), dropped by the prompt."""
    kept, early, late, never = (_rgb(name) for name in (_KEPT, _EARLY, _LATE, _NEVER))
    share = np.where(np.isfinite(lifetimes), lifetimes, 0.0)[..., None]
    out = early + (late - early) * share
    out[lifetimes == 0] = never
    out[np.isinf(lifetimes)] = kept
    return np.asarray(out)


def mixed(image: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """An image [rows, n, 3] with at most so many columns, neighbours averaged."""
    n = image.shape[1]
    if n <= columns:
        return image
    edges = np.linspace(0, n, columns + 1).astype(np.int64)
    sums = np.add.reduceat(image, edges[:-1], axis=1)
    return np.asarray(sums / np.diff(edges)[None, :, None])


def _draw_tokens(axes: Axes, log: KeepLog) -> None:
    from matplotlib.patches import Patch

    heads, lifetimes = log.eviction.heads, log.lifetimes()
    many, tokens = lifetimes.shape
    drawn = mixed(colours(lifetimes), _COLUMNS)
    axes.imshow(drawn, aspect="auto", extent=(0, tokens, many, 0), interpolation="nearest")
    lines = [layer * heads.kv_heads for layer in range(1, heads.layers)]
    axes.hlines(lines, 0, tokens, color=PAPER, lw=1.2)
    every = -(-heads.layers // 24)
    named = range(0, heads.layers, every)
    axes.set_yticks([(layer + 0.5) * heads.kv_heads for layer in named], [str(i) for i in named])
    axes.axvline(log.tokens[0], color=INK, lw=0.9, ls=":")
    axes.set_xlim(0, tokens)
    axes.set_xlabel("token of the text (dotted: end of the prompt)")
    axes.set_ylabel(f"layer, {heads.kv_heads} KV heads each")
    share = float(np.isinf(lifetimes).mean())
    name = type(log.eviction.evictor).__name__
    axes.set_title(
        f"{name}: tokens kept by each head ({share:.1%} at the end)",
        loc="left",
        fontsize=10,
        color=FAINT,
    )
    handles = [
        Patch(color=_KEPT, label="kept"),
        Patch(color=_LATE, label="dropped by a step (darker: later)"),
        Patch(color=_NEVER, label="dropped after the prompt"),
    ]
    axes.legend(handles=handles, **_ABOVE)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_memory(axes: Axes, log: KeepLog, history: History) -> None:
    """Rows of a head on the left axis, bytes of all on the right one."""
    rows = axes.plot(
        log.tokens, log.rows, color=_KEPT, lw=1.7, label=f"rows of a head ({log.rows[-1]:,.0f})"
    )
    axes.set_ylim(0, max(log.rows) * 1.15)
    axes.set_xlabel(history.x_name)
    axes.set_ylabel("rows of a head, on average")
    right = axes.twinx()
    points = list(history.points)
    scale = 1 << 20
    label = f"mapped ({size(points[-1][1])})" if points else "mapped"
    mapped = right.plot(
        [x for x, _, _ in points], [y / scale for _, y, _ in points], color=_LATE, label=label
    )
    top = max((y for _, y, _ in points), default=scale)
    drawn = [*rows, *mapped]
    for name, curve in history.curves.items():
        xs, ys = [x for x, _ in curve], [y / scale for _, y in curve]
        drawn += right.plot(xs, ys, label=name, **CURVE)
        top = max(top, *(y for _, y in curve))
    right.set_ylim(0, top / scale * 1.15)
    right.set_ylabel("MiB")
    axes.legend(handles=drawn, **_ABOVE)
    axes.grid(axis="y", color=GRID, lw=0.8)
    for each in (axes, right):
        each.spines["top"].set_visible(False)


def _rgb(name: str) -> NDArray[np.float64]:
    return np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)]) / 255
