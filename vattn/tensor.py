"""An address becomes a torch tensor, without a copy. The only file that knows raw pointers.

A tensor made here holds a *lease*: the pages of its slots stay mapped until its storage dies, which
torch reports by dropping the buffer object that the storage was made from. So a view that outlives
its sequence, or its cache, still reads what it read before.

    cpu     torch.frombuffer: the storage owns the buffer object
    cuda    the same storage, handed over by DLPack with the device's name on it

Things that do not work on a device: ``torch._C._construct_storage_from_data_pointer`` with ``set_``
owns nothing, and a lease kept by the tensor dies while a slice of it lives on;
``__cuda_array_interface__`` asks the driver whose pointer it is, which fails where none is mapped
yet; a deleter written in Python would be called by C++ on any thread, also while the interpreter
shuts down. torch's own capsule of a host tensor has a deleter in C++ that ends where the host path
ends, and its ``device`` field is all that tells host from device: nobody reads the memory on the
way.

A view's storage spans everything between its first and its last element, pages included that were
never mapped. Reading elements is always safe; copying the *storage* is not: use ``view.clone()``
before ``torch.save``, ``copy.deepcopy`` or sending a view to another process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allocator.arena import Arena
from .allocator.errors import ClosedError
from .layout import ITEM_BYTES

if TYPE_CHECKING:
    from .allocator.share_device import Import

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
# A buffer object, the place, a dtype, a count of elements and a byte offset: one flat tensor, whose
# storage keeps the buffer object.
Maker = Callable[[Any, torch.device, torch.dtype, int, int], Tensor]


class Window:
    """Tensors over the memory of one arena, all of one dtype, on ``device``."""

    def __init__(self, arena: Arena, dtype: torch.dtype, device: torch.device) -> None:
        self.arena, self.dtype = arena, dtype
        self.item_bytes = dtype.itemsize
        self._place, self._make = device, MAKERS[device.type]
        nbytes = arena.pages * arena.page_bytes
        self._buffer = ctypes.c_char * nbytes
        # For our own short accesses: no lease, so nothing may keep it. An ordinary tensor even if
        # the cache is made under inference_mode, so that later turns may write outside of it.
        with torch.inference_mode(False):
            whole = self._buffer.from_address(arena.address)
            self._whole = self._make(whole, device, dtype, nbytes // dtype.itemsize, 0)
        self.device = self._whole.device

    def access(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor at byte ``offset`` for use within one call; it keeps nothing mapped."""
        return self._whole.as_strided(shape, strides, offset // self.item_bytes)

    def view(
        self, slots: tuple[int, int], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        """A tensor at byte ``offset`` that keeps slots ``first .. last`` mapped while it lives.

        ``strides`` are in elements. Every element must be mapped.
        """
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        count = 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
        buffer = self._buffer.from_address(self.arena.address)
        buffer.lease = self.arena.lease(*slots)  # type: ignore[attr-defined]
        flat = self._make(buffer, self._place, self.dtype, count, offset)
        return flat.as_strided(shape, strides)


def imported(pages: Import, dtype: torch.dtype) -> Tensor:
    """Another process's pages as one flat tensor on their device, which keeps them mapped. Writing
    to it is a fault: they are mapped to be read.

    Raises ClosedError if the import is closed.
    """
    if pages.closed:
        raise ClosedError("the import is closed")
    buffer = (ctypes.c_char * pages.nbytes).from_address(pages.address)
    buffer.lease = pages  # type: ignore[attr-defined]
    device = torch.device(pages.backend.devices[0])
    return MAKERS[device.type](buffer, device, dtype, pages.nbytes // dtype.itemsize, 0)


# ---- from a buffer to a flat tensor --------------------------------------------------------------
def from_buffer(
    buffer: Any, device: torch.device, dtype: torch.dtype, count: int, offset: int
) -> Tensor:
    """On the host; ``device`` is the host."""
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


def from_capsule(
    buffer: Any, device: torch.device, dtype: torch.dtype, count: int, offset: int
) -> Tensor:
    """On any device, by the capsule of a host tensor over the same addresses.

    Bytes until the end, because DLPack's list of dtypes is shorter than torch's.
    """
    nbytes = count * dtype.itemsize
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)
    capsule = flat.__dlpack__()
    head = _Head.from_address(_pointer_of(capsule, b"dltensor"))
    head.device_type, head.device_id = DLPACK_DEVICES[device.type], device.index or 0
    return torch.utils.dlpack.from_dlpack(capsule).view(dtype)


class _Head(ctypes.Structure):
    """How every ``DLTensor`` begins (dlpack.h): where it lies."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
DLPACK_DEVICES = {"cpu": 1, "cuda": 2}  # DLDeviceType of dlpack.h
MAKERS: dict[str, Maker] = {"cpu": from_buffer, "cuda": from_capsule}
