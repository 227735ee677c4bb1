"""Law: the driver emulator refuses what cuda.h forbids, with the error that cuda.h names.

Every rule is broken once, through the unmodified `cuda.bindings`; what is refused changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.build import NoEmulator, RealDriver, build, load
from tests.emulator.control import NOTHING, Emulator, ready

G = 2 << 20  # the granularity
VALUE, MEMORY, NOT_INIT, DEVICE, CONTEXT = 1, 2, 3, 101, 201
HANDLE, NOT_READY, NOT_PERMITTED, NOT_SUPPORTED, UNKNOWN = 400, 600, 800, 801, 999


class Gpu:
    """A device with a reservation of eight pages, two handles, the first one mapped at page 0."""

    def __init__(self, emulator: Emulator) -> None:
        from cuda.bindings import driver

        self.emulator, self.d = emulator, driver
        self("cuInit", 0)
        self.context = self("cuDevicePrimaryCtxRetain", 0)
        self("cuCtxSetCurrent", self.context)
        self.base = int(self("cuMemAddressReserve", 8 * G, 0, 0, 0))
        self.a, self.b = (self("cuMemCreate", G, self.prop(), 0) for _ in range(2))
        self("cuMemMap", self.base, G, 0, self.a, 0)

    def code(self, name: str, *arguments: Any) -> int:
        """What a call returns."""
        return int(getattr(self.d, name)(*arguments)[0])

    def __call__(self, name: str, *arguments: Any) -> Any:
        """A call that is to succeed; its result."""
        code, *values = getattr(self.d, name)(*arguments)
        assert int(code) == 0, (name, code)
        return values[0] if values else None

    def prop(self, where: int = 1, number: int = 0, types: int = 0, rdma: int = 0) -> Any:
        prop = self.d.CUmemAllocationProp()
        prop.type = self.d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location = self.place(where, number)
        prop.requestedHandleTypes = self.d.CUmemAllocationHandleType(types)
        prop.allocFlags.gpuDirectRDMACapable = rdma
        return prop

    def place(self, where: int, number: int = 0) -> Any:
        place = self.d.CUmemLocation()
        place.type, place.id = self.d.CUmemLocationType(where), number
        return place

    def access(self, flags: int = 3, where: int = 1, number: int = 0) -> list[Any]:
        desc = self.d.CUmemAccessDesc()
        desc.location, desc.flags = self.place(where, number), self.d.CUmemAccess_flags(flags)
        return [desc]

    def allow(self, page: int = 0, count: int = 1, **options: int) -> int:
        at = self.base + page * G
        return self.code("cuMemSetAccess", at, count * G, self.access(**options), 1)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    emulator = ready()
    yield Gpu(emulator)
    emulator.reset()


FD = 1  # CUmemAllocationHandleType
Act = Callable[[Gpu], int]


def fd_type(gpu: Gpu) -> Any:
    return gpu.d.CUmemAllocationHandleType(FD)


BROKEN: dict[str, tuple[int, Act]] = {
    "reserve: size of no host page": (VALUE, lambda g: g.code("cuMemAddressReserve", 100, 0, 0, 0)),
    "reserve: no size": (VALUE, lambda g: g.code("cuMemAddressReserve", 0, 0, 0, 0)),
    "reserve: alignment": (VALUE, lambda g: g.code("cuMemAddressReserve", G, 3 * G, 0, 0)),
    "reserve: flags": (VALUE, lambda g: g.code("cuMemAddressReserve", G, 0, 0, 1)),
    "reserve: too much": (MEMORY, lambda g: g.code("cuMemAddressReserve", 1 << 50, 0, 0, 0)),
    "free: another size": (VALUE, lambda g: g.code("cuMemAddressFree", g.base, 4 * G)),
    "free: from the middle": (VALUE, lambda g: g.code("cuMemAddressFree", g.base + G, 7 * G)),
    "free: something is mapped": (VALUE, lambda g: g.code("cuMemAddressFree", g.base, 8 * G)),
    "create: half a granule": (VALUE, lambda g: g.code("cuMemCreate", G // 2, g.prop(), 0)),
    "create: no size": (VALUE, lambda g: g.code("cuMemCreate", 0, g.prop(), 0)),
    "create: flags": (VALUE, lambda g: g.code("cuMemCreate", G, g.prop(), 1)),
    "create: no such device": (DEVICE, lambda g: g.code("cuMemCreate", G, g.prop(number=3), 0)),
    "create: host memory for export": (
        VALUE,
        lambda g: g.code("cuMemCreate", G, g.prop(where=2, types=FD), 0),
    ),
    "create: the current node": (VALUE, lambda g: g.code("cuMemCreate", G, g.prop(where=4), 0)),
    "create: no such node": (
        DEVICE,
        lambda g: g.code("cuMemCreate", G, g.prop(where=3, number=9), 0),
    ),
    "create: more than there is": (
        MEMORY,
        lambda g: g.code("cuMemCreate", 9 << 30, g.prop(), 0),
    ),
    "map: an offset": (VALUE, lambda g: g.code("cuMemMap", g.base + G, G, G, g.b, 0)),
    "map: part of a handle": (VALUE, lambda g: g.code("cuMemMap", g.base + G, G // 2, 0, g.b, 0)),
    "map: more than the handle": (
        VALUE,
        lambda g: g.code("cuMemMap", g.base + G, 2 * G, 0, g.b, 0),
    ),
    "map: between granules": (
        VALUE,
        lambda g: g.code("cuMemMap", g.base + G + 4096, G, 0, g.b, 0),
    ),
    "map: over a mapping": (VALUE, lambda g: g.code("cuMemMap", g.base, G, 0, g.b, 0)),
    "map: outside": (VALUE, lambda g: g.code("cuMemMap", g.base + 8 * G, G, 0, g.b, 0)),
    "map: flags": (VALUE, lambda g: g.code("cuMemMap", g.base + G, G, 0, g.b, 1)),
    "map: no handle": (VALUE, lambda g: g.code("cuMemMap", g.base + G, G, 0, 77, 0)),
    "access: a hole": (VALUE, lambda g: g.allow(0, 2)),
    "access: nothing mapped": (VALUE, lambda g: g.allow(1)),
    "access: write only": (VALUE, lambda g: g.code("cuMemSetAccess", g.base, G, g.access(), 0)),
    "access: no such device": (DEVICE, lambda g: g.allow(number=2)),
    "access: the host on device memory": (VALUE, lambda g: g.allow(where=3)),
    "access: part of a mapping": (
        VALUE,
        lambda g: g.code("cuMemSetAccess", g.base, G // 2, g.access(), 1),
    ),
    "unmap: part of a mapping": (VALUE, lambda g: g.code("cuMemUnmap", g.base, G // 2)),
    "unmap: a hole": (VALUE, lambda g: g.code("cuMemUnmap", g.base, 2 * G)),
    "unmap: nothing mapped": (VALUE, lambda g: g.code("cuMemUnmap", g.base + G, G)),
    "release: no handle": (VALUE, lambda g: g.code("cuMemRelease", 77)),
    "retain: nothing mapped": (
        VALUE,
        lambda g: g.code("cuMemRetainAllocationHandle", g.base + G),
    ),
    "export: not asked for at create": (
        VALUE,
        lambda g: g.code("cuMemExportToShareableHandle", g.a, fd_type(g), 0),
    ),
    "import: some other file": (
        VALUE,
        lambda g: g.code("cuMemImportFromShareableHandle", 0, fd_type(g)),
    ),
    "fill: no access": (VALUE, lambda g: g.code("cuMemsetD8", g.base, 0, G)),
    "fill: beyond the mapping": (
        VALUE,
        lambda g: g.allow() or g.code("cuMemsetD8", g.base + 8, 0, G),
    ),
    "copy: from nowhere": (
        VALUE,
        lambda g: g.allow() or g.code("cuMemcpyDtoD", g.base, g.base + G, 8),
    ),
    "stream: unknown": (HANDLE, lambda g: g.code("cuStreamSynchronize", 99)),
    "event: unknown": (HANDLE, lambda g: g.code("cuEventRecord", 99, 0)),
    "context: given back too often": (
        CONTEXT,
        lambda g: g("cuDevicePrimaryCtxRelease", 0) or g.code("cuDevicePrimaryCtxRelease", 0),
    ),
    "context: none is current": (
        CONTEXT,
        lambda g: g("cuCtxSetCurrent", 0) or g.code("cuMemUnmap", g.base, G),
    ),
    "context: given back": (
        CONTEXT,
        lambda g: g("cuDevicePrimaryCtxRelease", 0) or g.code("cuMemUnmap", g.base, G),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_refused_and_changes_nothing(rule: str, gpu: Gpu) -> None:
    before = gpu.emulator.live
    expected, act = BROKEN[rule]
    assert act(gpu) == expected
    after = gpu.emulator.live
    assert after._replace(contexts=before.contexts) == before
    assert gpu.emulator.faults == 0


def test_every_rule_has_its_opposite(gpu: Gpu) -> None:
    """What the rules allow, in one life of a reservation, and nothing is left of it."""
    first = gpu.base
    gpu("cuMemMap", first + G, G, 0, gpu.b, 0)
    gpu("cuMemMap", first + 2 * G, G, 0, gpu.a, 0)  # an alias
    assert gpu.allow(0, 3) == 0  # one call over three mappings
    ctypes.memset(first, 5, G)
    assert ctypes.string_at(first + 2 * G + 7, 1) == b"\5"
    handle = gpu("cuMemRetainAllocationHandle", first + 2 * G + 100)
    assert int(handle) == int(gpu.a)
    gpu("cuMemRelease", handle)
    gpu("cuMemRelease", gpu.a)  # still mapped: the memory stays
    gpu("cuMemcpyDtoD", first + G, first, G)
    gpu("cuMemUnmap", first, 2 * G)  # several whole mappings
    assert ctypes.string_at(first + 2 * G, 1) == b"\5"
    assert gpu.emulator.live.allocations == 2
    gpu("cuMemUnmap", first + 2 * G, G)
    gpu("cuMemRelease", gpu.b)
    gpu("cuMemAddressFree", first, 8 * G)
    gpu("cuDevicePrimaryCtxRelease", 0)
    assert gpu.emulator.live == NOTHING


def test_a_handle_of_several_granules_is_one_mapping(gpu: Gpu) -> None:
    big = gpu("cuMemCreate", 4 * G, gpu.prop(), 0)
    at = gpu.base + 4 * G
    gpu("cuMemMap", at, 4 * G, 0, big, 0)
    assert gpu.code("cuMemUnmap", at, 2 * G) == VALUE
    assert gpu.code("cuMemUnmap", at + 2 * G, 2 * G) == VALUE
    assert gpu.code("cuMemSetAccess", at, 2 * G, gpu.access(), 1) == VALUE
    assert gpu.code("cuMemMap", at + 2 * G, G, 0, gpu.b, 0) == VALUE
    gpu("cuMemUnmap", at, 4 * G)


@pytest.mark.parametrize("flags", [0, 1])
def test_a_mapping_has_no_access_until_it_is_given(flags: int) -> None:
    """And a mapping made anew has none again: a real read or write faults."""
    act = "ctypes.memset(g.base, 1, 1)" if flags else "ctypes.string_at(g.base, 1)"
    code = f"""
