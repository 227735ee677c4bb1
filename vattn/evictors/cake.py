"""CAKE: layers share one budget by how their attention spreads and shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, Step, best
from vattn.evictors.order import by_text
from vattn.selector import Caps

LEAST = 1e-30  # of a preference: layers that want nothing share what the others leave
CLOSE = 1e-6  # what rounding may add to a budget


@dataclass(frozen=True, kw_only=True)
class CAKE(Evictor):
    """Keep the tokens with the largest mean + gamma * variance of the window's attention, smoothed;
    a layer's share grows with the entropy and the variance of that attention. Shares are found anew
    after each layer of a prompt, and earlier layers shrink: the whole never holds more than all
    budgets and one whole layer. At decode steps the current query's attention decides.

    Args:
        window_tokens: queries that are asked; their own tokens are kept in any case.
        kernel: tokens of the average, odd.
        gamma: weight of the variance.
        tau1, tau2: a layer's preference is entropy ** (1 / tau1) * variance ** (1 / tau2). The
            authors tune both for each model; here both are 1.

    Source: Qin et al., arXiv 2503.12491; code antgroup/cakekv (window 32, gamma 200, average of 5).
    """

    sink_tokens: int = 0
    recent_tokens: int = 32
    window_tokens: int = 32
    kernel: int = 5
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = "arXiv 2503.12491"
    summary: ClassVar[str] = "mean and variance of the window's attention, layers share a budget"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    cascades: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 2 or self.kernel < 1 or self.kernel % 2 == 0:
            raise EvictorError(
                "window_tokens must be >= 2 (a variance is taken) and kernel an odd int >= 1, got "
                f"{self.window_tokens!r} and {self.kernel!r}"
            )
        if not (self.gamma >= 0 and self.tau1 > 0 and self.tau2 > 0):
            raise EvictorError(
                "gamma must be >= 0, tau1 and tau2 > 0, got "
                f"{self.gamma!r}, {self.tau1!r} and {self.tau2!r}"
            )

    def rows(self, tokens: int) -> int:
        return self.window_tokens

    # ---- tokens --------------------------------------------------------------------------------
    def score(self, seen: Seen) -> Tensor:
        mean, variance, old = self._moments(seen)
        found = (mean + self.gamma * variance).mean(2) * old
        return smoothed(found, seen, self.kernel)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        old = step.positions < (step.tokens - self.window_tokens)[:, None, None]
        return smoothed(step.mass() / step.logits.shape[2] * old, step, self.kernel)

    def _moments(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance over the window [B, H, G, n]; which keys are before it [B, H, n]."""
        found = seen.columns(self.window_tokens)
        mean = found.total / found.rows
        variance = (found.square - found.total * mean) / max(1, found.rows - 1)
        return mean, variance.clamp_min(0), seen.valid & (seen.age >= found.rows)

    # ---- layers --------------------------------------------------------------------------------
    def preference(self, seen: Seen) -> Tensor:
        _, variance, old = self._moments(seen)
        entropy = torch.zeros(len(old), dtype=torch.float32, device=old.device)
        for _, block in seen.logits(self.window_tokens):
            weights = block.softmax(-1) * old[:, :, None, None]
            entropy += torch.special.entr(weights).sum((1, 2, 3, 4))
        shift = (variance * old[:, :, None]).sum((1, 2, 3))
        return entropy ** (1 / self.tau1) * shift ** (1 / self.tau2)

    def shares(self, preferences: Tensor, layers: int, target: Tensor, tokens: Tensor) -> Tensor:
        kept, device = self.sink_tokens + self.recent_tokens, target.device
        preferences, target, tokens = preferences.cpu(), target.cpu(), tokens.cpu()
        room = (tokens - kept).clamp_min(0).double()
        exact = poured(preferences.double(), ((target - kept) * layers).double(), room)
        if len(preferences) < layers:  # rounded up: later layers only take
            whole = torch.minimum((exact + CLOSE).ceil(), room)
        else:
            whole = (exact + CLOSE).floor()
            spare = exact.sum(0).round() - whole.sum(0)
            whole += best((exact - whole).mT, spare).mT
        # Where all is kept, the rest of the budget is for tokens to come.
        return torch.where(target < tokens, kept + whole.long(), target).to(device)


def smoothed(scores: Tensor, seen: Seen | Step, kernel: int) -> Tensor:
    """The mean of each row's ``kernel`` neighbours in the text: rows may be in any order."""
    order = by_text(seen)
    line = (scores * seen.valid).gather(-1, order)
    mean = F.avg_pool1d(line, kernel, stride=1, padding=kernel // 2)
    return torch.zeros_like(scores).scatter_(-1, order, mean)


def poured(preferences: Tensor, amount: Tensor, room: Tensor) -> Tensor:
    """``amount`` [B] shared by layers as they prefer [l, B], none with more than ``room`` [B]; what
    one cannot take the others share. More layers never give one of them more."""
    # A floor of its own, whatever the others prefer: layers to come must not raise it.
    wish = preferences.clamp_min(LEAST)
    full = torch.zeros_like(wish, dtype=torch.bool)
    while True:
        left = (amount - (full * room).sum(0)).clamp_min(0)
        given = wish * left / (wish * ~full).sum(0).clamp_min(1e-300)
        more = full | (given >= room)
        if bool((more == full).all()):
            return torch.where(full, room, given)
        full = more
