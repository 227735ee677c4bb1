"""SimLayerKV: lazy layers, which look at the first and the last tokens alone, keep just these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.batch import Ints
from vattn.evictor import Evictor, EvictorError, Seen
from vattn.kernels.evict import Rule
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(Evictor):
    """A layer is lazy if the last queries of the prompt give more than ``threshold`` of their
    attention, averaged over all heads, to the first and the recent tokens. A lazy layer keeps these
    alone, at decode steps as well; the others keep everything. There is no budget (``budget`` does
    nothing): how many layers are lazy follows from the text.

    Args:
        sink_tokens: at least 1: what the layer is, is recorded beside the first token.
        threshold: depends on the model: .9 for Llama 3, .65 for Llama 2, .8 for Mistral, .85 for
            Qwen. 1: no layer is lazy.
        window_tokens: queries that are asked.

    Source: Zhang et al., arXiv 2410.13846; defaults of NVIDIA/kvpress.
    """

    sink_tokens: int = 4
    recent_tokens: int = 1024
    threshold: float = 0.9
    window_tokens: int = 1

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "position"}), "token", "layer")
    source: ClassVar[str] = "arXiv 2410.13846"
    summary: ClassVar[str] = "everything, or the ends alone in layers that look nowhere else"
    decodes: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens < 1 or self.window_tokens < 1:
            raise EvictorError(
                "sink_tokens and window_tokens must be >= 1, got "
                f"{self.sink_tokens!r} and {self.window_tokens!r}"
            )
        if not 0 <= self.threshold <= 1:
            raise EvictorError(f"threshold must be from 0 to 1, got {self.threshold!r}")

    def rows(self, tokens: int) -> int:
        return self.window_tokens

    def score(self, seen: Seen) -> Tensor:
        found = seen.columns(self.window_tokens)
        mass = (found.total.mean(2) * self.forced(seen)).sum(2).mean(1) / found.rows
        # A sum of all weights may come out above 1.
        return mass.clamp(max=1.0)[:, None, None].expand_as(seen.score)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return (self.forced(seen) | ~self._lazy(score)[..., None]) & seen.valid

    def rule(self, seen: Seen, limits: Ints) -> Rule:
        return self._ends_rule(seen, self._lazy(seen.score))

    def _lazy(self, score: Tensor) -> Tensor:
        """[B, H] bool; the first token never goes, and with it its score."""
        return score[:, :, 0] > self.threshold
