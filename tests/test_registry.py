"""torch's registry of flash attention implementations: ours agrees with torch's kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.places import PLACES
from tests.ways import NATIVE, activated, counted, grouped, left_as_found
from vattn import registry

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    with left_as_found() as value:
        yield value


MASKS = {
    "none": lambda: None,
    "batch": lambda: torch.rand(2, 1, 3, 37) < 0.6,
    "heads": lambda: torch.rand(1, 8, 3, 37) < 0.6,
    "keys": lambda: torch.rand(1, 37) < 0.6,
    "float": lambda: torch.randn(3, 37),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("token_major", [False, True])
def test_registry_agrees_with_torch(token_major: bool, dtype: torch.dtype, mask: str) -> None:
    """Results, strides and gradients, against torch's own kernel."""
    shapes = [(2, 8, 3, 16), (2, 2, 37, 16), (2, 2, 37, 16)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if token_major:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    keep = MASKS[mask]()
    expected = NATIVE(*tensors, keep, enable_gqa=True)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weights).sum(), tensors)
    with activated(), counted() as calls:
        out = NATIVE(*tensors, keep, enable_gqa=True)
        found = torch.autograd.grad((out * weights).sum(), tensors)
        assert calls() == 1
    assert out.stride() == expected.stride()
    slack = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip((out, *found), (expected, *grads), strict=True):
        torch.testing.assert_close(one, other, atol=slack, rtol=slack)


def test_registry_leaves_other_calls_to_torch() -> None:
    query, key, value = (torch.randn(1, 4, n, 8) for n in (3, 6, 6))
    expected = NATIVE(query, key, value, is_causal=True)
    with activated():
        assert torch.equal(NATIVE(query, key, value, is_causal=True), expected)


# ---- CUDA ----------------------------------------------------------------------------------------
def cuda_call(place: str, length: int = 1, tokens: int = 1030, dtype: torch.dtype = torch.float16):
    """Query of 4 heads, K and V of 2, as torch's flash kernel for CUDA gets them."""
    sizes = ((1, 4, length, 16), (1, 2, tokens, 16), (1, 2, tokens, 16))
    return [torch.randn(size).to(place, dtype) for size in sizes]


class Kernel:
    """Where torch's own kernel is called, on any device: the calls, and nothing is computed."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call_boxed(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        self.calls.append((args, options))
        return (None,) * 9


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_the_kernel_for_cuda_returns_what_torchs_does(place: str, length: int) -> None:
    tensors = cuda_call(place, length)
    kernel = Kernel()
    found = registry._ActivatedCuda(kernel).call(None, *tensors, scale=0.3)
    assert not kernel.calls
    metas = (t.to("meta") for t in tensors)
    model = torch.ops.aten._scaled_dot_product_flash_attention(*metas, scale=0.3)
    for ours, theirs in zip(found, model, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.shape, ours.dtype, ours.stride()) == (
                (theirs.shape, theirs.dtype, theirs.stride())
            )
        else:
            assert ours == theirs
    wide = [t.cpu().repeat_interleave(4 // t.shape[1], 1) for t in tensors]
    exact = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.double() for t in wide), scale=0.3
    )
    torch.testing.assert_close(found[0].cpu().double(), exact[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1].cpu().double(), exact[1], atol=1e-4, rtol=0)


OTHERS = {
    "dropout": (cuda_call, {"dropout_p": 0.1}),
    "causal": (cuda_call, {"is_causal": True}),
    "a debug mask": (cuda_call, {"return_debug_mask": True}),
    "few keys": (lambda place: cuda_call(place, tokens=40), {}),
    "many queries": (lambda place: cuda_call(place, length=17), {}),
    "float32": (lambda place: cuda_call(place, dtype=torch.float32), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_for_cuda_leaves_to_torchs(name: str) -> None:
    make, options = OTHERS[name]
    tensors, kernel = make("cpu"), Kernel()
    registry._ActivatedCuda(kernel).call("keys", *tensors, **options)
    ((args, rest),) = kernel.calls
    expected = (
        "keys",
        *tensors,
        *({"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False} | options).values(),
    )
    assert all(a is b or a == b for a, b in zip(args, expected, strict=True))
    assert rest == {"scale": None}


@pytest.mark.gpu
def test_torchs_flash_kernel_for_cuda_is_switched_and_given_back() -> None:
    tensors = [t.requires_grad_() for t in cuda_call("cuda", 2, 2048)]

    def both() -> list[torch.Tensor]:
        out = NATIVE(*tensors, enable_gqa=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    theirs = both()
    with activated(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = both()
    for ours, model in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, model, atol=2e-2, rtol=2e-2)
    assert all(map(torch.equal, both(), theirs))


def test_registering_changes_no_call() -> None:
    registry.register()
    registry.register()
    assert "vattn" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    tensors = grouped()
    with counted() as calls:
        NATIVE(*tensors, enable_gqa=True)
    assert calls() == 0


def test_a_torch_without_the_registry_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.delattr(torch.nn.attention, "register_flash_attention_impl")
        with pytest.raises(registry.RegistryError, match=r"use vattn\.patch\(\)"):
            registry.register()
    registry.register()
    with monkeypatch.context() as older:
        older.delattr(torch.library, "get_kernel")
        with pytest.raises(registry.RegistryError, match=r"use vattn\.patch\(\)"):
            torch.nn.attention.activate_flash_attention_impl("vattn")
