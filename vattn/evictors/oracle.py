"""Oracle: what will be attended to, if somebody has recorded it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle(Evictor):
    """Keep the tokens that later queries attend to most, from a recording of what they did.

    For benchmarks and tests: no evictor that scores tokens one by one keeps more of that attention.

    Args:
        future: [layers, B, Hkv, tokens], attention summed over the queries to come, by position in
            the text; tokens behind its end count as never attended to.

    Source: the upper bound of every comparison; no paper.
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    future: Tensor = field(repr=False)

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "offline"}), "token")
    source: ClassVar[str] = "bound"
    summary: ClassVar[str] = "attention of queries to come, recorded"
    decodes: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    # Tensors have no truth value to compare by.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future.dim() != 4 or not self.future.shape[3]:
            raise EvictorError(
                f"future is {tuple(self.future.shape)}: must be [layers, batch, KV heads, tokens]"
            )

    def score(self, seen: Seen) -> Tensor:
        if len(self.future) != seen.layers:
            raise EvictorError(
                f"future is of {len(self.future)} layers: the cache has {seen.layers}"
            )
        return by_position(self.future[seen.layer], seen)


def by_position(recorded: Tensor, seen: Seen) -> Tensor:
    """What was recorded [B, Hkv, tokens] of the token of each row [B, H, n]; 0 behind its end.

    Raises:
        EvictorError: it was recorded of another batch, or of other heads.
    """
    batch, heads = seen.counts.shape
    mine = recorded[seen.sequence : seen.sequence + batch].to(seen.score)
    if mine.shape[:2] != (batch, heads):
        raise EvictorError(
            f"recorded were {tuple(recorded.shape[:2])} sequences and KV heads: the cache has "
            f"sequence {seen.sequence + batch - 1} and {heads} heads"
        )
    last = recorded.shape[2] - 1
    found = mine.gather(2, seen.positions.clamp(0, last))
    return found.masked_fill(seen.positions > last, 0.0)
