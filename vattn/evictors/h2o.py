"""H2O: heavy hitters, the tokens that have had most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import ALL_ROWS, Evictor, EvictorError, Seen, Step
from vattn.selector import Caps

WINDOW = 32  # queries of a prompt that `decode_only` looks at
TIE = 1e-6  # what their attention counts beside that of decode steps


@dataclass(frozen=True, kw_only=True)
class H2O(Evictor):
    """Keep the tokens with the largest sum of attention over all queries so far, and recent ones.

    Args:
        recent_share: of the budget, for the last tokens; the paper has half.
        decode_only: sum over decode steps alone: attention within a prompt favours its first
            tokens. A prompt's last 32 queries decide among tokens that no step has told apart yet.

    Source: Zhang et al., arXiv 2306.14048; code FMInference/H2O.
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    recent_share: float = 0.5
    decode_only: bool = False

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = "arXiv 2306.14048"
    summary: ClassVar[str] = "attention summed over all queries so far"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share < 1:
            raise EvictorError(f"recent_share must be >= 0 and < 1, got {self.recent_share}")

    def rows(self, tokens: int) -> int:
        return WINDOW if self.decode_only else ALL_ROWS

    def score(self, seen: Seen) -> Tensor:
        mass = seen.columns().total.sum(2)
        return seen.score + (TIE * mass if self.decode_only else mass)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        return score + step.mass()

    def recent(self, seen: Seen) -> Tensor:
        return (seen.target * self.recent_share).long().clamp_min(self.recent_tokens)
