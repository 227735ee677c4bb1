"""The controls of the driver emulator: look at it, break it, hold its work back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

from tests.emulator.build import NoEmulator, load


class Live(NamedTuple):
    """What exists in the emulator now."""

    allocations: int
    references: int
    mappings: int
    reservations: int
    contexts: int
    streams: int
    events: int
    work: int


class Emulator:
    """The loaded emulator. One for the process: `ready` makes it as new."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._calls: Callable[..., int] = library.emu_calls
        library.emu_calls.argtypes, library.emu_calls.restype = [ctypes.c_char_p], ctypes.c_long
        library.emu_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        library.emu_set.argtypes = [ctypes.c_char_p, ctypes.c_long]
        library.emu_reset.argtypes = [ctypes.c_ulonglong, ctypes.c_ulonglong, ctypes.c_int]
        library.emu_kernel.argtypes = [ctypes.c_ulonglong] * 3

    def reset(self, *, granularity: int = 2 << 20, memory: int = 8 << 30, devices: int = 1) -> None:
        """Forget everything, and be another device."""
        self._library.emu_reset(granularity, memory, devices)

    def calls(self, name: str | None = None) -> int:
        """How often the driver was called, or one function of it."""
        return self._calls(None if name is None else name.encode())

    def fail(self, n: int, code: int = 1, name: str | None = None) -> None:
        """Make the ``n``-th call from now (1: the next; 0: none) return ``code``."""
        self._library.emu_fail(None if name is None else name.encode(), n, code)

    @property
    def failing(self) -> bool:
        """Is the failure that was asked for yet to come?"""
        return bool(self._library.emu_failing())

    def set(self, **values: int) -> None:
        """Settings of libcuda.c's ``emu_set``: memory, delay, poison, refused_types, ..."""
        for name, value in values.items():
            self._library.emu_set(name.encode(), int(value))

    def attribute(self, number: int, value: int) -> None:
        """A device attribute (CU_DEVICE_ATTRIBUTE_...) from now on."""
        self._library.emu_attribute(number, value)

    def kernel(self, address: int, nbytes: int, stream: int = 0) -> None:
        """Submit work that reads a range."""
        self._library.emu_kernel(stream, address, nbytes)

    def run(self, n: int = 1 << 30) -> int:
        """Let ``n`` pieces of held work finish; returns how many are left."""
        return self._library.emu_run(n)

    @property
    def faults(self) -> int:
        """Accesses that would have killed the context of a real device."""
        return self._library.emu_faults(None, 0)

    @property
    def fault(self) -> str:
        """The last fault, in words."""
        text = ctypes.create_string_buffer(200)
        self._library.emu_faults(text, 200)
        return text.value.decode()

    @property
    def live(self) -> Live:
        """What exists now."""
        counts = (ctypes.c_long * 8)()
        self._library.emu_live(counts)
        return Live(*counts)


NOTHING = Live(0, 0, 0, 0, 0, 0, 0, 0)


def ready(**options: int) -> Emulator:
    """The emulator, as new; skips the running test where there is none."""
    import pytest  # benchmarks do without

    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    try:
        emulator = Emulator(load())
    except NoEmulator as error:
        pytest.skip(str(error))
    emulator.reset(**options)
    return emulator
