"""Exact: what every index is measured against; reads all of K to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels import score
from vattn.kernels.contract import EMPTY
from vattn.policies.evidence import keys_themselves
from vattn.selector import Caps, Look, Selector


@dataclass(frozen=True, kw_only=True)
class Exact(Selector):
    """Score a page by the log of the sum of exp(score) of its tokens: the best there is to know.

    An oracle for tests and benchmarks: it saves no bytes of K.
    """

    page_tokens: int = 1

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "token")

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        size = self.page_tokens
        tokens = min(pages * size, look.kv.key.shape[2])
        found = score.summaries(query, keys_themselves(look), tokens, scale=look.scale)
        if size == 1:
            return found
        whole = torch.nn.functional.pad(found, (0, pages * size - tokens), value=EMPTY)
        return whole.unflatten(-1, (pages, size)).logsumexp(-1)
