"""TOVA: what the last token does not look at goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, Seen, Step
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class TOVA(Evictor):
    """Keep the tokens with most attention of the last query, averaged over all heads of the layer:
    each head keeps the same tokens. At the budget, each step drops the least.

    The newest token stays, whatever it thinks of itself.

    Source: Oren et al., arXiv 2401.06104.
    """

    sink_tokens: int = 0
    recent_tokens: int = 1

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token", "layer")
    source: ClassVar[str] = "arXiv 2401.06104"
    summary: ClassVar[str] = "attention of the last query, one choice for all heads of a layer"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def rows(self, tokens: int) -> int:
        return 1

    def score(self, seen: Seen) -> Tensor:
        return seen.columns(1).total.mean((1, 2))[:, None].expand_as(seen.score)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        last = step.mass([0.0] * (step.fresh - 1) + [1.0])
        return (last.mean(1) * (step.fresh / step.logits.shape[2]))[:, None].expand_as(score)
