"""Calls of compiled loops: a record of int64 words, and a list of units drawn by several threads.

    words    a NamedTuple of ints, as int64 in memory; the loops see a record of the same names
    counts   int64 [next unit, finished units, threads, ...], shared by the threads of a call

`crew` is the other side, in Python. Imports numba at the top: import this module only where numba
is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import numba
import numpy as np
from llvmlite import ir
from numba import types

from vattn.kernels import lanes as v
from vattn.kernels.stream_loops import kept
from vattn.kernels.stream_tiles import jit

TAGS = (v.F32, v.BF16, v.F16)
_i32, _i64 = ir.IntType(32), ir.IntType(64)


def reader(fields: tuple[str, ...]) -> Any:
    """A word that makes a record of ``fields`` of the int64 words at an address."""
    record = numba.from_dtype(np.dtype([(name, np.int64) for name in fields]))
    pointer = ir.ArrayType(ir.IntType(8), 8 * len(fields)).as_pointer()

    @v.word(record, v.address)
    def call_at(b: Any, place: Any) -> Any:
        """The call whose words lie at an address."""
        return b.inttoptr(place, pointer)

    return call_at


def sources(*names: str) -> int:
    """A sum over the files that compiled code is made of, besides the one that compiles it: numba
    finds kept code by that file's time, and by the numbers that a function encloses."""
    here = Path(__file__)
    files = ["calls.py", "lanes.py", "stream_tiles.py", *names]
    return 1 + crc32(b"".join(here.with_name(name).read_bytes() for name in files))


@kept
def finished(counts: int, units: int, spins: int) -> bool:
    """Whether all units are done; looks up to ``spins`` times."""
    while spins > 0 and v.fetch_add(counts + 8, 0) < units:
        spins -= 1
    return spins > 0


@v.word(types.int64, v.address)
def int32(b: Any, place: Any) -> Any:
    """One int32."""
    loaded = b.load(b.inttoptr(place, _i32.as_pointer()))
    loaded.align = 4
    return b.sext(loaded, _i64)


@v.word(types.void, v.address, types.int64)
def write_int32(b: Any, place: Any, value: Any) -> None:
    """Write one int32."""
    b.store(b.trunc(value, _i32), b.inttoptr(place, _i32.as_pointer())).align = 4


@v.word(types.void, v.address, types.int64)
def write_integer(b: Any, place: Any, value: Any) -> None:
    """Write one int64."""
    b.store(value, b.inttoptr(place, _i64.as_pointer())).align = 8


@jit
def counted(place: int, index: int, otherwise: int) -> int:
    """Element ``index`` of an int64 line, or ``otherwise`` where there is none."""
    return otherwise if place == 0 else v.integer(place + 8 * index)
