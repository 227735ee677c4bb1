"""Memory whose unmapped rows kill the process that reads them, and a child process to try it in.

`fenced` reserves a tensor in which nothing may be touched; `allow` opens whole pages of it. A stray
read or write anywhere else is a SIGSEGV, of which `outcome` tells.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from importlib import import_module
from math import prod
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_PROT_NONE, _PROT_RW = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor that nobody may touch, on a page boundary, a closed page either side."""
    size = prod(shape) * dtype.itemsize
    room = 2 * PAGE + -(-size // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _libc.mmap(None, room, _PROT_NONE, flags, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {room} bytes")
    raw = (ctypes.c_uint8 * size).from_address(base + PAGE)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def allow(rows: Tensor) -> Tensor:
    """Let the bytes of a contiguous part of a fenced tensor be used: they must be whole pages."""
    begin, size = rows.data_ptr(), rows.numel() * rows.element_size()
    if begin % PAGE or size % PAGE or not rows.is_contiguous():
        raise ValueError(f"{size} bytes at {begin:#x} are not whole pages of {PAGE} bytes")
    if _libc.mprotect(begin, size, _PROT_RW):
        raise OSError(ctypes.get_errno(), f"mprotect of {size} bytes at {begin:#x}")
    return rows


def outcome(function: str) -> tuple[int, str]:
    """(return code, output) of a child process that calls ``function``, "tests.module:name"."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.guard", function],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONFAULTHANDLER": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, _, name = sys.argv[1].partition(":")
    getattr(import_module(module), name)()
