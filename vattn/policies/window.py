"""Window: the first and the last tokens, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.selector import Caps, Look, Selector


@dataclass(frozen=True, kw_only=True)
class Window(Selector):
    """Read the sinks, and as many of the last pages as the budget holds.

    Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), with the positions
    that the tokens have, and nothing lost.
    """

    caps: ClassVar[Caps] = Caps(frozenset({"position"}), "page")

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        device = query.device
        last = look.counts(self.page_tokens)[:, None] - 1
        behind = last - torch.arange(pages, device=device)
        age = behind.float().masked_fill_(behind < 0, torch.inf)
        return -age[:, None, None].expand(-1, look.kv.key.shape[1], 1, -1)
