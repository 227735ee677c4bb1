"""SubGen: clusters of keys, of each a few members that stand for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps

MANY = 1 << 40  # a label behind all others


@dataclass(frozen=True, kw_only=True)
class SubGen(Evictor):
    """Draw ``samples`` tokens of each cluster of keys; each stands for its share of the cluster.

    Clusters are found greedily: the key farthest from all centres is the next one, until every key
    is within ``radius`` of one, or the budget holds no more. Of a cluster of n tokens with more
    than ``samples`` rows as many are drawn with replacement, and count n / samples each time; so
    sums over keys of exp(q . k) and exp(q . k) v, whose quotient attention is, keep their means.
    Smaller clusters are kept as they are. A later prompt clusters what earlier ones left, with its
    weights.

    Args:
        samples: of a cluster.
        radius: 0: as many clusters as the budget holds.
        seed: of the draws.

    Source: Zandieh et al., arXiv 2402.06082. The paper draws V anew, by its length; here one draw
    serves both. Samples and seed are our choice.
    """

    samples: int = 4
    radius: float = 0.0
    seed: int = 0

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "random"}), "token")
    source: ClassVar[str] = "arXiv 2402.06082"
    summary: ClassVar[str] = "samples of clusters of keys, weighted; and the last tokens"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.samples, int) or self.samples < 1:
            raise EvictorError(f"samples must be an int >= 1, got {self.samples!r}")
        if not self.radius >= 0:
            raise EvictorError(f"radius must be >= 0, got {self.radius!r}")
        least = self.sink_tokens + self.recent_tokens + self.samples
        if isinstance(self.budget, int) and self.budget < least:
            raise EvictorError(
                f"budget must be >= {least} (sink_tokens {self.sink_tokens}, recent_tokens "
                f"{self.recent_tokens} and one cluster of {self.samples}), got {self.budget}"
            )

    def target(self, tokens: Tensor) -> Tensor:
        least = self.sink_tokens + self.recent_tokens + self.samples
        return super().target(tokens).clamp_min(least)

    def score(self, seen: Seen) -> Tensor:
        """How many tokens each row stands for; 0: it goes."""
        logs = seen.log_weight
        have = (torch.zeros_like(seen.score) if logs is None else logs).exp()
        have = have.masked_fill(~seen.valid, 0.0)
        forced = self.forced(seen) & seen.valid
        free = seen.valid & ~forced
        most = (seen.target[:, None] - forced.sum(-1)).clamp_min(0) // self.samples
        label = clusters(seen.keys.float(), free, most, self.radius)
        drawn = self._drawn(have, label.masked_fill(~free, MANY), seen.layer)
        over = seen.counts > seen.target[:, None]
        return torch.where(free & over[..., None], drawn, have)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return (score > 0) & seen.valid

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return seen.keys.clone(), seen.values.clone(), seen.score.log()

    def _drawn(self, have: Tensor, label: Tensor, layer: int) -> Tensor:
        """The weights [B, H, n] after the draws."""
        free = label < MANY
        kinds = int(label.masked_fill(~free, 0).amax()) + 1
        of, weight = label.masked_fill(~free, 0), have.double() * free
        zeros = weight.new_zeros(*weight.shape[:2], kinds)
        mass = zeros.scatter_add(2, of, weight)
        size = zeros.long().scatter_add_(2, of, free.long())
        # Members side by side: cluster c holds places ends[c] - size[c] .. ends[c] of the order.
        order, ends = label.argsort(dim=-1, stable=True), size.cumsum(-1)
        line = weight.gather(2, order).cumsum(-1)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        lots = torch.rand(*size.shape, self.samples, generator=draw, dtype=torch.float64)
        at = (mass.cumsum(-1) - mass)[..., None] + lots.to(mass) * mass[..., None]
        place = torch.searchsorted(line, at.flatten(2), right=True).unflatten(2, at.shape[2:])
        place = place.maximum((ends - size)[..., None]).minimum((ends - 1).clamp_min(0)[..., None])
        each = (mass / self.samples).masked_fill(size <= self.samples, 0.0)
        drawn = torch.zeros_like(weight).scatter_add_(
            2, order.gather(2, place.flatten(2)), each.repeat_interleave(self.samples, -1)
        )
        whole = free & (size.gather(2, of) <= self.samples)
        return torch.where(whole, weight, drawn).float()


def clusters(keys: Tensor, free: Tensor, most: Tensor, radius: float) -> Tensor:
    """The nearest of at most ``most`` [B, H] centres, for each row [B, H, n] of ``free``. Centres
    are such rows, farther than ``radius`` from each other."""
    far = torch.where(free, float("inf"), -1.0)
    label = torch.zeros_like(far, dtype=torch.int64)
    for i in range(int(most.max())):
        distance, at = far.max(-1)
        goes = (distance > radius) & (i < most)
        if not bool(goes.any()):
            break
        centre = keys.gather(2, at[..., None, None].expand(*at.shape, 1, keys.shape[3]))
        apart = (keys - centre).norm(dim=-1)
        closer = goes[..., None] & free & (apart < far)
        label.masked_fill_(closer, i)
        far = torch.where(closer, apart, far)
    return label
