"""Grouped matrix products: the contract of the folder, and what they hold in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.attention import MASKS, ROWS, Case, assert_exact, fresh_seed
from vattn.kernels import grouped as module
from vattn.kernels.grouped import grouped, grouped_lse

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 17])
def test_exact(length: int, dtype: torch.dtype, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 16 * 3 * 10)
    assert_exact(Case(length=length, dtype=dtype, rows=rows, value_dim=24), grouped_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("length", [1, 5])
def test_masks(length: int, mask: str, kind: str, dtype: torch.dtype) -> None:
    assert_exact(Case(length=length, mask=mask, kind=kind, dtype=dtype), grouped_lse)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize(("batch", "kv_heads", "groups"), [(1, 1, 1), (3, 1, 7), (1, 5, 2)])
def test_head_counts_and_scales(batch: int, kv_heads: int, groups: int, scale: float) -> None:
    assert_exact(Case(batch=batch, kv_heads=kv_heads, groups=groups, scale=scale), grouped_lse)


@pytest.mark.parametrize("lost", ["batch", "kv_heads", "length", "keys"])
def test_nothing_in_is_nothing_out(lost: str) -> None:
    assert_exact(dataclasses.replace(Case(), **{lost: 0}), grouped_lse)


def test_rows_of_no_elements_weigh_all_keys_alike() -> None:
    query, key, value, _ = Case(dim=0).inputs()
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(4, dim=1)
    torch.testing.assert_close(grouped(query, key, value), mean)


def test_any_stride() -> None:
    query, key, value, _ = Case(length=3).inputs()
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value)]
    torch.testing.assert_close(grouped(*turned), grouped(query, key, value))


@pytest.mark.parametrize("mask", ["none", "shared", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_holds_the_scores_once(dtype: torch.dtype, mask: str) -> None:
    case = Case(batch=4, kv_heads=2, groups=8, length=16, keys=2048, dtype=dtype, mask=mask)
    query, key, value, given = case.inputs()
    scores = 4 * 4 * 2 * 8 * 16 * 2048
    with torch.profiler.profile(profile_memory=True, with_stack=False) as profile:
        grouped(query, key, value, given)
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert scores <= peak < 2 * scores
