"""Law: a trace tells every call that took effect, in order, and forgets the oldest first."""

from __future__ import annotations

import numpy as np
import pytest

from tests.mirror import PAGE
from vattn.allocator.arena import Arena
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import DriverError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.trace import Event, Trace, TracedBackend


def test_replaying_a_trace_gives_the_record() -> None:
    checked = CheckedBackend(HostBackend(PAGE))
    backend = TracedBackend(checked)
    arena = Arena(Pool(backend, budget_bytes=99 * PAGE), slots=3, lanes=2, lane_pages=4)
    arena.grow(arena.plan_grow(np.arange(2), np.array([4, 2])))
    arena.alias(0, 2, 2, 8)
    arena.permute(np.arange(3), np.array([2, 0, 1]), np.array([2, 2, 2]), np.zeros(3, np.int64))
    arena.shift(0, 1, 0, 1)
    checked.fail_at = checked.count
    with pytest.raises(DriverError):
        arena.drop(0)
    mapped: set[int] = set()
    for event in backend.trace:
        addresses = range(event.address, event.address + event.bytes, PAGE)
        if event.action == "map":
            mapped |= set(addresses)
        elif event.action == "unmap":
            mapped -= set(addresses)
    assert mapped == set(checked.at)
    times = [event.time_ns for event in backend.trace]
    assert times == sorted(times)
    arena.close()
    assert [event.action for event in backend.trace][-2:] == ["unmap", "release"]


def test_the_oldest_events_are_forgotten_first() -> None:
    trace = Trace(limit=3)
    trace.owner_of = lambda address: f"slot {address}"
    for i in range(5):
        trace.note("map", i + 1, PAGE)
    assert (len(trace), trace.count, trace.dropped) == (3, 5, 2)
    assert [event.owner for event in trace] == ["slot 3", "slot 4", "slot 5"]
    assert Event._fields == ("time_ns", "action", "address", "bytes", "owner")
