"""What is compared for one case: values, layout of the result, gradients, untouched inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from bench.contract.call import Attend, Call
from bench.contract.cases import Case, gradients
from bench.contract.inputs import laid_out
from bench.contract.judge import BACKWARD, Differs, close, equal, expect, same_kind

Check = Callable[[Attend, Case], None]


def forward(attend: Attend, case: Case) -> None:
    """Values, type, shape, dtype; strides where torch is fused; inputs left as they were.

    Elements that are exactly 0 in both torch and truth (rows that attend to nothing) must be 0.
    """
    native = case.native
    if isinstance(native, Exception):
        return refused(attend, case.call, native)
    call = case.call
    kept = {name: each.clone() for name, each in call.tensors().items()}
    out = same_kind(call.run(attend), native, strides=call.fused)
    for name, before in kept.items():
        if not _same(call.tensors()[name], before):
            case.forget()
            raise Differs(f"{name} was changed in place")
        shared = out.untyped_storage().data_ptr() == _storage(call.tensors()[name])
        expect(not out.numel() or not shared, f"the result lies in the memory of {name}")
    close(out, native, case.exact, call=call)
    zeros = (case.exact == 0) & (native == 0)
    expect(not out[zeros].any(), "a row that attends to nothing is not exactly 0")
    if "bits" in case.marks:
        equal(out, case.exact.to(out.dtype))
    return None


def backward(attend: Attend, case: Case) -> None:
    """First derivatives against float64, at most 4x torch's own error and a rounding of the terms
    they are made of and of the logits; exactly 0 where every term is 0."""
    found = gradients(attend, case.call, case.leaves, case.cotangent)
    for name, model in case.native_gradients.items():
        if name not in found:
            raise Differs(f"no gradient reaches {name}")
        out = same_kind(found[name], model)
        size = case.gradient_sizes[name]
        truth = case.exact_gradients[name]
        what, call = f"gradient of {name}", case.call
        dtype = call.query.dtype
        close(out, model, truth, factor=BACKWARD, call=call, size=size, dtype=dtype, what=what)
        nothing = (size == 0) & (model == 0)
        expect(not out[nothing].any(), f"{what} is not 0 where nothing attends")


def noncontiguous(attend: Attend, case: Case) -> None:
    """The same values with a last stride of 2, NaN between them."""
    native = case.native
    assert isinstance(native, Tensor)
    spread = case.call.map(lambda each: laid_out(each, "wide"))
    close(same_kind(spread.run(attend), native), native, case.exact, call=case.call)


def gradcheck(attend: Attend, case: Case) -> None:
    """Analytic against numeric derivatives in float64."""
    tensors = case.call.tensors()
    floats = {n: each for n, each in tensors.items() if each.is_floating_point()}
    leaves = {n: each.detach().clone().requires_grad_() for n, each in floats.items()}

    def call(*inputs: Tensor) -> Tensor:
        return case.call.having(dict(zip(leaves, inputs, strict=True))).run(attend)

    try:
        torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)
    except GradcheckError as error:
        raise Differs(f"gradcheck: {' '.join(str(error).split())[:300]}") from None


def refused(attend: Attend, call: Call, native: Exception) -> None:
    """Where torch raises, the same class must be raised."""
    try:
        call.run(attend)
    except type(native):
        return
    raise Differs(f"accepted what torch refuses: {type(native).__name__}: {native}")


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
