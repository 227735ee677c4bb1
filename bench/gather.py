"""What a block table costs a decode step on a CPU: gather blocks into one tensor, then attend.

The same K and V twice: in a `KVCache`, contiguous in address space, and in blocks of 16 tokens
scattered over a pool, as a paged cache holds them. torch's attention reads tensors only, so a paged
cache must gather the blocks of every step; ours reads in place. 32 query heads, 8 KV heads of 128.

    contiguous   vattn.scaled_dot_product_attention on the cache's view
    blocks       index_select of the K and V blocks through the table, into tensors made once,
                 then torch's scaled_dot_product_attention
    blocks+ours  the same, then ours: what gathering alone costs

The gate: both answers are those of float64 within three times torch's error, and the gathered rows
are the cache's rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import vattn
from bench.decode_cpu import DIM, HEADS, KV_HEADS, exact, race, step
from bench.harness import Bench
from vattn import Layout

BLOCK = 16
SCRATCH = 64 << 20
FASTER = "ratio >= 3"


class Blocks:
    """K and V in blocks of 16 tokens at random places, and the table that finds them.

    A pool is [heads, blocks, 16, dim]: gathered, each head's tokens lie side by side, which is what
    torch's attention reads fastest.
    """

    def __init__(self, bench: Bench, key: Tensor, value: Tensor) -> None:
        batch, heads, tokens, dim = key.shape
        count = batch * tokens // BLOCK
        generator = torch.Generator().manual_seed(bench.seed)
        self.table = torch.randperm(count, generator=generator)
        self.pools, self.gathered = [], []
        for rows in (key, value):
            blocks = rows.transpose(0, 1).reshape(heads, count, BLOCK, dim)
            pool = torch.empty_like(blocks)
            pool[:, self.table] = blocks
            self.pools.append(pool)
            self.gathered.append(torch.empty_like(blocks))
        self.shape = (heads, batch, tokens, dim)

    def gather(self) -> list[Tensor]:
        """K and V as [batch, heads, tokens, dim], gathered through the table."""
        for pool, target in zip(self.pools, self.gathered, strict=True):
            torch.index_select(pool, 1, self.table, out=target)
        return [rows.view(self.shape).transpose(0, 1) for rows in self.gathered]


def run(bench: Bench, dtype: str = "bfloat16") -> None:
    buffers = [torch.ones(SCRATCH, dtype=torch.uint8) for _ in range(2)]
    for batch, context in bench.pick([(1, 4 << 10), (8, 4 << 10), (1, 32 << 10)], [(1, 4 << 10)]):
        with step(bench, Layout(1, KV_HEADS, DIM, context, dtype=dtype), batch) as inputs:
            figures(bench, f"gather/{dtype}/{batch}x{context}", *inputs, buffers)


def figures(
    bench: Bench, name: str, query: Tensor, key: Tensor, value: Tensor, buffers: list[Tensor]
) -> None:
    """Contiguous against gathered; and how much of the difference is the gathering."""
    blocks = Blocks(bench, key, value)
    ours = partial(vattn.scaled_dot_product_attention, query, key, value, enable_gqa=True)

    def paged(attention: object = F.scaled_dot_product_attention) -> Tensor:
        return attention(query, *blocks.gather(), enable_gqa=True)  # type: ignore[operator]

    def same() -> bool:
        for rows, gathered in zip((key, value), blocks.gather(), strict=True):
            assert torch.equal(rows, gathered), "the gathered rows are not the cache's"
        return exact(query, key, value, ours) and exact(query, key, value, paged)

    gate = cache(same)
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "blocks": paged,
        "blocks+ours": partial(paged, vattn.scaled_dot_product_attention),
    }
    taken = race(bench, contestants, buffers)
    for suffix, peer, target in (("", "blocks", FASTER), ("/same_attention", "blocks+ours", None)):
        bench.figure(
            name + suffix,
            bench.versus(taken["ours"], taken[peer]),
            "ms",
            gate=gate,
            target=target,
            peer=peer,
            heads=HEADS,
            block=BLOCK,
            threads=torch.get_num_threads(),
        )
