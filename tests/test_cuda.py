"""Laws of the CUDA backend, over the driver emulator: no GPU, the unmodified cuda.bindings.

The contract of all backends runs on it in `test_host`. Here is what only a device has: calls that
are counted, memory that comes dirty and runs out, kinds of pages. `test_cuda_work` has what runs
behind the host, threads, forks and ends; `test_cuda_faults` makes every call fail.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

from tests.arenas import fill, first_words, grow, ints, state_of
from tests.contract import emulated
from tests.devices import make_arena, shut
from tests.emulator.control import NOTHING, Emulator, ready
from tests.mirror import PAGE, words_at
from tests.test_host import run_python
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import (
    DriverError,
    NoDeviceError,
    OutOfDeviceMemory,
    OutOfRange,
    PageStateError,
    ReserveError,
    ShareError,
)
from vattn.allocator.probe import survey

POISON = 0xCBCBCBCBCBCBCBCB

# ---- what is missing -------------------------------------------------------------------------
MISSING = {
    "bindings": ("sys.modules['cuda.bindings'] = None", r"pip install 'vattn\[cuda\]'"),
    "driver": (
        "from cuda.bindings import driver\n"
        "def cuInit(flags): raise RuntimeError('Failed to dlopen libcuda.so.1')\n"
        "driver.cuInit = cuInit",
        "install the NVIDIA driver",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_named_with_its_remedy(what: str) -> None:
    if what == "driver":
        ready()
    hide, remedy = MISSING[what]
    done = run_python(
        f"import sys\n{hide}\nimport vattn.allocator.cuda as cuda, vattn.allocator.errors as e\n"
        "try: cuda.CudaBackend()\nexcept e.NoDeviceError as error: print(error)"
    )
    assert done.returncode == 0, done.stderr
    assert remedy.replace("\\", "") in done.stdout
    assert "host backend" in done.stdout


def test_no_usable_device_is_named_with_its_remedy(emulator: Emulator) -> None:
    with pytest.raises(NoDeviceError, match=r"device 3 was asked for, 1 are visible"):
        CudaBackend(PAGE, device=3)
    with pytest.raises(NoDeviceError, match="device 1 was asked for"):
        CudaBackend(PAGE, peers=[1])
    emulator.attribute(102, 0)
    with pytest.raises(NoDeviceError, match="no virtual memory management"):
        CudaBackend(PAGE)
    emulator.reset(devices=0)
    with pytest.raises(NoDeviceError, match=r"CUDA_ERROR_NO_DEVICE \(100\).*nvidia-smi"):
        CudaBackend(PAGE)


@pytest.mark.parametrize("page_bytes", [0, -PAGE, 1 << 20, 3 << 20])
def test_pages_are_multiples_of_what_the_device_says(page_bytes: int) -> None:
    emulator = ready()
    with pytest.raises(OutOfRange, match=rf"multiple of {2 << 20}.*got {page_bytes}"):
        CudaBackend(page_bytes)
    assert emulator.live == NOTHING


@pytest.mark.parametrize("page_bytes", [None, 2 << 20, 6 << 20, 16 << 20, 64 << 20])
def test_pages_of_any_multiple_are_one_mapping_each(page_bytes: int | None) -> None:
    emulator = ready()
    emulator.set(recommended=4 << 20)
    backend = CudaBackend(page_bytes)
    size = backend.page_bytes
    assert size == page_bytes or (page_bytes is None and size == 4 << 20)
    arena = make_arena(backend)
    before = emulator.live.mappings
    grow(arena, 1, 3)
    assert emulator.live.mappings == before + 3
    assert arena.address % (size & -size) == 0
    words_at(arena.address + 8 * size + 3 * size - 8, 1)[0] = 7
    assert backend.resident_bytes() == 3 * size
    shut(arena)
    assert emulator.live == NOTHING
    assert emulator.faults == 0


# ---- calls -----------------------------------------------------------------------------------
def test_a_run_is_one_access_call_and_one_unmap(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE, scrub=False)
    base = backend.reserve(8, home=0)
    backend.create(0, 8)
    counts = {n: emulator.calls(n) for n in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap")}
    backend.map(base, 0, 8)
    backend.unmap(base, 0, 8)
    assert {n: emulator.calls(n) - c for n, c in counts.items()} == {
        "cuMemMap": 8,
        "cuMemSetAccess": 1,
        "cuMemUnmap": 1,
    }
    backend.close()


def test_warm_pages_keep_their_handles(emulator: Emulator) -> None:
    arena = make_arena(CudaBackend(PAGE))
    grow(arena, 0, 6)
    made = emulator.calls("cuMemCreate")
    for _ in range(3):
        arena.drop(0)
        arena.pool.advance()
        grow(arena, 1, 6)
        arena.drop(1)
        arena.pool.advance()
        grow(arena, 0, 6)
    assert emulator.calls("cuMemCreate") == made
    assert emulator.calls("cuMemRelease") == 1  # of the page that the probe made
    shut(arena)


def test_errors_tell_call_result_address_size_and_remedy(backend: CudaBackend) -> None:
    base = backend.reserve(4, home=0)
    backend.map(base, 0, 1)
    with pytest.raises(DriverError) as error:
        backend.unmap(base, 0, 2)
    text = str(error.value)
    for part in ("cuMemUnmap", "CUDA_ERROR_INVALID_VALUE (1)", f"{base:#x}", f"{2 * PAGE:#x}"):
        assert part in text
    assert "whole pages" in text
    assert (error.value.call, error.value.code) == ("cuMemUnmap", 1)
    assert (error.value.address, error.value.nbytes) == (base, 2 * PAGE)


def test_a_fault_of_the_device_points_to_the_flight_recorder(
    emulator: Emulator, backend: CudaBackend
) -> None:
    base = backend.reserve(4, home=0)
    backend.map(base, 2, 3)
    backend.unmap(base + PAGE, 3, 1)
    emulator.fail(1, 700, "cuCtxSynchronize")
    with pytest.raises(DriverError, match=r"ILLEGAL_ADDRESS.*flight recorder"):
        backend.wait()
    verbs = [(f.verb, f.page, f.pages) for f in backend.flights.around(base + PAGE, PAGE)]
    assert verbs == [("map", 2, 3), ("unmap", 3, 1)]
    last = backend.flights.around(base + PAGE, PAGE)[-1]
    assert (last.thread, last.waits) == (threading.get_ident(), 1)


@pytest.mark.parametrize("verb", ["map", "remap", "duplicate", "destroy", "warm", "export_page"])
def test_pages_that_do_not_exist_are_refused(verb: str, backend: CudaBackend) -> None:
    base = backend.reserve(4, home=0)
    arguments = {
        "map": (base, 7, 2),
        "remap": (base, 7, 2),
        "duplicate": (0, 9, 8),
        "destroy": (9, 1),
        "warm": (8, 1),
        "export_page": (8,),
    }[verb]
    with pytest.raises(PageStateError, match="create it first"):
        getattr(backend, verb)(*arguments)
    with pytest.raises(PageStateError, match="exists already"):
        backend.create(7, 2)
    assert backend.resident_bytes() == 8 * PAGE


def test_too_much_address_space_is_refused_with_a_remedy(
    emulator: Emulator, backend: CudaBackend
) -> None:
    for pages in (1 << 40, 1 << 52, 1 << 62):
        with pytest.raises(ReserveError, match="max_tokens"):
            backend.reserve(pages, home=0)
    emulator.set(address_space=1 << 20)
    with pytest.raises(ReserveError, match=r"OUT_OF_MEMORY.*WSL2"):
        backend.reserve(1 << 10, home=0)
    with pytest.raises(ReserveError, match="one by one"):
        backend.reserve(1 << 17, home=0, zero_backed=True)


# ---- memory that runs out --------------------------------------------------------------------
def test_a_shortage_asks_once_and_tries_again(emulator: Emulator) -> None:
    asked = []

    def give_back() -> None:
        asked.append(backend.resident_bytes())
        emulator.set(memory=8 * PAGE)

    backend = CudaBackend(PAGE, on_out_of_memory=give_back)
    emulator.set(memory=4 * PAGE)
    backend.create(0, 6)
    assert len(asked) == 1
    with pytest.raises(OutOfDeviceMemory, match=r"cuMemCreate.*set_budget.*empty_cache"):
        backend.create(6, 3)
    assert len(asked) == 2
    assert emulator.live.allocations == 6
    assert backend.resident_bytes() == 6 * PAGE
    backend.close()


def test_a_shortage_leaves_arena_and_pool_as_they_were(emulator: Emulator) -> None:
    arena = make_arena(CheckedBackend(CudaBackend(PAGE)))
    grow(arena, 0, 3)
    emulator.set(memory=5 * PAGE)
    before, live = state_of(arena), emulator.live
    with pytest.raises(OutOfDeviceMemory):
        grow(arena, 1, 3)
    assert state_of(arena) == before
    assert emulator.live == live
    grow(arena, 1, 2)
    arena.pool.check()
    shut(arena)


# ---- what was there before -------------------------------------------------------------------
def test_memory_of_a_new_page_is_zeroed_before_it_is_seen(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    base = backend.reserve(8, home=0)
    backend.create(0, 8)
    backend.map(base, 0, 1)
    backend.remap(base, 1, 2)
    backend.warm(3, 1)
    backend.map(base + 3 * PAGE, 3, 2)
    words_at(base)[:] = 6
    backend.duplicate(1, 6, 64)
    backend.duplicate(1, 7, PAGE)
    backend.map(base + 5 * PAGE, 6, 2)
    assert (words_at(base + 5 * PAGE, 8) == 6).all()
    assert not words_at(base + 5 * PAGE + 64, 504).any()
    assert (words_at(base + 6 * PAGE) == 6).all()
    assert not words_at(base + PAGE).any()
    assert not words_at(base + 3 * PAGE, 1024).any()
    backend.unmap(base, 1, 1)
    backend.map(base, 1, 1)
    assert (words_at(base) == 6).all()  # once only
    backend.close()


def test_without_scrub_it_is_what_it_was(emulator: Emulator) -> None:
    """That the emulator's memory does come dirty, and nothing else zeroes it."""
    backend = CudaBackend(PAGE, scrub=False)
    base = backend.reserve(1, home=0)
    backend.create(0, 1)
    backend.map(base, 0, 1)
    assert (words_at(base) == POISON).all()
    backend.close()


