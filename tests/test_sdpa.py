"""vattn.scaled_dot_product_attention against a float64 oracle, and against torch's own answers."""

from __future__ import annotations

import secrets

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

from vattn.sdpa import explain, scaled_dot_product_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [1, 2, 3, 7, 16, 17]


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed every run; pytest prints it with the failing test's locals."""
    value = secrets.randbits(32)
    torch.manual_seed(value)
    print("seed", value)
    return value


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention in float64, written as its definition: one score matrix per query head."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return weights @ value


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def cache_rows(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, rows: str):
    """K and V as views into one range of a cache, NaN in every row that is not theirs."""
    reserved = tokens + 5
    if rows == "head_major":
        base = poisoned(batch, 2, heads, reserved, dim, dtype=dtype)
        key, value = base[:, 0, :, :tokens], base[:, 1, :, :tokens]
    else:
        base = poisoned(batch, 2, reserved, heads, dim, dtype=dtype)
        key, value = (base[:, i, :tokens].transpose(1, 2) for i in (0, 1))
    key.copy_(torch.randn(batch, heads, tokens, dim))
    value.copy_(torch.randn(batch, heads, tokens, dim))
    return key, value


def assert_as_good_as_torch(out: Tensor, exact: Tensor, native: Tensor) -> None:
    """Error against float64 at most 3x torch's own plus one rounding of the output."""
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().item()
    allowed = 3 * (native.double() - exact).abs().max().item() + rounding
    assert (out.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("rows", ["head_major", "token_major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_grouped_heads_match_float64(length: int, dtype: torch.dtype, rows: str) -> None:
    key, value = cache_rows(2, 3, 37, 16, dtype, rows)
    query = torch.randn(2, 12, length, 16).to(dtype)
    out = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    native = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert out.shape == native.shape
    assert out.dtype == dtype
    assert_as_good_as_torch(out, oracle(query, key, value), native)


def masks(kind: str, batch: int, heads: int, length: int, keys: int) -> Tensor:
    shape = {
        "per_batch": (batch, 1, length, keys),
        "per_head": (batch, heads, length, keys),
        "shared": (length, keys),
        "per_key": (batch, 1, 1, keys),
        "per_head_key": (1, heads, 1, keys),
    }[kind]
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("kind", ["per_batch", "per_head", "shared", "per_key", "per_head_key"])
@pytest.mark.parametrize("length", [1, 5])
def test_masks(length: int, kind: str, additive: bool, dtype: torch.dtype) -> None:
    key, value = cache_rows(2, 2, 29, 8, dtype, "head_major")
    query = torch.randn(2, 8, length, 8).to(dtype)
    mask = masks(kind, 2, 8, length, 29)
    if additive:
        mask = torch.randn(mask.shape).masked_fill(~mask, float("-inf")).to(dtype)
    out = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    native = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert_as_good_as_torch(out, oracle(query, key, value, mask), native)


@pytest.mark.parametrize("length", [1, 4, 17])
def test_causal_is_aligned_top_left(length: int) -> None:
    key, value = cache_rows(1, 2, 11, 8, torch.float32, "head_major")
    query = torch.randn(1, 4, length, 8)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    exact = oracle(query, key, value, causal=True)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)
    first = value[:, :, :1].repeat_interleave(2, dim=1)
    torch.testing.assert_close(out[:, :, :1], first)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_row_that_attends_to_nothing_is_zero(additive: bool, length: int) -> None:
    key, value = cache_rows(2, 2, 13, 8, torch.float32, "head_major")
    query = torch.randn(2, 6, length, 8)
    mask = torch.ones(2, 1, length, 13, dtype=torch.bool)
    mask[1, 0, -1] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    out = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert torch.equal(out[1, :, -1], torch.zeros(6, 8))
    assert out[0].abs().min() > 0


def test_scale_zero_and_negative() -> None:
    key, value = cache_rows(1, 2, 9, 8, torch.float32, "head_major")
    query = torch.randn(1, 4, 1, 8)
    for scale in (0.0, -0.7, 3):
        out = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        exact = oracle(query, key, value, scale=scale)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


def test_k_and_v_are_not_copied() -> None:
    key, value = cache_rows(2, 4, 4096, 64, torch.float32, "head_major")
    query = torch.randn(2, 16, 1, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        scaled_dot_product_attention(query, key, value, enable_gqa=True)
    taken = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert taken < key.numel() * key.element_size() / 8


@pytest.mark.parametrize(
    ("query", "key", "value", "gqa"),
    [
        ((3, 5, 8), (3, 7, 8), (3, 7, 8), False),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), False),
        ((1, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), True),
        ((2, 4, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8), True),
        ((2, 4, 0, 8), (2, 2, 3, 8), (2, 2, 3, 8), True),
    ],
)
def test_every_other_call_is_torchs(query: tuple, key: tuple, value: tuple, gqa: bool) -> None:
    tensors = [torch.randn(shape) for shape in (query, key, value)]
    out = scaled_dot_product_attention(*tensors, enable_gqa=gqa)
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors, enable_gqa=gqa))


