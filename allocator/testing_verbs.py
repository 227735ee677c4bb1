"""For `testing_storm`: what a thread may draw: all verbs of an arena and its pool, budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import DriverError
from .testing_ledger import Ledger, share, take
from .testing_worker import Worker
from .testing_world import LANE_PAGES, SLOTS, View

VIEWS = 3  # of a thread, alive at once
REOPEN = 1 / 16  # of the times that `reopen` is drawn
BUDGETS = (60, 160)  # pages, of 288 that two threads could map
WARM_HIGHS = (0, 0, 4, None)  # pages: with cold ones the short ways are taken more often
# How often each operation is drawn, of 256.
WEIGHTS = {
    "grow": 36,
    "grow_many": 2,
    "trim": 10,
    "close": 20,
    "adopt": 20,
    "write": 28,
    "read": 84,
    "fork": 6,
    "permute": 1,
    "shift": 2,
    "refill": 1,
    "lease": 16,
    "unlease": 16,
    "advance": 8,
    "drain": 1,
    "set_budget": 1,
    "give_back": 1,
    "warm": 2,
    "reopen": 1,
}


class Verbs(Worker):
    """A worker that draws from `WEIGHTS`. A slot that is parked is left to `adopt`."""

    def deck(self) -> list[Callable[[Ledger, int], None]]:
        return [getattr(self, name) for name, n in WEIGHTS.items() for _ in range(n)]

    # ---- growing -----------------------------------------------------------------------------
    def grow(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return self.adopt(ledger, slot)
        arena, tenant, old = ledger.arena, ledger.tenant.item(slot), ledger.frontiers(slot)
        to = min(max(last for _, last in old) + self.random.randint(0, 3), LANE_PAGES)
        self.note("grow", slot, to)
        act = lambda: arena.grow_to(slot, to, tenant=tenant)  # noqa: E731
        exactly = self.random.random() < 0.1
        need = sum(to - last for _, last in old)
        if self.attempt(ledger, need, (lambda: self.exactly(act)) if exactly else act):
            for lane, (_, last) in enumerate(old):
                ledger.begin(slot, lane, last, to)
        ledger.verify(slot)
        self.kernel(ledger, slot)
        return None

    def grow_many(self, ledger: Ledger, _: int) -> None:
        """By a plan, which may be out of date by then."""
        arena, random = ledger.arena, self.random
        slots = [slot for slot in ledger.slots if slot not in ledger.parked]
        slots = random.sample(slots, min(len(slots), 3))
        to = [random.randint(0, LANE_PAGES) for _ in slots]
        plan = arena.plan_grow(np.array(slots, np.int64), np.array(to, np.int64))
        if plan is None:
            return
        if random.random() < 0.2:
            self.grow(ledger, slots[0])
        self.note("grow_many", *zip(slots, to, strict=True))
        old = [ledger.frontiers(slot) for slot in slots]
        new = [
            (slot, lane, last, end)
            for slot, end, lanes in zip(slots, to, old, strict=True)
            for lane, (_, last) in enumerate(lanes)
        ]
        need = sum(max(end - last, 0) for *_, last, end in new)
        if self.attempt(ledger, need, lambda: arena.grow(plan, tenant=ledger.tenant)):
            for slot, lane, last, end in new:
                ledger.begin(slot, lane, last, end)
        for slot in slots:
            ledger.verify(slot)

    def refill(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return
        arena, tenant, old = ledger.arena, ledger.tenant.item(slot), ledger.frontiers(slot)
        lanes, need = np.arange(arena.lanes), sum(first for first, _ in old)
        self.note("refill", slot)
        if self.attempt(ledger, need, lambda: arena.refill(slot, lanes, tenant=tenant)):
            for lane, (first, _) in enumerate(old):
                ledger.begin(slot, lane, 0, first)
        ledger.verify(slot)

    # ---- giving back -------------------------------------------------------------------------
    def trim(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return
        arena, random, old = ledger.arena, self.random, ledger.frontiers(slot)
        first, last = random.choice((0, 0, 0, 1, 2)), random.randint(0, LANE_PAGES)
        self.note("trim", slot, first, last)
        act = lambda: arena.trim(slot, first, last)  # noqa: E731
        held = random.random() < 0.5
        if self.attempt(ledger, 0, (lambda: self.world.hold(act)) if held else act, slot):
            for lane, (low, high) in enumerate(old):
                new_first = min(max(first, low), high)
                ledger.keep(slot, lane, new_first, min(max(last, new_first), high))
        ledger.verify(slot)

    def drop(self, ledger: Ledger, slot: int) -> None:
        """Unmap a slot of ours; the next to live there is another tenant."""
        self.note("drop", slot)
        if self.attempt(ledger, 0, lambda: ledger.arena.drop(slot), slot):
            ledger.keep(slot, 0, 0, 0)
            ledger.group[slot] = -1
            ledger.tenant[slot] = self.random.choice(self.world.tenants)
        ledger.verify(slot)

    def close(self, ledger: Ledger, slot: int) -> None:
        """As a cache does: a slot that shares nothing is parked, still mapped."""
        if slot in ledger.parked or not ledger.has_rows(slot):
            return
        if ledger.arena.shared_to.item(slot):
            self.drop(ledger, slot)
            return
        self.note("close", slot)
        with self.turn:
            ledger.parked[slot] = self.pool.quarantine.epoch

    def adopt(self, ledger: Ledger, slot: int) -> None:
        """Open a parked slot for a tenant: this one, or the one that was parked first."""
        arena, tenant = ledger.arena, self.random.choice(self.world.tenants)
        with self.turn:
            if slot not in ledger.parked:
                slot = next(iter(ledger.parked), slot)
            if slot not in ledger.parked or arena.pins.item(slot):
                return
            del ledger.parked[slot]
        self.note("adopt", slot, tenant)
        changes, ledger.tenant[slot] = tenant != ledger.tenant.item(slot), tenant
        if not self.attempt(ledger, None, lambda: arena.retenant(slot, tenant)):
            self.drop(ledger, slot)
        elif changes:
            for lane, (first, last) in enumerate(ledger.frontiers(slot)):
                ledger.begin(slot, lane, first, last)
        ledger.verify(slot)

    # ---- reading and writing -----------------------------------------------------------------
    def read(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return
        self.note("read", slot)
        ledger.verify(slot)
        if ledger.arena.zero_backed:
            assert not ledger.probes[slot][ledger.group[slot] < 0].any(), "not backed by zeros"

    def write(self, ledger: Ledger, slot: int) -> None:
        """As a cache does, private copies first; sometimes through one of a page's addresses."""
        if slot in ledger.parked:
            return
        arena, random, tenant = ledger.arena, self.random, ledger.tenant.item(slot)
        first, last = sorted(random.choices(range(LANE_PAGES + 1), k=2))
        rows = [
            (lane, max(first, low), min(last, high))
            for lane, (low, high) in enumerate(ledger.frontiers(slot))
            if max(first, low) < min(last, high)
        ]
        if rows and random.random() < 0.25:
            self.note("scribble", slot, rows[0])
            ledger.scribble(slot, *rows[0][:2])
            ledger.verify(slot)
            return
        self.note("write", slot, first, last)
        shared = ledger.shared_pages(slot, first, last)
        act = lambda: arena.unshare(slot, first, last, tenant=tenant)  # noqa: E731
        if self.attempt(ledger, len(shared), act):
            for lane, page in shared:
                ledger.renumber(slot, lane, page, page + 1)
            ledger.verify(slot)
            for row in rows:
                ledger.write(slot, *row)
        self.kernel(ledger, slot)

    # ---- sharing -----------------------------------------------------------------------------
    def fork(self, ledger: Ledger, source: int) -> None:
        arena, random, tenant = ledger.arena, self.random, ledger.tenant.item(source)
        target = (source + random.randint(1, SLOTS - 1)) % SLOTS
        if source in ledger.parked or target in ledger.parked:
            return
        if ledger.tenant.item(target) != tenant:
            if ledger.has_rows(target):
                self.drop(ledger, target)
                return
            ledger.tenant[target] = tenant
        top = ledger.top(source)
        tail = random.choice((0, 0, 1, 2, 4)) * ledger.probe_bytes if top else 0
        full = random.randint(0, top - (tail > 0))
        effect = share(ledger, source, target, full, tail, whole=False)
        self.note("fork", source, target, full, tail)
        act = lambda: arena.alias(source, target, full, tail, tenant=tenant)  # noqa: E731
        if self.attempt(ledger, len(effect.copies), act, target):
            take(ledger, [effect], tail)
        ledger.verify(source)
        ledger.verify(target)

    def permute(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return
        arena, random, tenant = ledger.arena, self.random, ledger.tenant.item(slot)
        slots = [
            s for s in ledger.slots if s not in ledger.parked and ledger.tenant.item(s) == tenant
        ]
        random.shuffle(slots)
        order = random.choices(range(len(slots)), k=len(slots))
        tops = [ledger.top(s) for s in slots]
        tails = [random.choice((0, 1, 3)) * ledger.probe_bytes * (top > 0) for top in tops]
        full = [random.randint(0, top - (tail > 0)) for top, tail in zip(tops, tails, strict=True)]
        kept, effects = {j for i, j in enumerate(order) if i == j}, []
        for i, j in enumerate(order):
            if i != j:
                whole = j not in kept
                kept.add(j)
                move = slots[j], slots[i], full[j], tails[j]
                effects.append(share(ledger, *move, whole=whole))
        self.note("permute", slots, order, full, tails)
        arrays = [np.array(values, np.int64) for values in (slots, order, full, tails)]
        act = lambda: arena.permute(*arrays, tenant=tenant)  # noqa: E731
        need = sum(len(effect.copies) for effect in effects)
        if self.attempt(ledger, need, act, *slots):
            take(ledger, effects, max(tails))
        for changed in slots:
            ledger.verify(changed)

    def shift(self, ledger: Ledger, slot: int) -> None:
        if slot in ledger.parked:
            return
        arena, random = ledger.arena, self.random
        lane = random.randrange(arena.lanes)
        first, last = ledger.frontiers(slot)[lane]
        gap = random.randint(first, last)
        count = random.randint(0, last - gap)
        self.note("shift", slot, lane, gap, count)
        if self.attempt(ledger, 0, lambda: arena.shift(slot, lane, gap, count), slot):
            ledger.shift(slot, lane, gap, count, last)
        ledger.verify(slot)

    # ---- views -------------------------------------------------------------------------------
    def lease(self, ledger: Ledger, slot: int) -> None:
        """A view, which the next thread lets die."""
        self.views = [view for view in self.views if view.state != View.DEAD]
        last = min(slot + self.random.randint(1, 2), SLOTS)
        if len(self.views) < VIEWS and not any(s in ledger.parked for s in range(slot, last)):
            self.note("lease", slot, last)
            self.views.append(View(ledger.arena, slot, last))
            mail = self.world.mail
            mail[(self.thread + 1) % len(mail)].append(self.views[-1])

    def unlease(self, _: Ledger, __: int) -> None:
        mail = self.world.mail[self.thread]
        if mail:
            self.note("unlease")
            mail.popleft().die()

    # ---- the pool ----------------------------------------------------------------------------
    def advance(self, *_: Any) -> None:
        self.note("advance")
        with self.turn:
            self.world.check_held()
        self.boundary(self.pool.advance, self.pool.drain)

    def drain(self, *_: Any) -> None:
        self.note("drain")
        self.boundary(self.pool.drain, self.pool.drain)

    def give_back(self, *_: Any) -> None:
        keep = self.random.randint(0, 20)
        self.note("give_back", keep)
        self.boundary(lambda: self.pool.trim(keep), lambda: self.pool.trim(keep))

    def set_budget(self, *_: Any) -> None:
        pages, pool = self.random.randint(*BUDGETS), self.pool
        self.note("set_budget", pages)

        def lower() -> None:
            old = pool.total
            try:
                pool.set_budget(pages * pool.page_bytes)
            except BaseException:
                assert pool.total == old, "a budget that was refused is in force"
                raise

        with self.turn:
            pool.warm_high = self.random.choice(WARM_HIGHS)
            self.boundary(lower, lower)
            assert pool.total == pages, "the budget is another"
            pool.check()

    def warm(self, *_: Any) -> None:
        """What a background thread does: make pages out of any turn."""
        pool, made = self.pool, 0
        lent = pool.lend(self.random.randint(1, 4))
        self.note("warm", len(lent))
        try:
            for page in lent.tolist():
                self.world.failing.create(page, 1)
                made += 1
        except DriverError as error:
            self.was_injected(error)
        self.boundary(lambda: pool.return_warm(lent, made), pool.drain)

    def reopen(self, ledger: Ledger, _: int) -> None:
        """Close an arena, perhaps under the eyes of views, and open another one."""
        if self.random.random() > REOPEN:
            return
        kind = self.ledgers.index(ledger)
        self.note("reopen", kind)
        with self.turn:
            ledger.parked.clear()
            close = lambda: self.world.close_arena(ledger.arena)  # noqa: E731
            self.boundary(close, close)
            self.boundary(lambda: self.reopened(kind), lambda: self.reopened(kind))

    def reopened(self, kind: int) -> None:
        self.ledgers[kind] = self.open_ledger(kind)
