"""A driver that claims a GPU: launchers compile what they would launch on it, and nothing runs.

Triton asks the active driver for its target, then compiles for it with its own compiler, which is
part of the wheel. A JIT function keeps its compiled kernels per device index, not per target, so
that the index is the compute capability: with one index for all, sm_90 would be given sm_80's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from vattn.kernels.gpu import A100, B200, H100, Device, pretend

DEVICES = {device.arch: device for device in (A100, H100, B200)}
THREADS = 1024  # in a program, at most


@contextmanager
def pretended(device: Device) -> Iterator[None]:
    """Launch on ``device`` as far as compiling goes: CPU tensors are taken for its own."""
    triton.runtime.driver.set_active(_Driver(device))
    try:
        with pretend(device):
            yield
    finally:
        triton.runtime.driver.set_active(None)


class _Driver(DriverBase):
    """The few answers that a launch needs."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.utils = _Loader(device)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.arch, 32)

    def get_current_device(self) -> int:
        return self.device.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on a pretended device: launch with a fixed tile")


class _Loader:
    """Answers for `cuModuleLoadData`: shared memory is what a kernel may fail to fit."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {"max_shared_mem": self.device.shared_bytes}

    def load_binary(self, name: str, *_: object) -> tuple[str, str, int, int, int]:
        return name, name, 0, 0, THREADS


class _Launcher:
    """Answers for `cuLaunchKernel`."""

    def __init__(self, src: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        pass
