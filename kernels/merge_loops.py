"""The compiled loops of `merge`. Addresses are in bytes.

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from vattn.kernels import lanes as v
from vattn.kernels.calls import sources
from vattn.kernels.stream_loops import kept

NOTHING, EMPTY = np.float32(0.0), np.float32(-np.inf)


def compiled(sources: int) -> Any:
    """Make `join`; see `calls.sources`."""

    @kept
    def join(parts: int, places: int, rows: int, dim: int, out: int, lse: int) -> None:
        """Join float32 parts, of each an address of results [rows, dim] and one of log-sum-exps
        [rows]; eight numbers at a time, the last eight perhaps once more; dim >= 8."""
        for row in range(rows * (sources != 0)):
            top = EMPTY
            for part in range(parts):
                one = v.read(v.F32, v.integer(places + 16 * part + 8) + 4 * row)
                top = one if one > top else top
            shift, total = v.fill(NOTHING if top == EMPTY else top), v.fill(NOTHING)
            for part in range(parts):
                one = v.read(v.F32, v.integer(places + 16 * part + 8) + 4 * row)
                if one != EMPTY:
                    total = v.add(total, v.exp(v.sub(v.fill(one), shift)))
            whole = v.number(total)
            # What is NaN stays NaN.
            v.write(lse + 4 * row, EMPTY if whole == NOTHING else top + np.float32(log(whole)))
            share = v.fill(NOTHING if whole == NOTHING else np.float32(1.0) / whole)
            for eight in range(0, dim, 8):
                at = 4 * (row * dim + min(eight, dim - 8))
                found = v.fill(NOTHING)
                for part in range(parts):
                    one = v.read(v.F32, v.integer(places + 16 * part + 8) + 4 * row)
                    if one != EMPTY:
                        weight = v.mul(v.exp(v.sub(v.fill(one), shift)), share)
                        found = v.fma(weight, v.load(v.integer(places + 16 * part) + at), found)
                v.store(out + at, found)

    return join


join = compiled(sources())
