"""How a negative control is made: a right implementation with one flaw put in.

A flaw changes the call before it is answered, or the result afterwards, or answers otherwise.
Everything else (checks of arguments, overrides, strides, dtypes) stays as it should be, so that
what the suite finds is the flaw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.contract.call import Call
from bench.contract.honest import answered

Compute = Callable[[Call], Tensor]


@dataclass(frozen=True)
class Flaw:
    """What is wrong, the flawed computation, and the part of the labels to look at first."""

    name: str
    compute: Compute
    look: str
    overrides: bool = True


def before(change: Callable[[Call], Call]) -> Compute:
    """Change a well-formed call, then answer it."""
    return lambda call: answered(change(call)) if ordinary(call) else answered(call)


def after(change: Callable[[Call, Tensor], Tensor]) -> Compute:
    """Answer a call, then change the result."""
    return lambda call: change(call, answered(call)) if ordinary(call) else answered(call)


def instead(compute: Compute) -> Compute:
    """Answer, which checks the arguments, then answer otherwise where there is no dropout."""

    def flawed(call: Call) -> Tensor:
        right = answered(call)
        return right if call.dropout or not ordinary(call) else compute(call)

    return flawed


def ordinary(call: Call) -> bool:
    """Whether the tensor arguments are dense tensors at all."""
    given = (call.query, call.key, call.value, *([] if call.mask is None else [call.mask]))
    return all(isinstance(t, Tensor) and not t.is_nested and t.dim() > 1 for t in given)


def plain_memory(call: Call) -> bool:
    """Whether there is memory to look at: not under a tracer, a transform or on meta."""
    return not (
        torch.compiler.is_compiling()
        or call.query.device.type != "cpu"
        or type(call.query) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(call.query)
    )


def bool_mask(call: Call) -> Tensor | None:
    """The mask, if it is one of bool."""
    return call.mask if call.mask is not None and call.mask.dtype == torch.bool else None


def float_mask(call: Call) -> Tensor | None:
    """The mask, if it is added."""
    return call.mask if call.mask is not None and call.mask.is_floating_point() else None


def with_mask(call: Call, mask: Tensor) -> Call:
    """The call with this mask alone."""
    return replace(call, mask=mask, causal=False)


def keep(call: Call) -> Tensor:
    """What may be attended, broadcastable to [..., L, S]; a float mask hides where it is -inf."""
    sizes = (call.query.shape[-2], call.key.shape[-2])
    seen = torch.ones(sizes, dtype=torch.bool, device=call.query.device)
    if call.causal:
        seen = seen.tril()
    if call.mask is None:
        return seen
    return seen & (call.mask if call.mask.dtype == torch.bool else call.mask != -torch.inf)


def sees_nothing(seen: Tensor, out: Tensor) -> Tensor:
    """Elements of the result whose row has no True in ``seen``."""
    return (~seen).all(dim=-1, keepdim=True).expand(out.shape)


def scale_of(call: Call) -> float:
    return max(call.query.shape[-1], 1) ** -0.5 if call.scale is None else call.scale
