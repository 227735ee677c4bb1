"""Draw ``curve.png`` from ``curve.jsonl``: ``python -m bench.model.plot DIR``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(folder: Path) -> Path:
    """Held-out bits per byte and recall against the bytes trained on."""
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    # Estimates at positions that were not trained yet measure extrapolation, not the text.
    fair = [r for r in rows if r.get("context")]
    left.plot(
        [r["tokens"] / 1e6 for r in fair], [r["held_out_bits"] for r in fair], marker="o", ms=3
    )
    left.axhline(2.0, color="grey", lw=0.8, ls="--")
    left.set(xlabel="training bytes, millions", ylabel="bits per byte", title="Held-out novel")
    series: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        for task in ("passkey", "lookup"):
            for distance, value in row.get(task, {}).items():
                point = (row["tokens"] / 1e6, value)
                series.setdefault((task, int(distance)), []).append(point)
    distances = sorted({d for _, d in series})
    shades = {d: plt.cm.viridis(i / len(distances)) for i, d in enumerate(distances)}
    for (task, distance), points in sorted(series.items()):
        style = "-" if task == "passkey" else "--"
        right.plot(
            *zip(*points, strict=True),
            style,
            color=shades[distance],
            lw=1.2,
            label=f"{task} {distance}",
        )
    right.set(
        xlabel="training bytes, millions",
        ylabel="share exactly right",
        title="Recall by distance in bytes",
        ylim=(-0.03, 1.03),
    )
    right.legend(fontsize=6, ncols=2)
    target = folder / "curve.png"
    fig.savefig(target, dpi=110)
    plt.close(fig)
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
