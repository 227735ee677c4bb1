"""The physical pages of a device: one driver handle for each page id that exists.

    create ──► fresh: nobody zeroed it ──► seen, or copied to ──► destroy ──► doomed, if refused

Nothing promises that the memory of a new handle is zeroed, and what lay there may have been another
tenant's; so a page stays fresh until somebody zeroed it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .driver import Driver
from .errors import DriverError, OutOfDeviceMemory, PageStateError


class Handles:
    """Handles by page id.

    Args:
        driver, prop, page_bytes: how to make one.
        scrub: new pages have to be zeroed before they are seen.
        on_out_of_memory: called once by a request that finds no memory, before it tries again.
    """

    def __init__(
        self,
        driver: Driver,
        prop: Any,
        page_bytes: int,
        *,
        scrub: bool,
        on_out_of_memory: Callable[[], object] | None,
    ) -> None:
        self.driver, self.prop, self.page_bytes = driver, prop, page_bytes
        self.scrub, self.on_out_of_memory = scrub, on_out_of_memory
        self.fresh: set[int] = set()
        self._handles: dict[int, int] = {}
        self._imported: set[int] = set()
        self._doomed: list[int] = []  # what the driver would not release

    def __getitem__(self, page: int) -> int:
        try:
            return self._handles[page]
        except KeyError:
            raise PageStateError(f"page {page} does not exist: create it first") from None

    def run(self, page: int, count: int) -> list[int]:
        """The handles of pages ``page .. page+count``."""
        try:
            if count == 1:  # a decode step
                return [self._handles[page]]
            return list(map(self._handles.__getitem__, range(page, page + count)))
        except KeyError as error:
            return [self[error.args[0]]]  # which says what is missing

    @property
    def resident(self) -> int:
        """Pages whose memory we hold; imported ones are their exporter's."""
        return len(self._handles) - len(self._imported) + len(self._doomed)

    # ---- pages -------------------------------------------------------------------------------
    def create(self, page: int, count: int) -> None:
        """All or nothing."""
        ids = range(page, page + count)
        for i in ids:
            self._check_new(i)
        self._handles.update(zip(ids, self.make(count), strict=True))
        if self.scrub:
            self.fresh.update(ids)

    def destroy(self, page: int, count: int) -> None:
        """All, if the first one can be."""
        for i in range(page, page + count):
            handle = self[i]
            try:
                self.driver.destroy(handle, self.page_bytes)
            except DriverError:
                if i == page:
                    raise
                # The pages before are gone for good: this one goes, too, as soon as it can.
                self._doomed.append(handle)
            del self._handles[i]
            self.fresh.discard(i)
            self._imported.discard(i)
        self.release_doomed()

    def adopt(self, page: int, fd: int) -> None:
        """Let ``page`` be what another process exported."""
        self._check_new(page)
        self._handles[page] = self.driver.import_fd(fd)
        self._imported.add(page)

    # ---- handles without a page --------------------------------------------------------------
    def make(self, count: int) -> list[int]:
        """New handles: ``count``, or none and an error."""
        made: list[int] = []
        asked = False
        try:
            while len(made) < count:
                try:
                    made.append(self.driver.create(self.page_bytes, self.prop))
                except OutOfDeviceMemory:
                    if asked or self.on_out_of_memory is None:
                        raise
                    asked = True
                    self.release_doomed()
                    self.on_out_of_memory()
        except BaseException:
            for handle in made:
                self.doom(handle)
            raise
        return made

    def doom(self, handle: int) -> None:
        """Release a handle now, or as soon as the driver takes it."""
        self._doomed.append(handle)
        self.release_doomed()

    def release_doomed(self) -> None:
        with suppress(DriverError):
            while self._doomed:
                handle = self._doomed.pop()  # before the call: another thread may do the same
                try:
                    self.driver.destroy(handle, self.page_bytes)
                except BaseException:
                    self._doomed.append(handle)
                    raise

    def close(self) -> None:
        """Release all, as far as the driver takes it."""
        for handle in [*self._handles.values(), *self._doomed]:
            with suppress(DriverError):
                self.driver.destroy(handle, self.page_bytes)
        self._handles.clear()
        self._doomed.clear()
        self._imported.clear()
        self.fresh.clear()

    def _check_new(self, page: int) -> None:
        if page in self._handles:
            raise PageStateError(f"page {page} exists already")
