"""Calls of the backward kernels and what is right for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from tests.guard import allow, fenced
from vattn.kernels.backward import backward, backward_sinks
from vattn.kernels.backward_tiles import Tile, Tiles
from vattn.kernels.scores import Scores, reference

HALVES = (torch.float16, torch.bfloat16)
SMALL = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def rows(*shape: int, dtype: torch.dtype = torch.float32, place: str = "cpu") -> Tensor:
    return torch.randn(shape).to(place, dtype)


@dataclass(frozen=True)
class Call:
    """Arguments of `backward` less out and lse: those are the definition's, rounded."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Scores = Scores()  # noqa: RUF009  frozen
    mask: Tensor | None = None
    grad_lse: Tensor | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """The definition's result and log-sum-exp, differentiable, in float64.

        A float mask hides by a number that is finite: autograd makes NaN of a row of -inf alone.
        """
        batch, mask = self.query.shape[0], self.mask
        masks = [None] * batch
        if mask is not None:
            if mask.dtype != torch.bool:
                mask = mask.double().clamp(min=-1e300)
            masks = list(mask.expand(*self.query.shape[:3], self.key.shape[2]))
        each = [
            reference(self.query[b], self.key[b], self.value[b], self.of(b), mask=masks[b])
            for b in range(batch)
        ]
        out, lse = (torch.stack(parts) for parts in zip(*each, strict=True))
        hidden = lse < -1e290
        return out.masked_fill(hidden[..., None], 0.0), lse.masked_fill(hidden, float("-inf"))

    def of(self, b: int) -> Scores:
        """The scores of one sequence."""
        alibi = self.scores.alibi
        return (
            self.scores
            if alibi is None or alibi.dim() == 1
            else replace(self.scores, alibi=alibi[b])
        )

    def expected(self) -> tuple[Tensor, ...]:
        """float64 gradients by autograd: dq, dk, dv, and of sink logits where there are any."""
        leaves = [t.detach().double().requires_grad_() for t in (self.query, self.key, self.value)]
        query, key, value = leaves
        scores = self.scores
        if scores.sink_logits is not None:
            leaves.append(scores.sink_logits.detach().clone().requires_grad_())
            scores = replace(scores, sink_logits=leaves[3])
        out, lse = replace(self, query=query, key=key, value=value, scores=scores).forward()
        loss = (out * self.grad.double()).sum()
        if self.grad_lse is not None:
            loss = loss + torch.where(lse == float("-inf"), 0.0, lse * self.grad_lse.double()).sum()
        return torch.autograd.grad(loss, leaves)

    def run(self, tiles: Tiles | None = SMALL) -> tuple[Tensor, ...]:
        """What the kernels give."""
        out, lse = self.forward()
        out, lse = out.to(self.query.dtype), lse.float()
        tensors = (self.grad, self.query, self.key, self.value, out, lse, self.scores)
        call = backward if self.scores.sink_logits is None else backward_sinks
        return call(*tensors, mask=self.mask, grad_lse=self.grad_lse, tiles=tiles)


def call(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    tokens: int = 40,
    keys: int = 70,
    dim: int = 16,
    value_dim: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    place: str = "cpu",
    scores: Scores = Scores(),  # noqa: B008  frozen
) -> Call:
    """A call with random numbers."""
    value_dim = value_dim or dim
    shapes = ((heads, tokens, value_dim), (heads, tokens, dim), (kv_heads, keys, dim))
    tensors = (rows(batch, *shape, dtype=dtype, place=place) for shape in shapes)
    value = rows(batch, kv_heads, keys, value_dim, dtype=dtype, place=place)
    return Call(*tensors, value, scores)


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Each gradient sums products of numbers rounded to ``dtype`` (p, ds, out): some eps of the
    largest; 2e-5 of it is for sums in float32."""
    for found_one, wanted_one in zip(found, wanted, strict=True):
        largest = float(wanted_one.abs().max()) if wanted_one.numel() else 0.0
        bound = (2 * torch.finfo(dtype).eps + 2e-5) * max(largest, 1.0)
        torch.testing.assert_close(found_one.double(), wanted_one.double(), rtol=0, atol=bound)


def random_call(random: Random, place: str) -> Call:
    """All options, each by chance."""
    heads, kv_heads = random.choice([(2, 2), (2, 1), (3, 1)])
    dim, value_dim = random.choice([(16, 16), (40, 24), (16, 72)])
    dtype = random.choice([torch.float32, *HALVES])
    tokens, keys = random.randint(1, 50), random.randint(1, 70)
    causal = random.choice([None, "top_left", "bottom_right"])
    window = random.choice([None, 1, 20, 50]) if causal else None
    slopes = torch.rand(random.choice([(heads,), (1, heads)])).to(place)
    scores = Scores(
        scale=random.choice([None, -0.2]),
        causal=causal,
        window=window,
        sink_tokens=random.choice([0, 5, 40]) if window else 0,
        softcap=random.choice([None, 2.0]),
        alibi=random.choice([None, slopes]),
        sink_logits=random.choice([None, torch.randn(heads).to(place)]),
    )
    sizes = (1, heads, kv_heads, tokens, keys, dim, value_dim)
    made = call(*sizes, dtype=dtype, place=place, scores=scores)
    mask = random_mask(random, (1, heads, tokens, keys), dtype, place)
    grad_lse = random.choice([None, rows(1, heads, tokens, place=place)])
    return replace(made, mask=mask, grad_lse=grad_lse)


def random_mask(
    random: Random, full: tuple[int, ...], dtype: torch.dtype, place: str
) -> Tensor | None:
    kind = random.choice(["none", "bool", "float", "query"])
    if kind == "none":
        return None
    shape = [random.choice([1, n]) for n in full]
    shape = shape[2:] if random.random() < 0.3 else shape
    seen = torch.rand(shape, device=place) < 0.7
    if kind == "bool":
        return seen
    added = torch.randn(shape, device=place).masked_fill(~seen, float("-inf"))
    return added.to(dtype if kind == "query" else torch.float32)


# ---- for a child process, which a stray access kills ----


def between_closed_pages(keys: int = 64) -> None:
    """Run with every tensor against a closed page; 64 rows of K and V are open."""
    torch.manual_seed(3)
    near = call(1, 2, 1, 32, 64)
    near = replace(near, mask=rows(32, 64))
    out, lse = near.forward()
    tensors = (near.grad, near.query, out.float(), near.mask)
    grad, query, result, mask = (closed(tensor) for tensor in tensors)
    held = [fenced((1, 1, 128, 16), torch.float32) for _ in range(2)]
    for rows_of, tensor in zip(held, (near.key, near.value), strict=True):
        allow(rows_of[:, :, :64]).copy_(tensor)
    key, value = (rows_of[:, :, :keys] for rows_of in held)
    sums = allow(fenced((1024,), torch.float32))[-64:].view(1, 2, 32).copy_(lse)
    tiles = Tiles(Tile(64, 128, 4, 1), Tile(64, 128, 4, 1))
    mask = mask if keys == 64 else None
    found = backward(grad, query, key, value, result, sums, mask=mask, tiles=tiles)
    agree(found, near.expected(), torch.float32)
    print("right")


def a_row_too_many() -> None:
    """What the fence is for: the kernels take 65 rows where 64 are open."""
    between_closed_pages(65)


def closed(tensor: Tensor) -> Tensor:
    """The same numbers, a whole number of pages of them, between two closed pages."""
    return allow(fenced(tuple(tensor.shape), tensor.dtype)).copy_(tensor)
