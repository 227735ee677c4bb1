"""Prefill in Triton on a device: against the matrix rate and every attention kernel there is.

Plain Triton, and on Hopper the Gluon version with FlashAttention-3's schedule beside it. `flop` are
those of the scores that are seen. Without a device: the floor of the data sheets, and what the
compiled kernels are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.gpu import (
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
from bench.shapes import PREFILL, Shape

TARGETS = {"b1_16k": 480, "b1_16k_causal": 450}  # TFLOP/s of plain Triton on Hopper
HOPPER = {"b1_16k": 640, "b1_16k_causal": 600}


def run(bench: Bench) -> None:
    if (why := missing()) is not None:
        return instead(bench, "prefill", PREFILL, why)
    torch.manual_seed(bench.seed)
    _, product = rates(bench)
    for shape in bench.pick(PREFILL, PREFILL[:2]):
        figures(bench, shape, product)
    return None


def figures(bench: Bench, shape: Shape, product: float) -> None:
    """Ours against all others; a version of ours that this device cannot run is left out."""
    from vattn.kernels.kv import KV
    from vattn.kernels.prefill import prefill
    from vattn.kernels.prefill_hopper import prefill_hopper
    from vattn.kernels.scores import Scores

    query, key, value = inputs(shape)
    kv, scores = KV(key, value), Scores(causal="bottom_right" if shape.causal else None)
    versions: dict[str, Callable[[], torch.Tensor]] = {
        "ours": partial(prefill, query, kv, scores),
        "hopper": partial(prefill_hopper, query, kv, scores),
    }
    square = shape.queries == max(shape.lengths)
    rivals = torch_kernels(query, key, value, is_causal=shape.causal) if square else {}
    rivals["torch flex"] = flex(query, key, value, causal=shape.causal)
    rivals |= installed(bench, query, key, value, causal=shape.causal)
    taken = race(bench, {**versions, **rivals}, bench.pick(30, 5))
    rival = best({name: sample for name, sample in taken.items() if name != "hopper"})
    teraflops = {name: round(shape.flop / sample.p50 / 1e12, 1) for name, sample in taken.items()}

    def right(attend: Callable[[], torch.Tensor]) -> bool:
        return close(attend(), query, key, value, shape.causal)

    for name, attend in versions.items():
        if name not in taken:
            continue
        bench.figure(
            f"prefill/{shape.name}" + ("" if name == "ours" else f"/{name}"),
            taken[name] if rival is None else bench.versus(taken[name], taken[rival]),
            "us",
            gate=partial(right, attend),
            peer=rival,
            target="ratio >= 0.97",
            teraflops=teraflops,
            of_matmul=shape.flop / taken[name].p50 / product,
        )
        least = (TARGETS if name == "ours" else HOPPER).get(shape.name)
        if least is not None:
            bench.figure(
                f"prefill/{shape.name}/{name}/rate",
                teraflops[name],
                "TFLOP/s",
                gate=True,
                target=f">= {least}",
            )
