"""Random: what every evictor has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps

WORD = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Evictor):
    """Keep tokens by lot: an even sample of the text, beside its first tokens and its last ones.

    A token's lot follows from the seed, its layer, its KV head and its position; so what is kept
    does not depend on who shares the batch, nor, but for the budget, on how a text is cut into
    prompts and steps.

    Args:
        seed: of the lots, an int >= 0.

    Source: the baseline of every comparison; no paper.
    """

    seed: int = 0

    caps: ClassVar[Caps] = Caps(frozenset({"random"}), "token")
    source: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "by lot"
    decodes: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or not 0 <= self.seed <= WORD:
            raise EvictorError(f"seed must be an int in [0, {WORD}], got {self.seed!r}")

    def score(self, seen: Seen) -> Tensor:
        heads = torch.arange(seen.counts.shape[1], device=seen.positions.device)[:, None]
        key = mixed(torch.full_like(heads, self.seed))
        for part in (seen.layer, heads, seen.positions):
            key = mixed(key + part)
        return key.float()


def mixed(x: Tensor) -> Tensor:
    """32 bits of int64, well stirred: one number for each."""
    x = x & WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & WORD
    return x ^ (x >> 16)
