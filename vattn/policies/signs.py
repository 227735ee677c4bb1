"""Signs: tokens by one bit a channel of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vattn.kernels import signs as codes
from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.policies.coded import Coded
from vattn.policies.maps import centred
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Signs(Coded):
    """Score a token by the signs of its key's channels times one length: 18 bytes a token and head
    of 128 channels.

    RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound (arXiv 2405.12497),
    its code of one bit a channel.
    """

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")
    form: ClassVar[Form | None] = "signs"

    @classmethod
    def calibrate(cls, keys: Tensor, *, seed: int = 0, **options: Any) -> Signs:
        """Centre and rotate keys like those recorded, [layers, Hkv, n, D]: the signs of channels
        that are alike, and as often positive as negative, say the most."""
        return cls(map=centred(keys).spread(seed=seed), **options)

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        width = -(-self.coded_channels(head_dim) // 8)
        return Part(width, torch.uint8), Part(1, torch.float16)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        return codes.pack(self.coded_keys(layer, keys))
