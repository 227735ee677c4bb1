"""Decoding over K and V of 8 bits: the numbers are widened exactly, alone and in pairs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.attention import fresh_seed
from tests.decoding import SMALL, Case, assert_close
from tests.places import PLACES
from vattn.kernels.decode import decode_lse
from vattn.kernels.gpu import Device, pretend
from vattn.kernels.kv import KV
from vattn.kernels.online import widen
from vattn.kernels.pairs import halves
from vattn.kernels.scores import Scores

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
HOPPER = Device(90, 2, 227 << 10)


@pytest.fixture(autouse=True)
def small_device(one_thread: None) -> Iterator[None]:
    """New memory holds NaN, and a launch has few programs."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pretend(SMALL):
        yield
    torch.use_deterministic_algorithms(False)


def make_fp8(name: str, dtype: torch.dtype, dim: int, place: str) -> tuple[Tensor, KV, KV]:
    """Query, K and V of 8 bits with scales, and what they stand for in float64."""
    case = Case(heads=6, tokens=2, dim=dim, value_dim=dim, dtype=dtype, place=place)
    query, kv, _, _ = case.make()
    query[0, 1] *= 300.0
    stored = kv.key.to(FP8[name]), kv.value.to(FP8[name])
    scales = torch.tensor([0.5, 3.0], device=place), torch.tensor([0.25], device=place)
    wide = (t.double() * s.view(1, -1, 1, 1) for t, s in zip(stored, scales, strict=True))
    plain = object.__new__(KV)  # float64, for the oracle alone
    for field_name, tensor in zip(("key", "value"), wide, strict=True):
        object.__setattr__(plain, field_name, tensor)
    for field_name in ("lengths", "starts", "slots"):
        object.__setattr__(plain, field_name, getattr(kv, field_name))
    return query, KV(*stored, kv.lengths, key_scale=scales[0], value_scale=scales[1]), plain


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("device", [SMALL, HOPPER], ids=["before 8.9", "since 8.9"])
@pytest.mark.parametrize(
    ("name", "dtype", "dim"),
    [
        ("e4m3", torch.bfloat16, 32),
        ("e5m2", torch.float16, 32),
        ("e4m3", torch.float16, 13),
        ("e4m3", torch.float32, 32),
        ("e5m2", torch.float32, 12),
    ],
)
def test_8_bit_rows(name: str, dtype: torch.dtype, dim: int, device: Device, place: str) -> None:
    query, kv, plain = make_fp8(name, dtype, dim, place)
    with pretend(device):
        out, lse = decode_lse(query, kv, Scores(causal="bottom_right"))
    assert_close(out, lse, query, plain, Scores(causal="bottom_right"))


@triton.jit
def _widen_all(codes, singles, even, odd, PAIRS: tl.constexpr, STORED: tl.constexpr):
    n = tl.arange(0, 256)
    tl.store(
        singles + n, widen(tl.load(codes.to(tl.pointer_type(tl.uint8)) + n), tl.float32, STORED)
    )
    n = tl.arange(0, 128)
    low, high = halves(tl.load(codes.to(tl.pointer_type(tl.int16)) + n), PAIRS)
    tl.store(even + n, low)
    tl.store(odd + n, high)


@pytest.mark.parametrize(
    ("name", "pairs", "unit"),
    [("e4m3", "e4m3", 256), ("e4m3", "e4m3 converted", 1), ("e5m2", "e5m2", 1)],
)
def test_every_8_bit_number_is_widened_exactly(name: str, pairs: str, unit: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    singles, even, odd = torch.zeros(256), torch.zeros(128).half(), torch.zeros(128).half()
    _widen_all[(1,)](codes, singles, even, odd, PAIRS=pairs, STORED=name)
    right = codes.view(FP8[name]).float()
    torch.testing.assert_close(singles, right, atol=0, rtol=0, equal_nan=True)
    paired = torch.stack([even, odd], 1).flatten().float() * unit
    torch.testing.assert_close(paired, right, atol=0, rtol=0, equal_nan=True)
