"""Laws of differentiation: what needs a gradient has one, in every mode and transform."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contract.call import Attend, exact
from bench.contract.cases import Case, gradients
from bench.contract.judge import BACKWARD, Differs, close, expect


def grad_modes(attend: Attend, case: Case) -> None:
    """requires_grad follows the inputs and the mode; inference mode makes inference tensors."""
    native = case.native
    assert isinstance(native, Tensor)
    leaves = {n: t.detach().requires_grad_() for n, t in case.call.tensors().items() if n != "mask"}
    tracked = case.call.having(leaves)
    expect(tracked.run(attend).requires_grad, "the result of leaves does not require a gradient")
    with torch.no_grad():
        expect(not tracked.run(attend).requires_grad, "under no_grad it requires a gradient")
    expect(not case.call.run(attend).requires_grad, "without leaves it requires a gradient")
    with torch.inference_mode():
        out = tracked.run(attend)
    expect(out.is_inference(), "inference_mode gives a tensor that is not an inference tensor")
    close(out.clone(), native, case.exact, call=case.call)


def single_leaves(attend: Attend, case: Case) -> None:
    """The gradient of one argument alone, for each of them."""
    for name, tensor in case.call.tensors().items():
        if tensor.dtype == torch.bool:
            continue
        found = gradients(attend, case.call, (name,), case.cotangent)
        if name not in found:
            raise Differs(f"no gradient reaches {name} when it is the only leaf")
        truth = case.exact_gradients.get(name)
        model = case.native_gradients.get(name)
        if truth is not None and model is not None:
            size = case.gradient_sizes[name]
            close(found[name], model, truth, factor=BACKWARD, size=size, what=f"gradient of {name}")


def _where_torch_can(case: Case, attempt: Callable[[], None]) -> None:
    """Make an attempt under MATH, which must succeed, and without: there a call that torch's fused
    kernel serves may be refused, since that kernel has no such derivative, but not be wrong."""
    with sdpa_kernel(SDPBackend.MATH):
        attempt()
    if not case.call.fused:
        return attempt()
    with suppress(RuntimeError, NotImplementedError):
        attempt()
    return None


def double_backward(attend: Attend, case: Case) -> None:
    """Second derivatives are right under the MATH backend; elsewhere they are right or refused."""
    names = [n for n, t in case.call.tensors().items() if t.dtype != torch.bool]

    def call(*inputs: Tensor) -> Tensor:
        return case.call.having(dict(zip(names, inputs, strict=True))).run(attend)

    def attempt() -> None:
        leaves = (case.call.tensors()[n].detach().clone().requires_grad_() for n in names)
        try:
            gradgradcheck(call, tuple(leaves), fast_mode=True)
        except GradcheckError as error:
            raise Differs(f"gradgradcheck: {' '.join(str(error).split())[:200]}") from None

    _where_torch_can(case, attempt)


def forward_mode(attend: Attend, case: Case) -> None:
    """Jacobian-vector products, with the rule of `double_backward`."""
    call = case.call
    tensors = (call.query, call.key, call.value)
    tangents = tuple(torch.cos(17 * each) for each in tensors)

    def product(function: Any) -> Tensor:
        def of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(replace(call, query=query, key=key, value=value))

        return torch.func.jvp(of, tensors, tangents)[1]

    def attempt() -> None:
        found = product(lambda each: each.run(attend))
        apart = float((found.double() - truth).abs().max())
        expect(apart < 1e-9 * (1 + float(truth.abs().max())), f"jvp is {apart:.3g} off")

    truth = product(exact)
    _where_torch_can(case, attempt)


def func_grad(attend: Attend, case: Case) -> None:
    """torch.func.grad and vjp agree with float64."""
    names = ("query", "key", "value")

    def weighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (replace(case.call, query=query, key=key, value=value).run(attend) * given).sum()

    given = case.cotangent
    inputs = (case.call.query, case.call.key, case.call.value)
    found = torch.func.grad(weighed, argnums=(0, 1, 2))(*inputs)
    for name, out in zip(names, found, strict=True):
        _gradient(case, name, out)


def per_sample(attend: Attend, case: Case) -> None:
    """vmap over grad: each sample's own gradient."""
    call = case.call

    def weighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return replace(call, query=query, key=key, value=value).run(attend).square().sum()

    stacks = tuple(torch.stack((t, t.flip(-1))) for t in (call.query, call.key, call.value))
    found = torch.func.vmap(torch.func.grad(weighed, argnums=(0, 1, 2)))(*stacks)
    for i in range(2):
        one = replace(call, query=stacks[0][i], key=stacks[1][i], value=stacks[2][i])
        wide = [t[i].double().requires_grad_() for t in stacks]
        total = exact(replace(one, query=wide[0], key=wide[1], value=wide[2])).square().sum()
        for out, truth in zip(found, torch.autograd.grad(total, wide), strict=True):
            apart = float((out[i].double() - truth).abs().max())
            expect(apart < 1e-4 * (1 + float(truth.abs().max())), f"vmap(grad) is {apart:.3g} off")


def _gradient(case: Case, name: str, out: Tensor) -> None:
    close(
        out,
        case.native_gradients[name],
        case.exact_gradients[name],
        factor=BACKWARD,
        size=case.gradient_sizes[name],
        what=f"gradient of {name}",
    )


LAWS = (grad_modes, single_leaves, func_grad, per_sample)
LAWS_DOUBLE = (double_backward, forward_mode)  # of float64 forms