def test_gradients_are_torchs() -> None:
    shapes = [(1, 4, 3, 8), (1, 2, 6, 8), (1, 2, 6, 8)]
    ours = [torch.randn(s, requires_grad=True) for s in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    scaled_dot_product_attention(*ours, enable_gqa=True).square().sum().backward()
    F.scaled_dot_product_attention(*theirs, enable_gqa=True).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("installed", [False, True])
def test_bias_classes_keep_their_meaning(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, 2, n, 8) for n in (4, 6, 6))
    native = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if installed:
        monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    out = scaled_dot_product_attention(query, key, value, causal_upper_left(4, 6))
    torch.testing.assert_close(out, native)


def test_k_and_v_of_different_lengths_are_refused() -> None:
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="6 tokens but value has 5"):
        scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("shape", [(2, 4, 3, 8), (2, 4, 1, 8)], ids=str)
@pytest.mark.parametrize("mask_shape", [(0, 70), (1, 1, 0, 70), (2, 4, 0, 70), (1, 0, 70)], ids=str)
def test_a_float32_mask_over_float64_is_added(shape: tuple, mask_shape: tuple) -> None:
    """torch's kernel reads the bytes of the mask as float64, past its end."""
    mask = torch.randn([n or shape[2] for n in mask_shape])
    query, key, value = (
        torch.randn(s, dtype=torch.float64) for s in (shape, (2, 2, 70, 8), (2, 2, 70, 8))
    )
    out = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(out, oracle(query, key, value, mask))
    query.requires_grad_()
    assert torch.equal(
        scaled_dot_product_attention(query, key, value, mask, enable_gqa=True),
        F.scaled_dot_product_attention(query, key, value, mask.double(), enable_gqa=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-2, -0.3, 0, 0.0, -0.0])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_causal_with_a_scale_of_zero_or_less(length: int, scale: float, dtype: torch.dtype) -> None:
    """torch's kernel multiplies the -inf of hidden keys by the scale and returns NaN."""
    key, value = cache_rows(1, 2, 11, 8, dtype, "head_major")
    query = torch.randn(1, 4, length, 8).to(dtype).requires_grad_()
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    exact = oracle(query, key, value, causal=True, scale=scale)
    torch.testing.assert_close(
        out.double(), exact, atol=8 * torch.finfo(dtype).eps + 1e-6, rtol=0.02
    )
    grad = torch.autograd.grad(out.double().sum(), query)[0]
    assert grad.isfinite().all()
    assert grad.abs().max() > 0 or scale == 0 or length == 1


EMPTY = {
    "no queries": ((2, 4, 0, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
    "no keys": ((2, 4, 3, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    "no keys, one query": ((2, 4, 1, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    "no batch": ((0, 4, 1, 8), (0, 2, 9, 8), (0, 2, 9, 8)),
    "no heads": ((2, 0, 1, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
    "no head_dim": ((2, 4, 1, 0), (2, 2, 9, 0), (2, 2, 9, 0)),
    "no head_dim in K": ((2, 4, 1, 0), (2, 2, 9, 0), (2, 2, 9, 8)),
    "no head_dim in V": ((2, 4, 1, 8), (2, 2, 9, 8), (2, 2, 9, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_dimensions(name: str, causal: bool, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(shape).to(dtype) for shape in EMPTY[name])
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    native = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    assert (out.shape, out.dtype, out.stride()) == (native.shape, native.dtype, native.stride())
    assert torch.equal(out, native)
    if "keys" in name:
        assert not out.any()
    if name == "no head_dim in K" and not causal:
        mean = value.mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
        torch.testing.assert_close(out, mean)


@pytest.mark.parametrize("length", [1, 2, 4, 16])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_bottom_right_causality_of_a_few_queries_is_a_mask(additive: bool, length: int) -> None:
    """What speculative decoding asks: L new tokens behind S - L old ones."""
    tokens = 3000
    key, value = cache_rows(2, 2, tokens, 64, torch.float32, "token_major")
    query = torch.randn(2, 8, length, 64)
    mask = torch.ones(length, tokens, dtype=torch.bool).tril(diagonal=tokens - length)
    kept = torch.zeros(length, tokens).masked_fill(~mask, float("-inf")) if additive else mask
    out = scaled_dot_product_attention(query, key, value, kept, enable_gqa=True)
    torch.testing.assert_close(out.double(), oracle(query, key, value, mask), atol=1e-5, rtol=0)
    assert explain(query, key, value, kept, enable_gqa=True).impl != "native"


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 0), (2, 1, 5, 0), (2, 8, 5, 0), (5, 0)], ids=str)
def test_a_call_allocates_less_than_twice_its_scores(shape: tuple, kind: str) -> None:
    tokens = 4096
    key, value = cache_rows(2, 2, tokens, 16, torch.float32, "head_major")
    query = torch.randn(2, 8, 5, 16)
    mask = torch.rand([n or tokens for n in shape]) < 0.7
    mask = torch.randn(mask.shape) if kind == "float" else mask
    scores = 2 * 8 * 5 * tokens * 4
    for impl in ("auto", "packed", "grouped"):
        with torch.profiler.profile(profile_memory=True) as profile:
            scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, impl=impl)
        taken = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
        assert taken < 2 * scores, f"{impl}: {taken / scores:.2f} times the scores"


def test_wrong_head_count_is_torchs_error() -> None:
    query, key = torch.randn(1, 3, 1, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(RuntimeError, match="divide"):
        scaled_dot_product_attention(query, key, key, enable_gqa=True)


def test_compiles_as_one_graph() -> None:
    key, value = cache_rows(1, 2, 8, 8, torch.float32, "head_major")
    query = torch.randn(1, 4, 1, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), call(query, key, value))
