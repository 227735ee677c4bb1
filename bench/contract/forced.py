"""vattn's kernels by name, so that the suite reaches them with calls that `auto` leaves to torch.

A forced function serves what its kernel can serve, and leaves the rest to `auto`. The suite's calls
are small, and small calls are torch's: without this a fault of a kernel's masks or strides could
hide behind the table of paths. `python -m bench sdpa_contract --impl bench.contract.forced:stream`

The Triton kernels run on the CPU where Triton interprets them, at some 10 ms a program: `thinned`
are the probes that are worth that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bench.contract import modes
from bench.contract.cases import Probe
from vattn.paths import ImplError
from vattn.sdpa import scaled_dot_product_attention


class Forced:
    """A kernel of vattn wherever it can serve; counts how often that was (once a compilation), and
    how often it or `auto` gave a result."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.served, self.refused = 0, 0

    @property
    def share(self) -> float:
        """Of the calls that had a result, those that the kernel served; 0 of none."""
        return self.served / max(1, self.served + self.refused)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        try:
            out = scaled_dot_product_attention(*args, **options, impl=self.impl)
        except ImplError:
            out = scaled_dot_product_attention(*args, **options)
            self.refused += 1
            return out
        self.served += 1
        return out


packed, grouped, stream = Forced("packed"), Forced("grouped"), Forced("stream")
KERNELS = (packed, grouped, stream)
triton = Forced("triton")

# Laws of torch's own random numbers and lazy memory, which no Triton kernel serves; threads, from
# several of which at once the interpreter cannot be called; and a mode that must be told of the
# examined function itself.
DROPOUT = {law.__name__ for law in modes.DROPOUT} | {"vmapped_dropout"}
TORCHS = {*DROPOUT, "copy_on_write", "nested", "meta", "parallel", "threaded", "mode"}


def thinned(probes: Iterable[Probe], *, quick: bool = False) -> list[Probe]:
    """The probes of which a Triton kernel serves a part, without those of a thousand keys.

    When quick without torch's samples, and with every fifth of what takes several calls.
    """
    kept = [
        each
        for each in probes
        if each.check not in TORCHS
        and "float64" not in each.name
        and not each.name.startswith(("long", "large"))
        and (each.family != "opinfo" or each.check in ("forward", "backward"))
    ]
    if not quick:
        return kept
    once = [each for each in kept if each.family == "refusals" or each.check == "forward"]
    several = [each for each in kept if each.family != "refusals" and each.check != "forward"]
    return [each for each in (*once, *several[::5]) if each.family != "opinfo"]
