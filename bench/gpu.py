"""Timing on a device: cold caches, the rates of the same run, and every attention kernel installed.

A contestant is timed by events around its launch, with more bytes than the second-level cache holds
written before each: K and V of a decode step were last read a whole model ago. Contestants take
turns, so that a clock that falls falls on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Bench
from bench.shapes import Shape
from bench.timing import Sample

Act = Callable[[], object]
COPIED = 1 << 30
SIDE = 8192  # of the matrices whose product gives the matrix rate
FLUSHES = 2  # times the second-level cache
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
}


def missing() -> str | None:
    """Why nothing can be timed here, or None."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def instead(bench: Bench, family: str, shapes: Iterable[Shape], why: str) -> None:
    """What can be said without a device: the floors of ``shapes``, and what the compiled kernels of
    configurations named ``family/...`` are made of (`python -m bench aot`)."""
    from bench.compiled import table
    from bench.roofline import floor

    bench.skip(f"{why}. Instead: floors of the data sheet, and the compiled kernels")
    for shape in shapes:
        floor(bench, shape)
    rows = table.load()
    if rows is None:
        bench.note("bench/results/aot.json is of another triton: python -m bench aot compiles anew")
    for row, code in (rows or {}).items():
        if f" {family}/" in row:
            bench.figure(
                f"compiled/{row}",
                code.loop_instructions,
                "instructions in the loop",
                gate=code.spill_bytes == 0 and code.programs > 0,
                **asdict(code),
            )


def timed_on_device(repeat: int, *acts: Act, cold: bool = False) -> list[Sample]:
    """Device time of each function, in interleaved rounds; ``cold`` with nothing in the cache."""
    spent: list[list[tuple[Any, Any]]] = [[] for _ in acts]
    evict = evictor() if cold else None
    for turn in range(3 + repeat):
        for act, pairs in zip(acts, spent, strict=True):
            if evict is not None:
                evict()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            act()
            pair[1].record()
            if turn >= 3:
                pairs.append(pair)
    torch.cuda.synchronize()
    return [Sample(tuple(a.elapsed_time(b) / 1e3 for a, b in pairs)) for pairs in spent]


def evictor() -> Act:
    """Write more than the second-level cache holds."""
    held = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(FLUSHES * held, dtype=torch.uint8, device="cuda").zero_


def race(bench: Bench, contestants: Mapping[str, Act], repeat: int) -> dict[str, Sample]:
    """Time all that can run, from a cold cache; who fails is left out with the reason."""
    able = {}
    for name, act in contestants.items():
        try:
            act()
            torch.cuda.synchronize()
            able[name] = act
        except Exception as error:  # a rival may refuse a call in any way
            bench.missing[name] = " ".join(str(error).split())[:200]
            bench.note(f"{name} is left out: {bench.missing[name]}")
    samples = timed_on_device(repeat, *able.values(), cold=True)
    return dict(zip(able, samples, strict=True))


def rates(bench: Bench) -> tuple[float, float]:
    """Bytes a second of a copy and FLOP a second of a bfloat16 product, each shown as a figure."""
    source = torch.ones(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    repeat = bench.pick(50, 10)
    copy, product = timed_on_device(repeat, partial(target.copy_, source), partial(torch.mm, a, a))
    moved, computed = 2 * COPIED / copy.p50, 2 * SIDE**3 / product.p50
    bench.figure("copy", moved / 1e9, "GB/s", gate=torch.equal(source, target))
    bench.figure("matmul", computed / 1e12, "TFLOP/s", gate=bool((a @ a).isfinite().all()))
    return moved, computed


def inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, L, D], K and V [B, Hkv, S, D] of random rows, S the longest length."""
    longest = max(shape.lengths)
    query = torch.randn(shape.batch, shape.heads, shape.queries, shape.dim, device="cuda")
    key, value = (
        torch.randn(shape.batch, shape.kv_heads, longest, shape.dim, device="cuda", dtype=dtype)
        for _ in range(2)
    )
    return query.to(dtype), key, value


def torch_kernels(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> dict[str, Act]:
    """torch's own kernels by name, as `scaled_dot_product_attention` would be called."""

    def one(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

    return {name: partial(one, backend) for name, backend in BACKENDS.items()}


def installed(
    bench: Bench, query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> dict[str, Act]:
    """FlashAttention 2, 3 and FlashInfer where they are installed; ``causal`` is bottom-right."""
    rows = tuple(t.transpose(1, 2) for t in (query, key, value))
    found: dict[str, Act] = {}
    for name, module in (("flash_attn", "flash_attn"), ("flash_attn_3", "flash_attn_interface")):
        rival = bench.peer(module)
        if rival is not None:
            attend = rival.flash_attn_with_kvcache
            found[name] = partial(attend, rows[0], rows[1], rows[2], causal=causal)
    rival = bench.peer("flashinfer")
    if rival is not None and query.shape[0] == 1:
        single = tuple(t[0] for t in rows)
        if query.shape[2] == 1:
            one = rival.single_decode_with_kv_cache
            found["flashinfer"] = partial(
                one, single[0][0], single[1], single[2], use_tensor_cores=True
            )
        else:
            many = rival.single_prefill_with_kv_cache
            found["flashinfer"] = partial(many, *single, causal=causal)
    return found


def flex(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Act:
    """torch's FlexAttention, compiled for these shapes; ``causal`` is bottom-right."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    block = None
    if causal:
        before = key.shape[2] - query.shape[2]
        block = create_block_mask(
            lambda b, h, q, k: q + before >= k,
            None,
            None,
            query.shape[2],
            key.shape[2],
            device="cuda",
        )
    return partial(compiled, query, key, value, block_mask=block, enable_gqa=True)


def close(ours: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Ours is as near to float64 as torch's float32-accumulating kernel is: three times its error
    and a rounding, on the first and the last sequence, a KV head at a time."""
    from vattn.kernels.contract import reference

    groups, before = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    rows = torch.arange(query.shape[2], device=query.device)[-256:]
    seen = torch.arange(key.shape[2], device=query.device) <= rows[:, None] + before
    mask = seen if causal else None
    for b in {0, query.shape[0] - 1}:
        for h in range(key.shape[1]):
            heads = slice(h * groups, (h + 1) * groups)
            given = (
                query[b : b + 1, heads, -256:],
                key[b : b + 1, h, None],
                value[b : b + 1, h, None],
            )
            truth, _ = reference(*given, mask)
            native = scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)
            rounding = torch.finfo(query.dtype).eps * truth.abs().max().item()
            allowed = 3 * (native.double() - truth).abs().max().item() + rounding
            error = (ours[b : b + 1, heads, -256:].double() - truth).abs().max().item()
            assert error <= allowed, f"sequence {b}, KV head {h}: {error:.2e} > {allowed:.2e}"
    return True


def best(samples: Mapping[str, Sample]) -> str | None:
    """The fastest of all but ours."""
    rivals = {name: sample.p50 for name, sample in samples.items() if name != "ours"}
    with suppress(ValueError):
        return min(rivals, key=lambda name: rivals[name])
    return None
