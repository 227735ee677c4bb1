"""The lower tier of a CUDA backend: host memory that kernels read at the addresses of the pages.

    page     cuMemCreate with a location of type HOST_NUMA, one handle each      `handles`
    mapped   as any other; the device reads it over the bus                      `mappings`
    copied   cuMemcpyAsync between scratch addresses, on a stream of its own

Copies are made on another thread than the compute's, and their scratch addresses are others than
those of the verbs: neither waits for the other.
"""

from __future__ import annotations

from .context import Context, current
from .driver import Driver, Kind
from .errors import NoDeviceError, OutOfRange, PageStateError
from .fences import Fences
from .handles import Handles
from .mappings import Mappings, Scratch
from .probe import refusal

LOT = 16  # pages copied between one map call and the next


class HostTier:
    """Host pages ``first .. end`` of a backend, and the copies between the two kinds.

    Raises:
        NoDeviceError: the device cannot map host memory of this node.
        OutOfRange: pages of host memory would have to be larger.
    """

    def __init__(
        self, driver: Driver, mappings: Mappings, first: int, pages: int, device: int, node: int
    ) -> None:
        kind = Kind(device, node)
        why = refusal(driver, kind)
        if why is not None:
            raise NoDeviceError(f"no lower tier: {why}. Do without tiers, or name another node")
        prop, size = driver.property(kind), mappings.page_bytes
        granularity = driver.granularity(prop, recommended=False)
        if size % granularity:
            raise OutOfRange(
                f"page_bytes must be a multiple of {granularity} for host memory, got {size}"
            )
        self.first, self.end = first, first + pages
        # Never zeroed: a page here is a whole copy before it is mapped anywhere.
        self.handles = Handles(driver, prop, size, scrub=False, on_out_of_memory=None)
        self.scratch = Scratch(mappings, 2 * LOT)
        self.stream = driver.create_stream()

    def close(self, driver: Driver) -> None:
        """Give everything back. Nothing is copied any more."""
        self.scratch.close()
        self.handles.close()
        driver.destroy_stream(self.stream)


class Tiered:
    """What a CUDA backend does with two kinds of pages."""

    context: Context
    driver: Driver
    mappings: Mappings
    fences: Fences
    handles: Handles
    page_bytes: int
    device: int
    lower: HostTier | None = None

    @current
    def add_tier(self, first: int, pages: int, place: str | int | None = None) -> None:
        if isinstance(place, str):
            raise OutOfRange(f"a device's lower tier is host memory: a NUMA node, got {place!r}")
        if self.lower is not None:
            raise PageStateError("the backend has a lower tier")
        node = 0 if place is None else place
        self.lower = HostTier(self.driver, self.mappings, first, pages, self.device, node)

    @current
    def settle(self) -> None:
        self.fences.wait()

    @current
    def copy(self, source: int, target: int, count: int) -> None:
        """All has been copied when it returns; only this thread waits."""
        lower, driver, size = self.lower, self.driver, self.page_bytes
        assert lower is not None, "add_tier() first"
        for done in range(0, count, LOT):
            some = min(LOT, count - done)
            handles = [
                *self.kind_of(source).run(source + done, some),
                *self.kind_of(target).run(target + done, some),
            ]
            nbytes = some * size
            with lower.scratch(handles, lower.stream) as at:
                driver.transfer(at + nbytes, at, nbytes, lower.stream)
                driver.synchronize_stream(lower.stream)
        self.handles.fresh.difference_update(range(target, target + count))

    def tier_bytes(self) -> int:
        lower = self.lower
        return 0 if lower is None else lower.handles.resident * self.page_bytes

    def kind_of(self, page: int) -> Handles:
        """The handles among which a page's is."""
        lower = self.lower
        if lower is not None and lower.first <= page < lower.end:
            return lower.handles
        return self.handles
