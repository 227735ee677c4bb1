"""When two results are the same: the one tolerance of the suite, and what a difference says.

    |out - exact|  <=  3 * max|native - exact|  +  rounding(out)  +  rounding(scores)

`exact` is float64. The first rounding is one unit in the last place of the result's dtype (four
where sums are kept in that dtype as well, and round at every step: float32, float64), the second
what one unit in the last place of the largest logit, in the dtype sums are kept in
(float32 for half precision), can move a weighted mean of V, or a gradient whose kernel computes the
scores again and holds them against a stored log-sum-exp: a kernel may add in another order than
torch, and torch may be lucky. Half-precision scores or a scale 2% off are far outside of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contract.call import Call, magnitude

FORWARD = 3.0
BACKWARD = 4.0
CLOSEST = 0.1  # of the largest value: however far off torch is, a result may not be further off


class Differs(Exception):
    """An implementation does something else than torch; the text says what."""


def expect(truth: object, text: str) -> None:
    """Raise `Differs` unless something holds."""
    if not truth:
        raise Differs(text)


def same_kind(out: object, model: Tensor, *, strides: bool = False) -> Tensor:
    """Check type, shape, dtype, device (and strides, where a dimension has more than one place)."""
    if not isinstance(out, Tensor):
        raise Differs(f"returned a {type(out).__name__}, not a Tensor")
    expect(out.shape == model.shape, f"shape {list(out.shape)}, torch's {list(model.shape)}")
    expect(out.dtype == model.dtype, f"dtype {out.dtype}, torch's {model.dtype}")
    expect(out.device == model.device, f"device {out.device}, torch's {model.device}")
    if strides and out.numel():
        places = [i for i, size in enumerate(out.shape) if size > 1]
        same = all(out.stride(i) == model.stride(i) for i in places)
        expect(same, f"strides {out.stride()}, torch's {model.stride()}")
    return out


def close(
    out: Tensor,
    native: Tensor,
    exact: Tensor,
    *,
    factor: float = FORWARD,
    call: Call | None = None,
    size: Tensor | None = None,
    dtype: torch.dtype | None = None,
    what: str = "result",
) -> None:
    """Check values: NaN where the truth is NaN, never where torch has none, and the tolerance.

    Where torch leaks a NaN that the truth does not hold, both a NaN and the truth are right; where
    torch has a number and the truth is NaN, anything is.
    ``call`` gives the size of the logits, looked at only when the plain tolerance is exceeded;
    ``size`` are the absolute terms behind every element of a gradient. ``dtype`` is what one
    rounding is of, where that is not the result's own.
    """
    if not out.numel():
        return
    got, peer, exact = out.detach().double(), native.detach().double(), exact.detach()
    finite = torch.isfinite(exact) & torch.isfinite(peer)
    if not bool(finite.all() and torch.isfinite(got).all()):
        finite = _finite_parts(got, peer, exact, finite, what)
    error = _worst(got, exact, finite)
    peers = _worst(peer, exact, finite)
    top = float(torch.where(finite, exact if size is None else size, 0.0).abs().max())
    allowed = min(factor * peers, CLOSEST * top) + rounding(dtype or out.dtype) * top
    if error > allowed and call is not None:
        sums = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
        moved = top if size is not None else max(top, _top(call.value))
        allowed += min(sums * magnitude(call), CLOSEST) * moved
    if error > allowed:
        at = torch.where(finite, (got - exact).abs(), 0.0).argmax()
        raise Differs(
            f"{what} is {error:.3g} off float64 at {_place(at, out)} "
            f"({got.flatten()[at]:.6g}, not {exact.flatten()[at]:.6g}); torch is {peers:.3g} off, "
            f"{allowed:.3g} is allowed"
        )


def rounding(dtype: torch.dtype) -> float:
    """The relative error that writing a result in this dtype may add."""
    steps = 1 if dtype in (torch.bfloat16, torch.float16) else 4
    return steps * torch.finfo(dtype).eps


def equal(out: Tensor, model: Tensor, what: str = "result") -> None:
    """Check that two tensors hold the same bits (any NaN equals any NaN)."""
    same = (out == model) | ((out != out) & (model != model))
    if not bool(same.all()):
        at = (~same).flatten().int().argmax()
        raise Differs(
            f"{what} at {_place(at, out)} is {out.flatten()[at].item():.9g}, "
            f"must be exactly {model.flatten()[at].item():.9g}"
        )


def _finite_parts(got: Tensor, peer: Tensor, exact: Tensor, finite: Tensor, what: str) -> Tensor:
    """Check everything that is not finite; returns where numbers remain to be compared."""
    lost = exact.isnan() & peer.isnan() & ~got.isnan()
    expect(not lost.any(), f"{what} hides a NaN of its inputs at {_first(lost)}")
    leaks = got.isnan() & ~exact.isnan() & ~peer.isnan()
    expect(not leaks.any(), f"{what} is NaN at {_first(leaks)}, torch's is not")
    apart = exact.isinf() & peer.isinf() & (got != exact)
    expect(not apart.any(), f"{what} is not {exact[apart][:1].tolist()} at {_first(apart)}")
    endless = got.isinf() & ~exact.isinf() & ~exact.isnan() & ~peer.isinf()
    expect(not endless.any(), f"{what} is infinite at {_first(endless)}")
    return finite & torch.isfinite(got)


def _worst(out: Tensor, exact: Tensor, where: Tensor) -> float:
    return float(torch.where(where, (out - exact).abs(), 0.0).max())


def _top(value: Tensor) -> float:
    return float(value.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _first(where: Tensor) -> list[int]:
    found = where.nonzero()
    return found[0].tolist() if len(found) else []


def _place(at: Tensor, out: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(at, out.shape)]
