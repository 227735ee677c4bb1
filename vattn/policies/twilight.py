"""Twilight: as few tokens as hold a share of the attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vattn.kernels import choose
from vattn.policies.two_stage import TwoStage
from vattn.selector import SelectorError


@dataclass(frozen=True, kw_only=True)
class Twilight(TwoStage):
    """Of the tokens of the pages that ``base`` takes, read the fewest that hold the share ``p`` of
    their attention by the estimate of ``code``; what is read in any case comes on top.

    Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning (arXiv 2502.02770).

    Args:
        budget_tokens: most tokens, whatever share they hold.
        p: share; 1 leaves nothing of the base's choice out.
    """

    budget_tokens: int = 8192
    p: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise SelectorError(f"p must be above 0 and at most 1, got {self.p!r}")

    def pick(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        if self.p == 1:
            return super().pick(joined)
        return choose.top_p(joined, self.p, 1, self.budget_tokens)
