"""The CUDA driver, one method a call: called with numbers, raising typed errors.

The only file that imports cuda.bindings, and only when a `Driver` is made. cuda.h says what each
call does: sections CUDA_VA, CUDA_CTX, CUDA_STREAM, CUDA_EVENT. None of them waits for the device
but `synchronize` and `synchronize_stream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import DriverError, NoDeviceError, OutOfDeviceMemory

Export = Literal["fd", "fabric"]

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, NOT_READY = 1, 2, 201, 600  # CUresult
READ, READ_WRITE = 1, 3  # CUmemAccess_flags
REMEDIES: Final = {
    INVALID_VALUE: "Addresses and sizes must be whole pages of one reservation.",
    OUT_OF_MEMORY: "Lower the budget with set_budget(), close sequences, or let other users of the "
    "device give memory back (torch.cuda.empty_cache()).",
    3: "The driver does not work in a fork of the process that began to use it: start processes "
    "by spawn, and make the cache in the process that uses it.",
    4: "The driver has shut down: close caches before the interpreter ends.",
    INVALID_CONTEXT: "The context is gone: something reset the device while a cache was open.",
    800: "The system forbids it: for fabric handles an IMEX channel must be readable "
    "(/dev/nvidia-caps-imex-channels).",
    801: "This device or driver cannot do it: see `vattn doctor`.",
    900: "Not while a stream is captured: grow between replays; a graph stays valid.",
}
DEAD: Final = (
    "The context of this process is dead and has to be restarted. If a kernel read memory that was "
    "unmapped, the backend's flight recorder says who unmapped it: backend.flights.save(FILE), "
    "then `vattn doctor --trace FILE`."
)
# CUresult of faults that no later call survives.
FATAL: Final = frozenset({214, 700, 702, 714, 715, 716, 717, 718, 719})


@dataclass(frozen=True)
class Kind:
    """What pages are: where they lie, and what may be done with them besides mapping."""

    device: int
    host_node: int | None = None  # a NUMA node: host memory that the device reads as its own
    export: Export | None = None  # how other processes may get them
    rdma: bool = False  # network cards may read and write them (GPUDirect RDMA)

    def __str__(self) -> str:
        place = f"device {self.device}" if self.host_node is None else f"node {self.host_node}"
        export = {"fd": "by descriptor", "fabric": "by fabric", None: "private"}[self.export]
        return f"{place}, {export}{', RDMA' if self.rdma else ''}"


class Driver:
    """The driver of this process.

    Raises:
        NoDeviceError: cuda-bindings, the driver or a device is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise NoDeviceError(
                f"cuda-bindings is not installed ({error}): pip install 'vattn[cuda]', or use the "
                "host backend"
            ) from error
        self.cuda: Any = cuda
        self.home = 0  # the context for threads that have none
        try:
            (code,) = cuda.cuInit(0)
        except RuntimeError as error:  # what cuda.bindings raises where libcuda.so.1 is missing
            raise NoDeviceError(
                f"no CUDA driver is installed ({error}): install the NVIDIA driver, or use the "
                "host backend"
            ) from error
        if code:
            raise NoDeviceError(
                f"no CUDA device can be used: {self.meaning(code)}. Check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, or use the host backend"
            )

    # ---- devices and contexts ----------------------------------------------------------------
    def device_count(self) -> int:
        return self._value("cuDeviceGetCount")

    def supports(self, what: str, device: int) -> bool:
        """Is device attribute ``what``_SUPPORTED advertised? True where these bindings or this
        driver do not know it: then only trying tells."""
        name = f"CU_DEVICE_ATTRIBUTE_{what}_SUPPORTED"
        which = getattr(self.cuda.CUdevice_attribute, name, None)
        if which is None:
            return True
        code, value = self.cuda.cuDeviceGetAttribute(which, device)
        return bool(code) or bool(value)

    def can_access_peer(self, device: int, peer: int) -> bool:
        return bool(self._value("cuDeviceCanAccessPeer", device, peer))

    def retain_context(self, device: int) -> int:
        """The primary context, the one that torch uses, too."""
        return self._value("cuDevicePrimaryCtxRetain", device)

    def release_context(self, device: int) -> None:
        self._call("cuDevicePrimaryCtxRelease", device)

    def current(self) -> int:
        """The context that is current on this thread; 0 for none."""
        return int(self.cuda.cuCtxGetCurrent()[1] or 0)

    def enter(self, context: int) -> bool:
        """Make a context current on this thread: for good where none was, else until `leave`. True
        if `leave` must bring the old one back."""
        now = self.current()
        if now == context:
            return False
        self._call("cuCtxPushCurrent" if now else "cuCtxSetCurrent", context)
        return now != 0

    def leave(self) -> None:
        """Bring back the context from before `enter`. What was done stays done: never raises."""
        self.cuda.cuCtxPopCurrent()

    def synchronize(self) -> None:
        """Wait until all work submitted to the current context is done."""
        (code,) = self.cuda.cuCtxSynchronize()
        if code:
            raise self.error("cuCtxSynchronize", code, 0, 0)

    # ---- address space -----------------------------------------------------------------------
    def reserve(self, nbytes: int, alignment: int) -> int:
        return self._value("cuMemAddressReserve", nbytes, alignment, 0, 0, nbytes=nbytes)

    def free(self, address: int, nbytes: int) -> None:
        (code,) = self.cuda.cuMemAddressFree(address, nbytes)
        if code:
            raise self.error("cuMemAddressFree", code, address, nbytes)

    # ---- physical pages ----------------------------------------------------------------------
    def property(self, kind: Kind) -> Any:
        """The CUmemAllocationProp of a kind."""
        cuda, prop = self.cuda, self.cuda.CUmemAllocationProp()
        prop.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location = self.location(kind)
        if kind.export is not None:
            types = cuda.CUmemAllocationHandleType
            prop.requestedHandleTypes = {
                "fd": types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                "fabric": types.CU_MEM_HANDLE_TYPE_FABRIC,
            }[kind.export]
        prop.allocFlags.gpuDirectRDMACapable = int(kind.rdma)
        return prop

    def location(self, kind: Kind) -> Any:
        """The CUmemLocation of a kind."""
        types, where = self.cuda.CUmemLocationType, self.cuda.CUmemLocation()
        if kind.host_node is None:
            where.type, where.id = types.CU_MEM_LOCATION_TYPE_DEVICE, kind.device
        else:
            where.type, where.id = types.CU_MEM_LOCATION_TYPE_HOST_NUMA, kind.host_node
        return where

    def granularity(self, prop: Any, *, recommended: bool) -> int:
        flags = self.cuda.CUmemAllocationGranularity_flags
        name = "RECOMMENDED" if recommended else "MINIMUM"
        flag = getattr(flags, f"CU_MEM_ALLOC_GRANULARITY_{name}")
        return self._value("cuMemGetAllocationGranularity", prop, flag)

    def create(self, nbytes: int, prop: Any) -> int:
        code, handle = self.cuda.cuMemCreate(nbytes, prop, 0)
        if code:
            raise self.error("cuMemCreate", code, 0, nbytes)
        return int(handle)

    def destroy(self, handle: int, nbytes: int) -> None:
        (code,) = self.cuda.cuMemRelease(handle)
        if code:
            raise self.error("cuMemRelease", code, 0, nbytes)

    def export_fd(self, handle: int) -> int:
        types = self.cuda.CUmemAllocationHandleType
        fd = types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return self._value("cuMemExportToShareableHandle", handle, fd, 0)

    def import_fd(self, fd: int) -> int:
        types = self.cuda.CUmemAllocationHandleType
        kind = types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return self._value("cuMemImportFromShareableHandle", fd, kind)

    def free_memory(self) -> int:
        """Bytes of the current context's device that nobody holds."""
        code, free, _total = self.cuda.cuMemGetInfo()
        if code:
            raise self.error("cuMemGetInfo", code, 0, 0)
        return int(free)

    # ---- mapping -----------------------------------------------------------------------------
    def map_run(self, address: int, nbytes: int, handles: Sequence[int], access: list[Any]) -> None:
        """Map handles of ``nbytes`` bytes side by side, and give access to all of them: `map` and
        `set_access` without a call of ours for each of the driver's. All or nothing."""
        call, at = self.cuda.cuMemMap, address
        try:
            for handle in handles:
                (code,) = call(at, nbytes, 0, handle, 0)
                if code:
                    self._again("cuMemMap", code, at, nbytes, 0, handle, 0)
                at += nbytes
            (code,) = self.cuda.cuMemSetAccess(address, at - address, access, len(access))
            if code:
                count = len(access)
                self._again("cuMemSetAccess", code, address, at - address, access, count)
        except BaseException:
            if at > address:
                self.unmap(address, at - address)
            raise

    def map(self, address: int, nbytes: int, handle: int) -> None:
        (code,) = self.cuda.cuMemMap(address, nbytes, 0, handle, 0)
        if code:
            raise self.error("cuMemMap", code, address, nbytes)

    def unmap(self, address: int, nbytes: int) -> None:
        (code,) = self.cuda.cuMemUnmap(address, nbytes)
        if code:
            self._again("cuMemUnmap", code, address, nbytes)

    def access(self, location: Any, flags: int) -> Any:
        """The CUmemAccessDesc that lets a location read, or read and write."""
        desc = self.cuda.CUmemAccessDesc()
        desc.location, desc.flags = location, self.cuda.CUmemAccess_flags(flags)
        return desc

    def set_access(self, address: int, nbytes: int, access: list[Any]) -> None:
        (code,) = self.cuda.cuMemSetAccess(address, nbytes, access, len(access))
        if code:
            self._again("cuMemSetAccess", code, address, nbytes, access, len(access))

    # ---- work --------------------------------------------------------------------------------
    def create_stream(self) -> int:
        """A stream that waits for no other."""
        return self._value("cuStreamCreate", self.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: int) -> None:
        """Wait until all work submitted to a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        (code,) = self.cuda.cuMemsetD8Async(address, value, nbytes, stream)
        if code:
            raise self.error("cuMemsetD8Async", code, address, nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        (code,) = self.cuda.cuMemcpyDtoDAsync(target, source, nbytes, stream)
        if code:
            raise self.error("cuMemcpyDtoDAsync", code, target, nbytes)

    def transfer(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """`copy` between any two kinds of memory."""
        (code,) = self.cuda.cuMemcpyAsync(target, source, nbytes, stream)
        if code:
            raise self.error("cuMemcpyAsync", code, target, nbytes)

    def create_event(self) -> int:
        return self._value("cuEventCreate", self.cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def reached(self, event: int) -> bool:
        """Is all work that was submitted before the event was recorded done?"""
        (code,) = self.cuda.cuEventQuery(event)
        if code and int(code) != NOT_READY:
            raise self.error("cuEventQuery", code, 0, 0)
        return not code

    # ---- errors ------------------------------------------------------------------------------
    def meaning(self, code: Any) -> str:
        """What a CUresult is called, and what it means."""
        said = [self.cuda.cuGetErrorName(code)[1], self.cuda.cuGetErrorString(code)[1]]
        name, text = (part.decode() if part else "" for part in said)
        return f"{name} ({int(code)}), {text}" if name else f"CUresult {int(code)}"

    def error(self, call: str, code: Any, address: int, nbytes: int) -> DriverError:
        """The typed error of a call that returned ``code``."""
        number = int(code)
        remedy = DEAD if number in FATAL else REMEDIES.get(number, "")
        kind = OutOfDeviceMemory if number == OUT_OF_MEMORY else DriverError
        return kind(call, number, address, nbytes, remedy, meaning=self.meaning(code))

    def _again(self, name: str, code: Any, address: int, nbytes: int, *arguments: Any) -> None:
        """A call that needs no context was refused. Where it wanted one all the same, and this
        thread has none, ours becomes the thread's for good, and the call is made again."""
        if int(code) == INVALID_CONTEXT and self.home and not self.current():
            self.enter(self.home)
            (code,) = getattr(self.cuda, name)(address, nbytes, *arguments)
        if code:
            raise self.error(name, code, address, nbytes)

    def _call(self, name: str, *arguments: Any) -> None:
        (code,) = getattr(self.cuda, name)(*arguments)
        if code:
            raise self.error(name, code, 0, 0)

    def _value(self, name: str, *arguments: Any, nbytes: int = 0) -> int:
        code, value = getattr(self.cuda, name)(*arguments)
        if code:
            raise self.error(name, code, 0, nbytes)
        return int(value)
