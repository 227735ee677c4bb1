"""Results that are kept in a file, one JSON object a line, and not computed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from bench.kept.playing import Played, apart


@dataclass(frozen=True, order=True)
class Key:
    """What a result belongs to; ``budget`` in tokens, 0: dense; ``context`` tokens of a prompt."""

    task: str
    policy: str
    budget: int
    seed: int
    contexts: int
    context: int


@dataclass(frozen=True)
class Cell:
    """One policy on one task at one budget, contexts of one seed.

    Args:
        right, asked, loss, held, evicted: see `Played`.
        returned: share of the physical bytes that were given back.
        footprint: as of `Played`, of the dense one.
        error: of the logits, see `apart`.
    """

    key: Key
    right: int
    asked: int
    loss: float
    held: float
    evicted: int
    returned: float
    footprint: float
    error: float

    @staticmethod
    def of(key: Key, ours: Played, dense: Played) -> Cell:
        """A result beside the dense one of the same script."""
        return Cell(
            key,
            ours.right,
            ours.asked,
            ours.loss,
            ours.held,
            ours.evicted,
            1 - ours.mapped / dense.mapped,
            ours.footprint / dense.footprint,
            apart(ours.logits, dense.logits),
        )


class Cells:
    """All results so far; with a path they are in a file, too."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        each = [json.loads(line) for line in lines]
        found = [Cell(**{**fields, "key": Key(**fields["key"])}) for fields in each]
        self.found = {cell.key: cell for cell in found}

    def get(self, key: Key, make: Callable[[], Cell]) -> Cell:
        """The result of a key, computed where it is not known."""
        cell = self.found.get(key)
        if cell is None:
            cell = self.found[key] = make()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(asdict(cell)) + "\n")
        return cell


@dataclass(frozen=True)
class Mean:
    """Cells of one policy and budget, over seeds."""

    cells: tuple[Cell, ...]

    @property
    def accuracy(self) -> float:
        """Share of all questions that are right."""
        return sum(c.right for c in self.cells) / sum(c.asked for c in self.cells)

    def of(self, what: str) -> float:
        """The mean of a field."""
        return sum(float(getattr(c, what)) for c in self.cells) / len(self.cells)

    def less(self, other: Mean) -> tuple[float, float]:
        """How much the loss differs from another policy's on the same contexts, in bits, and the
        standard error of that over seeds; NaN of one seed."""
        pairs = zip(self.cells, other.cells, strict=True)
        each = [(ours.loss - theirs.loss) / math.log(2) for ours, theirs in pairs]
        spread = stdev(each) / len(each) ** 0.5 if len(each) > 1 else math.nan
        return mean(each), spread
