"""The drop-in by the Triton kernels: torch's answers, gradients of both orders, one graph, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.attention import fresh_seed
from tests.places import PLACES
from vattn import batch_invariant, explain, sdpa_gpu
from vattn import scaled_dot_product_attention as ours
from vattn import sdpa_gpu_op as op
from vattn.kernels.contract import reference
from vattn.paths import ImplError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
NATIVE = torch._C._nn.scaled_dot_product_attention
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = 21


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tensors(
    place: str,
    length: int = 3,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> list[Tensor]:
    """Query of 4 heads, K and V of 2."""
    sizes = ((4, length, dim), (2, TOKENS, dim), (2, TOKENS, value_dim or dim))
    return [torch.randn(batch, *size).to(place, dtype) for size in sizes]


def triton(*args: Any, **options: Any) -> Tensor:
    return ours(*args, enable_gqa=True, impl="triton", **options)


def native(*args: Any, **options: Any) -> Tensor:
    return NATIVE(*args, enable_gqa=True, **options)


def double(*args: Any, **options: Any) -> Tensor:
    """torch's MATH kernel in float64."""
    wide = [t.double() if isinstance(t, Tensor) and t.dtype != torch.bool else t for t in args]
    with sdpa_kernel(SDPBackend.MATH):
        return NATIVE(*wide, enable_gqa=True, **options)


def as_good(out: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """At most 3 times torch's error, and one rounding of the type (4 where sums are in it)."""
    assert out.shape == theirs.shape
    assert out.dtype == theirs.dtype
    steps = 4 if out.dtype == torch.float32 else 1
    rounding = steps * torch.finfo(out.dtype).eps * exact.abs().max().item()
    error, peer = ((t.double() - exact).abs().max().item() for t in (out, theirs))
    assert error <= 3 * peer + rounding


MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda length: None,
    "shared": lambda length: torch.rand(length, TOKENS) < 0.6,
    "keys": lambda length: torch.rand(1, 1, 1, TOKENS) < 0.6,
    "heads, float": lambda length: torch.randn(1, 4, length, TOKENS),
    "3-D": lambda length: torch.rand(4, length, TOKENS) < 0.6,
    "queries, float": lambda length: torch.randn(length, 1),
    "nothing is seen": lambda length: torch.zeros(1, 1, length, 1, dtype=torch.bool),
    "stride 0": lambda length: (torch.rand(1, 1, 1, TOKENS) < 0.6).expand(1, 4, length, TOKENS),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 18])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, length: int, dtype: torch.dtype, place: str) -> None:
    given = tensors(place, length, dtype=dtype)
    mask = MASKS[kind](length)
    mask = mask if mask is None else mask.to(place)
    out = triton(*given, mask)
    as_good(out, native(*given, mask), double(*given, mask))
    assert explain(*given, mask, enable_gqa=True, impl="triton").impl == "triton"
    if kind == "nothing is seen":
        assert not out.any()


@pytest.mark.parametrize("length", [1, 7, 16, 24])
def test_causal_is_aligned_top_left(length: int, place: str) -> None:
    given = tensors(place, length)
    out = triton(*given, is_causal=True, scale=0.4)
    as_good(
        out, native(*given, is_causal=True, scale=0.4), double(*given, is_causal=True, scale=0.4)
    )
    torch.testing.assert_close(out[:, :, :1], given[2][:, :, :1].repeat_interleave(2, 1))


@pytest.mark.parametrize("length", [1, 18])
@pytest.mark.parametrize("dims", [(8, 24), (40, 8), (13, 13), (1, 3)], ids=str)
def test_widths(dims: tuple[int, int], length: int, place: str) -> None:
    given = tensors(place, length, *dims)
    as_good(triton(*given), native(*given), double(*given))


@pytest.mark.parametrize("length", [1, 18])
@pytest.mark.parametrize("form", ["BSHD", "expanded", "part of a cache"])
def test_the_result_is_strided_as_the_query(form: str, length: int, place: str) -> None:
    query, key, value = tensors(place, length)
    if form == "BSHD":
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    elif form == "expanded":
        query, key = query[:, :1].expand(1, 4, -1, -1), key[:, :1].expand(1, 2, -1, -1)
    else:
        room = torch.full((1, 2, 2, TOKENS + 5, 8), float("nan"), device=place)
        key = room[:, 0, :, :TOKENS].copy_(key)
    out = triton(query, key, value)
    as_good(out, native(query, key, value), double(query, key, value))
    assert out.stride() == torch.empty_like(query).stride()


# ---- gradients -----------------------------------------------------------------------------------
def gradients(function: Callable[..., Tensor], leaves: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves, *rest)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, leaves, weights))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["none", "shared", "nothing is seen"])
@pytest.mark.parametrize("length", [2, 18])
def test_gradients(length: int, kind: str, dtype: torch.dtype, place: str) -> None:
    given = tensors(place, length, dtype=dtype)
    mask = MASKS[kind](length)
    mask = mask if mask is None else mask.to(place)
    exact = gradients(double, [t.double() for t in given], mask)
    for found in zip(
        gradients(triton, given, mask), gradients(native, given, mask), exact, strict=True
    ):
        as_good(*found)


