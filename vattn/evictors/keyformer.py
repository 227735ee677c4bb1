"""Keyformer: heavy hitters by attention with noise, and with less and less contrast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, Step
from vattn.selector import Caps

# Multipliers of splitmix64, as signed numbers.
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, kw_only=True)
class Keyformer(Evictor):
    """Keep the tokens with the largest sum of softmax((scores + noise) / tau) over all queries so
    far, and recent ones. Noise stands for the tokens that are gone, which a softmax over what is
    left ignores; a rising tau evens attention out.

    Noise depends on ``seed``, layer, query head and the places of query and key in the text alone:
    a request keeps the same tokens whoever shares its batch.

    Args:
        recent_share: of the budget, for recent tokens.
        tau_init, tau_delta, tau_end: tau at the prompt, what each decode step adds, and its end.
        noise: whether to add any. Without, and with ``tau_delta=0``, this is H2O.
        seed: of the noise.

    Source: Adnan et al., arXiv 2403.09054; code d-matrix-ai/keyformer-llm (tau from 1 to 2 by .01,
    30 % recent, a budget of 60 %).
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    recent_share: float = 0.3
    tau_init: float = 1.0
    tau_delta: float = 0.01
    tau_end: float = 2.0
    noise: bool = True
    seed: int = 0

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "random"}), "token")
    source: ClassVar[str] = "arXiv 2403.09054"
    summary: ClassVar[str] = "attention with noise, summed over all queries so far"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share <= 1:
            raise EvictorError(f"recent_share must be from 0 to 1, got {self.recent_share!r}")
        if not 0 < self.tau_init <= self.tau_end or self.tau_delta < 0:
            raise EvictorError(
                "tau must rise: 0 < tau_init <= tau_end and tau_delta >= 0, got tau_init "
                f"{self.tau_init!r}, tau_end {self.tau_end!r} and tau_delta {self.tau_delta!r}"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            raise EvictorError(f"seed must be an int from 0 to 2**63 - 1, got {self.seed!r}")

    def rows(self, tokens: int) -> int:
        return tokens

    def score(self, seen: Seen) -> Tensor:
        total = seen.score.clone()
        for at, block in seen.logits():
            total += self._added(block, at, seen.positions, seen.layer, self.tau_init)
        return total

    def observe(self, score: Tensor, step: Step) -> Tensor:
        at, block = step.block()
        tau = min(self.tau_end, self.tau_init + self.tau_delta * (step.number + 1))
        return score + self._added(block, at, step.positions, step.layer, tau)

    def recent(self, seen: Seen) -> Tensor:
        share = (seen.target.double() * self.recent_share + 1e-9).long()
        return share.clamp_min(self.recent_tokens)

    def _added(
        self, block: Tensor, at: Tensor, positions: Tensor, layer: int, tau: float
    ) -> Tensor:
        """What queries at ``at`` [B, r] with logits [B, H, G, r, n] add to the scores."""
        if self.noise:
            block = block + gumbel(self.seed, layer, at, positions, block.shape[2])
        return (block / tau).softmax(-1).sum((2, 3))


def gumbel(seed: int, layer: int, at: Tensor, positions: Tensor, groups: int) -> Tensor:
    """Noise of Gumbel's distribution, [B, H, groups, r, n] float32: for each query head, query
    ``at`` [B, r] and key at ``positions`` [B, H, n] the same number, whatever else is asked for."""
    heads, device = positions.shape[1], at.device
    head = torch.arange(heads * groups, device=device).view(heads, groups, 1, 1)
    state = _mixed(_mixed(torch.tensor(seed, device=device)) + layer)
    state = _mixed(state + head)
    state = _mixed(state + at[:, None, None, :, None])
    state = _mixed(state + positions[:, :, None, None, :])
    # 23 bits: the largest is still below 1 in float32.
    uniform = (((state >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """The last steps of splitmix64: every bit of an int64 depends on every bit of x."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))
