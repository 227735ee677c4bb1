"""KVzap: what KVzip would say, guessed from the hidden state alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True, eq=False)
class KVzap(Evictor):
    """Keep the tokens that a linear map of the hidden state rates highest: within a budget, or all
    that it rates above a threshold.

    Args:
        weights: [layers, Hkv, width], fitted to log scores of `KVzip`.
        biases: [layers, Hkv], or None.
        threshold: what is rated above it is kept, and no budget counts; None: the budget counts.

    Source: Jegou et al., arXiv 2601.07891 (thresholds -9 to -3, the last 128 tokens kept). Needs
    hidden states: `Eviction.attend(hidden=...)`.
    """

    recent_tokens: int = 128
    weights: Tensor = field(repr=False)
    biases: Tensor | None = field(default=None, repr=False)
    threshold: float | None = None

    caps: ClassVar[Caps] = Caps(frozenset({"hidden", "offline"}), "token")
    source: ClassVar[str] = "arXiv 2601.07891"
    summary: ClassVar[str] = "a linear guess from the hidden state"

    # Tensors have no truth value to compare by.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.weights.shape)
        if len(shape) != 3:
            raise EvictorError(f"weights is {shape}: must be [layers, KV heads, width]")
        if self.biases is not None and tuple(self.biases.shape) != shape[:2]:
            raise EvictorError(f"biases is {tuple(self.biases.shape)}: must be {shape[:2]}")
        if self.threshold is not None and self.threshold != self.threshold:
            raise EvictorError(f"threshold must be a number, got {self.threshold!r}")

    def score(self, seen: Seen) -> Tensor:
        if seen.hidden is None:
            raise EvictorError("KVzap needs hidden states: Eviction.attend(hidden=...)")
        want = (seen.layers, seen.counts.shape[1], seen.hidden.shape[2])
        if tuple(self.weights.shape) != want:
            raise EvictorError(f"weights is {tuple(self.weights.shape)}: must be {want}")
        guess = seen.hidden.float() @ self.weights[seen.layer].to(seen.score).mT
        if self.biases is not None:
            guess = guess + self.biases[seen.layer].to(guess)
        # The hidden states are those of the last tokens; older rows keep what they were given.
        fresh = guess.shape[1]
        at = seen.positions - (seen.tokens - fresh)[:, None, None]
        found = guess.mT.gather(2, at.clamp(0, fresh - 1))
        return found.where(at >= 0, seen.score)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        if self.threshold is None:
            return super().choose(score, seen, budgets)
        return ((score > self.threshold) | self.forced(seen)) & seen.valid