def test_gradients_of_one_argument_of_a_causal_call(place: str) -> None:
    given = tensors(place, 5)
    for at in range(3):
        leaves = [t.detach().requires_grad_(i == at) for i, t in enumerate(given)]
        total = triton(*leaves, is_causal=True).sum()  # whose gradient has strides 0
        (found,) = torch.autograd.grad(total, leaves[at])
        (theirs,) = torch.autograd.grad(native(*leaves, is_causal=True).sum(), leaves[at])
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert not triton(*leaves).requires_grad


def test_gradients_of_a_query_whose_rows_overlap(place: str) -> None:
    """`empty_like` of it, as torch strides the result, has gaps in its rows. The peer is torch's
    MATH: the flash kernel of torch 2.13 for CPUs reads what is in such gaps before it is written,
    and its gradients are then anything."""
    base, (_, key, value) = torch.randn(1, 4, 64, device=place), tensors(place, dim=32)
    base = base.requires_grad_()

    def call(function: Callable[..., Tensor], of: Tensor) -> tuple[Tensor, Tensor]:
        out = function(of.unfold(2, 32, 1)[:, :, :5], key.to(of.dtype), value.to(of.dtype))
        return out, torch.autograd.grad(out.square().sum(), of)[0]

    wide = base.detach().double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        theirs = call(native, base)
    ways = call(triton, base), theirs, call(double, wide)
    assert ways[0][0].stride() == torch.empty_like(base.unfold(2, 32, 1)[:, :, :5]).stride()
    for found in zip(*ways, strict=True):
        as_good(*found)


def test_second_derivatives_are_computed_by_torch(place: str) -> None:
    """Of one tensor in several places, too."""
    query, key, _ = tensors(place, 3)
    mask = torch.rand(3, TOKENS, device=place) < 0.7

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        q, kv = query.detach().requires_grad_(), key.detach().requires_grad_()
        first = torch.autograd.grad(
            function(q, kv, kv, mask).square().sum(), (q, kv), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (q, kv)))

    with sdpa_kernel(SDPBackend.MATH):
        theirs = second(native)
    for found, model in zip(second(triton), theirs, strict=True):
        torch.testing.assert_close(found, model, atol=2e-4 * float(model.abs().max()), rtol=0)


def test_a_gradient_of_the_mask_is_refused_by_name() -> None:
    given = tensors("cpu")
    mask = torch.zeros(3, TOKENS, requires_grad=True)
    with pytest.raises(ImplError, match="the mask wants a gradient"):
        triton(*given, mask)
    with pytest.raises(ValueError, match=r"no gradient of the mask: pass mask\.detach"):
        op.attention(*given, mask, False, None)


# ---- compilers, transforms and modes -------------------------------------------------------------
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys"])
def test_compiles_to_one_graph_that_holds_the_operation(kind: str, leaf: bool, place: str) -> None:
    given = tensors(place)
    mask = MASKS[kind](3)
    mask = mask if mask is None else mask.to(place)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(triton, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*given, mask), native(*given, mask), atol=1e-5, rtol=0)
    if leaf:
        for found, theirs in zip(
            gradients(compiled, given, mask), gradients(native, given, mask), strict=True
        ):
            torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    assert all("vattn.attention" in graph for graph in graphs)


def test_one_dynamic_graph_serves_other_lengths(place: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(triton, backend="aot_eager", fullgraph=True, dynamic=True)
    query, key, value = tensors(place)
    for tokens in (TOKENS, TOKENS - 4):
        given = query, key[:, :, :tokens], value[:, :, :tokens]
        torch.testing.assert_close(compiled(*given), native(*given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "shared", "heads, float", "3-D"])
def test_vmap_over_any_argument(kind: str, place: str) -> None:
    given = [torch.stack([t, -t]) for t in tensors(place)]
    mask = MASKS[kind](3)
    for shared in ((), (1, 2)):
        arguments = [t[0] if i in shared else t for i, t in enumerate(given)]
        dims = tuple(None if i in shared else 0 for i in range(3))
        masks, at = (mask, None) if shared or mask is None else (torch.stack([mask, mask]), 0)
        masks = masks if masks is None else masks.to(place)
        out = torch.vmap(triton, in_dims=(*dims, at))(*arguments, masks)
        for i in range(2):
            one = [t if d is None else t[i] for t, d in zip(arguments, dims, strict=True)]
            expected = native(*one, masks[i] if at == 0 else masks)
            torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=0)


