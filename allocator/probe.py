"""What kinds of pages does a device really give? Asked by making one, mapping it and letting it go.

What a driver advertises and what it does are not the same: WSL2 advertises RDMA and refuses access,
fabric handles need a permission. So each kind is tried, the best first, and every refusal keeps its
reason for `vattn doctor`:

    wanted fabric:  fabric ──► fd ──► private         each with RDMA first, then without
    wanted fd:                 fd ──► private
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .driver import READ_WRITE, Driver, Kind
from .errors import DriverError, NoDeviceError, OutOfRange

SUPPORTS = {"fd": "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR", "fabric": "HANDLE_TYPE_FABRIC"}


def ladder(wanted: Kind) -> Iterator[Kind]:
    """The kinds that will do, best first."""
    exports = {"fabric": ("fabric", "fd", None), "fd": ("fd", None), None: (None,)}
    for export in exports[wanted.export]:
        for rdma in (True, False) if wanted.rdma else (False,):
            yield replace(wanted, export=export, rdma=rdma)  # type: ignore[arg-type]


def refusal(driver: Driver, kind: Kind) -> str | None:
    """Why the current context's device gives no page of this kind; None if it does."""
    device = kind.device
    if kind.export is not None and not driver.supports(SUPPORTS[kind.export], device):
        return f"{kind}: the device does not advertise {SUPPORTS[kind.export]}"
    if kind.rdma and not driver.supports("GPU_DIRECT_RDMA_WITH_CUDA_VMM", device):
        return f"{kind}: the device does not advertise GPU_DIRECT_RDMA_WITH_CUDA_VMM"
    if kind.host_node is not None and not driver.supports(
        "HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT", device
    ):
        return f"{kind}: the device does not advertise HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT"
    try:
        _try(driver, kind)
    except DriverError as error:
        return f"{kind}: {error}"
    return None


def choose(driver: Driver, wanted: Kind) -> tuple[Kind, list[str]]:
    """The best kind that the current context's device gives, and why not a better one.

    Raises:
        NoDeviceError: none at all.
    """
    refusals: list[str] = []
    for kind in ladder(wanted):
        why = refusal(driver, kind)
        if why is None:
            return kind, refusals
        refusals.append(why)
    raise NoDeviceError(f"the device gives no pages: {'; '.join(refusals)}")


def survey(device: int = 0) -> dict[str, str | None]:
    """Every kind of page, and why it is refused (None: it is given). For `vattn doctor`.

    Raises:
        NoDeviceError: no bindings, driver or device.
    """
    driver = Driver()
    context = driver.retain_context(device)
    try:
        entered = driver.enter(context)
        try:
            kinds = [*ladder(Kind(device, None, "fabric", True)), *ladder(Kind(device, 0, "fd"))]
            return {str(kind): refusal(driver, kind) for kind in kinds}
        finally:
            if entered:
                driver.leave()
    finally:
        driver.release_context(device)


def check_devices(driver: Driver, device: int, peers: tuple[int, ...]) -> None:
    """Raises:
    NoDeviceError: a device is not there, has no virtual memory, or cannot reach the other."""
    count = driver.device_count()
    for ordinal in (device, *peers):
        if not 0 <= ordinal < count:
            raise NoDeviceError(
                f"device {ordinal} was asked for, {count} are visible: see nvidia-smi and "
                "CUDA_VISIBLE_DEVICES"
            )
        if not driver.supports("VIRTUAL_MEMORY_MANAGEMENT", ordinal):
            raise NoDeviceError(
                f"device {ordinal} has no virtual memory management: use another one, or the host "
                "backend"
            )
    for peer in peers:
        if not driver.can_access_peer(peer, device):
            raise NoDeviceError(
                f"device {peer} cannot reach the memory of device {device}: leave it out of peers"
            )


def page_size(driver: Driver, prop: Any, page_bytes: int | None) -> int:
    """``page_bytes``, or what the driver recommends where that is None.

    Raises:
        OutOfRange: not a positive multiple of the granularity.
    """
    granularity = driver.granularity(prop, recommended=False)
    recommended = driver.granularity(prop, recommended=True)
    size = recommended if page_bytes is None else page_bytes
    if size <= 0 or size % granularity:
        raise OutOfRange(
            f"page_bytes must be a positive multiple of {granularity} on this device "
            f"({recommended} is recommended), got {size}"
        )
    return size


def accesses(driver: Driver, kind: Kind, peers: tuple[int, ...], flags: int) -> list[Any]:
    """What the device, its peers and, for host memory, the host may do with pages of a kind."""
    places = [Kind(device) for device in (kind.device, *peers)]
    if kind.host_node is not None:
        places.append(kind)
    return [driver.access(driver.location(place), flags) for place in places]


def _try(driver: Driver, kind: Kind) -> None:
    """One page: create, map, allow, unmap, release. Leaves nothing."""
    prop = driver.property(kind)
    size = driver.granularity(prop, recommended=False)
    handle = driver.create(size, prop)
    try:
        address = driver.reserve(size, 0)
        try:
            driver.map(address, size, handle)
            try:
                access = driver.access(driver.location(Kind(kind.device)), READ_WRITE)
                driver.set_access(address, size, [access])
            finally:
                driver.unmap(address, size)
        finally:
            driver.free(address, size)
    finally:
        driver.destroy(handle, size)
