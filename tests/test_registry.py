"""torch's registry of flash attention implementations: ours agrees with torch's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
