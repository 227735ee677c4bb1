"""Inputs of prefill tests and what is right for them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from vattn.kernels.kv import KV
from vattn.kernels.prefill import prefill_lse
from vattn.kernels.prefill_tiles import Tile
from vattn.kernels.scores import Scores, reference

HALVES = (torch.float16, torch.bfloat16)
SMALL = Tile(32, 32, 4, 1)
NAN = float("nan")


def rows(*shape: int, dtype: torch.dtype = torch.float32, place: str = "cpu") -> Tensor:
    return torch.randn(shape).to(place, dtype)


def one(query: Tensor, kv: KV, b: int, scores: Scores, mask: Tensor | None) -> tuple:
    """The definition for query [Hq, L, D] of sequence ``b``."""
    slot = b if kv.slots is None else int(kv.slots[b])
    length = kv.key.shape[2] if kv.lengths is None else int(kv.lengths[b])
    start = 0 if kv.starts is None else int(kv.starts[b])
    if mask is not None:
        mask = mask[b if mask.shape[0] > 1 else 0] if mask.dim() == 4 else mask
        heads = (query.shape[0],) if mask.dim() == 3 else ()
        mask = mask.expand(*heads, -1, kv.key.shape[2])
        mask = mask.expand(*heads, query.shape[1], -1) if mask.shape[-2] == 1 else mask
        mask = mask[..., : query.shape[1], :]
    if scores.alibi is not None and scores.alibi.dim() == 2:
        scores = replace(scores, alibi=scores.alibi[b])
    key, value = kv.key[slot].double(), kv.value[slot].double()
    if kv.key_scale is not None:
        key = key * kv.key_scale.double()[:, None, None]
    if kv.value_scale is not None:
        value = value * kv.value_scale.double()[:, None, None]
    return reference(query, key, value, scores, length=length, start=start, mask=mask)


def expected(
    query: Tensor, kv: KV, scores: Scores | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition for a dense batch."""
    each = [one(query[b], kv, b, scores or Scores(), mask) for b in range(kv.batch)]
    outs, lses = zip(*each, strict=True)
    return torch.stack(outs), torch.stack(lses)


def agree(found: tuple, wanted: tuple, kv: KV) -> None:
    """Softmax's weights and the result are rounded to the query's dtype, half an eps each; 1e-5 is
    for sums in float32."""
    largest = kv.value.float().nan_to_num().abs().max()
    if kv.value_scale is not None:
        largest *= kv.value_scale.max()
    bound = float(torch.finfo(found[0].dtype).eps * largest + 1e-5)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=bound)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)


class Sequences:
    """A random call: two ragged sequences in a cache of three, NaN in rows that do not count."""

    def __init__(self, random: Random, place: str) -> None:
        self.packed = random.random() < 0.5
        groups, kv_heads = random.choice([(1, 2), (2, 1), (3, 1)])
        heads, dtype = groups * kv_heads, random.choice([torch.float32, *HALVES])
        dim, value_dim = random.choice([(16, 16), (40, 24)])
        counts = [random.randint(0, 40), random.randint(1, 40)]
        self.tokens = max(counts)
        lengths = [random.randint(1, 100), random.randint(60, 100)]
        starts = [random.choice([0, random.randint(0, n)]) for n in lengths]
        slots = random.sample(range(3), 2)
        self.scores = self.random_scores(random, heads, place)
        self.mask = self.random_mask(random, heads, dtype, place)
        self.query = rows(2, heads, self.tokens, dim, dtype=dtype, place=place)
        self.starts: Tensor | None = None
        if self.packed:
            self.query = rows(sum(counts), heads, dim, dtype=dtype, place=place)
            self.starts = torch.tensor([0, counts[0], sum(counts)]).to(place, torch.int32)
        key = rows(3, kv_heads, 101, dim, dtype=dtype, place=place)
        value = rows(3, kv_heads, 101, value_dim, dtype=dtype, place=place)
        held = torch.zeros(3, 101, dtype=torch.bool)
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            held[slot, start:length] = True
        key.masked_fill_(~held[:, None, :, None].to(place), NAN)
        value.masked_fill_(~held[:, None, :, None].to(place), NAN)
        counts_dtype = random.choice([torch.int32, torch.int64])
        tables = (torch.tensor(n).to(place, counts_dtype) for n in (lengths, starts, slots))
        self.kv = KV(key, value, *tables)

    def random_scores(self, random: Random, heads: int, place: str) -> Scores:
        causal = random.choice([None, "top_left", "bottom_right"])
        window = random.choice([None, 1, 20, 50]) if causal else None
        scores = Scores(
            scale=random.choice([None, -0.2]),
            causal=causal,
            window=window,
            sink_tokens=random.choice([0, 5, 40]) if window else 0,
            softcap=random.choice([None, 2.0]),
            alibi=random.choice([None, torch.rand(heads), torch.rand(heads, 2).T]),
            sink_logits=random.choice([None, torch.randn(heads)]),
        )
        alibi, sinks = (t if t is None else t.to(place) for t in (scores.alibi, scores.sink_logits))
        return replace(scores, alibi=alibi, sink_logits=sinks)

    def random_mask(
        self, random: Random, heads: int, dtype: torch.dtype, place: str
    ) -> Tensor | None:
        kind = random.choice(["none", "bool", "float", "query"])
        if kind == "none":
            return None
        shape = [random.choice([1, n]) for n in (2, heads, self.tokens, 101)]
        shape = shape[2:] if random.random() < 0.3 else shape
        cells = torch.rand(shape, device=place) < 0.7
        if kind == "bool":
            return cells
        added = torch.randn(shape, device=place).masked_fill(~cells, float("-inf"))
        return added.to(dtype if kind == "query" else torch.float32)

    def run(self) -> tuple[Tensor, Tensor]:
        packed = {"query_starts": self.starts, "most_tokens": self.tokens} if self.packed else {}
        return prefill_lse(self.query, self.kv, self.scores, mask=self.mask, tile=SMALL, **packed)

    def expected(self) -> tuple[Tensor, Tensor]:
        if self.starts is None:
            return expected(self.query, self.kv, self.scores, self.mask)
        results = [
            one(self.query[a:b].transpose(0, 1), self.kv, i, self.scores, self.mask)
            for i, (a, b) in enumerate(self.starts.unfold(0, 2, 1).tolist())
        ]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1).T
