"""Laws of torch's modes and of repeated use: autocast, backend choice, dropout, threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contract.call import Attend, Call, exact, torchs
from bench.contract.cases import Case
from bench.contract.judge import Differs, close, equal, expect, same_kind

DRAWS = 32
DROPPED = 0.4
THREADS, ROUNDS = 4, 5
BACKENDS: tuple[tuple[SDPBackend, ...], ...] = (
    (SDPBackend.MATH,),
    (SDPBackend.FLASH_ATTENTION,),
    (SDPBackend.EFFICIENT_ATTENTION,),
    (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    (),
)


def autocast(attend: Attend, case: Case) -> None:
    """Inputs are cast as torch casts them, mixed dtypes included; float64 is left alone."""
    call = case.call
    mixed = replace(call, key=call.key.bfloat16())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for each in (call, mixed):
                same_outcome(attend, each, f"autocast to {dtype}", cast(each, dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        odd = replace(call, key=call.key.double())
        same_outcome(attend, odd, "autocast of float64", call)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The call that autocast makes of this one."""
    return call.map(lambda each: each.to(dtype) if each.is_floating_point() else each)


def backends(attend: Attend, case: Case) -> None:
    """Under sdpa_kernel a call is answered, or refused, as torch answers or refuses it."""
    for chosen in BACKENDS:
        with sdpa_kernel(list(chosen)):
            names = "+".join(each.name for each in chosen) or "none"
            same_outcome(attend, case.call, f"sdpa_kernel {names}", case.call)


def same_outcome(attend: Attend, call: Call, where: str, truth: Call) -> None:
    """The same class of error as torch, or a result of the same kind that is as good."""
    try:
        model = call.run(torchs)
    except Exception as error:  # whatever torch raises is the rule
        try:
            call.run(attend)
        except type(error):
            return
        raise Differs(f"{where}: torch refuses with {type(error).__name__}: {error}") from None
    out = same_kind(call.run(attend), model)
    with torch.autocast("cpu", enabled=False):
        close(out, model, exact(truth), call=truth, what=f"under {where}, result")


def repeated(attend: Attend, case: Case) -> None:
    """A result stays what it is when the function is called again, and comes out the same."""
    first = case.call.run(attend)
    kept = first.clone()
    replace(case.call, query=-case.call.query, value=2 * case.call.value).run(attend)
    equal(first, kept, "a result, after another call,")
    equal(case.call.run(attend), kept, "the same call, made again,")


def threaded(attend: Attend, case: Case) -> None:
    """Calls from several Python threads at once, each with its own inputs."""
    calls = [replace(case.call, value=case.call.value * (i + 1)) for i in range(THREADS)]
    wrong: list[str] = []
    near = max(1e-4, 8 * torch.finfo(case.call.query.dtype).eps)

    def work(call: Call) -> None:
        try:
            model = call.run(torchs)
            for _ in range(ROUNDS):
                out = call.run(attend)
                if not torch.allclose(out, model, rtol=near, atol=near):
                    wrong.append("a result differs when several threads call at once")
        except Exception as error:  # reported by the thread that waits
            wrong.append(f"raised {type(error).__name__} in a thread: {error}")

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    expect(not wrong, wrong[0] if wrong else "")


def parallel(attend: Attend, case: Case) -> None:
    """The same values with two and three of torch's own threads."""
    before = torch.get_num_threads()
    assert isinstance(case.native, Tensor)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            out = case.call.run(attend)
            close(out, case.native, case.exact, call=case.call, what=f"on {count} threads, result")
    finally:
        torch.set_num_threads(before)


def settings(attend: Attend, case: Case) -> None:
    """Another default dtype, and deterministic algorithms, change nothing."""
    assert isinstance(case.native, Tensor)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        out = same_kind(case.call.run(attend), case.native)
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(True)
        again = case.call.run(attend)
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)
    for each in (out, again):
        close(each, case.native, case.exact, call=case.call)


def copy_on_write(attend: Attend, case: Case) -> None:
    """Inputs that are lazy clones stay lazy where torch leaves them so: nobody writes to them."""
    lazy, spent = (case.call.map(torch._lazy_clone) for _ in range(2))
    spent.run(torchs)
    out = lazy.run(attend)
    for name, each in lazy.tensors().items():
        copied = not lies_lazy(each)
        needless = copied and lies_lazy(spent.tensors()[name])
        expect(not needless, f"{name} was copied, as if it were written to")
    assert isinstance(case.native, Tensor)
    close(out, case.native, case.exact, call=case.call)


def lies_lazy(tensor: Tensor) -> bool:
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


# ---- dropout -------------------------------------------------------------------------------------
def dropout_mean(attend: Attend, case: Case) -> None:
    """Over many seeds the mean is the result without dropout, and draws differ."""
    call = replace(case.call, dropout=case.call.dropout or DROPPED)
    draws = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        draws.append(call.run(attend).double())
    stack = torch.stack(draws)
    doubt = 7 * stack.std(dim=0) / DRAWS**0.5
    rounding = 8 * torch.finfo(call.query.dtype).eps * float(stack.abs().max())
    apart = (stack.mean(dim=0) - case.exact).abs() - doubt - rounding
    expect(apart.max() <= 0, f"dropout is biased: the mean of {DRAWS} draws is off by far")
    expect(stack.std(dim=0).max() > 0, "dropout drops nothing")


def dropout_seeded(attend: Attend, case: Case) -> None:
    """torch.manual_seed decides the draw; the next call draws anew."""
    call = replace(case.call, dropout=case.call.dropout or DROPPED)
    torch.manual_seed(5)
    first, second = call.run(attend), call.run(attend)
    torch.manual_seed(5)
    equal(call.run(attend), first, "the draw of a seed, drawn again,")
    expect(not torch.equal(first, second), "two draws in a row are the same")


def dropout_all(attend: Attend, case: Case) -> None:
    """p = 1 leaves zeros."""
    out = replace(case.call, dropout=1.0).run(attend)
    expect(not out.any(), "dropout_p=1 does not give zeros")


def dropout_gradient(attend: Attend, case: Case) -> None:
    """The gradient of a draw belongs to that draw: out is linear in V, so <V, dV> = <out, g>."""
    value = case.call.value.detach().requires_grad_()
    torch.manual_seed(3)
    call = replace(case.call, value=value, dropout=case.call.dropout or DROPPED)
    out = call.run(attend)
    (found,) = torch.autograd.grad(out, value, case.cotangent)
    sides = [(found.double() * value.double()), (out.double() * case.cotangent.double())]
    apart = abs(float(sides[0].sum() - sides[1].sum()))
    room = 16 * torch.finfo(out.dtype).eps * float(sides[0].abs().sum() + sides[1].abs().sum())
    expect(apart <= room, f"the gradient of V belongs to another draw: {apart:.3g} apart")


DROPOUT = (dropout_mean, dropout_seeded, dropout_all, dropout_gradient)
LAWS = (autocast, backends, repeated, threaded, parallel, settings, copy_on_write, *DROPOUT)
