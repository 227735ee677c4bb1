"""The backends that `test_host` runs the laws of `vattn.allocator.testing` on.

The CUDA backend runs over the driver emulator, whose device has pages as small as the host's and
memory that the processor reads, too; fresh memory there is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.emulator.control import ready
from tests.mirror import PAGE
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.host import HostBackend
from vattn.allocator.testing import LAWS
from vattn.allocator.trace import TracedBackend
from vattn.allocator.vmm import Backend

__all__ = ["BACKENDS", "LAWS", "emulated"]


def emulated(page_bytes: int = PAGE, **options: Any) -> CudaBackend:
    """A CUDA backend on a new emulated device; skips the test where there can be none."""
    ready(granularity=PAGE).set(poison=1)
    return CudaBackend(page_bytes, **options)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "host": lambda: HostBackend(PAGE),
    "checked": lambda: CheckedBackend(HostBackend(PAGE)),
    "traced": lambda: TracedBackend(CheckedBackend(HostBackend(PAGE))),
    "cuda": emulated,
    "cuda checked": lambda: CheckedBackend(emulated()),
    "cuda traced, two streams": lambda: TracedBackend(emulated(streams=lambda: (0, 1))),
}
