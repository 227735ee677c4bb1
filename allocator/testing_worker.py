"""For `testing_storm`: one thread: it draws operations, does each in full view, and checks all."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from .errors import DriverError, OutOfPages, PageStateError, ReserveError
from .testing_ledger import Ledger
from .testing_world import KINDS, LANE_PAGES, SLOTS, TRIES, View, World

TRACED = 40  # operations that an error shows
SECOND = 0.15  # of the operations are on the second arena, the dearer one
AUDIT_EVERY, FAIL_EVERY = 512, 256


class Worker:
    """One thread of a storm; what it may draw is in `testing_verbs`.

    Args:
        world: what it shares with the others.
        thread: its number.
        operations: how many to do.
        seed: of everything it draws.
    """

    def __init__(self, world: World, thread: int, operations: int, seed: int) -> None:
        self.world, self.thread, self.operations = world, thread, operations
        self.random = Random(f"{seed}/{thread}")
        self.pool, self.turn = world.pool, world.pool.turn
        self.done = self.failures = self.refusals = self.reclaimed = 0
        self.verbs: Counter[str] = Counter()
        self.trace: deque[tuple[Any, ...]] = deque(maxlen=TRACED)
        self.views: list[View] = []
        self.error: BaseException | None = None
        self.ledgers = [self.open_ledger(kind) for kind in range(len(KINDS))]
        world.ledgers.append(self.ledgers)
        self.pool.reclaimers.append(self.reclaim)

    def open_ledger(self, kind: int) -> Ledger:
        return Ledger(self.world.open_arena(kind), self.thread, next(self.world.serials))

    def run(self) -> None:
        """Do all operations; an error is kept in ``error``, and stops everybody."""
        draw, deck = self.random.random, self.deck()
        size = len(deck)
        audit, fail = AUDIT_EVERY, FAIL_EVERY
        try:
            while self.done < self.operations and not self.world.stop:
                deck[int(draw() * size)](self.ledgers[draw() < SECOND], int(draw() * SLOTS))
                if self.done >= fail:
                    fail += FAIL_EVERY
                    self.world.fail(self.random.randint(1, 12))
                if self.done >= audit:
                    audit += AUDIT_EVERY
                    self.audit()
            self.audit()
        except BaseException as error:
            self.error = error
            self.world.stop = True

    def deck(self) -> list[Callable[[Ledger, int], None]]:
        """What to draw from: each is given a ledger and a slot."""
        raise NotImplementedError

    def audit(self) -> None:
        """All laws, and all that this thread knows."""
        with self.turn:
            self.world.audit()
            for ledger in self.ledgers:
                ledger.verify_all()

    # ---- doing one thing ---------------------------------------------------------------------
    def note(self, verb: str, *what: Any) -> None:
        """Count a verb, and keep it for whoever looks into a failure."""
        self.done += 1
        self.verbs[verb] += 1
        self.trace.append((self.done, verb, *what))

    def attempt(
        self, ledger: Ledger, need: int | None, act: Callable[[], object], *slots: int
    ) -> bool:
        """Run a verb that needs so many pages, and unmaps pages of some slots; True if it took
        effect. An injected failure must leave all as it was, and the verb is tried again."""
        views = [v for v in self.views if v.state != View.DEAD and v.arena is ledger.arena]
        watched = [s for s in slots if any(s in view.slots for view in views)]
        before = ledger.freeze()
        for _ in range(TRIES):
            try:
                act()
            except OutOfPages as error:
                self.was_refused(error, need)
                ledger.assert_frozen(before)
                return False
            except PageStateError as error:
                if not watched or "live views" not in str(error):
                    raise
                ledger.assert_frozen(before)
                return False
            except (DriverError, ReserveError) as error:
                self.was_injected(error)
                ledger.assert_frozen(before)
            else:
                for slot in watched:
                    if any(slot in v.slots and v.state == View.ALIVE for v in views):
                        ledger.assert_kept(before, slot)
                return True
        raise AssertionError(f"failed {TRIES} times, though one failure at a time was injected")

    def was_refused(self, error: OutOfPages, need: int | None) -> None:
        """There were fewer pages than a verb needs, which the error names."""
        assert error.needed > error.free, f"refused without a reason: {error}"
        assert need in (None, error.needed), f"{need} pages needed: {error}"
        self.refusals += 1

    def was_injected(self, error: DriverError | ReserveError) -> None:
        """Go on after an injected failure; any other is one of the allocator."""
        if not self.world.injected(error):
            raise error
        self.failures += 1

    def boundary(self, act: Callable[[], object], again: Callable[[], object]) -> None:
        """A change of the pool; after an injected failure all laws hold, and it works again."""
        for _ in range(TRIES):
            try:
                act()
            except (DriverError, ReserveError) as error:
                self.was_injected(error)
                with self.turn:
                    self.pool.check()
                act = again
            else:
                return
        raise AssertionError(f"failed {TRIES} times, though one failure at a time was injected")

    def exactly(self, act: Callable[[], object]) -> None:
        """`act` within one turn: a refusal names the pages that there are, and none was to be had
        from anybody."""
        with self.turn:
            parked = self.world.reclaimable()  # before: afterwards a view may have died meanwhile
            try:
                act()
            except OutOfPages as error:
                self.was_exact(error, parked)
                raise

    def was_exact(self, error: OutOfPages, parked: list[tuple[Ledger, int]]) -> None:
        """Within the turn of the refusal."""
        assert (error.free, error.pending) == (self.pool.free, self.pool.pending), error
        left = [slot for ledger, slot in parked if slot in ledger.parked]
        assert error.pending or not left, f"not reclaimed: {error}"

    def kernel(self, ledger: Ledger, slot: int) -> None:
        """Let the device read a slot, late, and get on with what it has."""
        device, arena = self.world.device, ledger.arena
        if device is None or self.random.random() > 0.2:
            return
        for lane, (first, last) in enumerate(ledger.frontiers(slot)):
            page = (slot * arena.lanes + lane) * LANE_PAGES + first
            if last > first:
                nbytes = (last - first) * arena.page_bytes
                device.kernel(self.thread, arena.address + page * arena.page_bytes, nbytes)
        device.progress(self.random.randint(0, 3))

    # ---- parked slots ------------------------------------------------------------------------
    def reclaim(self, pages: int) -> None:
        """Unmap what this thread has parked; on any thread, within a turn."""
        epoch = self.pool.quarantine.epoch
        for ledger, slot in self.reclaimable():
            if pages <= 0:
                break
            quiesced = ledger.parked[slot] < epoch
            gone = ledger.arena.drop_all(np.array([slot]), quiesced=quiesced)
            del ledger.parked[slot]
            ledger.group[slot] = -1
            self.reclaimed += gone
            pages -= gone
        self.pool.drain()

    def reclaimable(self) -> list[tuple[Ledger, int]]:
        """Parked slots that nobody looks at. Within a turn."""
        return [
            (ledger, slot)
            for ledger in self.ledgers
            for slot in ledger.parked
            if not ledger.arena.pins.item(slot)
        ]
