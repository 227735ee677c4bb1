"""Check a backend of your own: laws of the verbs, and a state machine of the whole allocator.

    from vattn.allocator import testing

    @pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
    def test_law(law):
        testing.check_law(law, MyBackend)

    TestHistories = testing.state_machine(MyBackend).TestCase

The laws are functions of a new backend. The state machine (with hypothesis) drives every verb of
two arenas over one pool, makes any backend call fail, and after each operation asserts

    conservation     free + mapped + pending == total + over, page by page       `laws.check_pool`
    no double owner  a page that is free is mapped nowhere, and quarantined for a whole step
    aliases          references of a page == addresses that map it
    use              nothing is unmapped under a live view, and every written word reads as written
    tenants          no word of one tenant is ever read by another, adopted pages included
    rollback         a call that failed left budget, counts, records and mappings exactly as before
    budget           created pages never exceed the budget, unless it was lowered under them
    ends             closed, everything is given back to the last byte

`storm` (without hypothesis) is for volume: the same laws under two threads that compete for pages,
millions of operations in minutes.

    storm(MyBackend, operations=20_000, seed=1)

The memory must be readable by the processor: test a device's backend over an emulator, or with
pages of host memory. Needs neither pytest nor hypothesis to be imported; `state_machine` needs
hypothesis.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import ClosedError, VattnError
from .testing_mirror import words_at
from .testing_storm import Device, Storm, StormError, storm
from .vmm import Backend

__all__ = [
    "LAWS",
    "Device",
    "Law",
    "Storm",
    "StormError",
    "check_law",
    "reserved",
    "state_machine",
    "storm",
]

Law = Callable[[Backend], None]


def check_law(law: Law, open_backend: Callable[[], Backend]) -> None:
    """Assert one of `LAWS` on a new backend, which is closed afterwards."""
    backend = open_backend()
    try:
        law(backend)
    finally:
        backend.close()


def state_machine(
    open_backend: Callable[[], Backend],
    *,
    lanes: int = 2,
    examples: int = 50,
    steps: int = 50,
    kernel_maps: bool = False,
) -> Any:
    """A `hypothesis.stateful.RuleBasedStateMachine` over new backends; its ``TestCase`` is a test.

    Args:
        open_backend: makes a new backend for each history.
        lanes: of the arenas; 1 takes the short ways through the allocator.
        examples, steps: histories, and operations of each.
        kernel_maps: the backend's ``maps`` are those of ``/proc/self/maps``: count them, too.

    Raises:
        VattnError: hypothesis is not installed.
    """
    try:
        from .testing_machine import Twins, settings_for
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise VattnError("the state machine needs hypothesis: pip install hypothesis") from None

    class Machine(Twins):
        def open_backend(self) -> Backend:
            return open_backend()

    Machine.lanes, Machine.kernel_maps = lanes, kernel_maps
    Machine.TestCase.settings = settings_for(examples, steps)
    return Machine


# ---- laws ----------------------------------------------------------------------------------------
def reserved(backend: Backend, pages: int = 4, *, zero_backed: bool = False) -> int:
    """A reservation whose home pages are 0 .. pages, all of them made."""
    backend.create(0, 2 * pages)
    return backend.reserve(pages, home=0, zero_backed=zero_backed)


def aliases_are_the_same_memory(backend: Backend) -> None:
    """One page at two addresses is the same bytes: alias count = mappings."""
    base = reserved(backend)
    backend.map(base, 7, 1)
    backend.map(base + 2 * backend.page_bytes, 7, 1)
    _words(backend, base)[3] = 11
    assert _words(backend, base + 2 * backend.page_bytes)[3] == 11
    _words(backend, base + 2 * backend.page_bytes)[3] = 12
    assert _words(backend, base)[3] == 12


def home_pages_are_where_they_belong(backend: Backend) -> None:
    """Mapping and unmapping runs, at home and elsewhere, moves no bytes."""
    base = reserved(backend)
    backend.map(base, 0, 4)
    for i in range(4):
        _words(backend, base + i * backend.page_bytes)[:] = i
    backend.unmap(base + backend.page_bytes, 1, 2)
    backend.map(base + backend.page_bytes, 2, 1)  # page 2 at the address of page 1
    assert (_words(backend, base + backend.page_bytes) == 2).all()
    backend.unmap(base + backend.page_bytes, 2, 1)
    backend.map(base + backend.page_bytes, 1, 2)
    assert [int(_words(backend, base + i * backend.page_bytes)[0]) for i in range(4)] == [
        0,
        1,
        2,
        3,
    ]


def remap_shows_the_new_page(backend: Backend) -> None:
    """A remap shows the new page; the old one keeps its bytes."""
    base = reserved(backend)
    backend.map(base, 0, 2)
    _words(backend, base)[:] = 5
    backend.remap(base, 6, 1)
    assert not _words(backend, base).any()
    backend.remap(base, 0, 1)
    assert (_words(backend, base) == 5).all()


def destroyed_pages_read_as_zeros(backend: Backend) -> None:
    """A page that was destroyed carries nobody's bytes when it is made again."""
    base = reserved(backend)
    backend.map(base, 0, 2)
    _words(backend, base, 2)[:] = 9
    held = backend.resident_bytes()
    backend.unmap(base, 0, 2)
    backend.destroy(0, 2)
    assert backend.resident_bytes() == held - 2 * backend.page_bytes
    backend.create(0, 2)
    backend.map(base, 0, 2)
    assert not _words(backend, base, 2).any()


