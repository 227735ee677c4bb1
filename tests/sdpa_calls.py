"""Calls of vattn.scaled_dot_product_attention that several test files make, and their yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vattn import explain, paths
from vattn.kernels import stream

NATIVE = torch._C._nn.scaled_dot_product_attention


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run from here to the end of the test, in order."""
    names: list[str] = []
    run = paths.run

    def noted(impl: str, *args: Any) -> Tensor:
        names.append(impl)
        return run(impl, *args)

    monkeypatch.setattr(paths, "run", noted)
    return names


def decode(
    batch: int = 2,
    heads: int = 8,
    kv_heads: int = 2,
    length: int = 1,
    tokens: int = 4200,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    token_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, K and V of a decode call; as it is, one that the table gives to a kernel."""
    query = torch.randn(batch, heads, length, dim).to(dtype)
    if token_major:
        kv = torch.randn(2, batch, tokens, kv_heads, dim).to(dtype).transpose(2, 3)
    else:
        kv = torch.randn(2, batch, kv_heads, tokens, dim).to(dtype)
    return query, kv[0], kv[1]


def usable(impl: str) -> None:
    """Skip where the kernel's optional package is missing or its processor unknown."""
    if impl == "stream" and (why := stream.available()) is not None:
        pytest.skip(why)


def close(out: Tensor, native: Tensor) -> None:
    """Equal to torch's own answer within two roundings of the type, and laid out alike."""
    eps = max(torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps * 8)
    scale = max(1.0, native.abs().max().item()) if native.numel() else 1.0
    torch.testing.assert_close(out, native, atol=2 * eps * scale, rtol=0)
    assert out.stride() == native.stride()


def layouts(length: int) -> dict[str, Tensor]:
    fused = torch.randn(2, length, 12, 64)
    return {
        "contiguous": torch.randn(2, 8, length, 64),
        "BSHD": torch.randn(2, length, 8, 64).transpose(1, 2),
        "part of a fused projection": fused[:, :, :8].transpose(1, 2),
        "part of a cache": torch.randn(2, 8, length + 3, 64)[:, :, :length],
        "expanded": torch.randn(1, 8, 1, 64).expand(2, 8, length, 64),
        "batch last": torch.randn(8, length, 64, 2).permute(3, 0, 1, 2),
        "every second element": torch.randn(2, 8, length, 128)[..., ::2],
        "BSHD, every second element": torch.randn(2, length, 8, 128)[..., ::2].transpose(1, 2),
    }


def refusal(impl: str, call: tuple[Any, ...]) -> str:
    """Why a kernel does not serve a grouped call by name; empty if it does."""
    try:
        explain(*call, enable_gqa=True, impl=impl)
    except paths.ImplError as error:
        return str(error)
    return ""
