"""Double Sparsity: tokens by the few channels of their keys that matter most, in four bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vattn.policies.maps import Map, channels
from vattn.policies.nibbles import Nibbles


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(Nibbles):
    """Score a token by its label: the channels of the map, in sixteen levels.

    Post-Training Sparse Attention with Double Sparsity (arXiv 2408.07092).

    Args:
        map: from `calibrate`.
    """

    map: Map

    @classmethod
    def calibrate(  # type: ignore[override]
        cls, keys: Tensor, queries: Tensor, rank: int | None = None, **options: Any
    ) -> DoubleSparsity:
        """The ``rank`` channels (None: D / 8) of largest mean |q_c k_c|: from keys [layers,
        Hkv, n, D] and queries [layers, Hq, m, D]."""
        return cls(map=channels(keys, queries, rank or keys.shape[-1] // 8), **options)
