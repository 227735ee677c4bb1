"""Errors of vattn.scaled_dot_product_attention: torch's own class and words, and the three of ours.

Every call torch refuses is made twice with the same arguments, once with torch's function; what is
raised must be the same. The deliberate differences have their own tests below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from vattn import explain, paths, scaled_dot_product_attention
from vattn.paths import ImplError

NATIVE = torch._C._nn.scaled_dot_product_attention
Args = tuple[tuple[Any, ...], dict[str, Any]]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def call(*changes: tuple[int, Any], **options: Any) -> Args:
    """A right grouped decode call over 64 tokens, some positional arguments replaced."""
    args: list[Any] = [rows(2, 4, 1, 8), rows(2, 2, 64, 8), rows(2, 2, 64, 8), None, 0.0, False]
    for place, argument in changes:
        args[place] = argument
    return tuple(args), {"enable_gqa": True, **options}


KV3 = rows(2, 3, 64, 8)
REFUSED: dict[str, Callable[[], Args]] = {
    "query is no tensor": lambda: call((0, 1.0)),
    "key is a list": lambda: call((1, [1.0])),
    "value is None": lambda: call((2, None)),
    "mask is an array": lambda: call((3, np.ones((1, 64), bool))),
    "mask is a list": lambda: call((3, [True])),
    "mask and causal, mask is a list": lambda: call((3, [True]), (5, True)),
    "dropout is text": lambda: call((4, "0")),
    "dropout is None": lambda: call((4, None)),
    "dropout above 1": lambda: call((4, 1.5)),
    "dropout below 0": lambda: call((4, -0.5)),
    "dropout is NaN": lambda: call((4, float("nan"))),
    "causal is an int": lambda: call((5, 1)),
    "causal is None": lambda: call((5, None)),
    "causal is a tensor": lambda: call((5, torch.tensor(True))),
    "scale is text": lambda: call(scale="1"),
    "scale is complex": lambda: call(scale=1j),
    "scale is positional": lambda: (call()[0] + (1.0,), {}),
    "gqa is an int": lambda: call(enable_gqa=1),
    "gqa is None": lambda: call(enable_gqa=None),
    "unknown keyword": lambda: call(softcap=1.0),
    "value is missing": lambda: (call()[0][:2], {}),
    "query is 1-D": lambda: call((0, rows(8))),
    "all are 1-D": lambda: call((0, rows(8)), (1, rows(8)), (2, rows(8))),
    "2-D with gqa": lambda: call((0, rows(3, 8)), (1, rows(6, 8)), (2, rows(6, 8))),
    "query is double": lambda: call((0, rows(2, 4, 1, 8, dtype=torch.float64))),
    "value is bfloat16": lambda: call((2, rows(2, 2, 64, 8, dtype=torch.bfloat16))),
    "all are int": lambda: call(*((i, t.int()) for i, t in enumerate(call()[0][:3]))),
    "all are bool": lambda: call(*((i, t.bool()) for i, t in enumerate(call()[0][:3]))),
    "all are complex": lambda: call(
        *((i, t.to(torch.complex64)) for i, t in enumerate(call()[0][:3]))
    ),
    "all are fp8": lambda: call(
        *((i, t.to(torch.float8_e4m3fn)) for i, t in enumerate(call()[0][:3]))
    ),
    "key is on meta": lambda: call((1, rows(2, 2, 64, 8).to("meta"))),
    "other head_dim in key": lambda: call((1, rows(2, 2, 64, 6))),
    "other batch in key and value": lambda: call((1, rows(3, 2, 64, 8)), (2, rows(3, 2, 64, 8))),
    "heads do not divide": lambda: call((1, KV3), (2, KV3)),
    "more KV heads than query heads": lambda: call((0, rows(2, 2, 1, 8)), (1, KV3), (2, KV3)),
    "groups without gqa": lambda: call(enable_gqa=False),
    "mask of uint8": lambda: call((3, torch.ones(1, 64, dtype=torch.uint8))),
    "mask of int64": lambda: call((3, torch.ones(1, 64, dtype=torch.int64))),
    "mask of double": lambda: call((3, rows(1, 64, dtype=torch.float64))),
    "mask of bfloat16": lambda: call((3, rows(1, 64, dtype=torch.bfloat16))),
    "mask is 0-D": lambda: call((3, torch.tensor(True))),
    "mask is 1-D": lambda: call((3, torch.ones(64, dtype=torch.bool))),
    "mask is 5-D": lambda: call((3, torch.ones(1, 1, 1, 1, 64, dtype=torch.bool))),
    "mask with other S": lambda: call((3, torch.ones(1, 63, dtype=torch.bool))),
    "mask with other L": lambda: call((3, torch.ones(2, 64, dtype=torch.bool))),
    "mask with other H": lambda: call((3, torch.ones(1, 3, 1, 64, dtype=torch.bool))),
    "mask with KV heads": lambda: call((3, torch.ones(1, 2, 1, 64, dtype=torch.bool))),
    "mask with other B": lambda: call((3, torch.ones(3, 1, 1, 64, dtype=torch.bool))),
    "mask with more B": lambda: call(
        (0, rows(1, 4, 1, 8)),
        (1, rows(1, 2, 64, 8)),
        (2, rows(1, 2, 64, 8)),
        (3, torch.ones(2, 1, 1, 64, dtype=torch.bool)),
    ),
    "mask 3-D of the batch": lambda: call((3, torch.ones(2, 1, 64, dtype=torch.bool))),
    "mask without keys": lambda: call((3, torch.ones(1, 0, dtype=torch.bool))),
    "bias class and causal": lambda: call((3, causal_lower_right(1, 64)), (5, True)),
}


def raised(function: Callable[..., Any], args: Args) -> Exception:
    try:
        function(*args[0], **args[1])
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def words(error: Exception) -> str:
    """The message without the signatures Python and torch list in different words."""
    text = str(error).split("\n")[0]
    if isinstance(error, TypeError) and "argument '" not in text:
        return ""
    return text


@pytest.fixture(params=["shipped", "any size"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as it is, and one that gives calls of any size to the kernels."""
    if request.param == "any size":
        rows = tuple(row._replace(groups=1, queries=1 << 30, reads=0) for row in paths.TABLE)
        monkeypatch.setattr(paths, "TABLE", rows)
        monkeypatch.setattr(paths, "MOST_QUERIES", 1 << 30)
        monkeypatch.setattr(paths, "LEAST_READS", dict.fromkeys(paths.FLOATS, 0))
        monkeypatch.setattr(paths, "LEAST_READ", 0)
        args, options = call()
        assert explain(*args, **options).impl != "native"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(name: str) -> None:
    args = REFUSED[name]()
    theirs, ours = raised(NATIVE, args), raised(scaled_dot_product_attention, args)
    assert type(ours) is type(theirs), f"{ours!r} instead of {theirs!r}"
    assert words(ours) == words(theirs)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", REFUSED)
