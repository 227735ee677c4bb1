"""For `testing_storm`: what its threads share: a pool, all arenas, views on their way, failures."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np

from .arena import Arena
from .checked import CheckedBackend
from .errors import DriverError, ReserveError, VattnError
from .laws import check_pool
from .lease import Lease
from .pool import Pool
from .quarantine import PageIds
from .table import QUARANTINED
from .testing_ledger import Ledger
from .vmm import Backend

SLOTS, LANE_PAGES = 6, 8
KINDS = ((1, False), (2, True))  # lanes, and is it zero-backed: an arena of each for every thread
INJECTED = "Injected by storm."
TRIES = 8  # of an operation whose calls are made to fail


class Device(Protocol):
    """What a device does meanwhile, for `storm`; an emulator's controls, say."""

    def kernel(self, thread: int, address: int, nbytes: int) -> None:
        """Submit work that reads pages, now or late."""

    def progress(self, n: int) -> None:
        """Let so many pieces of held work finish."""

    def fail(self, n: int) -> None:
        """The n-th driver call from now fails with an error that `injected` knows; 0: none."""

    @property
    def failing(self) -> bool:
        """Is the failure that was asked for yet to come?"""

    def injected(self, error: DriverError) -> bool:
        """Was it `fail`?"""

    def check(self) -> None:
        """Raise AssertionError if work has read what was not mapped."""

    def settle(self) -> None:
        """All work is done; none is held from now on."""


