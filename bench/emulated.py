"""The driver emulator as a device for benchmarks: every driver call is counted, none is slow.

What is measured over it is our own half: which calls are made, and what they cost in Python.
"""

from __future__ import annotations

from typing import Any

from bench.harness import Bench
from vattn.allocator.cuda import CudaBackend

CALLS = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease")


def open_emulator(bench: Bench, *, granularity: int, memory: int = 1 << 46) -> Any | None:
    """A new emulated device; None, with the reason said, where there can be none."""
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError as error:
        bench.skip(f"cuda-bindings is not installed: {error}")
        return None
    try:
        from tests.emulator.build import NoEmulator, load
        from tests.emulator.control import Emulator
    except ImportError as error:
        bench.skip(f"the driver emulator is part of a checkout's tests: {error}")
        return None
    try:
        emulator = Emulator(load())
    except NoEmulator as error:
        bench.skip(str(error))
        return None
    emulator.reset(granularity=granularity, memory=memory)
    return emulator


def open_backend(page_bytes: int, **options: Any) -> CudaBackend:
    """A backend on the emulated device, whose memory the processor reads, too."""
    backend = CudaBackend(page_bytes, **options)
    backend.devices = ("cpu",)
    return backend


def counts(emulator: Any) -> dict[str, int]:
    """Calls of each kind so far."""
    return {name: emulator.calls(name) for name in CALLS}
