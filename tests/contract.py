"""What every backend must do, as functions over a backend; `test_host` runs them on each.

The CUDA backend runs over the driver emulator, whose device has pages as small as the host's and
memory that the processor reads, too; fresh memory there is poisoned.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from tests.emulator.control import ready
from tests.mirror import PAGE, words_at
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import ClosedError
from vattn.allocator.host import HostBackend
from vattn.allocator.trace import TracedBackend
from vattn.allocator.vmm import Backend


def emulated(page_bytes: int = PAGE, **options: Any) -> CudaBackend:
    """A CUDA backend on a new emulated device; skips the test where there can be none."""
    ready(granularity=PAGE).set(poison=1)
    return CudaBackend(page_bytes, **options)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "host": lambda: HostBackend(PAGE),
    "checked": lambda: CheckedBackend(HostBackend(PAGE)),
    "traced": lambda: TracedBackend(CheckedBackend(HostBackend(PAGE))),
    "cuda": emulated,
    "cuda checked": lambda: CheckedBackend(emulated()),
    "cuda traced, two streams": lambda: TracedBackend(emulated(streams=lambda: (0, 1))),
}


def reserved(backend: Backend, pages: int = 4, *, zero_backed: bool = False) -> int:
    """A reservation whose home pages are 0 .. pages, all of them made."""
    backend.create(0, 2 * pages)
    return backend.reserve(pages, home=0, zero_backed=zero_backed)


def aliases_are_the_same_memory(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 7, 1)
    backend.map(base + 2 * PAGE, 7, 1)
    words_at(base)[3] = 11
    assert words_at(base + 2 * PAGE)[3] == 11
    words_at(base + 2 * PAGE)[3] = 12
    assert words_at(base)[3] == 12


def home_pages_are_where_they_belong(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 4)
    for i in range(4):
        words_at(base + i * PAGE)[:] = i
    backend.unmap(base + PAGE, 1, 2)
    backend.map(base + PAGE, 2, 1)  # page 2 at the address of page 1
    assert (words_at(base + PAGE) == 2).all()
    backend.unmap(base + PAGE, 2, 1)
    backend.map(base + PAGE, 1, 2)
    assert [int(words_at(base + i * PAGE)[0]) for i in range(4)] == [0, 1, 2, 3]


def remap_shows_the_new_page(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 2)
    words_at(base)[:] = 5
    backend.remap(base, 6, 1)
    assert not words_at(base).any()
    backend.remap(base, 0, 1)
    assert (words_at(base) == 5).all()


def destroyed_pages_read_as_zeros(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 2)
    words_at(base, 1024)[:] = 9
    held = backend.resident_bytes()
    backend.unmap(base, 0, 2)
    backend.destroy(0, 2)
    assert backend.resident_bytes() == held - 2 * PAGE
    backend.create(0, 2)
    backend.map(base, 0, 2)
    assert not words_at(base, 1024).any()


def zero_backed_addresses_read_as_zeros(backend: Backend) -> None:
    base = reserved(backend, zero_backed=True)
    assert not words_at(base, 2048).any()
    backend.map(base + PAGE, 1, 1)
    words_at(base + PAGE)[:] = 4
    backend.remap(base, 1, 1)
    backend.unmap(base + PAGE, 1, 1)
    assert (words_at(base) == 4).all()
    backend.unmap(base, 1, 1)
    assert not words_at(base, 2048).any()


def duplicate_copies_a_prefix(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 1)
    words_at(base)[:] = 8
    backend.duplicate(0, 5, 64)
    backend.map(base + PAGE, 5, 1)
    assert (words_at(base + PAGE, 8) == 8).all()
    assert not words_at(base + PAGE + 64, 504).any()


def zero_scrubs(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 2)
    words_at(base, 1024)[:] = 8
    backend.zero(base + 64, PAGE)
    assert words_at(base, 1024).sum() == 8 * 512


def warm_commits_and_changes_nothing(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 1)
    words_at(base)[:] = 3
    backend.warm(0, 2)
    assert backend.resident_bytes() >= 2 * PAGE  # a device commits what is created
    assert (words_at(base) == 3).all()
    backend.map(base + PAGE, 1, 1)
    assert not words_at(base + PAGE).any()
    assert backend.huge_bytes() == 0  # pages of 4 KiB are no huge pages


def release_gives_the_range_back(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 4)
    backend.release(base, 4)
    backend.note_maps(-1)
    assert backend.maps == 0
    with pytest.raises(Exception, match="reservation"):
        backend.release(base, 4)


def close_ends_everything(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 4)
    words_at(base)[:] = 1
    backend.close()
    backend.close()
    assert backend.resident_bytes() == 0
    for use in (
        lambda: backend.reserve(1, home=0),
        lambda: backend.admit_maps(1),
        lambda: backend.descriptor(),
    ):
        with pytest.raises(ClosedError):
            use()


def a_fence_is_reached_when_nothing_runs(backend: Backend) -> None:
    base = reserved(backend)
    backend.map(base, 0, 1)
    backend.unmap(base, 0, 1)
    fence = backend.fence()
    assert fence is None or fence()


def terabytes_cost_nothing(backend: Backend) -> None:
    pages = (4 << 40) // PAGE
    base = backend.reserve(pages, home=0)
    last = pages - 1
    backend.create(last, 1)
    backend.map(base + last * PAGE, last, 1)
    ctypes.memset(base + last * PAGE, 1, PAGE)
    assert backend.resident_bytes() == PAGE
    backend.unmap(base + last * PAGE, last, 1)
    backend.release(base, pages)


LAWS = [
    aliases_are_the_same_memory,
    home_pages_are_where_they_belong,
    remap_shows_the_new_page,
    destroyed_pages_read_as_zeros,
    zero_backed_addresses_read_as_zeros,
    duplicate_copies_a_prefix,
    zero_scrubs,
    warm_commits_and_changes_nothing,
    release_gives_the_range_back,
    close_ends_everything,
    a_fence_is_reached_when_nothing_runs,
    terabytes_cost_nothing,
]