class Failing:
    """A backend of which one verb, the n-th from now, fails before anything happens.

    Verbs come from several threads, without a lock: some call fails, not more than one.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner, self.left = inner, 0
        for verb in ("note_maps", "admit_maps", "fence", "page_bytes", "granularity", "calls"):
            setattr(self, verb, getattr(inner, verb))
        for verb in filter(partial(hasattr, inner), CheckedBackend.FAILABLE):
            setattr(self, verb, self._counted(verb, getattr(inner, verb)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _counted(self, name: str, verb: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                if not self.left:
                    raise DriverError(name, errno.EIO, 0, 0, INJECTED)
            return verb(*arguments, **options)

        return call


class View:
    """A lease that one thread took and another one lets die."""

    ALIVE, DYING, DEAD = range(3)

    def __init__(self, arena: Arena, first: int, last: int) -> None:
        self.arena, self.slots = arena, range(first, last)
        self.lease: Lease | None = arena.lease(first, last)
        self.state = self.ALIVE

    def die(self) -> None:
        """May run next to anything."""
        self.state = self.DYING
        self.lease = None
        self.state = self.DEAD


class World:
    """One pool, and who uses it.

    Args:
        backend: the verbs; closed at the end.
        device: what reads the pages late, if there is one.
        budget_pages: to begin with.
    """

    def __init__(
        self, backend: Backend, device: Device | None, *, threads: int, budget_pages: int
    ) -> None:
        self.failing: Any = Failing(backend)
        self.device = device
        self.pool = Pool(self.failing, budget_bytes=budget_pages * backend.page_bytes)
        self.tenants = [self.pool.tenant(f"tenant {i}") for i in range(3)]
        self.ledgers: list[list[Ledger]] = []  # of each thread
        self.arenas: list[Arena] = []  # changed within a turn; also closed ones that a view keeps
        self.mail: list[deque[View]] = [deque() for _ in range(threads)]
        self.held: list[tuple[int, PageIds]] = []  # epoch, and pages that were given back in it
        self.serials = count()
        self.stop = False

    # ---- failures ----------------------------------------------------------------------------
    def fail(self, n: int) -> None:
        """Some call soon fails: a verb, or on a device a driver call. Within a turn, and never
        beside another failure that is still to come: the call is then none of a change that is
        being undone, and undoing is not promised to survive a second failure."""
        with self.pool.turn:
            if self.failing.left or (self.device is not None and self.device.failing):
                return
            if self.device is not None and n % 2:
                self.device.fail(n)
            else:
                self.failing.left = n

    def injected(self, error: VattnError) -> bool:
        """Was that our doing?"""
        cause = error.__cause__ if isinstance(error, ReserveError) else error
        if not isinstance(cause, DriverError):
            return False
        device = self.device
        return INJECTED in str(cause) or (device is not None and device.injected(cause))

    # ---- arenas ------------------------------------------------------------------------------
    def open_arena(self, kind: int) -> Arena:
        """A new arena that all laws count."""
        lanes, zero_backed = KINDS[kind]
        with self.pool.turn:
            arena = Arena(
                self.pool, slots=SLOTS, lanes=lanes, lane_pages=LANE_PAGES, zero_backed=zero_backed
            )
            self.arenas.append(arena)
            return arena

    def close_arena(self, arena: Arena) -> None:
        """Close it; it counts until its last view has died."""
        with self.pool.turn:
            arena.close()
            self.bury()

    def bury(self) -> None:
        """Forget the arenas that are gone. Within a turn."""
        self.arenas = [arena for arena in self.arenas if not arena._torn_down]

    # ---- laws --------------------------------------------------------------------------------
    def hold(self, act: Callable[[], object]) -> None:
        """Run a change; the pages that it gives back have to wait for this epoch."""
        with self.pool.turn:
            before, epoch = self.quarantined(), self.pool.quarantine.epoch
            act()
            new = np.setdiff1d(self.quarantined(), before, assume_unique=True)
            if len(new):
                self.held.append((epoch, new))

    def check_held(self) -> None:
        """What was given back in this epoch still waits. Within a turn."""
        self.held = [held for held in self.held if held[0] == self.pool.quarantine.epoch]
        for _, waiting in self.held:
            states = self.pool.table.state[waiting]
            assert (states == QUARANTINED).all(), "a page left quarantine before its time"

    def quarantined(self) -> PageIds:
        """Ids of the pages that wait."""
        return np.flatnonzero(self.pool.table.state[: self.pool.table.size] == QUARANTINED)

    def reclaimable(self) -> list[tuple[Ledger, int]]:
        """The parked slots of all threads that nobody looks at. Within a turn."""
        return [
            (ledger, slot)
            for ledgers in self.ledgers
            for ledger in ledgers
            for slot in ledger.parked
            if not ledger.arena.pins.item(slot)
        ]

    def audit(self) -> None:
        """Every law over every page, between two changes."""
        with self.pool.turn:
            pool, size = self.pool, self.pool.table.size
            check_pool(pool)
            self.bury()
            for arena in self.arenas:
                arena.check()
            ids = [arena.entry[arena.entry > 0] - 1 for arena in self.arenas]
            counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *ids]), minlength=size)
            assert (counts == pool.table.refs[:size]).all(), "a page has two owners, or none"
            self.check_held()
            if self.device is not None:
                self.device.check()

    # ---- the end -----------------------------------------------------------------------------
    def calm(self) -> None:
        """No failure, no late work and no view from now on."""
        self.failing.left = 0
        if self.device is not None:
            self.device.fail(0)
            self.device.settle()
        for mail in self.mail:
            while mail:
                mail.popleft().die()

    def end(self) -> None:
        """Give everything back, and see that nothing is left."""
        self.calm()
        for arena in self.arenas:
            assert not arena.pins.any(), "a view that died still pins its slots"
            arena.close()
        pool, backend = self.pool, self.failing.inner
        assert pool.mapped == 0, f"{pool.mapped} pages are still mapped"
        pool.advance()
        pool.trim()
        pool.check()
        assert pool.created == 0, f"{pool.created} pages are left"
        assert backend.resident_bytes() == 0, f"{backend.resident_bytes()} bytes leaked"
        assert backend.maps == 0, f"{backend.maps} kernel maps are left"
        pool.close()
        if self.device is not None:
            self.device.check()

    def abandon(self) -> None:
        """After a broken law: let go of what can be let go of."""
        self.calm()
        for arena in self.arenas:
            with suppress(VattnError):
                arena.close()
        self.failing.inner.close()
