"""Mean and deviation: pages by what an upper key of a page would score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.selector import Caps, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class MeanDeviation(Selector):
    """Score a page by q . mean + weight * sum_c |q_c| deviation_c of its keys.

    Mean and standard deviation in the place of bounds (arXiv 2605.27740).

    Args:
        weight: of the deviation; 0 leaves the mean alone.
        dtype: of both vectors.
    """

    weight: float = 1.0
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "page")
    form: ClassVar[Form | None] = "summaries"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise SelectorError(f"weight must be >= 0, got {self.weight!r}")

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(head_dim, self.dtype), Part(head_dim, self.dtype)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        keys = keys.float()
        mean = keys.mean(2)
        spread = (keys - mean[:, :, None]).square().mean(2).sqrt()
        return mean.to(self.dtype), (self.weight * spread).to(self.dtype)
