"""For `testing`: two arenas over one pool, their mirrors, one operation at a time that may fail."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine

from .arena import Arena
from .checked import CheckedBackend
from .errors import DriverError, OutOfPages, PageStateError
from .host import HostBackend
from .lease import Lease
from .pool import Pool
from .table import FREE, MAPPED, QUARANTINED, WARM
from .testing_mirror import PAGE, Mirror, maps_within
from .vmm import Backend

SLOTS, LANE_PAGES = 4, 5
done = {"operations": 0, "failures": 0, "runs": 0}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Rig(RuleBasedStateMachine):
    """The second arena is zero-backed. Rules are in `testing_machine`."""

    lanes = 2
    kernel_maps = True  # are the backend's maps the kernel's?

    def open_backend(self) -> Backend:
        return HostBackend(PAGE)

    def __init__(self) -> None:
        super().__init__()
        done["runs"] += 1
        self.backend = CheckedBackend(self.open_backend())
        self.page = self.backend.page_bytes
        self.pool = Pool(self.backend, budget_bytes=40 * self.page)
        self.arenas = [
            Arena(
                self.pool,
                slots=SLOTS,
                lanes=self.lanes,
                lane_pages=LANE_PAGES,
                zero_backed=zero_backed,
            )
            for zero_backed in (False, True)
        ]
        self.mirrors = [Mirror(arena) for arena in self.arenas]
        self.held: set[int] = (
            set()
        )  # pages given back in this epoch: nobody gets them before the next
        self.leases: list[tuple[Mirror, int, int, Lease]] = []

    # ---- one operation -----------------------------------------------------------------------
    def snapshot(self) -> tuple[Any, ...]:
        """Everything that a failed operation must leave alone."""
        pool, size = self.pool, self.pool.table.size
        state = pool.table.state[:size].copy()
        used = state > WARM
        # Free pages may lose their bytes in a failed attempt to make room; used ones change never.
        pages = (np.where(used, state, FREE), pool.table.refs[:size] * used)
        owners = pool.table.owner[:size] * (state == MAPPED)
        arenas = [
            x.copy()
            for a in self.arenas
            for x in (a.entry, a.first, a.last, a.shared_to, a.pins, ints(a.maps))
        ]
        counts = ints(pool.free, pool.mapped, pool.pending, pool.total, pool.over)
        return size, dict(self.backend.at), [*pages, owners, counts, *arenas]

    def assert_same(self, before: tuple[Any, ...]) -> None:
        after = self.snapshot()
        size = before[0]  # ids may have been added, all of them free
        assert before[1] == after[1], "another mapping"
        for i, (old, new) in enumerate(zip(before[2], after[2], strict=True)):
            cut = new[:size] if i < 3 else new
            assert (old == cut).all(), f"item {i} changed"
            assert i > 2 or not new[size:].any()

    def do(
        self,
        fail: int | None,
        act: Callable[[], Any],
        *,
        refused: bool = False,
        quiesced: bool = False,
    ) -> bool:
        """Run one operation, perhaps with a failing call; True if it took effect.

        ``refused``: it must be refused, because pages would be unmapped under a live view.
        """
        before = self.snapshot()
        held = self.quarantined()
        if fail is not None:
            self.backend.fail_at = self.backend.count + fail
        try:
            for attempt in (1, 2):
                done["operations"] += 1
                try:
                    act()
                    break
                except DriverError as error:
                    if attempt == 2 or "Injected" not in str(error):
                        raise
                    done["failures"] += 1
                    self.backend.fail_at = None
                    self.assert_same(before)
        except OutOfPages as error:
            self.assert_same(before)
            if error.needed <= error.free:
                raise
            return False
        except PageStateError:
            assert refused, "refused without a reason"
            self.assert_same(before)
            return False
        finally:
            self.backend.fail_at = None
        assert not refused, "pages unmapped under a live view"
        if not quiesced:
            self.held |= self.quarantined() - held
        return True

    def quarantined(self) -> set[int]:
        return set(np.flatnonzero(self.pool.table.state == QUARANTINED).tolist())

    def teardown(self) -> None:
        self.leases.clear()
        gc.collect(0)
        for arena in self.arenas:
            arena.close()
        assert self.pool.mapped == 0
        self.pool.advance()
        self.pool.trim()
        assert self.pool.created == 0
        assert self.backend.resident_bytes() == 0, "bytes leaked"
        self.pool.close()
        assert not self.backend.at

    # ---- after every operation ---------------------------------------------------------------
    def check(self) -> None:
        self.pool.check()
        assert self.held <= self.quarantined(), "a page left quarantine before its time"
        ids = [a.entry[a.entry > 0] - 1 for a in self.arenas]
        count = np.bincount(np.concatenate(ids), minlength=self.pool.table.size)
        assert (count == self.pool.table.refs[: len(count)]).all(), "references are the mappings"
        for arena, mirror in zip(self.arenas, self.mirrors, strict=True):
            arena.check()
            mirror.verify()
            number = np.flatnonzero(arena.entry)
            at = {arena.address + n * self.page: int(arena.entry[n]) - 1 for n in number.tolist()}
            assert at.items() <= self.backend.at.items(), "the record is what is mapped"
        assert len(self.backend.at) == sum(len(i) for i in ids)
        if self.kernel_maps and done["operations"] % 32 == 0:
            for arena in self.arenas:
                real = maps_within(arena.address, arena.pages * self.page)
                assert arena.maps == real, (arena.maps, real)

    def boundary(
        self, fail: int | None, act: Callable[[], Any], again: Callable[[], Any] | None = None
    ) -> None:
        """A pool operation with, perhaps, a failing call; it works when tried again."""
        if fail is not None:
            self.backend.fail_at = self.backend.count + fail
        done["operations"] += 1
        try:
            act()
        except DriverError:
            done["failures"] += 1
            self.backend.fail_at = None
            self.check()
            (again or act)()
        finally:
            self.backend.fail_at = None
        self.check()
