"""What the kernel under us can do, found out by doing it: reserve, map, alias, collapse, time.

The probes use the host backend itself, so a machine that passes them can hold a cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn.allocator.errors import VattnError
from vattn.allocator.host import HostBackend

HUGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25
_ROUNDS = 64


@dataclass(frozen=True)
class Probe:
    """The outcome of one trial: whether it worked, the figure, and what it means."""

    name: str
    works: bool
    value: str
    note: str = ""
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "works": self.works,
            "value": self.value,
            "note": self.note,
            "microseconds": None if self.seconds is None else self.seconds * 1e6,
        }


def host_probes() -> list[Probe]:
    """Every probe, none of which raises."""
    trials: list[tuple[str, Callable[[], Probe]]] = [
        ("reserve 1 TiB", _reserve),
        ("map and alias", _alias),
        ("map a page", _map_cost),
        ("protect a page", _protect_cost),
        ("seal a page file", _seal),
        ("huge page on request", _collapse),
    ]
    probes = []
    for name, trial in trials:
        try:
            probes.append(trial())
        except (VattnError, OSError) as error:
            probes.append(Probe(name, False, "failed", str(error)))
    return probes


def _reserve() -> Probe:
    nbytes = 1 << 40
    with ExitStack() as stack:
        backend = _open(stack, HUGE_BYTES)
        begin = time.perf_counter()
        backend.reserve(nbytes // HUGE_BYTES, home=0)
        seconds = time.perf_counter() - begin
    return Probe(
        "reserve 1 TiB",
        True,
        f"{seconds * 1e6:.0f} us",
        "address space only: no memory is taken",
        seconds,
    )


def _alias() -> Probe:
    """One page at two addresses: what is written at one is read at the other."""
    with ExitStack() as stack:
        backend = _open(stack, 64 << 10)
        base = backend.reserve(2, home=0)
        backend.create(0, 1)
        backend.map(base, 0, 1)
        backend.map(base + backend.page_bytes, 0, 1)
        ctypes.memmove(base, b"vattn", 5)
        works = ctypes.string_at(base + backend.page_bytes, 5) == b"vattn"
    return Probe("map and alias", works, "yes" if works else "no", "prefixes are shared this way")


def _map_cost() -> Probe:
    """Median time of a map of one page away from its home: one mmap call."""
    with ExitStack() as stack:
        backend = _open(stack, 64 << 10)
        base = backend.reserve(2 * _ROUNDS, home=0)
        backend.create(0, 2 * _ROUNDS)
        seconds = _median(lambda i: backend.map(base + 2 * i * backend.page_bytes, 2 * i + 1, 1))
    return Probe("map a page", True, f"{seconds * 1e6:.1f} us", "mmap, median", seconds)


def _protect_cost() -> Probe:
    """Median time of a map of one page at home: one mprotect call, the usual case."""
    with ExitStack() as stack:
        backend = _open(stack, 64 << 10)
        base = backend.reserve(_ROUNDS, home=0)
        backend.create(0, _ROUNDS)
        seconds = _median(lambda i: backend.map(base + i * backend.page_bytes, i, 1))
    return Probe("protect a page", True, f"{seconds * 1e6:.1f} us", "mprotect, median", seconds)


def _seal() -> Probe:
    import fcntl

    fd = os.memfd_create("vattn-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        works = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
    finally:
        os.close(fd)
    return Probe("seal a page file", works, "yes" if works else "no", "read-only export of pages")


def _collapse() -> Probe:
    """MADV_COLLAPSE 2 MiB of memfd pages; the address and the file offset must both be aligned."""
    with ExitStack() as stack:
        backend = _open(stack, mmap.PAGESIZE)
        pages = HUGE_BYTES // mmap.PAGESIZE
        base = backend.reserve(2 * pages, home=2 * pages)
        address = -(-base // HUGE_BYTES) * HUGE_BYTES
        backend.map(address, 0, pages)
        ctypes.memset(address, 1, 1)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        begin = time.perf_counter()
        refused = libc.madvise(address, HUGE_BYTES, _MADV_COLLAPSE)
        seconds = time.perf_counter() - begin
        if refused:
            reason = os.strerror(ctypes.get_errno())
            return Probe(
                "huge page on request",
                False,
                "no",
                f"MADV_COLLAPSE: {reason}; 4 KiB page tables it is (needs Linux 6.1)",
            )
    note = "MADV_COLLAPSE of 2 MiB of memfd: wide TLB reach without shmem_enabled"
    return Probe("huge page on request", True, f"{seconds * 1e6:.0f} us", note, seconds)


def _open(stack: ExitStack, page_bytes: int) -> HostBackend:
    backend = HostBackend(page_bytes)
    stack.callback(backend.close)
    return backend


def _median(act: Callable[[int], None]) -> float:
    times = []
    for i in range(_ROUNDS):
        begin = time.perf_counter()
        act(i)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def read_setting(path: str) -> str | None:
    """A kernel setting as text, None where this kernel has none; ``[x]`` of a choice list wins."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    chosen = text.partition("[")[2].partition("]")[0]
    return chosen or text