# ---- kinds of pages --------------------------------------------------------------------------
def test_the_best_kind_that_works_is_chosen_and_refusals_are_kept(emulator: Emulator) -> None:
    def opened(**options: Any) -> tuple[str, list[str]]:
        backend = CudaBackend(PAGE, **options)
        backend.close()
        return str(backend.kind), backend.refusals

    assert opened() == ("device 0, by descriptor, RDMA", [])
    assert opened(export="fabric") == ("device 0, by fabric, RDMA", [])
    assert opened(export=None, rdma=False) == ("device 0, private", [])
    emulator.set(refuse_rdma=1)
    kind, refusals = opened()
    assert kind == "device 0, by descriptor"
    assert "cuMemSetAccess failed: CUDA_ERROR_UNKNOWN (999)" in refusals[0]
    emulator.set(refuse_rdma=0, refused_types=8)
    kind, refusals = opened(export="fabric")
    assert kind == "device 0, by descriptor, RDMA"
    assert len(refusals) == 2
    assert all("CUDA_ERROR_NOT_PERMITTED" in why and "imex" in why for why in refusals)
    emulator.attribute(103, 0)
    emulator.attribute(110, 0)
    kind, refusals = opened()
    assert kind == "device 0, private"
    assert "does not advertise HANDLE_TYPE_POSIX_FILE_DESCRIPTOR" in refusals[0]
    assert "does not advertise GPU_DIRECT_RDMA_WITH_CUDA_VMM" in refusals[2]


