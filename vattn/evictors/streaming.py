"""StreamingLLM, and a plain sliding window: what stays follows from positions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Streaming(Evictor):
    """Keep the first tokens (attention sinks) and the last ones.

    Source: Xiao et al., arXiv 2309.17453; code mit-han-lab/streaming-llm (4 sinks). Positions stay
    those of the text; the paper counts them within the cache.
    """

    caps: ClassVar[Caps] = Caps(frozenset({"position"}), "token")
    source: ClassVar[str] = "arXiv 2309.17453"
    summary: ClassVar[str] = "the first tokens and the last ones"
    decodes: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.float()


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Streaming):
    """Keep the last tokens alone (first in, first out).

    Source: Longformer, arXiv 2004.05150; what StreamingLLM compares with.
    """

    sink_tokens: int = 0
    recent_tokens: int = 1

    source: ClassVar[str] = "arXiv 2004.05150"
    summary: ClassVar[str] = "the last tokens"