def test_several_gradients_at_once(place: str) -> None:
    """is_grads_batched maps the backward operation."""
    leaves = [t.requires_grad_() for t in tensors(place)]
    out = triton(*leaves)
    weights = torch.randn(2, *out.shape, device=place)
    found = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        alone = torch.autograd.grad(out, leaves, weights[i], retain_graph=True)
        for both, one in zip(found, alone, strict=True):
            torch.testing.assert_close(both[i], one)


@pytest.mark.parametrize("kind", ["none", "keys"])
def test_the_operations_pass_torchs_checks(kind: str, place: str) -> None:
    given = tensors(place)
    mask = MASKS[kind](3)
    mask = mask if mask is None else mask.to(place)
    out, lse = op.attention(*given, mask, False, 0.3)
    leaves = [t.requires_grad_() for t in given]
    checks = torch.library.opcheck(op.attention, (*leaves, mask, False, 0.3))
    assert set(checks.values()) == {"SUCCESS"}
    rest = (*(t.detach() for t in given), out, lse, mask, False, 0.3)
    checks = torch.library.opcheck(op.attention_backward, (torch.randn_like(out), *rest))
    assert set(checks.values()) == {"SUCCESS"}


def test_autocast_that_has_nothing_to_cast(place: str) -> None:
    given = tensors(place, dtype=torch.bfloat16)
    expected = triton(*given)
    with torch.autocast(place, torch.bfloat16):
        assert torch.equal(triton(*given), expected)
    with torch.autocast(place, torch.float16), pytest.raises(ImplError, match="autocast"):
        triton(*given)


# ---- bits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [1, 18])
def test_bits_do_not_depend_on_the_batch(length: int, place: str) -> None:
    query, key, value = tensors(place, length, batch=3)
    key, value = (t.repeat(1, 1, 8, 1) for t in (key, value))
    torch.use_deterministic_algorithms(True)
    try:
        with batch_invariant(128):
            together = triton(query, key, value)
            for i in range(3):
                alone = triton(query[i : i + 1], key[i : i + 1], value[i : i + 1])
                assert torch.equal(alone[0], together[i])
    finally:
        torch.use_deterministic_algorithms(False)
    exact, _ = reference(query, key, value)
    torch.testing.assert_close(together.double(), exact, atol=1e-5, rtol=0)
    assert sdpa_gpu.split_tokens() is None


def test_a_split_that_no_tile_divides_is_refused() -> None:
    for tokens in (0, -128, 100):
        with (
            pytest.raises(ValueError, match=f"split_tokens={tokens}: must be"),
            batch_invariant(tokens),
        ):
            pass
    assert not sdpa_gpu.invariant()


def test_blocks_that_are_nested_and_left_in_any_order() -> None:
    assert sdpa_gpu.split_tokens() is None
    outer, inner = batch_invariant(256), batch_invariant(128)
    with outer:
        with inner:
            assert sdpa_gpu.split_tokens() == 128
        assert sdpa_gpu.split_tokens() == 256
    first, second = batch_invariant(256), batch_invariant(128)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sdpa_gpu.split_tokens() == 128
    assert sdpa_gpu.invariant()
    second.__exit__(None, None, None)
    assert sdpa_gpu.split_tokens() is None
    assert not sdpa_gpu.invariant()


@pytest.mark.parametrize("reserved", [1, 400, 256 << 9, (256 << 9) + 1, 1 << 20, 10_000_001])
def test_parts_of_a_sequence_are_bounded_and_depend_on_its_room_alone(reserved: int) -> None:
    from vattn.kernels import deals, gpu
    from vattn.kernels.kv import KV
    from vattn.kernels.scores import Scores

    assert sdpa_gpu.cut(reserved) is None
    with batch_invariant(512):
        split = sdpa_gpu.cut(reserved)
    assert split is not None
    assert split % 128 == 0
    assert (split == 512) is (reserved <= 512 * sdpa_gpu.MOST_PARTS)
    for batch in (1, 64):
        key = torch.empty(batch, 2, reserved, 64, dtype=torch.bfloat16, device="meta")
        query = torch.empty(batch, 8, 1, 64, dtype=torch.bfloat16, device="meta")
        dealt = deals.deal_for(gpu.H100, query, KV(key, key), Scores(), split)
        assert dealt.most <= sdpa_gpu.MOST_PARTS


@pytest.mark.gpu
def test_batch_invariant_refuses_what_depends_on_the_batch() -> None:
    given = tensors("cuda")
    refused = {"dtypes differ": [t.double() for t in given], "not all 4-D": [t[0] for t in given]}
    for words, call in refused.items():
        with batch_invariant(), pytest.raises(ImplError, match=f"{words}.*block .* leave it"):
            ours(*call, enable_gqa=True)
        with batch_invariant(), pytest.raises(ImplError, match=words):
            explain(*call, enable_gqa=True)
    with batch_invariant():
        assert explain(*given, enable_gqa=True).impl == "triton"
