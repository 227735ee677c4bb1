"""Fixtures that several test files use."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.emulator.control import Emulator
    from vattn.allocator.cuda import CudaBackend


# torch's own test samples ask numba for CUDA devices: it must not talk to the driver emulator that
# an earlier test may have loaded.
os.environ["NUMBA_DISABLE_CUDA"] = "1"

# A shell lets what it starts in the background ignore Ctrl-C, and tests send themselves some.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Triton interprets its kernels unless a GPU was asked for. It looks when it is imported."""
    if "not gpu" in config.option.markexpr:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What was imported stays: a collection need not walk through it, at 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A new emulated device with small pages and dirty memory; nothing is left of it afterwards."""
    from tests.emulator.control import NOTHING, ready
    from tests.mirror import PAGE

    gc.collect()
    emulator = ready(granularity=PAGE)
    emulator.set(poison=1)
    yield emulator
    gc.collect()
    live, faults = emulator.live, emulator.faults
    emulator.reset()
    assert live == NOTHING
    assert faults == 0


@pytest.fixture
def backend(emulator: Emulator) -> Iterator[CudaBackend]:
    """A CUDA backend with pages 0 .. 8."""
    from tests.mirror import PAGE
    from vattn.allocator.cuda import CudaBackend

    backend = CudaBackend(PAGE)
    backend.create(0, 8)
    yield backend
    backend.close()
