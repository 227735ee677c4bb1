"""One decode step in Triton on a device: against the copy rate and every attention kernel there is.

K and V are read from memory, not from a cache, and each row once: `.../copy_share` is the rate at
which ours reads them, divided by the rate of a copy in the same run. `graph` replays one captured
CUDA graph, with lengths that the device reads, against a launch that knows them: what it costs to
serve any length. Without a device: the floor of the data sheets, and what the compiled kernels are
made of.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu import (
    Act,
    best,
    close,
    flex,
    inputs,
    installed,
    instead,
    missing,
    race,
    rates,
    torch_kernels,
)
from bench.harness import Bench
from bench.shapes import DECODE, Shape

GIB = 1 << 30
SHARES = ((GIB, ">= 0.92"), (GIB // 8, ">= 0.85"))  # of the copy rate, by bytes of K and V


def run(bench: Bench) -> None:
    if (why := missing()) is not None:
        return instead(bench, "decode", DECODE, why)
    torch.manual_seed(bench.seed)
    copied, _ = rates(bench)
    for shape in bench.pick(DECODE, DECODE[:3]):
        figures(bench, shape, copied)
    return graph(bench, DECODE[4])


def figures(bench: Bench, shape: Shape, copied: float) -> None:
    """Ours against all others, then against memory."""
    from vattn.kernels.decode import decode
    from vattn.kernels.kv import KV
    from vattn.kernels.scores import Scores

    query, key, value = inputs(shape)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
    scores = Scores(causal="bottom_right" if shape.causal else None)
    ours = partial(decode, query, KV(key, value, lengths), scores)
    even = isinstance(shape.keys, int)
    mask = None if even and not shape.causal else visible(shape, lengths)
    contestants: dict[str, Act] = {"ours": ours, **torch_kernels(query, key, value, attn_mask=mask)}
    if even:
        contestants["torch flex"] = flex(query, key, value, causal=shape.causal)
        contestants |= installed(bench, query, key, value, causal=shape.causal)
    gate = (
        partial(close, ours(), query, key, value, shape.causal)
        if even
        else partial(close_ragged, ours(), query, key, value, shape.lengths)
    )
    taken = race(bench, contestants, bench.pick(100, 20))
    rival = best(taken)
    name = f"decode/{shape.name}"
    rate = {each: shape.kv_bytes / sample.p50 / 1e9 for each, sample in taken.items()}
    bench.figure(
        name,
        taken["ours"] if rival is None else bench.versus(taken["ours"], taken[rival]),
        "us",
        gate=gate,
        peer=rival,
        target="ratio >= 0.97",
        gigabytes_per_second={each: round(one, 1) for each, one in rate.items()},
        kv_bytes=shape.kv_bytes,
    )
    shares = SHARES if even else SHARES[1:]  # ragged lengths balance less well
    targets = [target for least, target in shares if shape.kv_bytes >= least]
    bench.figure(
        f"{name}/copy_share",
        shape.kv_bytes / taken["ours"].p50 / copied,
        "of copy",
        gate=gate,
        target=targets[0] if targets else None,
    )


def visible(shape: Shape, lengths: Tensor) -> Tensor:
    """What torch's kernels need to be told: [B, 1, L, S], True = attend."""
    keys = torch.arange(max(shape.lengths), device="cuda")
    queries = torch.arange(shape.queries, device="cuda")
    last = lengths[:, None] - shape.queries + queries
    seen: Tensor = (keys <= last[:, None, :, None]) & (keys < lengths[:, None, None, None])
    return seen


def close_ragged(
    ours: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
) -> bool:
    """`close`, the shortest and the longest sequence by itself."""
    for b in (lengths.index(min(lengths)), lengths.index(max(lengths))):
        one = slice(b, b + 1)
        rows = slice(0, lengths[b])
        close(ours[one], query[one], key[one, :, rows], value[one, :, rows], False)
    return True


def graph(bench: Bench, shape: Shape) -> None:
    """One captured graph for any lengths, against a launch for these alone."""
    from vattn.kernels.decode import decode
    from vattn.kernels.kv import KV

    query, key, value = inputs(shape)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
    known = partial(decode, query, KV(key, value))
    known()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = decode(query, KV(key, value, lengths))
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        known()

    def follows() -> bool:
        """The graph serves other lengths than it was captured with."""
        for tokens in (1, 100, max(shape.lengths)):
            lengths.fill_(tokens)
            captured.replay()
            close(out, query, key[:, :, :tokens], value[:, :, :tokens], False)
        return True

    taken = race(bench, {"ours": captured.replay, "static": again.replay}, bench.pick(200, 30))
    bench.figure(
        "decode/graph",
        bench.versus(taken["ours"], taken["static"]),
        "us",
        gate=follows,
        peer="a graph of these lengths alone",
        target="ratio >= 0.98",
    )
