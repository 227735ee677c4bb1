"""Appending the rows of a decode step in Triton on a device: against copies by torch's indexing.

256 sequences of different lengths get one row in each of K and V, in one launch that reads the
lengths on the device. The peer is `index_put_` with prepared indices, as a paged cache does it.
Without a device: what the compiled kernel is made of.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu import instead, missing, race
from bench.harness import Bench

BATCH, HEADS, TOKENS, DIM = 256, 8, 2048, 128
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


def run(bench: Bench) -> None:
    if (why := missing()) is not None:
        return instead(bench, "append", (), why)
    torch.manual_seed(bench.seed)
    for dtype in DTYPES:
        for rows in ("head_major", "token_major"):
            figures(bench, dtype, rows)
    return None


def figures(bench: Bench, dtype: torch.dtype, rows: str) -> None:
    from vattn.kernels.append import append
    from vattn.kernels.kv import KV

    shape = (BATCH, HEADS, TOKENS, DIM) if rows == "head_major" else (BATCH, TOKENS, HEADS, DIM)
    store = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(4)]
    if rows == "token_major":
        store = [t.transpose(1, 2) for t in store]
    lengths = torch.randint(0, TOKENS, (BATCH,), device="cuda", dtype=torch.int32)
    new = [torch.randn(BATCH, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    sequences = torch.arange(BATCH, device="cuda")[:, None]
    heads = torch.arange(HEADS, device="cuda")[None]
    at = (sequences, heads, lengths.long()[:, None])

    def indexed() -> None:
        for side, one in zip(store[2:], new, strict=True):
            side[at] = one[:, :, 0].to(dtype)

    ours = partial(append, new[0], new[1], KV(store[0], store[1], lengths))

    def equal() -> bool:
        ours()
        indexed()
        pairs = zip(store[:2], store[2:], strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    taken = race(bench, {"ours": ours, "index_put": indexed}, bench.pick(200, 30))
    name = f"append/{str(dtype).removeprefix('torch.')}/{rows}"
    versus = bench.versus(taken["ours"], taken["index_put"])
    bench.figure(name, versus, "us", gate=equal, peer="index_put", target="ratio >= 1")
