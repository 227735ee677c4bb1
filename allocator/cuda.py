"""The verbs on a CUDA device: the driver's virtual memory management, and nothing of the runtime.

    page         cuMemCreate, one handle each, kept by page id while the page exists    `handles`
    map          cuMemMap for each page, then one cuMemSetAccess for the run            `mappings`
    unmap        wait, then one cuMemUnmap for the run                                  `fences`
    remap        both, over pages, zero pages and holes

Creating costs 100 times what mapping costs, so the pool's warm pages keep their handles. The driver
never waits for kernels: whatever unmaps, scrubs or copies first waits for the work that was
submitted before. Work that other threads submit *meanwhile* is the caller's to prevent; steps and
quarantine are there for that.

A verb that raises has done nothing. Nothing here imports torch: its context is the same primary
context, and what torch should do when memory is short is injected (``on_out_of_memory``).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby

from .context import Context, current
from .driver import READ, READ_WRITE, Driver, Export, Kind
from .errors import DriverError, OutOfRange, ReserveError, ShareError
from .fences import Fences, Streams
from .flight import FlightRecorder
from .handles import Handles
from .hosttier import Tiered
from .mappings import Mappings
from .probe import accesses, check_devices, choose, page_size

MAX_BYTES = 1 << 49  # of unified addresses: more is refused before it can overflow a C integer
MAX_ZERO_PAGES = 1 << 16  # mapped one by one, at some microseconds each
NO_LIMIT = sys.maxsize  # a device limits mappings only by the memory for its page tables


class CudaBackend(Tiered):
    """`vmm.Backend` on one CUDA device.

    Args:
        page_bytes: a multiple of the device's granularity (2 MiB on all devices so far); larger
            pages cost less to map and waste more. None takes what the driver recommends.
        device: ordinal among the visible devices.
        peers: other devices that may read and write the pages.
        host_node: make pages of this NUMA node's host memory instead, for the same addresses.
        export: how other processes are to get pages; what is refused is left out, see `refusals`.
        rdma: ask for memory that network cards can reach, where the device has it.
        streams: asked at each wait for the streams whose work may touch pages; None waits for all
            work of the context.
        on_out_of_memory: called once when the device has no memory for a page, before trying again.
        scrub: zero every page before it is first seen, see `handles`.

    Attributes: ``kind`` of its pages, ``refusals`` why they are no better, ``flights`` the flight
    recorder, ``fences`` its waits, ``maps`` as the records count them, ``devices`` that read its
    pages.

    Raises:
        NoDeviceError: no bindings, driver or device, or one without virtual memory management.
        OutOfRange: ``page_bytes`` is not a positive multiple of the granularity.
    """

    map_limit = NO_LIMIT

    def __init__(
        self,
        page_bytes: int | None = None,
        *,
        device: int = 0,
        peers: Sequence[int] = (),
        host_node: int | None = None,
        export: Export | None = "fd",
        rdma: bool = True,
        streams: Streams | None = None,
        on_out_of_memory: Callable[[], object] | None = None,
        scrub: bool = True,
    ) -> None:
        self.device, self.peers = device, tuple(peers)
        self.devices: tuple[str, ...] = tuple(f"cuda:{i}" for i in (device, *peers))
        if host_node is not None:
            self.devices = (*self.devices, "cpu")
        self.calls: Counter[str] = Counter()
        self.flights = FlightRecorder()
        self.maps = 0
        self._ranges: dict[int, int] = {}  # address of a reservation -> pages
        self.driver = driver = Driver()
        check_devices(driver, device, self.peers)
        self.context = context = Context(driver, device)
        try:
            entered = context.enter()
            try:
                wanted = Kind(device, host_node, export, rdma and host_node is None)
                self.kind, self.refusals = choose(driver, wanted)
                prop = driver.property(self.kind)
                self.granularity = driver.granularity(prop, recommended=False)
                self.page_bytes = page_size(driver, prop, page_bytes)
                self._stream = driver.create_stream()
            finally:
                if entered:
                    context.leave()
        except BaseException:
            context.close()
            raise
        self.fences = Fences(context, streams)
        self.mappings = Mappings(
            driver,
            self.page_bytes,
            accesses(driver, self.kind, self.peers, READ_WRITE),
            accesses(driver, self.kind, self.peers, READ),
        )
        self.handles = Handles(
            driver, prop, self.page_bytes, scrub=scrub, on_out_of_memory=on_out_of_memory
        )

    # ---- address space -----------------------------------------------------------------------
    @current
    def reserve(self, pages: int, *, home: int, zero_backed: bool = False) -> int:
        self.calls["reserve"] += 1
        nbytes = pages * self.page_bytes
        if zero_backed and pages > MAX_ZERO_PAGES:
            raise ReserveError(
                "a zero-backed reservation maps the zero page at every address, one by one: "
                f"{pages} pages are more than {MAX_ZERO_PAGES}. Use larger pages, fewer slots or a "
                "smaller max_tokens, or a reservation that is not zero-backed."
            )
        if nbytes > MAX_BYTES:
            raise _refused(nbytes, f"unified addresses are {MAX_BYTES} bytes")
        try:
            address = self.driver.reserve(nbytes, self.page_bytes & -self.page_bytes)
        except DriverError as error:
            raise _refused(nbytes, str(error).rstrip(".")) from error
        if zero_backed:
            try:
                self._back_by_zeros(address, pages)
            except BaseException:
                self.driver.free(address, nbytes)
                raise
        self._ranges[address] = pages
        self.note_maps(1)
        return address

    def release(self, address: int, pages: int) -> None:
        if self.context.open:  # close() has released everything; finalizers run in any order
            self._release(address, pages)

    @current
    def _release(self, address: int, pages: int) -> None:
        self.calls["release"] += 1
        mapped, nbytes = self.mappings, pages * self.page_bytes
        if self._ranges.get(address) != pages:
            raise OutOfRange(f"no reservation of {nbytes:#x} bytes at {address:#x}")
        runs = mapped.within(address, pages)
        if runs:
            self.fences.wait()
        mapped.clear(runs)
        try:
            self.driver.free(address, nbytes)
        except BaseException:
            mapped.fill(runs)
            raise
        for start, handles in runs:
            mapped.forget(start, len(handles))
        del self._ranges[address]
        if mapped.zero_ranges.pop(address, None) is not None:
            self._drop_zero_page()
        self.flights.note("release", address, None, pages, self.fences.waits)

    # ---- physical pages ----------------------------------------------------------------------
    @current
    def create(self, page: int, count: int) -> None:
        self.calls["create"] += 1
        self.kind_of(page).create(page, count)

    @current
    def destroy(self, page: int, count: int) -> None:
        self.calls["destroy"] += 1
        self.kind_of(page).destroy(page, count)

    @current
    def warm(self, page: int, count: int) -> None:
        """Zero pages that nobody has seen yet, so that mapping them need not."""
        self.calls["warm"] += 1
        for i, handle in enumerate(self.kind_of(page).run(page, count), page):
            if i in self.handles.fresh:
                with self.mappings.scratch([handle], self._stream) as at:
                    self._zero(at, self.page_bytes)
                self.handles.fresh.discard(i)

    def resident_bytes(self) -> int:
        if not self.context.open:
            return 0
        return (self.handles.resident + (self.mappings.zero_page is not None)) * self.page_bytes

    @current
    def available_bytes(self) -> int:
        """Memory that the device could give to new pages now, whoever else asks for it."""
        return self.driver.free_memory()

    def huge_bytes(self) -> int:
        return 0  # a device maps by pages of its own

    def descriptor(self) -> int:
        self.context.check()
        raise ShareError(
            "a device's pages lie in no common file, each has a descriptor of its own: export_page"
        )

    @current
    def export_page(self, page: int) -> int:
        """A new file descriptor of one page for another process; the caller closes it.

        Raises:
            ShareError: pages of this kind have none.
        """
        if self.kind.export != "fd":
            why = "; ".join(self.refusals) or "that was asked for"
            raise ShareError(f"pages are {self.kind}, which have no descriptors: {why}")
        return self.driver.export_fd(self.handles[page])

    @current
    def import_page(self, page: int, fd: int) -> None:
        """Let ``page`` be the page behind another process's descriptor, which the caller closes.
        `destroy` lets go of it. Never zeroed, not counted as resident."""
        self.handles.adopt(page, fd)

    # ---- mapping -----------------------------------------------------------------------------
    def map(self, address: int, page: int, count: int) -> None:
        self.context.check()
        self.calls["map"] += 1
        mapped, handles = self.mappings, self.kind_of(page).run(page, count)
        if mapped.zero_ranges and mapped.zero_backed(address):
            self._exchange(address, handles)
        else:
            self.driver.map_run(address, self.page_bytes, handles, mapped.access)
        if self.handles.fresh:
            self._scrub(address, page, handles)
        mapped.keep(address, handles)
        self.flights.note("map", address, page, count, self.fences.waits)

    def remap(self, address: int, page: int, count: int) -> None:
        self.context.check()
        self.calls["remap"] += 1
        handles = self.kind_of(page).run(page, count)
        self._exchange(address, handles)
        if self.handles.fresh:
            self._scrub(address, page, handles)
        self.mappings.keep(address, handles)
        self.flights.note("remap", address, page, count, self.fences.waits)

    def unmap(self, address: int, page: int, count: int) -> None:
        self.context.check()
        self.calls["unmap"] += 1
        mapped = self.mappings
        zero = mapped.zero_page
        if zero is not None and mapped.zero_backed(address):
            self._exchange(address, [zero] * count)
        else:
            self.fences.wait()
            self.driver.unmap(address, count * self.page_bytes)
        mapped.forget(address, count)
        self.flights.note("unmap", address, page, count, self.fences.waits)

    @current
    def zero(self, address: int, nbytes: int) -> None:
        self.calls["zero"] += 1
        self.fences.wait()
        self._zero(address, nbytes)

    @current
    def duplicate(self, source: int, target: int, nbytes: int) -> None:
        self.calls["duplicate"] += 1
        pair = [self.kind_of(source)[source], self.kind_of(target)[target]]
        driver, size, stream = self.driver, self.page_bytes, self._stream
        copy = driver.copy if self.lower is None else driver.transfer
        self.fences.wait()
        with self.mappings.scratch(pair, stream) as at:
            copy(at + size, at, nbytes, stream)
            if target in self.handles.fresh and nbytes < size:
                driver.fill(at + size + nbytes, 0, size - nbytes, stream)
            driver.synchronize_stream(stream)
        self.handles.fresh.discard(target)

    # ---- waiting -----------------------------------------------------------------------------
    @current
    def wait(self) -> None:
        """Wait until the work submitted before, to ``streams`` or to the context, is done."""
        self.fences.wait()

    def fence(self) -> Callable[[], bool] | None:
        return self.fences.fence()

    # ---- limits ------------------------------------------------------------------------------
    def admit_maps(self, extra: int) -> None:
        """Never refused: a device has no limit of maps."""
        self.context.check()

    def note_maps(self, change: int) -> None:
        self.maps += change

    def close(self) -> None:
        if not self.context.open or self.context.foreign:
            return
        self.fences.streams = None  # whoever names them may be gone: wait for all
        with suppress(DriverError):  # a dead context has nothing to give back
            self._teardown()
        with suppress(DriverError):
            self.context.close()
        self.maps = 0

    def __del__(self) -> None:
        if hasattr(self, "handles"):
            self.close()

    # ---- inside: mapping ---------------------------------------------------------------------
    def _exchange(self, address: int, handles: list[int]) -> None:
        old = self.mappings.runs(self.mappings.addresses(address, len(handles)))
        if old:
            self.fences.wait()
        self.mappings.exchange(address, old, handles)

    def _scrub(self, address: int, page: int, handles: list[int]) -> None:
        """Zero those of the pages just mapped that are fresh; or undo the mapping."""
        ids, fresh = range(page, page + len(handles)), self.handles.fresh
        if fresh.isdisjoint(ids):
            return
        try:
            for is_fresh, run in groupby(ids, fresh.__contains__):
                if is_fresh:
                    first, count = next(run), 1 + sum(1 for _ in run)
                    at = address + (first - page) * self.page_bytes
                    self._zero(at, count * self.page_bytes)
        except BaseException:
            self.mappings.undo(address, len(handles))
            raise
        fresh.difference_update(ids)

    @current
    def _zero(self, address: int, nbytes: int) -> None:
        """On a stream of our own, which waits for nobody; done when it returns."""
        self.driver.fill(address, 0, nbytes, self._stream)
        try:
            self.driver.synchronize_stream(self._stream)
        except DriverError:  # it must not run after whatever the caller undoes: once more
            self.driver.synchronize_stream(self._stream)

    def _back_by_zeros(self, address: int, pages: int) -> None:
        mapped = self.mappings
        try:
            if mapped.zero_page is None:
                [mapped.zero_page] = self.handles.make(1)
                with mapped.scratch([mapped.zero_page], self._stream, write=True) as at:
                    self._zero(at, self.page_bytes)
            mapped.put(address, [mapped.zero_page] * pages)
        except BaseException:
            self._drop_zero_page()
            raise
        mapped.zero_ranges[address] = address + pages * self.page_bytes

    def _drop_zero_page(self) -> None:
        """Let go of the zero page if no reservation needs it any more."""
        page = self.mappings.zero_page
        if page is not None and not self.mappings.zero_ranges:
            self.mappings.zero_page = None
            self.handles.doom(page)

    # ---- inside: beginning and end -----------------------------------------------------------
    @current
    def _teardown(self) -> None:
        """Give everything back, as far as the driver takes it."""
        for address, pages in list(self._ranges.items()):
            with suppress(DriverError):
                self._release(address, pages)
        if self.lower is not None:
            with suppress(DriverError):
                self.lower.close(self.driver)
        with suppress(DriverError):
            self.mappings.close()
        self.handles.close()
        self.fences.close()
        self.driver.destroy_stream(self._stream)


def _refused(nbytes: int, why: str) -> ReserveError:
    return ReserveError(
        f"cannot reserve {nbytes} bytes of device address space: {why}. Use fewer slots or a "
        "smaller max_tokens; WSL2, vGPUs and Windows have much less of it than Linux."
    )
