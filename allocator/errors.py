"""What can go wrong, as types. Every message names the value, the limit and the remedy."""

from __future__ import annotations

import os


class VattnError(RuntimeError):
    """Base of every error that vattn raises on purpose."""


class OutOfPages(VattnError):
    """The budget does not cover a request. Nothing was taken.

    Attributes: ``needed``, ``free`` and ``pending`` pages; ``pending`` pages sit in quarantine and
    come back at the next step boundary.
    """

    def __init__(self, needed: int, free: int, pending: int, page_bytes: int) -> None:
        self.needed, self.free, self.pending, self.page_bytes = needed, free, pending, page_bytes
        super().__init__(
            f"out of pages: needed {needed}, free {free}, pending {pending} "
            f"(pages of {page_bytes} bytes; short of {max(0, needed - free) * page_bytes} bytes). "
            "Close or truncate sequences, call advance() to collect the pending pages, "
            "or raise the budget with set_budget()."
        )


class ClosedError(VattnError):
    """Use after close, or a second close."""


class ReserveError(VattnError):
    """The operating system refused address space."""


class MapLimitError(VattnError):
    """A map or file-descriptor limit of the process is near. Nothing was mapped."""


class OutOfRange(VattnError, ValueError):
    """A position lies outside of the reserved virtual range."""


class PageStateError(VattnError):
    """A page was about to take an edge that its state machine does not have."""


class ShareError(VattnError):
    """Pages could not be exported to, or imported from, another process."""


class NoDeviceError(VattnError):
    """No CUDA device can be used: no bindings, no driver, no such device, or too old a one."""


class DriverError(VattnError):
    """A system or driver call failed.

    Attributes: ``call`` (name), ``code`` (errno or CUresult), ``address`` and ``nbytes``.
    """

    def __init__(
        self,
        call: str,
        code: int,
        address: int,
        nbytes: int,
        remedy: str = "",
        *,
        meaning: str | None = None,
    ) -> None:
        self.call, self.code, self.address, self.nbytes = call, code, address, nbytes
        if meaning is None:
            meaning = f"{os.strerror(code)} (errno {code})"
        text = f"{call} failed: {meaning} at {address:#x}, {nbytes:#x} bytes"
        super().__init__(f"{text}. {remedy}" if remedy else text)


class OutOfDeviceMemory(DriverError):
    """The device has no memory for a page, though the budget does. Nothing was taken."""