def zero_backed_addresses_read_as_zeros(backend: Backend) -> None:
    """Where nothing is mapped, a zero-backed range reads as zeros."""
    base = reserved(backend, zero_backed=True)
    assert not _words(backend, base, 4).any()
    backend.map(base + backend.page_bytes, 1, 1)
    _words(backend, base + backend.page_bytes)[:] = 4
    backend.remap(base, 1, 1)
    backend.unmap(base + backend.page_bytes, 1, 1)
    assert (_words(backend, base) == 4).all()
    backend.unmap(base, 1, 1)
    assert not _words(backend, base, 4).any()


def duplicate_copies_a_prefix(backend: Backend) -> None:
    """The first bytes of a page are copied, and no others."""
    base = reserved(backend)
    backend.map(base, 0, 1)
    _words(backend, base)[:] = 8
    backend.duplicate(0, 5, 64)
    backend.map(base + backend.page_bytes, 5, 1)
    assert (_words(backend, base + backend.page_bytes)[:8] == 8).all()
    assert not _words(backend, base + backend.page_bytes)[8:].any()


def zero_scrubs(backend: Backend) -> None:
    """Exactly the bytes named are zeroed, over borders of pages."""
    base = reserved(backend)
    backend.map(base, 0, 2)
    _words(backend, base, 2)[:] = 8
    backend.zero(base + 64, backend.page_bytes)
    assert _words(backend, base, 2).sum() == backend.page_bytes


def warm_commits_and_changes_nothing(backend: Backend) -> None:
    """Warming commits bytes and changes none."""
    base = reserved(backend)
    backend.map(base, 0, 1)
    _words(backend, base)[:] = 3
    backend.warm(0, 2)
    assert backend.resident_bytes() >= 2 * backend.page_bytes  # a device commits what is created
    assert (_words(backend, base) == 3).all()
    backend.map(base + backend.page_bytes, 1, 1)
    assert not _words(backend, base + backend.page_bytes).any()


def release_gives_the_range_back(backend: Backend) -> None:
    """A range that is released is gone, whatever was mapped; twice is an error."""
    base = reserved(backend)
    backend.map(base, 0, 4)
    backend.release(base, 4)
    backend.note_maps(-1)
    assert backend.maps == 0
    _refuses(lambda: backend.release(base, 4), VattnError)


def close_ends_everything(backend: Backend) -> None:
    """Close gives all bytes back, may be repeated, and is final."""
    base = reserved(backend)
    backend.map(base, 0, 4)
    _words(backend, base)[:] = 1
    backend.close()
    backend.close()
    assert backend.resident_bytes() == 0
    for use in (
        lambda: backend.reserve(1, home=0),
        lambda: backend.admit_maps(1),
        lambda: backend.descriptor(),
    ):
        _refuses(use, ClosedError)


def a_fence_is_reached_when_nothing_runs(backend: Backend) -> None:
    """A fence with no work before it is reached."""
    base = reserved(backend)
    backend.map(base, 0, 1)
    backend.unmap(base, 0, 1)
    fence = backend.fence()
    assert fence is None or fence()


def terabytes_cost_nothing(backend: Backend) -> None:
    """Address space is free: 4 TiB with one page mapped at the end."""
    pages = (4 << 40) // backend.page_bytes
    base = backend.reserve(pages, home=0)
    last = pages - 1
    backend.create(last, 1)
    backend.map(base + last * backend.page_bytes, last, 1)
    ctypes.memset(base + last * backend.page_bytes, 1, backend.page_bytes)
    assert backend.resident_bytes() == backend.page_bytes
    backend.unmap(base + last * backend.page_bytes, last, 1)
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


def _words(backend: Backend, address: int, pages: int = 1) -> np.ndarray:
    """The words of so many pages."""
    return words_at(address, pages * backend.page_bytes // 8)


def _refuses(act: Callable[[], object], error: type[Exception]) -> None:
    try:
        act()
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")
