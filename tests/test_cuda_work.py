"""Laws of the CUDA backend: nothing is unmapped under work, threads keep their contexts, close ends
everything. Over the driver emulator, whose work can be held back.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

import pytest

from tests.arenas import fill, first_words, grow
from tests.devices import UNKNOWN, make_arena, shut
from tests.emulator.control import NOTHING, Emulator, ready
from tests.mirror import PAGE, words_at
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import (
    ClosedError,
    DriverError,
)

# ---- work behind the host --------------------------------------------------------------------
ENDS: dict[str, Callable[[CudaBackend, int], object]] = {
    "unmap": lambda b, base: b.unmap(base, 0, 2),
    "remap": lambda b, base: b.remap(base, 4, 1),
    "release": lambda b, base: b.release(base, 8),
    "close": lambda b, base: b.close(),
}


@pytest.mark.parametrize("streams", ["context", "named"])
@pytest.mark.parametrize("verb", ENDS)
def test_nothing_is_unmapped_under_work(verb: str, streams: str, emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    backend.create(0, 8)
    base = backend.reserve(8, home=0)
    backend.map(base, 0, 2)
    stream = backend.driver.create_stream()
    if streams == "named":
        backend.fences.streams = lambda: (0, stream)
    emulator.set(delay=1)
    emulator.kernel(base, 2 * PAGE, stream)
    ENDS[verb](backend, base)
    assert emulator.live.work == 0
    assert emulator.faults == 0
    if verb != "close":
        backend.driver.destroy_stream(stream)
        backend.close()
    else:
        emulator.reset()


def test_what_is_not_waited_for_is_seen(emulator: Emulator) -> None:
    """The check of the check: a backend that waits for the wrong streams faults."""
    backend = CudaBackend(PAGE, streams=lambda: ())
    backend.create(0, 8)
    base = backend.reserve(8, home=0)
    backend.map(base, 0, 2)
    emulator.set(delay=1)
    emulator.kernel(base, PAGE)
    backend.unmap(base, 0, 2)
    assert emulator.faults == 1
    emulator.reset()
    backend.context.open = False


def test_scrubs_and_copies_come_after_the_work_before(
    emulator: Emulator, backend: CudaBackend
) -> None:
    base = backend.reserve(8, home=0)
    backend.map(base, 0, 2)
    emulator.set(delay=1)
    emulator.kernel(base, PAGE)
    backend.zero(base, PAGE)
    assert emulator.live.work == 0
    backend.driver.fill(base, 1, PAGE, 0)  # somebody's kernel writes the page
    backend.duplicate(0, 5, PAGE)
    backend.map(base + 4 * PAGE, 5, 1)
    assert (words_at(base + 4 * PAGE) == 0x0101010101010101).all()
    assert emulator.live.work == 0


def test_pages_wait_for_the_fence_of_their_streams(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE, streams=lambda: (0, 1))
    arena = make_arena(backend)
    grow(arena, 0, 4)
    emulator.set(delay=1)
    arena.trim(0, 0, 2)
    arena.pool.advance()
    assert (arena.pool.pending, arena.pool.free) == (2, 196)
    assert emulator.run(1) == 1
    arena.pool.drain()
    assert arena.pool.pending == 2
    assert emulator.run(1) == 0
    arena.pool.drain()
    assert (arena.pool.pending, arena.pool.free) == (0, 198)
    made = emulator.live.events
    for _ in range(5):
        arena.drop(0)
        emulator.run()
        arena.pool.advance()
        grow(arena, 0, 2)
    assert emulator.live.events == made  # events are used again
    shut(arena)
    emulator.run()


def test_a_fence_that_cannot_be_made_waits_instead(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE, streams=lambda: (0,))
    arena = make_arena(backend)
    grow(arena, 0, 4)
    emulator.set(delay=1)
    emulator.fail(1, UNKNOWN, "cuEventCreate")
    arena.drop(0)
    arena.pool.advance()
    assert arena.pool.pending == 0
    shut(arena)


# ---- threads, forks, ends --------------------------------------------------------------------
def test_any_thread_may_call_and_keeps_its_own_context() -> None:
    emulator = ready(granularity=PAGE, devices=2)
    backend = CudaBackend(PAGE)
    cuda = backend.driver.cuda
    _, other = cuda.cuDevicePrimaryCtxRetain(1)
    seen: list[object] = []

    def act(context: object) -> None:
        if context is not None:
            cuda.cuCtxSetCurrent(context)
        base = backend.reserve(4, home=0)
        page = backend.resident_bytes() // PAGE
        backend.create(page, 1)
        backend.map(base, page, 1)
        backend.zero(base, PAGE)
        with pytest.raises(DriverError):
            backend.unmap(base, page, 2)
        backend.unmap(base, page, 1)
        seen.append((int(cuda.cuCtxGetCurrent()[1]), None if context is None else int(context)))  # type: ignore[call-overload]

    for context in (None, other):
        thread = threading.Thread(target=act, args=(context,))
        thread.start()
        thread.join()
    act(None)
    ours = backend.context.number
    assert seen == [(ours, None), (int(other), int(other)), (ours, None)]
    backend.close()
    cuda.cuDevicePrimaryCtxRelease(1)
    assert emulator.live == NOTHING


@pytest.mark.parametrize("needed", [True, False])
def test_mapping_asks_for_no_context_and_makes_ours_current_where_a_driver_insists(
    emulator: Emulator, backend: CudaBackend, needed: bool
) -> None:
    """cuda.h names no context for mapping; the emulator insists on one unless told not to."""
    base = backend.reserve(8, home=0)
    emulator.set(context_free=not needed)
    seen: list[int] = []

    def act() -> None:
        backend.handles.fresh.clear()  # nothing to zero, which needs a context
        asked = emulator.calls("cuCtxGetCurrent"), emulator.calls("cuMemMap")
        backend.map(base, 0, 3)
        backend.map(base + 3 * PAGE, 3, 3)
        seen.append(emulator.calls("cuCtxGetCurrent") - asked[0])
        seen.append(emulator.calls("cuMemMap") - asked[1])
        seen.append(backend.driver.current())
        backend.unmap(base, 0, 3)  # waits, and that needs it
        seen.append(backend.driver.current())

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    ours = backend.context.number
    # Insisting costs the first call of a thread twice, and two questions.
    assert seen == ([2, 7, ours, ours] if needed else [0, 6, 0, ours])
    backend.release(base, 8)


def test_a_change_waits_for_our_work_whatever_is_current(emulator: Emulator) -> None:
    """Another library may make its context current at any time, without telling us."""
    emulator.reset(granularity=PAGE, devices=2)
    backend = CudaBackend(PAGE)
    cuda = backend.driver.cuda
    backend.create(0, 2)
    base = backend.reserve(4, home=0)
    backend.map(base, 0, 2)
    emulator.set(delay=1)
    emulator.kernel(base, PAGE)  # of our context
    _, other = cuda.cuDevicePrimaryCtxRetain(1)
    cuda.cuCtxPushCurrent(other)
    backend.unmap(base, 0, 1)
    backend.map(base, 0, 1)
    backend.remap(base + PAGE, 0, 1)
    assert backend.driver.current() == int(other)
    assert emulator.faults == 0, emulator.fault
    cuda.cuCtxPopCurrent()
    backend.close()
    cuda.cuDevicePrimaryCtxRelease(1)
    assert emulator.live == NOTHING


def test_a_wait_that_fails_leaves_no_zeroing_behind(emulator: Emulator) -> None:
    """A fresh page is zeroed when it is mapped; when the wait for that fails, the zeroing must not
    run later, over whatever is there by then. Found by the storm."""
    backend = CudaBackend(PAGE, streams=lambda: (0,))  # our own stream is none of them
    backend.create(0, 2)
    base = backend.reserve(4, home=0)
    emulator.set(delay=1)
    emulator.fail(1, UNKNOWN, "cuStreamSynchronize")
    backend.map(base, 0, 1)  # the wait is tried again
    assert not emulator.failing
    backend.unmap(base, 0, 1)
    emulator.set(delay=0)
    assert emulator.faults == 0, emulator.fault
    backend.close()


def test_threads_warm_pages_while_another_grows(emulator: Emulator) -> None:
    from vattn.allocator.warm import Warmer

    arena = make_arena(CheckedBackend(CudaBackend(PAGE)), slots=8, pages=60)
    with Warmer(arena.pool, low_bytes=12 * PAGE) as warmer:
        for step in range(200):
            slot = step % 8
            grow(arena, slot, step % 7 + 1)
            fill(arena, slot, step << 20)
            assert first_words(arena, slot)[0] >> 20 == step
            if step % 3 == 0:
                arena.drop((step // 3) % 8)
            arena.pool.advance()
        warmer.settle(5)
        assert warmer.refused is None
    assert warmer.made > 0
    arena.check()
    arena.pool.check()
    shut(arena)


def test_a_fork_is_refused_and_does_no_harm(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    arena = make_arena(backend)
    grow(arena, 0, 3)
    fill(arena, 0, 5)
    if (child := os.fork()) == 0:
        refused = 0
        for act in (
            lambda: backend.create(99, 1),
            lambda: backend.unmap(arena.address, 0, 1),
            lambda: grow(arena, 0, 4),
            lambda: backend.export_page(0),
            backend.wait,
        ):
            try:
                act()
            except ClosedError as error:
                refused += "fork" in str(error)
        arena.close()
        backend.close()
        os._exit(0 if refused == 5 and backend.fence() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert first_words(arena, 0) == [5, 6, 7]
    grow(arena, 0, 4)
    arena.check()
    shut(arena)


def test_close_gives_everything_back_and_is_final(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE, streams=lambda: (0,))
    backend.create(0, 20)
    zeros = backend.reserve(8, home=0, zero_backed=True)
    base = backend.reserve(8, home=8)
    backend.map(zeros + PAGE, 1, 3)
    for i in range(8):
        backend.map(base + i * PAGE, 19 - 2 * i, 1)
    backend.duplicate(19, 18, 64)
    assert backend.fence() is not None
    backend.import_page(50, fd := backend.export_page(0))
    os.close(fd)
    backend.close()
    backend.close()
    assert emulator.live == NOTHING
    assert backend.resident_bytes() == 0
    backend.release(base, 8)
    for act in (
        lambda: backend.create(0, 1),
        lambda: backend.map(base, 0, 1),
        lambda: backend.zero(base, 8),
        lambda: backend.admit_maps(1),
        backend.descriptor,
        backend.wait,
    ):
        with pytest.raises(ClosedError):
            act()
    emulator.reset()


def test_a_forgotten_backend_gives_everything_back(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    backend.create(0, 4)
    backend.map(backend.reserve(4, home=0), 0, 4)
    del backend
    gc.collect()
    assert emulator.live == NOTHING


def test_a_dead_context_can_be_closed(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    backend.create(0, 4)
    backend.map(backend.reserve(4, home=0), 0, 4)
    backend.driver.release_context(0)  # somebody reset the device
    with pytest.raises(DriverError, match=r"INVALID_CONTEXT.*something reset the device"):
        backend.wait()
    backend.close()
    assert backend.resident_bytes() == 0
    emulator.reset()
