"""Random: what every index has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.selector import Caps, Look, Selector


@dataclass(frozen=True, kw_only=True)
class Random(Selector):
    """Draw pages evenly, anew in every layer and step, the same for the same seed.

    Args:
        seed: of the draws.
    """

    seed: int = 0

    caps: ClassVar[Caps] = Caps(frozenset({"random"}), "page")

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        return uniform((query.shape[0], look.kv.key.shape[1], 1, pages), self.seed, look)


def uniform(shape: tuple[int, ...], seed: int, look: Look) -> Tensor:
    """Numbers of [0, 1), float32, drawn on the host for this layer and step."""
    draw = torch.Generator().manual_seed(hash((seed, look.layer, look.step)) & (1 << 63) - 1)
    drawn = torch.rand(shape, generator=draw, dtype=torch.float32)
    return drawn.to(look.kv.key.device)
