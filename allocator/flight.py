"""The flight recorder: who mapped and unmapped what, when, and behind which wait.

A GPU that reads an address after its page was unmapped reports it later, on another call, without a
name; by then only a record tells who unmapped it. The last few thousand changes are kept in a ring:
one tuple each, always on.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from threading import get_ident
from time import time_ns
from typing import NamedTuple

from .errors import VattnError


class Flight(NamedTuple):
    """One change of a mapping."""

    time_ns: int  # of time.time_ns()
    thread: int
    verb: str  # "map", "remap", "unmap" or "release"
    address: int
    page: int | None  # id of the first page; None for a release
    pages: int
    waits: int  # how many waits for the device had ended before it


class FlightRecorder:
    """The last ``limit`` changes, oldest first."""

    def __init__(self, limit: int = 4096) -> None:
        self._ring: deque[tuple[int, int, str, int, int | None, int, int]] = deque(maxlen=limit)

    def note(self, verb: str, address: int, page: int | None, pages: int, waits: int) -> None:
        """Keep one change."""
        self._ring.append((time_ns(), get_ident(), verb, address, page, pages, waits))

    def __iter__(self) -> Iterator[Flight]:
        return map(Flight._make, list(self._ring))

    def __len__(self) -> int:
        return len(self._ring)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record as JSON lines, for `vattn doctor --trace` in another process: the one
        with the fault may not live long."""
        Path(path).write_text("".join(json.dumps(f._asdict()) + "\n" for f in self))

    @staticmethod
    def load(path: str | PathLike[str]) -> list[Flight]:
        """What `save` wrote.

        Raises:
            VattnError: the file holds something else.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            return [Flight(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise VattnError(f"{path} was not written by FlightRecorder.save: {error}") from error

    def around(self, address: int, page_bytes: int) -> list[Flight]:
        """What happened to the page at an address, oldest first: where to look after a fault."""
        return [f for f in self if f.address <= address < f.address + f.pages * page_bytes]