def test_after_an_error_the_same_tensors_still_serve(name: str) -> None:
    args, options = call()
    raised(scaled_dot_product_attention, REFUSED[name]())
    out = scaled_dot_product_attention(*args, **options)
    torch.testing.assert_close(out, NATIVE(*args, **options))


@pytest.mark.parametrize("enable_gqa", [False, True])
@pytest.mark.parametrize("length", [1, 64])
def test_a_mask_with_causal_raises_as_torchs_math_path(length: int, enable_gqa: bool) -> None:
    heads = 2 if enable_gqa else 4
    args, options = call(
        (0, rows(2, 4, length, 8)),
        (1, rows(2, heads, 64, 8)),
        (2, rows(2, heads, 64, 8)),
        (3, torch.ones(length, 64, dtype=torch.bool)),
        (5, True),
    )
    options["enable_gqa"] = enable_gqa
    ours = raised(scaled_dot_product_attention, (args, options))
    with sdpa_kernel(SDPBackend.MATH):
        theirs = raised(NATIVE, (args, options))
    assert type(ours) is type(theirs) is RuntimeError
    assert str(ours).split("\n")[0] == str(theirs).split("\n")[0]
    assert "Explicit attn_mask should not be set when is_causal=True" in str(ours)
    assert type(raised(explain, (args, options))) is RuntimeError


def test_a_wrong_mask_with_causal_is_wrong_first() -> None:
    args = call((3, torch.ones(1, 64, dtype=torch.int32)), (5, True))
    assert words(raised(scaled_dot_product_attention, args)) == words(raised(NATIVE, args))


@pytest.mark.parametrize("tokens", [1, 63, 65, 0])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_k_and_v_of_different_lengths_are_refused(rank: int, tokens: int) -> None:
    query, key, value = (rows(*(2,) * (rank - 2), n, 8) for n in (1, 64, tokens))
    with pytest.raises(RuntimeError, match=f"key has 64 tokens but value has {tokens}: .* slice"):
        scaled_dot_product_attention(query, key, value)
    with pytest.raises(RuntimeError, match=f"key has 64 tokens but value has {tokens}"):
        explain(query, key, value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_different_lengths_are_refused_on_every_device_and_when_compiled(device: str) -> None:
    tensors = [rows(1, 2, n, 8).to(device) for n in (1, 6, 5)]
    with pytest.raises(RuntimeError, match="6 tokens but value has 5"):
        scaled_dot_product_attention(*tensors)
    compiled = torch.compile(scaled_dot_product_attention, backend="eager")
    with pytest.raises(RuntimeError, match="6 tokens but value has 5"):
        compiled(*tensors)


def test_an_unknown_implementation_is_named() -> None:
    args, options = call(impl="fastest")
    for function in (scaled_dot_product_attention, explain):
        with pytest.raises(ValueError, match=r"impl='fastest' is unknown; choose one of .*packed"):
            function(*args, **options)


UNABLE = {
    "causality": (lambda: call((5, True), impl="packed"), "is_causal"),
    "dropout": (lambda: call((4, 0.5), impl="packed"), "dropout"),
    "a gradient": (lambda: call((0, rows(2, 4, 1, 8).requires_grad_()), impl="packed"), "gradient"),
    "5-D": (
        lambda: call(*((i, t[None]) for i, t in enumerate(call()[0][:3])), impl="packed"),
        "4-D",
    ),
    "another width of V": (lambda: call((2, rows(2, 2, 64, 6)), impl="packed"), "head_dim 8"),
    "meta": (
        lambda: call(*((i, t.to("meta")) for i, t in enumerate(call()[0][:3])), impl="packed"),
        "device meta",
    ),
    "a mask that fits nothing": (
        lambda: call((3, torch.ones(1, 63, dtype=torch.bool)), impl="packed"),
        "broadcast",
    ),
    "an empty dimension": (
        lambda: call((1, rows(2, 2, 0, 8)), (2, rows(2, 2, 0, 8)), impl="packed"),
        "empty",
    ),
    "a bias class": (lambda: call((3, causal_lower_right(1, 64)), impl="packed"), "overrides"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_an_implementation_asked_for_by_name_says_why_it_cannot(name: str) -> None:
    args, why = UNABLE[name][0](), UNABLE[name][1]
    error = raised(scaled_dot_product_attention, args)
    assert type(error) is ImplError
    assert why in str(error)
    assert 'impl="packed"' in str(error)
    assert 'impl="auto"' in str(error)