def test_no_kind_at_all_is_an_error_that_leaves_nothing(emulator: Emulator) -> None:
    emulator.set(memory=0)
    with pytest.raises(NoDeviceError, match=r"gives no pages.*OUT_OF_MEMORY"):
        CudaBackend(PAGE)


def test_a_survey_tries_every_kind(emulator: Emulator) -> None:
    emulator.set(refused_types=8)
    found = survey()
    assert len(found) == 8
    given = [kind for kind, why in found.items() if why is None]
    assert "device 0, private, RDMA" in given
    assert "node 0, by descriptor" in given
    assert "NOT_PERMITTED" in str(found["device 0, by fabric"])


def test_pages_of_host_memory_serve_the_same_addresses(emulator: Emulator) -> None:
    device = CudaBackend(PAGE)
    host = CudaBackend(PAGE, host_node=0)
    assert str(host.kind) == "node 0, by descriptor"
    base = device.reserve(2, home=0)
    device.create(0, 2)
    host.create(0, 1)
    device.map(base, 0, 2)
    device.unmap(base + PAGE, 1, 1)
    host.map(base + PAGE, 0, 1)  # the address moved to host memory
    assert host.driver.cuda.cuMemGetAccess(host.driver.location(host.kind), base + PAGE)[1] == 3
    emulator.kernel(base, 2 * PAGE)
    assert emulator.faults == 0
    host.unmap(base + PAGE, 0, 1)
    host.close()
    device.close()


