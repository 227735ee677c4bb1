"""Attention with a mask in Triton on a device: against torch's kernels that take one.

    padding    [B, 1, 1, S] bool: half of the batch is half as long
    blocks     [L, S] bool, document blocks of 1,024 tokens: what is masked costs nothing
    bias       [1, Hq, L, S] additive, in the query's dtype

`unmasked` is our own kernel without a mask, for what the mask costs. Without a device: the floor of
the data sheets, and what the compiled kernels are made of.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as native

from bench.gpu import best, inputs, instead, missing, race, torch_kernels
from bench.harness import Bench
from bench.shapes import Shape

SHAPE = Shape("b4_4k", "prefill", 4, 4096, 4096, 32, 8)
DOCUMENT = 1024
TARGETS = {"padding": "ratio >= 2"}


def run(bench: Bench) -> None:
    if (why := missing()) is not None:
        return instead(bench, "prefill", [SHAPE], why)
    torch.manual_seed(bench.seed)
    for name, mask in masks(SHAPE).items():
        figures(bench, name, mask)
    return None


def masks(shape: Shape) -> dict[str, Tensor]:
    """One mask of each form."""
    tokens = torch.arange(shape.queries, device="cuda")
    half = torch.full((shape.batch, 1, 1, 1), shape.queries, device="cuda")
    half[::2] //= 2
    document = tokens // DOCUMENT
    bias = torch.randn(1, shape.heads, shape.queries, shape.queries, device="cuda")
    return {
        "padding": tokens < half,
        "blocks": document[:, None] == document,
        "bias": bias.bfloat16(),
    }


def figures(bench: Bench, name: str, mask: Tensor) -> None:
    from vattn.kernels.kv import KV
    from vattn.kernels.prefill import prefill

    query, key, value = inputs(SHAPE)
    ours = partial(prefill, query, KV(key, value), mask=mask)
    plain = partial(prefill, query, KV(key, value))

    def close() -> bool:
        """The first sequence is as near to float64 as torch's kernel is."""
        one = mask[:1] if mask.dim() == 4 else mask
        bias = one if one.dtype == torch.bool else one.double()
        q, k, v = (t[:1].double() for t in (query, key, value))
        wanted = native(q, k, v, attn_mask=bias, enable_gqa=True)
        theirs = native(query[:1], key[:1], value[:1], attn_mask=one, enable_gqa=True)
        allowed = 3 * (theirs - wanted).abs().max() + torch.finfo(query.dtype).eps
        error = (ours()[:1] - wanted).abs().max()
        assert error <= allowed, f"{error:.2e} > {allowed:.2e}"
        return True

    rivals = torch_kernels(query, key, value, attn_mask=mask)
    taken = race(bench, {"ours": ours, **rivals, "unmasked": plain}, bench.pick(30, 5))
    rival = best({each: sample for each, sample in taken.items() if each != "unmasked"})
    bench.figure(
        f"masked/{name}",
        taken["ours"] if rival is None else bench.versus(taken["ours"], taken[rival]),
        "us",
        gate=close,
        peer=rival,
        target=TARGETS.get(name),
        unmasked_us=1e6 * taken["unmasked"].p50,
    )
