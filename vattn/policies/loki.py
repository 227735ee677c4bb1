"""Loki: tokens by the first principal components of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.policies.coded import Coded
from vattn.policies.maps import Map, principal
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Loki(Coded):
    """Score a token by the components that the map keeps of its key.

    Loki: Low-rank Keys for Efficient Sparse Attention (arXiv 2406.02542).

    Args:
        map: from `calibrate`.
        dtype: of the components.
    """

    map: Map
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")
    form: ClassVar[Form | None] = "summaries"

    @classmethod
    def calibrate(cls, keys: Tensor, rank: int | None = None, **options: Any) -> Loki:
        """The ``rank`` first principal components (None: D / 4) of recorded keys [layers, Hkv, n,
        D]."""
        return cls(map=principal(keys, rank or keys.shape[-1] // 4), **options)

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return (Part(self.map.rank, self.dtype),)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        return (self.coded_keys(layer, keys).to(self.dtype),)