def test_peers_get_access_to_every_page() -> None:
    emulator = ready(granularity=PAGE, devices=2)
    backend = CudaBackend(PAGE, peers=[1])
    backend.create(0, 2)
    base = backend.reserve(2, home=0, zero_backed=True)
    backend.map(base, 0, 1)
    other = backend.driver.retain_context(1)
    backend.driver.enter(other)
    stream = backend.driver.create_stream()
    emulator.kernel(base, 2 * PAGE, stream)
    assert emulator.faults == 0
    backend.driver.leave()
    emulator.reset()
    backend.context.open = False


def test_pages_go_to_another_process_by_descriptor(backend: CudaBackend) -> None:
    base = backend.reserve(2, home=0)
    backend.map(base, 3, 1)
    words_at(base)[:] = 41
    fd = backend.export_page(3)
    code = f"""
from tests.contract import emulated
from tests.mirror import words_at
backend = emulated()
base = backend.reserve(1, home=0)
backend.import_page(0, {fd})
backend.map(base, 0, 1)
assert backend.resident_bytes() == 0
words_at(base)[:] += 1
backend.unmap(base, 0, 1)
backend.destroy(0, 1)
backend.close()
"""
    done = run_python(code, pass_fds=[fd])
    assert done.returncode == 0, done.stderr
    assert (words_at(base) == 42).all()
    backend.import_page(9, fd)
    os.close(fd)
    backend.map(base + PAGE, 9, 1)
    words_at(base + PAGE)[0] = 5
    assert words_at(base)[0] == 5


def test_pages_that_cannot_be_exported_say_why(emulator: Emulator) -> None:
    emulator.attribute(103, 0)
    backend = CudaBackend(PAGE)
    backend.create(0, 1)
    with pytest.raises(ShareError, match=r"private.*does not advertise HANDLE_TYPE_POSIX"):
        backend.export_page(0)
    with pytest.raises(ShareError, match="export_page"):
        backend.descriptor()
    backend.close()


# ---- zeros -----------------------------------------------------------------------------------
def test_zeros_are_one_page_for_all(emulator: Emulator) -> None:
    backend = CudaBackend(PAGE)
    bases = [backend.reserve(64, home=0, zero_backed=True) for _ in range(2)]
    assert backend.resident_bytes() == PAGE
    assert not any(words_at(base, 64 * 512).any() for base in bases)
    place = backend.driver.location(backend.kind)
    assert backend.driver.cuda.cuMemGetAccess(place, bases[0] + PAGE)[1] == 1  # readable only
    backend.release(bases[0], 64)
    assert backend.resident_bytes() == PAGE
    backend.release(bases[1], 64)
    assert backend.resident_bytes() == 0
    backend.close()


# ---- arenas ----------------------------------------------------------------------------------
def test_arenas_share_shift_and_permute_without_a_copy(emulator: Emulator) -> None:
    arena = make_arena(CheckedBackend(emulated()))
    for slot in range(2):
        grow(arena, slot, 4)
        fill(arena, slot, 1000 * (slot + 1))
    copies = emulator.calls("cuMemcpyDtoDAsync")
    arena.alias(0, 2, 4)
    assert first_words(arena, 2) == first_words(arena, 0) == [1000, 1001, 1002, 1003]
    words = first_words(arena, 1)
    arena.permute(np.arange(2), ints(1, 0), ints(4, 4), ints(0, 0))
    assert first_words(arena, 0) == words
    arena.shift(1, 0, 1, 2)
    assert first_words(arena, 1) == [1000, 1003]
    assert emulator.calls("cuMemcpyDtoDAsync") == copies
    arena.unshare(2, 0, 4)
    words_at(arena.address + 16 * PAGE)[:] = 1
    assert first_words(arena, 1) == [1000, 1003]
    shut(arena)


def test_adoption_makes_no_driver_call(emulator: Emulator) -> None:
    """A parked slot that is long enough serves the next sequence as it is."""
    arena = make_arena(CudaBackend(PAGE))
    grow(arena, 0, 6)
    before = emulator.calls()
    for length in (1, 3, 6, 2):
        grow(arena, 0, length)
        arena.pool.advance()
    assert emulator.calls() == before
    shut(arena)
