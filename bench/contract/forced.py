"""vattn's kernels by name, so that the suite reaches them with calls that `auto` leaves to torch.

A forced function serves what its kernel can serve, and leaves the rest to `auto`. The suite's calls
are small, and small calls are torch's: without this a fault of a kernel's masks or strides could
hide behind the table of paths. `python -m bench sdpa_contract --impl bench.contract.forced:stream`
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vattn.paths import ImplError
from vattn.sdpa import scaled_dot_product_attention


class Forced:
    """A kernel of vattn wherever it can serve; counts how often that was."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.served = 0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        try:
            out = scaled_dot_product_attention(*args, **options, impl=self.impl)
        except ImplError:
            return scaled_dot_product_attention(*args, **options)
        self.served += 1
        return out


packed, grouped, stream = Forced("packed"), Forced("grouped"), Forced("stream")
KERNELS = (packed, grouped, stream)
