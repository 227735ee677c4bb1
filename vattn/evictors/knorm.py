"""Knorm: short keys draw attention, long ones go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Knorm(Evictor):
    """Keep the tokens whose keys are shortest.

    Args:
        every: 64, since each eviction at a step reads all keys; our choice.

    Source: Devoto et al., arXiv 2406.11430. Needs no attention and no query.
    """

    every: int = 64

    caps: ClassVar[Caps] = Caps(frozenset({"keys"}), "token")
    source: ClassVar[str] = "arXiv 2406.11430"
    summary: ClassVar[str] = "the length of the key, the shortest first"
    decodes: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        return -seen.keys.float().norm(dim=-1)

    def rescore(self, seen: Seen) -> Tensor:
        return self.score(seen)
