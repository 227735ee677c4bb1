"""What a launcher asks about the device that it launches on.

Kernels run on CUDA tensors, and on CPU tensors where Triton interprets (TRITON_INTERPRET=1, to be
set before triton is imported) or where `pretend` names a device: the compile gate launches every
kernel so, and nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """A GPU as far as a tile depends on it.

    Args:
        arch: compute capability times ten: 80 Ampere, 90 Hopper, 100 Blackwell.
        processors: streaming multiprocessors.
        shared_bytes: shared memory that one program may use.
    """

    arch: int
    processors: int
    shared_bytes: int


# CUDA C programming guide, "Technical specifications per compute capability".
A100 = Device(80, 108, 163 << 10)
H100 = Device(90, 132, 227 << 10)
B200 = Device(100, 148, 227 << 10)
# Few processors, so that an interpreted launch has several splits a program and is short.
INTERPRETER = Device(80, 8, 163 << 10)

_pretended: ContextVar[Device | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Let launchers take CPU tensors for tensors of ``device``."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def device_of(tensor: Tensor) -> Device:
    """The device that a kernel on ``tensor`` runs on.

    Raises ValueError for a tensor that no kernel can be launched on.
    """
    why = cannot_launch(tensor)
    if why is not None:
        raise ValueError(why)
    if tensor.is_cuda:
        return _properties(tensor.get_device())
    return _pretended.get() or INTERPRETER


def cannot_launch(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run on ``tensor``, or None."""
    if tensor.is_cuda:
        if torch.version.hip is not None:
            return "AMD devices: these kernels are compiled and checked for CUDA only"
        if _properties(tensor.get_device()).arch < 80:
            return "the device is older than compute capability 8.0 (Ampere)"
        return None
    if tensor.is_cpu and (interpreted() or _pretended.get() is not None):
        return None
    return f"the tensor is on {tensor.device}: Triton kernels need a CUDA device"


def padded(n: int) -> int:
    """Elements of a tile's side that holds ``n``: a power of two, 16 for matrix instructions."""
    return max(16, triton.next_power_of_2(n))


def precision(tensor: Tensor) -> str:
    """How products of ``tensor``'s rows are rounded: "tf32" for float32 where the user allows it
    (`torch.set_float32_matmul_precision`), else "ieee"."""
    # Not allow_tf32, which raises where the user has set the newer name.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tensor.dtype == torch.float32 and allowed else "ieee"


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the one that Triton launches on."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.get_device())


@cache
def _properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    held = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Device(10 * found.major + found.minor, found.multi_processor_count, held)
