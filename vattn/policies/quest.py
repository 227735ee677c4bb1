"""Quest: pages by the most that a query could score with any key inside their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels.index import Part
from vattn.kernels.score import Form
from vattn.kernels.summaries import DTYPES, outward
from vattn.selector import Caps, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class Quest(Selector):
    """Score a page by sum_c max(q_c min_c, q_c max_c), which no key of the page exceeds.

    Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv 2406.10774).

    Args:
        dtype: of the bounds, which are kept as centre and half range, rounded outward.
    """

    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "page")
    form: ClassVar[Form | None] = "summaries"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise SelectorError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(head_dim, self.dtype), Part(head_dim, self.dtype)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        keys = keys.float()
        return outward(keys.amin(2), keys.amax(2), self.dtype)
