"""Laws of the backends: real aliasing, real faults, limits refused before they are hit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from tests import contract
from tests.mirror import PAGE, maps_within, open_things, words_at
from vattn.allocator.errors import ClosedError, MapLimitError, OutOfRange, ReserveError
from vattn.allocator.host import HostBackend, process_maps
from vattn.allocator.vmm import Backend

ROOT = Path(__file__).parents[1]


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script of ours in a process of its own, without core files."""
    resource_limit = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    return subprocess.run(
        [sys.executable, "-c", resource_limit + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("law", contract.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", contract.BACKENDS)
def test_contract(name: str, law: Callable[[Backend], None]) -> None:
    backend = contract.BACKENDS[name]()
    try:
        law(backend)
    finally:
        backend.close()


def test_unmapped_rows_of_a_zero_backed_range_may_be_written() -> None:
    backend = HostBackend(PAGE)
    backend.create(0, 4)
    base = backend.reserve(4, home=0, zero_backed=True)
    backend.map(base + PAGE, 1, 1)
    words_at(base)[0] = 0  # compilers copy whole tensors back
    backend.unmap(base + PAGE, 1, 1)
    assert not words_at(base, 2048).any()


def test_warm_commits_exactly_what_was_asked_for() -> None:
    backend = HostBackend(PAGE)
    backend.create(0, 8)
    backend.warm(0, 2)
    assert backend.resident_bytes() == 2 * PAGE


@pytest.mark.parametrize("touch", ["read", "write"])
@pytest.mark.parametrize(
    "where", ["never mapped", "unmapped at home", "unmapped alias", "released"]
)
def test_unmapped_pages_fault(where: str, touch: str) -> None:
    code = f"""
import ctypes
from vattn.allocator.host import HostBackend
b = HostBackend({PAGE}); b.create(0, 8); base = b.reserve(4, home=0)
where = {where!r}
if where != "never mapped":
    page = 6 if where == "unmapped alias" else 0
    b.map(base, page, 1)
    ctypes.memset(base, 1, 8)
    b.unmap(base, page, 1)
if where == "released":
    b.release(base, 4)
print("alive", flush=True)
if {touch!r} == "read": print(ctypes.c_char.from_address(base).value)
else: ctypes.memset(base, 1, 1)
print("no fault")
"""
    done = run_python(code)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_reserve_refused_is_typed_and_leaves_nothing() -> None:
    code = f"""
import resource
from vattn.allocator.errors import ReserveError
from vattn.allocator.host import HostBackend
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
b = HostBackend({PAGE})
try: b.reserve((8 << 30) // {PAGE}, home=0)
except ReserveError as error: print(error)
assert b.maps == 0
b.reserve(16, home=0)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert str(8 << 30) in done.stdout
    assert "ulimit -v" in done.stdout


@pytest.mark.parametrize("pages", [1 << 40, 1 << 52, 1 << 62])
def test_reserve_of_more_than_the_address_space_is_refused(pages: int) -> None:
    with pytest.raises(ReserveError, match="address space"):
        HostBackend(PAGE).reserve(pages, home=0)


def test_no_descriptor_left_is_a_map_limit_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(MapLimitError, match="ulimit -n"):
            HostBackend(PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_map_limit_is_refused_at_the_limit() -> None:
    backend = HostBackend(PAGE, map_limit=process_maps() + 20)
    backend.reserve(4, home=0)
    backend.admit_maps(10)
    with pytest.raises(MapLimitError, match=r"max_map_count.*larger pages") as error:
        backend.admit_maps(100)
    assert f"limit {backend.map_limit}" in str(error.value)


@pytest.mark.parametrize("page_bytes", [0, -4096, 4095, 6000])
def test_page_size_is_a_multiple_of_the_granularity(page_bytes: int) -> None:
    with pytest.raises(OutOfRange, match=str(page_bytes)):
        HostBackend(page_bytes)


def test_neighbouring_home_pages_are_one_kernel_map() -> None:
    backend = HostBackend(PAGE)
    backend.create(0, 64)
    base = backend.reserve(64, home=0)
    for i in range(48):
        backend.map(base + i * PAGE, i, 1)
    assert maps_within(base, 64 * PAGE) == 2
    backend.unmap(base + 8 * PAGE, 8, 1)
    assert maps_within(base, 64 * PAGE) == 4
    backend.map(base + 8 * PAGE, 8, 1)
    assert maps_within(base, 64 * PAGE) == 2
    backend.remap(base + 8 * PAGE, 8, 1)
    assert maps_within(base, 64 * PAGE) == 2


def test_close_leaves_no_descriptor_and_no_map() -> None:
    before = open_things()
    for _ in range(5):
        backend = HostBackend(PAGE)
        backend.create(0, 32)
        backend.reserve(8, home=0, zero_backed=True)
        base = backend.reserve(8, home=8)
        for i in range(8):
            backend.map(base + i * PAGE, 31 - 2 * i, 1)
        backend.close()
    assert open_things() == before


def test_reservations_lie_where_huge_pages_fit() -> None:
    backend = HostBackend(PAGE)
    for home in (0, 5, 600):
        base = backend.reserve(1024, home=home)
        assert (base - home * PAGE) % (2 << 20) == 0


def test_a_fork_is_refused_and_does_no_harm() -> None:
    code = f"""
import ctypes, gc, os, numpy as np
from vattn.allocator.arena import Arena
from vattn.allocator.errors import ClosedError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
pool = Pool(HostBackend({PAGE}), budget_bytes=1 << 20, warm_high_bytes=0)
arena = Arena(pool, slots=2, lanes=1, lane_pages=4)
arena.grow(arena.plan_grow(np.array([0, 1]), np.array([3, 3])))
lease = arena.lease(0, 1)
ctypes.memset(arena.address, 7, {PAGE})
if (child := os.fork()) == 0:
    refused = 0
    for act in (lambda: arena.trim(0, 0, 1), lambda: arena.drop(1), pool.advance, pool.trim,
                lambda: arena.grow(arena.plan_grow(np.array([0]), np.array([4]))),
                lambda: arena.unshare(0, 0, 1), lambda: pool.set_budget(0),
                lambda: pool.backend.destroy(0, 1),
                lambda: Arena(pool, slots=1, lanes=1, lane_pages=1)):
        try: act()
        except ClosedError as error:
            assert "fork" in str(error), error
            refused += 1
    arena.close(); pool.close(); pool.backend.close()
    del lease, arena, pool; gc.collect()
    os._exit(0 if refused == 9 else 1)
assert os.waitpid(child, 0)[1] == 0
assert bytes((ctypes.c_char * {PAGE}).from_address(arena.address)) == b"\\7" * {PAGE}
arena.check(); pool.check()
arena.grow(arena.plan_grow(np.array([0]), np.array([4])))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_closed_backend_refuses_every_verb() -> None:
    backend = HostBackend(PAGE)
    base = backend.reserve(2, home=0)
    backend.close()
    for act in (
        lambda: backend.create(0, 1),
        lambda: backend.destroy(0, 1),
        lambda: backend.map(base, 0, 1),
        lambda: backend.remap(base, 0, 1),
        lambda: backend.unmap(base, 0, 1),
        lambda: backend.duplicate(0, 1, 8),
        lambda: backend.warm(0, 1),
    ):
        with pytest.raises(ClosedError):
            act()


def test_two_threads_may_make_the_file_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter request, still under way when the longer one comes, must not shrink the file."""
    backend, resize = HostBackend(PAGE), os.ftruncate
    longer = Thread(target=backend.create, args=(100, 28))

    def slow(fd: int, nbytes: int) -> None:
        if nbytes == 10 * PAGE:
            longer.start()
            longer.join(timeout=0.2)
        resize(fd, nbytes)

    monkeypatch.setattr(os, "ftruncate", slow)
    backend.create(0, 10)
    longer.join()
    assert os.fstat(backend.fd).st_size == 128 * PAGE
    backend.close()
