"""KVzip: what it takes to say the text once more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, best, ranked
from vattn.evictors.oracle import by_position
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True, eq=False)
class KVzip(Evictor):
    """Keep the tokens that a query attends to when the model repeats the text; all layers and heads
    compete for one budget.

    Args:
        mass: for each layer [B, Hkv, tokens], the largest attention that a query of the replay pays
            to the token, over queries and query heads.

    Source: Kim et al., arXiv 2505.23416 (4 sinks, as in NVIDIA/kvpress).
    """

    recent_tokens: int = 0
    mass: tuple[Tensor, ...] = field(repr=False)

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "offline"}), "token")
    source: ClassVar[str] = "arXiv 2505.23416"
    summary: ClassVar[str] = "attention of a replay of the text; layers and heads share one budget"
    joint: ClassVar[bool] = True

    # Tensors have no truth value to compare by.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mass, tuple) or not self.mass or self.mass[0].dim() != 3:
            raise EvictorError(
                "mass must be a tuple of tensors [batch, KV heads, tokens], one a layer"
            )

    def score(self, seen: Seen) -> Tensor:
        if len(self.mass) != seen.layers:
            raise EvictorError(f"mass is of {len(self.mass)} layers: the cache has {seen.layers}")
        mass, tokens = self.mass[seen.layer], int(seen.tokens.max())
        if mass.shape[2] < tokens:
            raise EvictorError(
                f"mass of layer {seen.layer} is of {mass.shape[2]} tokens and the text of "
                f"{tokens}: replay the whole text"
            )
        return by_position(mass, seen)

    def choose_jointly(
        self, scores: list[Tensor], seen: list[Seen], target: Tensor
    ) -> list[Tensor]:
        lines = [
            ranked(score, self.forced(some), some).flatten(1)
            for score, some in zip(scores, seen, strict=True)
        ]
        keep = best(torch.cat(lines, 1), target * sum(some.counts.shape[1] for some in seen))
        parts = keep.split([line.shape[1] for line in lines], 1)
        return [
            part.reshape(score.shape) & some.valid
            for part, score, some in zip(parts, scores, seen, strict=True)
        ]
