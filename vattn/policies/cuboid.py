"""Cuboid mean: pages by their box, shrunk to the mean distance of the keys from its centre."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.selector import Caps, Selector


@dataclass(frozen=True, kw_only=True)
class Cuboid(Selector):
    """Score a page by q . centre + sum_c |q_c| spread_c: centre (min + max) / 2 of its keys, spread
    their mean |k - centre|.

    ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction (NeurIPS 2024),
    its digest "cuboid-mean". Its pages have 32 tokens, of which 2 first and 2 last are kept.

    Args:
        dtype: of both vectors.
    """

    page_tokens: int = 32
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "page")
    form: ClassVar[Form | None] = "summaries"

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(head_dim, self.dtype), Part(head_dim, self.dtype)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        keys = keys.float()
        centre = (keys.amin(2) + keys.amax(2)) / 2
        spread = (keys - centre[:, :, None]).abs().mean(2)
        return centre.to(self.dtype), spread.to(self.dtype)
