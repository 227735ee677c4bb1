"""Laws of tracing: fake and meta tensors, vmap, torch.compile without a graph break, export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.contract.call import Attend, exact, torchs
from bench.contract.cases import Case
from bench.contract.checks import backward
from bench.contract.judge import close, expect, same_kind


def fake(attend: Attend, case: Case) -> None:
    """FakeTensors foretell shape, dtype and strides of what the same implementation returns."""
    real = case.call.run(attend)
    with FakeTensorMode() as mode:
        out = case.call.map(mode.from_tensor).run(attend)
    expect(out.shape == real.shape, f"fake shape {list(out.shape)}, real {list(real.shape)}")
    expect(out.dtype == real.dtype, f"fake dtype {out.dtype}, real {real.dtype}")
    places = [i for i, size in enumerate(real.shape) if size > 1]
    same = all(out.stride(i) == real.stride(i) for i in places)
    expect(same or not real.numel(), f"fake strides {out.stride()}, real {real.stride()}")


def meta(attend: Attend, case: Case) -> None:
    """The meta device gives shape and dtype."""
    out = case.call.map(lambda each: each.to("meta")).run(attend)
    model = case.native
    assert isinstance(model, Tensor)
    same_kind(out, model.to("meta"))


def vmapped(attend: Attend, case: Case) -> None:
    """vmap over a new dimension of everything, of the query alone, and of the mask."""
    call = case.call
    twice = {n: torch.stack((t, t.flip(-1))) for n, t in call.tensors().items() if n != "mask"}
    masks = {} if call.mask is None else {"mask": torch.stack((call.mask, call.mask.roll(1, -1)))}
    for batched in (twice, {"query": twice["query"]}, {**twice, **masks}):

        def one(each: dict[str, Tensor]) -> Tensor:
            return call.having(each).run(attend)

        out = torch.func.vmap(one)(batched)
        for i in range(2):
            lane = call.having({n: t[i] for n, t in batched.items()})
            what = f"vmap over {'+'.join(batched)}, result"
            close(out[i], lane.run(torchs), exact(lane), call=lane, what=what)


def vmapped_dropout(attend: Attend, case: Case) -> None:
    """Under vmap dropout asks for randomness=, and follows it."""
    stack = torch.stack((case.call.query, case.call.query))

    def one(query: Tensor) -> Tensor:
        return replace(case.call, query=query, dropout=0.5).run(attend)

    try:
        torch.func.vmap(one)(stack)
        refused = False
    except RuntimeError:
        refused = True
    expect(refused, 'dropout under vmap with randomness="error" raises no RuntimeError')
    lanes = torch.func.vmap(one, randomness="different")(stack)
    expect(not torch.equal(lanes[0], lanes[1]), 'randomness="different" draws the same')
    lanes = torch.func.vmap(one, randomness="same")(stack)
    expect(torch.equal(lanes[0], lanes[1]), 'randomness="same" draws differently')


def compiled(attend: Attend, case: Case) -> None:
    """torch.compile as one graph: values and gradients."""
    _compiled(attend, case, backend="aot_eager")


def inductor(attend: Attend, case: Case) -> None:
    """The same with the default backend."""
    _compiled(attend, case, backend="inductor")


def _compiled(attend: Attend, case: Case, backend: str) -> None:
    torch._dynamo.reset()
    call = case.call

    def graph(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return attend(query, key, value, **options)

    once = torch.compile(graph, backend=backend, fullgraph=True)
    model = case.native
    assert isinstance(model, Tensor)
    out = same_kind(call.run(once), model, strides=call.fused)
    close(out, model, case.exact, call=call, what=f"compiled ({backend}), result")
    if case.leaves:
        backward(once, case)


def compiled_shapes(attend: Attend, case: Case) -> None:
    """One dynamic graph serves another number of keys."""
    torch._dynamo.reset()
    bare = replace(case.call, mask=None)

    def graph(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return replace(bare, query=query, key=key, value=value).run(attend)

    once = torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)
    for repeat in (1, 3):
        keys = [t.repeat_interleave(repeat, dim=-2) for t in (bare.key, bare.value)]
        call = replace(bare, key=keys[0], value=keys[1])
        out = once(call.query, call.key, call.value)
        close(out, call.run(torchs), exact(call), call=call, what="dynamic graph, result")


def exported(attend: Attend, case: Case) -> None:
    """torch.export of a module that calls the function."""
    call = case.call

    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return replace(call, query=query, key=key, value=value).run(attend)

    inputs = (call.query, call.key, call.value)
    out = torch.export.export(Attention(), inputs).module()(*inputs)
    model = case.native
    assert isinstance(model, Tensor)
    close(out, model, case.exact, call=call, what="exported module, result")


LAWS = (fake, meta, vmapped, vmapped_dropout)
COMPILED = (compiled, compiled_shapes, exported)
