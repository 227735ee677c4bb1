"""Muon: momentum whose matrix updates are orthogonalised by Newton-Schulz iterations.

Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/. Matrices of one shape are stacked so that every
iteration is one batched product.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# Quintic coefficients of the reference: fast growth of small singular values, limit near one.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Map a stack of matrices [n, rows, cols], rows <= cols, near their orthogonal factors."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x


def shared_orthogonalise(stack: Tensor) -> Tensor:
    """``orthogonalise`` with the stack's matrices dealt out to the worker processes."""
    if not dist.is_initialized():
        return orthogonalise(stack)
    rank, world = dist.get_rank(), dist.get_world_size()
    result = torch.zeros_like(stack)
    result[rank::world] = orthogonalise(stack[rank::world])
    dist.all_reduce(result)
    return result


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters, with Nesterov momentum and decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.0,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["velocity"], group["momentum"])
                if p.shape[0] > p.shape[1]:
                    update = update.mT
                stacks.setdefault(tuple(update.shape), []).append((p, update))
            for entries in stacks.values():
                updates = shared_orthogonalise(torch.stack([u for _, u in entries]))
                for (p, _), update in zip(entries, updates, strict=True):
                    tall = p.shape[0] > p.shape[1]
                    # Equal root-mean-square change of the outputs for every shape.
                    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update.mT if tall else update, alpha=-group["lr"] * scale)
