"""What token codes share: an optional map of keys and queries before they are coded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vattn.policies.maps import Map
from vattn.policies.tokens import TokenSelector
from vattn.selector import Look


@dataclass(frozen=True, kw_only=True)
class Coded(TokenSelector):
    """A selector of single tokens by a code of their keys.

    Args:
        map: of keys and queries before they are coded; None: as they are.
    """

    map: Map | None = None

    def coded_channels(self, head_dim: int) -> int:
        """Channels of what is coded."""
        return head_dim if self.map is None else self.map.rank

    def coded_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Keys [Hkv, n, 1, D] -> [Hkv, n, r] float32, to be coded."""
        return (keys.float() if self.map is None else self.map.keys(layer, keys)).squeeze(2)

    def asked(self, query: Tensor, look: Look) -> Tensor:
        """Query [B, Hq, L, D] -> [B, Hq, L, r] as the codes see it."""
        if self.map is None:
            return query
        return self.map.queries(look.layer, query, look.kv.key.shape[1])
