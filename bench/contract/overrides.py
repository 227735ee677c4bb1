"""Laws of Python overrides: subclasses, modes, CausalBias, Parameters, nested tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

from bench.contract.call import Attend, exact, native, torchs
from bench.contract.cases import Case
from bench.contract.judge import close, expect


class Logged(Tensor):
    """A subclass that notes which functions it is passed to."""

    seen: list[Any] = []  # noqa: RUF012  (emptied by the law that uses it)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Watch(TorchFunctionMode):
    """A mode that notes every function, and answers attention by itself."""

    def __init__(self, answer: Tensor, names: tuple[Any, ...]) -> None:
        super().__init__()
        self.answer = answer
        self.names = names
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        if func in self.names:
            return self.answer
        return func(*args, **(kwargs or {}))


def names(attend: Attend) -> tuple[Any, ...]:
    """What an override may be told it overrides."""
    return attend, native, torch.nn.functional.scaled_dot_product_attention


def subclass(attend: Attend, case: Case) -> None:
    """A subclass in any place sees the call, and wraps the result."""
    for name, tensor in case.call.tensors().items():
        Logged.seen.clear()
        out = case.call.having({name: tensor.as_subclass(Logged)}).run(attend)
        told = [func for func in Logged.seen if func in names(attend)]
        expect(told, f"a subclass as {name} does not see the call")
        expect(type(out) is Logged, f"a subclass as {name} gives a {type(out).__name__}")
        close(out.as_subclass(Tensor), _native(case), case.exact, call=case.call)


def mode(attend: Attend, case: Case) -> None:
    """A TorchFunctionMode sees the call, and its answer is the result."""
    answer = torch.empty(1)
    with Watch(answer, names(attend)) as watch:
        out = case.call.run(attend)
    expect(out is answer, f"a TorchFunctionMode does not see the call, it sees {watch.seen[:3]}")


def bias_upper_left(attend: Attend, case: Case) -> None:
    _bias(attend, case, causal_upper_left, lower=False)


def bias_lower_right(attend: Attend, case: Case) -> None:
    _bias(attend, case, causal_lower_right, lower=True)


def _bias(attend: Attend, case: Case, make: Callable[..., Any], *, lower: bool) -> None:
    """CausalBias as a mask means what it says, called by name and installed under torch's name."""
    bare = replace(case.call, mask=None, causal=False)
    rows, keys = bare.query.shape[-2], bare.key.shape[-2]
    keep = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows if lower else 0)
    truth = replace(bare, mask=keep)
    for installed in (False, True):
        with _installed(attend, installed):
            out = replace(bare, mask=make(rows, keys)).run(attend)
            through = torch.nn.functional.scaled_dot_product_attention(
                bare.query, bare.key, bare.value, make(rows, keys), enable_gqa=bare.gqa
            )
            try:
                replace(bare, mask=make(rows, keys), causal=True).run(attend)
                refused = False
            except ValueError:
                refused = True
        name = "installed: CausalBias" if installed else "CausalBias"
        for each in (out, through) if installed else (out,):
            close(each, truth.run(torchs), exact(truth), call=truth, what=name)
        expect(refused, f"{name} with is_causal=True raises no ValueError")


def parameter(attend: Attend, case: Case) -> None:
    """Parameters in, a plain Tensor out."""
    wanted = {n: torch.nn.Parameter(t) for n, t in case.call.tensors().items() if n != "mask"}
    out = case.call.having(wanted).run(attend)
    expect(type(out) is Tensor, f"Parameters give a {type(out).__name__}")
    close(out, _native(case), case.exact, call=case.call)


def keywords(attend: Attend, case: Case) -> None:
    """All arguments by name, and the first six by position."""
    call = case.call
    named = attend(query=call.query, key=call.key, value=call.value, **call.options())
    tail = {"scale": call.scale, "enable_gqa": call.gqa}
    placed = attend(call.query, call.key, call.value, call.mask, call.dropout, call.causal, **tail)
    for out in (named, placed):
        close(out, _native(case), case.exact, call=call)


def nested(attend: Attend, case: Case) -> None:
    """Jagged nested tensors [B, H, j, D] give what torch gives, and refuse a mask as it does."""
    call = case.call
    parts = [call.query[i % 2].transpose(0, 1)[: 3 - i] for i in range(2)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    model = native(jagged, jagged, jagged)
    out = attend(jagged, jagged, jagged)
    expect(out.is_nested, "a nested tensor gives one that is not nested")
    pairs = zip(out.unbind(), model.unbind(), strict=True)
    expect(all(torch.allclose(a, b, atol=1e-5) for a, b in pairs), "nested values differ")
    try:
        attend(jagged, jagged, jagged, torch.ones(1, 1, dtype=torch.bool))
    except ValueError:
        return
    expect(False, "a nested tensor with a mask raises no ValueError")


def _native(case: Case) -> Tensor:
    assert isinstance(case.native, Tensor)
    return case.native


@contextmanager
def _installed(attend: Attend, wanted: bool) -> Iterator[None]:
    """Put an implementation under torch's name, and take it away again."""
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention
    if wanted:
        functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


LAWS = (subclass, mode, bias_upper_left, bias_lower_right, parameter, keywords)
