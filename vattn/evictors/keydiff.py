"""KeyDiff: keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vattn.evictor import Evictor, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evictor):
    """Keep the tokens whose keys point away from the mean direction of all that a head holds.

    Args:
        every: 64, since each eviction at a step reads all keys; our choice.

    Source: Park et al., arXiv 2504.15364. Needs no attention and no query.
    """

    every: int = 64

    caps: ClassVar[Caps] = Caps(frozenset({"keys"}), "token")
    source: ClassVar[str] = "arXiv 2504.15364"
    summary: ClassVar[str] = "cosine of the key to the mean key, the least first"
    decodes: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        directions = F.normalize(seen.keys.float(), dim=-1)
        # The rows behind a count are 0 and add nothing.
        mean = F.normalize(directions.sum(2), dim=-1)
        return -(directions @ mean[..., None]).squeeze(-1)

    def rescore(self, seen: Seen) -> Tensor:
        return self.score(seen)
