"""For `testing`: every verb on two arenas over one pool, any backend call made to fail.

A state machine drives the allocator and a plain model (`testing_mirror`) side by side. After each
operation every byte is compared, the laws of pool and arenas are asserted, no page has two owners,
nobody reads another tenant's bytes; after each failure everything is exactly as before, and the
same operation works when tried again.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import initialize, precondition, rule

from .testing_rig import LANE_PAGES, SLOTS, Rig, done, ints

slot_of = st.integers(0, SLOTS - 1)
page_of = st.integers(0, LANE_PAGES)
which_of = st.integers(0, 1)
lane_of = st.integers(0, 1)
tenant_of = st.integers(0, 2)
# Which backend call of an operation fails: more often none.
fail_of = st.sampled_from([None, None, None, 0, 1, 2, 3, 5])


class Twins(Rig):
    """Two arenas (the second zero-backed) over one pool, and their mirrors."""

    @initialize(
        budget=st.integers(30, 80),
        warm=st.none() | st.integers(0, 20),
        lengths=st.lists(page_of, min_size=2 * SLOTS, max_size=2 * SLOTS),
        tenants=st.lists(tenant_of, min_size=2 * SLOTS, max_size=2 * SLOTS),
    )
    def begin(self, budget: int, warm: int | None, lengths: list[int], tenants: list[int]) -> None:
        self.pool.set_budget(budget * self.page)
        self.pool.warm_high = warm
        for i, (pages, tenant) in enumerate(zip(lengths, tenants, strict=True)):
            self.mirrors[i % 2].tenant[i // 2] = tenant
            self.grow(i % 2, [(i // 2, pages)], None)
            self.write(i % 2, i // 2, 0, LANE_PAGES, None)

    # ---- verbs -------------------------------------------------------------------------------
    @rule(
        which=which_of,
        data=st.lists(st.tuples(slot_of, page_of), min_size=1, max_size=4),
        fail=fail_of,
    )
    def grow(self, which: int, data: list[tuple[int, int]], fail: int | None) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        want = dict(data)
        tenant = mirror.tenant[next(iter(want))]
        want = {s: n for s, n in want.items() if mirror.tenant[s] == tenant}
        plan = arena.plan_grow(ints(*want), ints(*want.values()))
        act = lambda: arena.grow(plan, tenant=tenant) if plan else None  # noqa: E731
        if len(want) == 1:
            ((slot, to),) = want.items()
            act = lambda: arena.grow_to(slot, to, tenant=tenant)  # noqa: E731
        if self.do(fail, act):
            mirror.grow(list(want), list(want.values()))
        self.check()

    @rule(which=which_of, slot=slot_of, first=page_of, last=page_of, fail=fail_of)
    def write(self, which: int, slot: int, first: int, last: int, fail: int | None) -> None:
        """As a cache does: private copies first."""
        arena, mirror = self.arenas[which], self.mirrors[which]
        tenant = mirror.tenant[slot]
        if self.do(fail, lambda: arena.unshare(slot, first, last, tenant=tenant)):
            mirror.unshare(slot, first, last, mirror.holders(self.mirrors))
            for lane, sheets in enumerate(mirror.lanes[slot]):
                for page, sheet in enumerate(sheets, mirror.first[slot][lane]):
                    if first <= page < last:
                        sheet.write(mirror.address(slot, lane, page), tenant)
        self.check()

    @rule(which=which_of, slot=slot_of, pick=st.integers(0, 99))
    def scribble(self, which: int, slot: int, pick: int) -> None:
        """Write through one address; every alias must see it."""
        mirror = self.mirrors[which]
        lane = pick % self.lanes
        if sheets := mirror.lanes[slot][lane]:
            at = pick // self.lanes % len(sheets)
            page = mirror.first[slot][lane] + at
            sheets[at].write(mirror.address(slot, lane, page), mirror.tenant[slot])
            done["operations"] += 1
        self.check()

    @rule(
        which=which_of,
        source=slot_of,
        into=slot_of,
        data=st.data(),
        tail=st.integers(-1, 4),
        fail=fail_of,
    )
    def alias(
        self, which: int, source: int, into: int, data: Any, tail: int, fail: int | None
    ) -> None:
        mirror = self.mirrors[which]
        top = min(mirror.last(source, lane) for lane in range(self.lanes))
        nbytes = max(tail, 0) * 125 * 8 if top else 0
        full = data.draw(st.integers(0, top - (nbytes > 0)))
        self.share(which, source, into, full, nbytes, fail)

    def share(
        self, which: int, source: int, into: int, full: int, nbytes: int, fail: int | None
    ) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        if source == into:
            return
        if mirror.empty(into):
            mirror.tenant[into] = mirror.tenant[source]
        tenant = mirror.tenant[into]
        moves = mirror.moves(source, into, full, nbytes, nbytes, whole=False)
        refused = mirror.put(into, moves, dry=True) and bool(mirror.pins[into])
        act = lambda: arena.alias(source, into, full, nbytes, tenant=tenant)  # noqa: E731
        if self.do(fail, act, refused=refused):
            mirror.put(into, moves)
        self.check()

    @rule(which=which_of, source=slot_of, into=slot_of, tail=st.booleans(), pages=page_of)
    def fork(self, which: int, source: int, into: int, tail: bool, pages: int) -> None:
        """A prefix of one slot becomes another's; then each writes on its own."""
        mirror = self.mirrors[which]
        top = min(mirror.last(source, lane) for lane in range(self.lanes))
        nbytes = 512 if tail and top else 0
        self.share(which, source, into, top - (nbytes > 0), nbytes, None)
        self.write(which, into, 0, pages, None)
        self.scribble(which, source, 0)

    @rule(which=which_of, data=st.data(), slots=st.permutations(range(SLOTS)), fail=fail_of)
    def permute(self, which: int, data: Any, slots: list[int], fail: int | None) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        slots = [s for s in slots if mirror.tenant[s] == mirror.tenant[slots[0]]]
        slots = slots[: data.draw(st.integers(1, len(slots)))]
        order = [data.draw(st.integers(0, len(slots) - 1)) for _ in slots]
        tops = [min(mirror.last(s, lane) for lane in range(self.lanes)) for s in slots]
        tails = [data.draw(st.sampled_from([0, 0, 8, 2048])) if top else 0 for top in tops]
        full = [
            data.draw(st.integers(0, top - (t > 0))) for top, t in zip(tops, tails, strict=True)
        ]
        tenant = mirror.tenant[slots[0]]
        moves = mirror.permutation(slots, order, full, tails)
        refused = any(mirror.put(s, m, dry=True) and mirror.pins[s] for s, m in moves)
        act = lambda: arena.permute(  # noqa: E731
            ints(*slots), ints(*order), ints(*full), ints(*tails), tenant=tenant
        )
        if self.do(fail, act, refused=refused):
            for slot, move in moves:
                mirror.put(slot, move)
        self.check()

    @rule(
        which=which_of,
        slot=slot_of,
        first=page_of,
        last=page_of,
        quiesced=st.booleans(),
        fail=fail_of,
    )
    def trim(
        self, which: int, slot: int, first: int, last: int, quiesced: bool, fail: int | None
    ) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        lose = any(
            mirror.lanes[slot][lane]
            and (first > mirror.first[slot][lane] or max(first, last) < mirror.last(slot, lane))
            for lane in range(self.lanes)
        )
        act = lambda: arena.trim(slot, first, last, quiesced=quiesced)  # noqa: E731
        if self.do(fail, act, refused=lose and bool(mirror.pins[slot]), quiesced=quiesced):
            mirror.trim(slot, first, last)
        self.check()

    @rule(which=which_of, slot=slot_of, tenant=tenant_of, fail=fail_of)
    def drop(self, which: int, slot: int, tenant: int, fail: int | None) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        refused = not mirror.empty(slot) and bool(mirror.pins[slot])
        if self.do(fail, lambda: arena.drop(slot), refused=refused):
            mirror.trim(slot, 0, 0)
            mirror.tenant[slot] = tenant
        self.check()

    @rule(which=which_of, slot=slot_of, fail=fail_of)
    def refill(self, which: int, slot: int, fail: int | None) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        lanes, tenant = np.arange(self.lanes), mirror.tenant[slot]
        if self.do(fail, lambda: arena.refill(slot, lanes, tenant=tenant)):
            for lane in range(self.lanes):
                front = [mirror.new(slot) for _ in range(mirror.first[slot][lane])]
                mirror.first[slot][lane], mirror.lanes[slot][lane][:0] = 0, front
        self.check()

    @rule(which=which_of, slot=slot_of, lane=lane_of, data=st.data(), fail=fail_of)
    def shift(self, which: int, slot: int, lane: int, data: Any, fail: int | None) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        lane %= self.lanes
        first, last = mirror.first[slot][lane], mirror.last(slot, lane)
        gap = data.draw(st.integers(first, last))
        count = data.draw(st.integers(0, last - gap))
        refused = count > 0 and bool(mirror.pins[slot])
        if self.do(fail, lambda: arena.shift(slot, lane, gap, count), refused=refused):
            mirror.shift(slot, lane, gap, count)
        self.check()

    @rule(which=which_of, slot=slot_of, tenant=tenant_of)
    def retenant(self, which: int, slot: int, tenant: int) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        if mirror.pins[slot]:
            return
        # No failure: a failed scrub leaves some pages zeroed, of a slot that nobody reads.
        if self.do(None, lambda: arena.retenant(slot, tenant)):
            mirror.retenant(slot, tenant)
        self.check()

    # ---- pool and views ----------------------------------------------------------------------
    @rule(fail=fail_of)
    def advance(self, fail: int | None) -> None:
        self.held.clear()
        self.boundary(fail, self.pool.advance, self.pool.drain)

    @rule(fail=fail_of)
    def drain(self, fail: int | None) -> None:
        self.boundary(fail, self.pool.drain)

    @rule(budget=st.integers(10, 90), fail=fail_of)
    def set_budget(self, budget: int, fail: int | None) -> None:
        self.boundary(fail, lambda: self.pool.set_budget(budget * self.page))
        assert self.pool.total == budget

    @rule(keep=st.integers(0, 10), fail=fail_of)
    def give_back(self, keep: int, fail: int | None) -> None:
        self.boundary(fail, lambda: self.pool.trim(keep))
        assert self.pool.warm <= keep

    @rule(which=which_of, first=slot_of, count=st.integers(1, 2))
    def lease(self, which: int, first: int, count: int) -> None:
        arena, mirror = self.arenas[which], self.mirrors[which]
        last = min(first + count, SLOTS)
        self.leases.append((mirror, first, last, arena.lease(first, last)))
        mirror.pins.update(range(first, last))
        done["operations"] += 1
        self.check()

    @precondition(lambda self: self.leases)
    @rule(pick=st.integers(0, 99))
    def unlease(self, pick: int) -> None:
        mirror, first, last, lease = self.leases.pop(pick % len(self.leases))
        mirror.pins.subtract(range(first, last))
        del lease
        done["operations"] += 1
        self.check()


class FlatTwins(Twins):
    """The same with one lane: the short ways through the allocator."""

    lanes = 1


def settings_for(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
