"""Law: a page comes back once, in order, after its epoch and its fence, and never before."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vattn.allocator.quarantine import Quarantine


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def drained(quarantine: Quarantine) -> list[int]:
    return [int(i) for part in quarantine.drain() for i in part]


def test_a_page_waits_for_the_next_epoch() -> None:
    quarantine = Quarantine()
    quarantine.hold(ids(3, 4))
    assert drained(quarantine) == []
    quarantine.advance()
    assert drained(quarantine) == [3, 4]
    assert quarantine.pages == 0


def test_a_quiesced_page_waits_for_nothing() -> None:
    quarantine = Quarantine()
    quarantine.hold(ids(1))
    quarantine.hold(ids(2), quiesced=True)
    assert drained(quarantine) == [2]


def test_a_fence_holds_what_is_behind_it() -> None:
    quarantine, reached = Quarantine(), [False]
    quarantine.hold(ids(1), fence=lambda: reached[0])
    quarantine.hold(ids(2))
    quarantine.advance()
    assert drained(quarantine) == []
    reached[0] = True
    assert drained(quarantine) == [1, 2]


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 3), st.booleans())), max_size=40))
def test_every_page_comes_back_once_and_in_time(script: list[tuple[int, bool] | None]) -> None:
    quarantine, due, fresh, back = Quarantine(), 0, {}, []
    for step in script:
        if step is None:
            quarantine.advance()
        else:
            count, quiesced = step
            part = np.arange(due, due + count)
            due += count
            quarantine.hold(part, quiesced=quiesced)
            fresh.update(dict.fromkeys(part.tolist(), quarantine.epoch - quiesced))
        back += (got := drained(quarantine))
        assert all(fresh[page] < quarantine.epoch for page in got)
        assert quarantine.pages == due - len(back)
    quarantine.advance()
    back += drained(quarantine)
    assert sorted(back) == list(range(due))
