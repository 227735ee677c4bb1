"""DuoAttention: some heads retrieve and keep everything, the others stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.batch import Ints
from vattn.evictor import Evictor, EvictorError, Seen
from vattn.kernels.evict import Rule
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Evictor):
    """Retrieval heads keep everything, streaming heads the first tokens and the recent ones. Which
    is which is known of the model; say it in one of two ways. There is no budget (``budget`` does
    nothing).

    Args:
        gates: for each layer, for each KV head, a number from 0 to 1, as the authors train them and
            publish them for some models. Heads with ``threshold`` or more retrieve.
        retrieval: (layer, KV head) of each retrieval head, instead of gates.

    Source: Xiao et al., arXiv 2410.10819; code mit-han-lab/duo-attention (256 first and 64 recent
    tokens).
    """

    sink_tokens: int = 256
    recent_tokens: int = 64
    gates: tuple[tuple[float, ...], ...] | None = None
    retrieval: tuple[tuple[int, int], ...] | None = None
    threshold: float = 0.5

    caps: ClassVar[Caps] = Caps(frozenset({"offline", "position"}), "token")
    source: ClassVar[str] = "arXiv 2410.10819"
    summary: ClassVar[str] = "everything in retrieval heads, the ends of the text in the others"
    decodes: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.gates is None) == (self.retrieval is None):
            given = "neither" if self.gates is None else "both"
            raise EvictorError(
                f"give gates (a number for each layer and KV head) or retrieval heads; got {given}"
            )
        for gate in (gate for gates in self.gates or () for gate in gates):
            if not 0 <= gate <= 1:
                raise EvictorError(f"gates must be from 0 to 1, got {gate!r}")
        if not 0 <= self.threshold <= 1:
            raise EvictorError(f"threshold must be from 0 to 1, got {self.threshold!r}")

    def score(self, seen: Seen) -> Tensor:
        self.retrieves(seen)  # a model that does not suit is refused at its first prompt
        return torch.zeros_like(seen.score)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return (self.forced(seen) | self.retrieves(seen)[:, None]) & seen.valid

    def rule(self, seen: Seen, limits: Ints) -> Rule:
        return self._ends_rule(seen, ~self.retrieves(seen).expand(seen.counts.shape))

    def retrieves(self, seen: Seen) -> Tensor:
        """Which KV heads of this layer keep everything: [H] bool.

        Raises:
            EvictorError: gates or heads of another model.
        """
        heads = seen.counts.shape[1]
        if self.gates is not None:
            shape = len(self.gates), {len(gates) for gates in self.gates}
            if shape != (seen.layers, {heads}):
                raise EvictorError(
                    f"gates are for {shape[0]} layers with {sorted(shape[1])} KV heads: the model "
                    f"has {seen.layers} with {heads}"
                )
            found = [gate >= self.threshold for gate in self.gates[seen.layer]]
        else:
            for layer, head in self.retrieval or ():
                if not (0 <= layer < seen.layers and 0 <= head < heads):
                    raise EvictorError(
                        f"retrieval has layer {layer}, head {head}: the model has {seen.layers} "
                        f"layers with {heads} KV heads, counted from 0"
                    )
            found = [(seen.layer, head) in (self.retrieval or ()) for head in range(heads)]
        return torch.tensor(found, device=seen.counts.device)
