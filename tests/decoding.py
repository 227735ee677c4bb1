"""What the tests of decoding share: batches in caches that are NaN where no row counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from tests.attention import tolerance
from vattn.kernels.gpu import Device
from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores, reference

# So few processors that most programs have work, and that an interpreted launch is short.
SMALL = Device(80, 2, 163 << 10)
LINES = ("lengths", "starts", "slots", "key_scale", "value_scale", "alibi", "sink_logits")
Part = TypeVar("Part", KV, Scores)


@dataclass
class Case:
    """A batch in a cache that is NaN wherever a row does not count."""

    lengths: list[int] = field(default_factory=lambda: [150, 3])
    starts: list[int] | None = None
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    dim: int = 32
    value_dim: int = 32
    reserved: int = 200
    dtype: torch.dtype = torch.float32
    token_major: bool = False
    slots: list[int] | None = None
    scores: dict = field(default_factory=dict)
    alibi: bool = False
    sink_logits: bool = False
    tree: str = ""
    place: str = "cpu"

    def make(self) -> tuple[Tensor, KV, Scores, Tensor | None]:
        """Query, K and V, scores, tree."""
        batch = len(self.lengths)
        query = torch.randn(batch, self.heads, self.tokens, self.dim).to(self.dtype)
        key, value = self.rows(self.dim), self.rows(self.value_dim)
        make = {"dtype": torch.int64 if self.slots else torch.int32, "device": self.place}
        kv = KV(
            key,
            value,
            torch.tensor(self.lengths, **make),
            None if self.starts is None else torch.tensor(self.starts, **make),
            None if self.slots is None else torch.tensor(self.slots, **make),
        )
        extra = {
            "alibi": torch.rand(self.heads, device=self.place) if self.alibi else None,
            "sink_logits": torch.randn(self.heads, device=self.place) if self.sink_logits else None,
        }
        shape = {"": None, "shared": (self.tokens,) * 2, "own": (batch,) + (self.tokens,) * 2}
        tree = None
        if self.tree:
            tree = (torch.rand(shape[self.tree]) < 0.5).to(self.place)
        return query.to(self.place), kv, Scores(**self.scores, **extra), tree

    def rows(self, dim: int) -> Tensor:
        slots = self.slots or list(range(len(self.lengths)))
        shape = (max(slots) + 1, self.kv_heads, self.reserved, dim)
        order = (0, 2, 1, 3) if self.token_major else (0, 1, 2, 3)
        base = torch.full([shape[i] for i in order], float("nan")).permute(order)
        for b, slot in enumerate(slots):
            live = slice(self.starts[b] if self.starts else 0, self.lengths[b])
            base[slot, :, live] = torch.randn_like(base[slot, :, live])
        return base.to(self.dtype).to(self.place)


def spread(part: Part, form: str) -> Part:
    """``part`` with lines whose elements lie two apart ("strided"), among zeros, or whose first
    element stands for all ("expanded")."""
    changed = {}
    for name in LINES:
        line = getattr(part, name, None)
        if line is None:
            continue
        if form == "strided":
            changed[name] = torch.stack([line, torch.zeros_like(line)], -1)[..., 0]
        else:
            changed[name] = line[..., :1].expand(line.shape)
        assert not changed[name].is_contiguous()
    return replace(part, **changed)


def plain(part: Part) -> Part:
    """``part`` with lines whose elements lie side by side."""
    lines = {name: getattr(part, name, None) for name in LINES}
    return replace(part, **{k: line.contiguous() for k, line in lines.items() if line is not None})


def scaled(kv: KV, place: str) -> KV:
    """``kv`` with a scale for each head."""
    scales = (torch.rand(kv.key.shape[1], device=place) + 0.5 for _ in range(2))
    return replace(kv, key_scale=next(scales), value_scale=next(scales))


def exact(
    query: Tensor, kv: KV, scores: Scores, tree: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition in float64, a sequence at a time."""
    found = []
    for b in range(query.shape[0]):
        slot = b if kv.slots is None else int(kv.slots[b])
        length = kv.key.shape[2] if kv.lengths is None else int(kv.lengths[b])
        start = 0 if kv.starts is None else int(kv.starts[b])
        mask = None
        if tree is not None:
            mask = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device)
            last = tree[b] if tree.dim() == 3 else tree
            width = min(length, query.shape[2])
            mask[:, length - width :] = last[:, query.shape[2] - width :]
        found.append(
            reference(
                query[b],
                kv.key[slot],
                kv.value[slot],
                scores,
                length=length,
                start=start,
                mask=mask,
            )
        )
    outs, lses = zip(*found, strict=True)
    return torch.stack(outs), torch.stack(lses)


def scored(query: Tensor, kv: KV, scores: Scores, tree: Tensor | None = None) -> list[Tensor]:
    """What queries score in float64, [Hkv, G * L, length] of each sequence; -inf unseen. Over
    values that are an identity, the result is the weights."""
    reserved, kv_heads = kv.key.shape[2], kv.key.shape[1]
    one = torch.eye(reserved, device=query.device)
    value = one.expand(kv.key.shape[0], kv_heads, -1, -1)
    weights, lse = exact(query, replace(kv, key=kv.key.float(), value=value), scores, tree)
    lines = (weights.log() + lse[..., None]).unflatten(1, (kv_heads, -1)).flatten(2, 3).cpu()
    lengths = [reserved] * len(query) if kv.lengths is None else kv.lengths.tolist()
    return [line[..., :length] for line, length in zip(lines, lengths, strict=True)]


def assert_close(out: Tensor, lse: Tensor, query: Tensor, kv: KV, scores: Scores, tree=None):
    right, right_lse = exact(query, kv, scores, tree)
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    error = (out.double() - right).abs().max().item()
    keys = kv.key.shape[2]
    assert error <= tolerance(right, query.dtype, keys), error
    assert torch.equal(lse == float("-inf"), right_lse == float("-inf"))
    gap = (lse.double() - right_lse)[right_lse.isfinite()].abs()
    assert gap.numel() == 0 or gap.max().item() <= tolerance(
        right_lse, torch.float32, query.shape[3]
    )


def shapes(batch: int, heads: int, kv_heads: int, dim: int, reserved: int, tokens: int = 1):
    """Tensors of these shapes without memory."""
    row = torch.zeros((), dtype=torch.bfloat16)
    key = row.expand(batch, kv_heads, reserved, dim)
    key = (
        key.as_strided(key.shape, (0, 0, 0, 1))
        if dim == 1
        else torch.zeros(dim, dtype=torch.bfloat16).expand(key.shape)
    )
    return row.expand(batch, heads, tokens, dim), KV(key, key)
