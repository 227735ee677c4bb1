"""Graded: tokens by the principal components of their keys, the first in four bits, the others in
one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vattn.kernels import nibbles, score, signs
from vattn.kernels.index import Part
from vattn.policies.coded import Coded
from vattn.policies.evidence import records
from vattn.policies.maps import Map, principal
from vattn.selector import Caps, Look, SelectorError


@dataclass(frozen=True, kw_only=True)
class Graded(Coded):
    """Score a token by ``fine`` channels in sixteen levels and the signs of the others: 20 bytes a
    token and head with 8 fine and 80 coarse channels.

    Bits go where the variance is, as in transform coding. Keys have a few directions of large
    variance (outlier channels that the rotary embedding turns, positions), which spoil the one
    length of sign codes; beyond these, signs are the best a bit buys.

    Args:
        map: from `calibrate`; its first ``fine`` channels are the fine ones.
        fine: even, at least 2 and below the map's rank.
    """

    map: Map
    fine: int = 8

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fine % 2 or not 2 <= self.fine < self.map.rank:
            raise SelectorError(
                f"fine must be even, 2 or more and below {self.map.rank}, got {self.fine}"
            )

    @classmethod
    def calibrate(
        cls, keys: Tensor, *, fine: int = 8, coarse: int = 80, seed: int = 0, **options: Any
    ) -> Graded:
        """From recorded keys [layers, Hkv, n, D]: the first ``fine`` principal components, and
        ``coarse`` (or all) that follow, these rotated at random."""
        return cls(map=principal(keys, fine + coarse).spread(fine, seed=seed), fine=fine, **options)

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return (
            Part(self.fine // 2, torch.uint8),
            Part(2, torch.float16),
            Part(-(-(self.map.rank - self.fine) // 8), torch.uint8),
            Part(1, torch.float16),
        )

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        x = self.coded_keys(layer, keys)
        return *nibbles.pack(x[..., : self.fine]), *signs.pack(x[..., self.fine :])

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        y = self.asked(query, look)
        fine, coarse = y[..., : self.fine].contiguous(), y[..., self.fine :].contiguous()
        found = score.nibbles(fine, records(look, 0, 2), pages, scale=look.scale)
        return found.add_(score.signs(coarse, records(look, 2), pages, scale=look.scale))
