"""K and V from fewer numbers: truncated SVD of the projections that make them (LoRC).

    W = U S V^T         K = W x + b  ~  U_r z + b         z = S_r V_r^T x: the latent, r numbers

A cache holds the latent of a token instead of its K, and likewise for V. U_r is orthonormal, so a
latent that is rounded is a K rounded as much, and the error of a token is at most the first
singular value left out times ||x||. K is rebuilt before it is rotated: a latent knows no position.

With a sample of what the model reads, U_r spans the directions that hold most of K there, and the
latent is U_r^T W x: the error on the sample is the least there is, much less than the SVD's.

How many numbers a layer keeps follows the cumulative condition number: an error in a shallow layer
is carried through all layers above it, so those keep more.

Source: arXiv 2410.03111; the sample is ours. Linear algebra alone: `vattn.hf_lorc` puts it into a
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vattn.allocator.errors import VattnError

# Rank of the deepest layer over that of the shallowest, as far as the budget lets it be.
TAPER = 0.5
# Weight of what a sample may have missed, beside what it shows.
RARE = 1e-6


class LorcError(VattnError, ValueError):
    """A share, rank or weight that no low-rank cache can have; the message has a remedy."""


class LowRank(nn.Module):
    """A linear layer in two steps, which leaves what lies between them in ``latent``.

    Args:
        down: [rank, in].
        up: [out, rank].
        bias: [out], or None.
    """

    bias: Tensor | None

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        self.latent: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        self.latent = F.linear(x, self.down)
        return self.rebuilt(self.latent)

    def rebuilt(self, latent: Tensor) -> Tensor:
        """[..., rank] to [..., out]."""
        return F.linear(latent, self.up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as torch prints them."""
        rank, width = self.down.shape
        return f"in={width}, rank={rank}, out={len(self.up)}, bias={self.bias is not None}"


@dataclass(frozen=True)
class Factors:
    """A weight [out, in] as ``up @ down``, and how to cut it.

    Args:
        up: [out, R], orthonormal columns; R = min(out, in).
        down: [R, in].
        values: [R] falling, in float64: the singular values, or, of a sample, the root mean square
            of each latent number.
    """

    up: Tensor
    down: Tensor
    values: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """``down`` [rank, in] and ``up`` [out, rank]: the best product of that rank.

        Raises:
            LorcError: there is no such rank.
        """
        if not 1 <= rank <= len(self.values):
            raise LorcError(
                f"rank must be from 1 to {len(self.values)} for a weight of "
                f"{len(self.up)} x {self.down.shape[1]}, got {rank}"
            )
        return self.down[:rank].clone(), self.up[:, :rank].contiguous()

    def log_condition(self) -> float:
        """Log of the largest over the smallest value; less than rounding counts as rounding."""
        top = float(self.values[0])
        least = max(float(self.values[-1]), top * torch.finfo(self.up.dtype).eps)
        return math.log(top / least) if top else 0.0


def factors(weight: Tensor, moment: Tensor | None = None) -> Factors:
    """Split a weight [out, in], in float64; the parts are of its dtype.

    Args:
        moment: [out, out] mean of y y^T over a sample, y = W x; None: every x is as likely.

    Raises:
        LorcError: it is no matrix of finite numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise LorcError(
            f"a weight to split is a matrix of finite numbers, got {tuple(weight.shape)} of "
            f"{weight.dtype}: load the model in float32 or bfloat16, and check its weights"
        )
    exact = weight.detach().double()
    if moment is None:
        up, values, down = torch.linalg.svd(exact, full_matrices=False)
        down = values[:, None] * down
    else:
        plain = exact @ exact.T
        # What the sample never shows comes last, but in the weight's own order.
        rest = RARE * moment.trace() / plain.trace().clamp_min(1e-300)
        squares, up = torch.linalg.eigh(moment.double() + rest * plain)
        up = up.flip(1)[:, : min(exact.shape)]
        values, down = squares.flip(0)[: up.shape[1]].clamp_min(0).sqrt(), up.T @ exact
    return Factors(up.to(weight.dtype), down.to(weight.dtype), values)


def weights(conditions: Sequence[float], taper: float = TAPER) -> list[float]:
    """How much each layer keeps in relation to the others, 1 at the first, ``taper`` at the last.

    Args:
        conditions: log condition numbers of the layers, K's and V's added up, in order.
        taper: over 0, at most 1; 1: all alike.

    Raises:
        LorcError: no such taper.
    """
    if not 0 < taper <= 1:
        raise LorcError(f"taper must be over 0 and at most 1, got {taper}; 1 keeps all alike")
    behind = 0.0
    cumulative: list[float] = []  # of a layer and of all above it
    for condition in reversed(conditions):
        behind += condition
        cumulative.append(behind)
    cumulative.reverse()
    top, span = cumulative[0], cumulative[0] - cumulative[-1]
    return [1 - (1 - taper) * ((top - each) / span if span else 0.0) for each in cumulative]


def ranks(
    widths: Sequence[int], limits: Sequence[int], share: Sequence[float], keep: float
) -> list[int]:
    """The rank of each layer: as ``share`` has them, together at most ``keep`` of the widths.

    Args:
        widths: numbers that the K of a token has, by layer.
        limits: most that a rank can be, by layer; what a layer cannot use goes to the others.
        share: see `weights`.
        keep: over 0, at most 1.

    Raises:
        LorcError: no such keep, or it leaves a layer without a number.
    """
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:
        raise LorcError(
            f"keep is the share of the cache's bytes, over 0 and at most 1, got {keep!r}; pass "
            "0.5, say"
        )
    budget = math.floor(keep * sum(widths) + 1e-9)
    if budget < len(widths):
        least = math.ceil(1e4 * len(widths) / sum(widths)) / 1e4
        raise LorcError(
            f"keep {keep} leaves {budget} of {sum(widths)} numbers to {len(widths)} layers, and "
            f"each takes at least 1: pass at least {least}"
        )

    def at(scale: float) -> list[int]:
        return [
            min(limit, max(1, int(scale * part * width)))
            for width, limit, part in zip(widths, limits, share, strict=True)
        ]

    low, high = 0.0, 2 / min(share)  # all at 1, all at their limits
    if sum(at(high)) <= budget:
        return at(high)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= budget else (low, middle)
    found = at(low)
    for layer, limit in enumerate(limits):  # what rounding down has left
        found[layer] += int(sum(found) < budget and found[layer] < limit)
    return found
