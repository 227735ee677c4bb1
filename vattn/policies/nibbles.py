"""Nibbles: tokens by four bits a channel of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vattn.kernels import nibbles as codes
from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.policies.coded import Coded
from vattn.policies.maps import principal
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Nibbles(Coded):
    """Score a token by its key in sixteen levels a channel: 68 bytes a token and head of 128
    channels.

    Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning (arXiv 2502.02770), its
    estimate of K.
    """

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")
    form: ClassVar[Form | None] = "nibbles"

    @classmethod
    def calibrate(cls, keys: Tensor, rank: int | None = None, **options: Any) -> Nibbles:
        """Code the ``rank`` first principal components (None: all) of keys like those recorded,
        [layers, Hkv, n, D]."""
        return cls(map=principal(keys, rank), **options)

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(self.coded_channels(head_dim) // 2, torch.uint8), Part(2, torch.float16)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        return codes.pack(self.coded_keys(layer, keys))