import ctypes, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from tests.emulator.control import ready
from tests.test_emulator import G, Gpu
g = Gpu(ready())
assert g.allow(flags=3) == 0
{act}
if {flags}: assert g.allow(flags={flags}) == 0; ctypes.string_at(g.base, 1)
else: g("cuMemUnmap", g.base, G); g("cuMemMap", g.base, G, 0, g.a, 0)
print("alive", flush=True)
{act}
print("no fault")
"""
    ready()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("alive\n", -11), done.stderr


def test_exported_memory_outlives_its_exporter(gpu: Gpu) -> None:
    shared = gpu("cuMemCreate", G, gpu.prop(types=FD), 0)
    gpu("cuMemMap", gpu.base + G, G, 0, shared, 0)
    gpu.allow(1)
    ctypes.memset(gpu.base + G, 3, G)
    fd = gpu("cuMemExportToShareableHandle", shared, fd_type(gpu), 0)
    gpu("cuMemUnmap", gpu.base + G, G)
    gpu("cuMemRelease", shared)
    handle = gpu("cuMemImportFromShareableHandle", fd, fd_type(gpu))
    os.close(fd)
    gpu("cuMemMap", gpu.base + G, G, 0, handle, 0)
    assert gpu.allow(1) == 0
    assert ctypes.string_at(gpu.base + G, 2) == b"\3\3"
    used = gpu("cuMemGetAllocationPropertiesFromHandle", handle)
    assert int(used.requestedHandleTypes) == FD


def test_exporting_moves_nothing_that_is_seen(gpu: Gpu) -> None:
    """Memory goes to a file of its own when first exported; aliases and access stay."""
    shared = gpu("cuMemCreate", G, gpu.prop(types=FD), 0)
    for page in (1, 3):
        gpu("cuMemMap", gpu.base + page * G, G, 0, shared, 0)
        gpu.allow(page)
    ctypes.memset(gpu.base + G, 9, G)
    os.close(gpu("cuMemExportToShareableHandle", shared, fd_type(gpu), 0))
    ctypes.memset(gpu.base + G, 4, 1)
    assert ctypes.string_at(gpu.base + 3 * G, 2) == b"\4\x09"


def test_what_is_advertised_may_be_refused(gpu: Gpu) -> None:
    gpu.emulator.set(refused_types=8, refuse_rdma=1)
    assert gpu.code("cuMemCreate", G, gpu.prop(types=8), 0) == NOT_PERMITTED
    gpu.emulator.attribute(128, 0)
    assert gpu.code("cuMemCreate", G, gpu.prop(types=8), 0) == NOT_SUPPORTED
    handle = gpu("cuMemCreate", G, gpu.prop(rdma=1), 0)
    gpu("cuMemMap", gpu.base + G, G, 0, handle, 0)
    assert gpu.allow(1) == UNKNOWN
    gpu.emulator.set(whole_unmap=1)
    assert gpu.code("cuMemUnmap", gpu.base, 2 * G) == VALUE


def test_host_memory_may_be_seen_by_the_host(gpu: Gpu) -> None:
    before = gpu("cuMemGetInfo")
    handle = gpu("cuMemCreate", G, gpu.prop(where=3), 0)
    assert gpu("cuMemGetInfo") == before
    gpu("cuMemMap", gpu.base + G, G, 0, handle, 0)
    assert gpu.allow(1, where=3) == 0
    assert gpu.code("cuMemsetD8", gpu.base + G, 1, 8) == VALUE  # the device may not yet
    assert gpu.allow(1) == 0
    gpu("cuMemsetD8", gpu.base + G, 1, 8)


def test_a_context_counts_on_each_thread(gpu: Gpu) -> None:
    codes: list[int] = []

    def act() -> None:
        codes.append(gpu.code("cuMemUnmap", gpu.base, G))
        gpu("cuCtxPushCurrent", gpu.context)
        codes.append(gpu.code("cuMemUnmap", gpu.base, G))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert codes == [CONTEXT, 0]


def test_a_fork_cannot_use_the_driver(gpu: Gpu) -> None:
    if (child := os.fork()) == 0:
        os._exit(gpu.code("cuMemUnmap", gpu.base, G))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == NOT_INIT
    gpu("cuMemUnmap", gpu.base, G)


# ---- work ------------------------------------------------------------------------------------
def test_work_runs_in_the_order_of_its_streams(gpu: Gpu) -> None:
    assert gpu.allow() == 0
    gpu.emulator.set(delay=1)
    one, two = (int(gpu("cuStreamCreate", 1)) for _ in range(2))
    event = gpu("cuEventCreate", 0)
    gpu("cuMemsetD8Async", gpu.base, 1, 64, one)
    gpu("cuEventRecord", event, one)
    gpu("cuMemsetD8Async", gpu.base, 2, 64, two)
    gpu("cuMemsetD8", gpu.base + 64, 3, 64)
    assert ctypes.string_at(gpu.base, 1) == b"\0"
    assert gpu.code("cuEventQuery", event) == NOT_READY
    assert gpu.code("cuStreamQuery", two) == NOT_READY
    gpu("cuStreamSynchronize", two)
    assert ctypes.string_at(gpu.base, 1) == b"\2"
    assert gpu.code("cuEventQuery", event) == NOT_READY  # the other stream does not wait
    gpu("cuEventSynchronize", event)
    assert ctypes.string_at(gpu.base, 65) == b"\1" * 64 + b"\0"
    gpu("cuCtxSynchronize")
    assert ctypes.string_at(gpu.base + 64, 1) == b"\3"
    assert gpu.emulator.live.work == 0


def test_the_default_stream_waits_for_blocking_streams_only(gpu: Gpu) -> None:
    assert gpu.allow() == 0
    gpu.emulator.set(delay=1)
    blocking, free = int(gpu("cuStreamCreate", 0)), int(gpu("cuStreamCreate", 1))
    gpu("cuMemsetD8Async", gpu.base, 1, 8, blocking)
    gpu("cuMemsetD8Async", gpu.base + 8, 2, 8, free)
    gpu("cuMemsetD8", gpu.base + 16, 3, 8)
    gpu("cuStreamSynchronize", 0)
    assert ctypes.string_at(gpu.base, 24) == b"\1" * 8 + b"\0" * 8 + b"\3" * 8
    event = gpu("cuEventCreate", 0)
    gpu("cuEventRecord", event, free)
    gpu("cuStreamWaitEvent", blocking, event, 0)
    gpu("cuStreamSynchronize", blocking)
    assert ctypes.string_at(gpu.base + 8, 1) == b"\2"


def test_an_unmap_under_work_is_a_fault(gpu: Gpu) -> None:
    assert gpu.allow() == 0
    gpu.emulator.set(delay=1)
    gpu.emulator.kernel(gpu.base, G)
    gpu("cuMemUnmap", gpu.base, G)  # the driver does not wait, and does not refuse
    assert gpu.emulator.faults == 1
    assert "unmap under work" in gpu.emulator.fault
    assert gpu.emulator.run() == 0
    assert gpu.emulator.faults == 2
    assert "not accessible" in gpu.emulator.fault


def test_work_of_another_device_needs_access_of_its_own() -> None:
    emulator = ready(devices=2)
    gpu = Gpu(emulator)
    assert gpu.allow() == 0
    gpu("cuCtxPushCurrent", gpu("cuDevicePrimaryCtxRetain", 1))
    stream = int(gpu("cuStreamCreate", 1))
    emulator.kernel(gpu.base, G, stream)
    assert emulator.faults == 1
    assert gpu.allow(number=1) == 0
    emulator.kernel(gpu.base, G, stream)
    assert emulator.faults == 1
    emulator.reset()


# ---- controls --------------------------------------------------------------------------------
def test_any_call_can_be_made_to_fail(gpu: Gpu) -> None:
    total = gpu.emulator.calls()
    gpu.emulator.fail(2, 999)
    assert [gpu.allow(), gpu.allow(), gpu.allow()] == [0, 999, 0]
    gpu.emulator.fail(1, 2, "cuMemUnmap")
    assert gpu.allow() == 0
    assert gpu.code("cuMemUnmap", gpu.base, G) == 2
    assert gpu.code("cuMemUnmap", gpu.base, G) == 0
    assert gpu.emulator.calls() == total + 6
    assert gpu.emulator.calls("cuMemUnmap") == 2


def test_the_loader_finds_it_by_the_library_path() -> None:
    """The way for a machine that has a real driver."""
    ready()
    code = """
import ctypes
from cuda.bindings import driver
assert int(driver.cuInit(0)[0]) == 100  # no device until emu_reset
assert hasattr(ctypes.CDLL("libcuda.so.1"), "emu_reset")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(build().parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_beside_a_real_driver_all_of_this_runs_in_a_process_of_its_own() -> None:
    try:
        load()
    except RealDriver:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not runs_in_a"]
            + [
                f"tests/test_{name}.py"
                for name in ("emulator", "cuda", "cuda_work", "cuda_faults", "host")
            ],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "LD_LIBRARY_PATH": str(build().parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert "skipped" not in done.stdout
    except NoEmulator as error:
        pytest.skip(str(error))
