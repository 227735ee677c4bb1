"""A prefix that many sequences share, read once in Triton on a device: against reading it for each.

64 sequences alias one prefix of 32,768 tokens and have 256 of their own. Peers read every row of
every sequence: our own decode, and torch's kernels on the same rows. `roofline/cascade` counts
the bytes of both ways and needs no device.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu import Act, best, instead, missing, race, torch_kernels
from bench.harness import Bench

MEMBERS, PREFIX, OWN = 64, 32768, 256
HEADS, KV_HEADS, DIM = 32, 8, 128


def run(bench: Bench) -> None:
    moved(bench)
    if (why := missing()) is not None:
        return instead(bench, "cascade", (), why)
    torch.manual_seed(bench.seed)
    for members in bench.pick((8, 64), (8,)):
        figures(bench, members, bench.pick(PREFIX, PREFIX // 4))
    return None


def moved(bench: Bench) -> None:
    """Bytes of K and V that both ways read, partial results written and read again among them."""
    from vattn.kernels.cascade import traffic
    from vattn.kernels.gpu import H100

    lengths, group = [PREFIX + OWN] * MEMBERS, (range(MEMBERS), 0, PREFIX)
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    both = traffic(lengths, [group], **heads, itemsize=2, device=H100)
    bench.figure(
        "roofline/cascade",
        both.unshared / (both.shared + both.partials),
        "times fewer bytes",
        gate=both.shared == 2 * KV_HEADS * DIM * 2 * (PREFIX + MEMBERS * OWN),
        target=">= 10",
        **both._asdict(),
    )


def figures(bench: Bench, members: int, prefix: int) -> None:
    from vattn.kernels.cascade import cascade_lse, levels
    from vattn.kernels.decode import decode_lse
    from vattn.kernels.kv import KV
    from vattn.kernels.scores import Scores

    tokens = prefix + OWN
    query = torch.randn(members, HEADS, 1, DIM, device="cuda").bfloat16()
    shape = (members, KV_HEADS, tokens, DIM)
    key, value = (torch.randn(shape, device="cuda", dtype=query.dtype) for _ in range(2))
    for rows in (key, value):
        rows[1:, :, :prefix] = rows[:1, :, :prefix]
    kv, scores = KV(key, value), Scores()
    shared = levels([(range(members), 0, prefix)], "cuda")
    ours = partial(cascade_lse, query, kv, shared, scores)
    apart = partial(decode_lse, query, kv, scores)

    def same() -> bool:
        """Both ways are equally near to each other's float32 sums: two roundings apart."""
        for mine, theirs in zip(ours(), apart(), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-3
            )
        return True

    contestants: dict[str, Act] = {
        "ours": ours,
        "unshared": apart,
        **torch_kernels(query, key, value),
    }
    taken = race(bench, contestants, bench.pick(50, 10))
    for peer in {"unshared", best(taken) or "unshared"}:
        bench.figure(
            f"cascade/{members}x{prefix}/{peer}",
            bench.versus(taken["ours"], taken[peer]),
            "us",
            gate=same,
            peer=peer,
            target="ratio >= 6" if members == MEMBERS else None,
        )
