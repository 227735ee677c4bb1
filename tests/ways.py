"""Every way into the drop-in, and a call of every kind, for the tests of what catches what."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention as earlier

import vattn
from tests.models import model, prompts
from vattn import dropin, registry
from vattn.dropin import SDPAMode, patch
from vattn.sdpa import scaled_dot_product_attention as ours

NATIVE = torch._C._nn.scaled_dot_product_attention
HERE = sys.modules[__name__]


@contextlib.contextmanager
def left_as_found() -> Iterator[int]:
    """A fresh seed, printed with a failure; and nothing that a way in changes stays changed."""
    value = secrets.randbits(32)
    torch.manual_seed(value)
    print("seed", value)
    before = state()
    yield value
    assert state() == before


def state() -> dict[str, Any]:
    """Everything that a way in may change, by identity."""
    return {
        "F": {name: id(value) for name, value in vars(F).items()},
        "bias": {name: id(value) for name, value in vars(CausalBias).items()},
        "here": id(earlier),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "flash": torch.nn.attention.current_flash_attention_impl(),
        "places": [place for place in dropin._places.values() if place.layers],
    }


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count how often our function, or our kernel in torch's registry, runs in this thread."""
    codes = (ours.__code__, registry._Activated._call.__code__)
    calls = 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code in codes

    sys.setprofile(look)
    try:
        yield lambda: calls
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def activated() -> Iterator[None]:
    registry.register()
    torch.nn.attention.activate_flash_attention_impl("vattn")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@contextlib.contextmanager
def patch_and_mode() -> Iterator[None]:
    with patch(), SDPAMode():
        yield


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "patch": patch,
    "modules": lambda: patch(modules=[HERE]),
    "fastpath": lambda: patch(fastpath=False),
    "mode": SDPAMode,
    "patch_and_mode": patch_and_mode,
    "registry": activated,
}


# ---- calls ---------------------------------------------------------------------------------------
def grouped() -> tuple[Tensor, Tensor, Tensor]:
    """A decode step: 4 query heads over 2 KV heads, 70 tokens."""
    return torch.randn(2, 4, 1, 16), torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 16)


def worth_a_kernel() -> tuple[Tensor, Tensor, Tensor]:
    """A decode step long enough that "auto" takes a kernel of ours."""
    for tokens in (512 << i for i in range(7)):
        tensors = torch.randn(1, 8, 1, 64), *(torch.randn(1, 2, tokens, 64) for _ in "kv")
        if vattn.explain(*tensors, enable_gqa=True).impl != "native":
            return tensors
    raise AssertionError(vattn.explain(*tensors, enable_gqa=True))


def through_f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def through_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return earlier(q, k, v, enable_gqa=True)


def scripted() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.jit.script(through_f)


def by(function: Callable[[], Callable[..., Tensor]]) -> Callable[[], Callable[[], Tensor]]:
    """A call of what ``function()`` names when it is called, on the same tensors each time."""

    def prepare() -> Callable[[], Tensor]:
        tensors = grouped()
        return lambda: function()(*tensors, enable_gqa=True)

    return prepare


def prepare_script() -> Callable[[], Tensor]:
    tensors, call = grouped(), scripted()
    return lambda: call(*tensors)


def prepare_attention(
    train: bool, gradients: bool, cross: bool = False
) -> Callable[[], Callable[[], Tensor]]:
    def prepare() -> Callable[[], Tensor]:
        layer = nn.MultiheadAttention(16, 4, batch_first=True).train(train)
        x = torch.randn(2, 5, 16)
        y = torch.randn(2, 7, 16) if cross else x

        def call() -> Tensor:
            with torch.set_grad_enabled(gradients):
                return layer(x, y, y, need_weights=False)[0]

        return call

    return prepare


def prepare_encoder(train: bool) -> Callable[[], Tensor]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, 5, 16)

    def call() -> Tensor:
        with torch.set_grad_enabled(train):
            return layer(x)

    return call


def prepare_llama() -> Callable[[], Tensor]:
    lm, ids = model("llama", attention="sdpa"), prompts(2, 12)

    def call() -> Tensor:
        with torch.no_grad():
            return lm(ids).logits

    return call


def prepare_thread() -> Callable[[], Tensor]:
    tensors = grouped()

    def call() -> Tensor:
        profile, results = sys.getprofile(), []

        def work() -> None:
            sys.setprofile(profile)
            results.append(F.scaled_dot_product_attention(*tensors, enable_gqa=True))
            sys.setprofile(None)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return results[0]

    return call


CALLS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "F": by(lambda: F.scaled_dot_product_attention),
    "earlier": by(lambda: earlier),
    "C": by(lambda: torch._C._nn.scaled_dot_product_attention),
    "aten": by(lambda: torch.ops.aten.scaled_dot_product_attention),
    "scripted": prepare_script,
    "attention": prepare_attention(train=True, gradients=True),
    "cross": prepare_attention(train=False, gradients=False, cross=True),
    "attention_eval": prepare_attention(train=False, gradients=False),
    "encoder": lambda: prepare_encoder(train=True),
    "encoder_eval": lambda: prepare_encoder(train=False),
    "transformers": prepare_llama,
    "thread": prepare_thread,
}
