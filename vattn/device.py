"""Where the pages of a cache lie: in host memory, or on a CUDA device; what Triton needs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .allocator.errors import NoDeviceError, OutOfRange, VattnError
from .allocator.host import HostBackend
from .allocator.pool import Pool
from .allocator.trace import Trace, TracedBackend
from .allocator.vmm import Backend
from .layout import Layout, LayoutError

BUDGET_SHARE = 0.8
Streams = Callable[[], Iterable[int]]


def place_of(device: str | torch.device | None, pool: Pool | None) -> torch.device:
    """The device of a cache's tensors: the one asked for, else the pool's, else the host.

    Raises:
        LayoutError: no such kind of device, or one that cannot read the pool's pages.
        NoDeviceError: "cuda" with a torch that has none.
    """
    if device is None:
        device = "cpu" if pool is None else pool.backend.devices[0]
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"device must be cpu, cuda or cuda:N, got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise LayoutError(f"device must be cpu, cuda or cuda:N, got {place}")
    if place.type == "cpu":
        place = torch.device("cpu")
    else:
        if not torch.cuda.is_available():
            raise NoDeviceError(
                f"device {place} was asked for, and torch {torch.__version__} sees no CUDA device: "
                "see `vattn doctor`, or leave device out for host memory"
            )
        if place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
    if pool is not None and str(place) not in pool.backend.devices:
        raise LayoutError(
            f"the pool's pages are read by {', '.join(pool.backend.devices)}, not by {place}"
        )
    return place


def open_backend(layout: Layout, place: torch.device, streams: Streams | None = None) -> Backend:
    """A backend whose pages are those of a layout.

    Raises:
        LayoutError: the layout's page is no multiple of the device's granularity.
        NoDeviceError: no bindings or driver, or a device without virtual memory management.
    """
    if place.type == "cpu":
        return HostBackend(layout.page)
    from .allocator.cuda import CudaBackend  # only who asks for a device needs cuda.bindings

    try:
        return CudaBackend(
            layout.page,
            device=place.index,
            streams=streams,
            on_out_of_memory=torch.cuda.empty_cache,
        )
    except OutOfRange as error:
        raise LayoutError(
            f"{error}. Choose it in the layout: Layout(..., page_bytes=2 << 20); with "
            "Layout.all_layers(...) a page of that size wastes least"
        ) from error


def open_pool(
    layout: Layout,
    place: torch.device,
    *,
    budget_bytes: int | None = None,
    streams: Streams | None = None,
    trace: Trace | None = None,
) -> Pool:
    """A pool of a layout's pages; 80% of what is available now by default. Raises: as
    `open_backend`."""
    backend = open_backend(layout, place, streams)
    if budget_bytes is None:
        ask = getattr(backend, "available_bytes", available_bytes)
        budget_bytes = int(ask() * BUDGET_SHARE)
    if trace is not None:
        backend = TracedBackend(backend, trace)
    return Pool(backend, budget_bytes=budget_bytes)


def available_bytes() -> int:
    """Memory the system could give to new pages now (``MemAvailable``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise VattnError("/proc/meminfo has no MemAvailable: pass budget_bytes")


_failed: dict[torch.device, str] = {}  # starting a driver in vain is slow: once a device


def cannot_launch(tensor: Tensor) -> str | None:
    """Say why no Triton kernel runs where ``tensor`` lies, None if one does; imports triton."""
    if tensor.device in _failed:
        return _failed[tensor.device]
    try:
        from .kernels import gpu

        return gpu.cannot_launch(tensor)
    except ImportError as error:
        why = f"triton cannot be imported ({error}): pip install triton"
    except Exception as error:  # whatever a driver, a C compiler or a library of theirs raises
        first = (str(error) or "no message").splitlines()[0]
        why = (
            f"triton's driver does not start ({type(error).__name__}: {first}): it needs a C "
            "compiler (CC), the headers of Python and libcuda"
        )
    _failed[tensor.device] = why
    return why
