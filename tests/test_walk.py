"""Law: whatever is appended, chosen, moved, shared and forgotten, in whatever order, attention to a
selection is attention to the true rows, and below the budget to all of them bit for bit.
"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.walk import ACTS, Walk

OPERATIONS, PARTS = 100_000, 20


@pytest.mark.parametrize("seed", [0, 1])
def test_a_short_walk(seed: int) -> None:
    done = Walk(seed).walk(250)
    assert done.keys() >= ACTS.keys()
    assert done["chosen"] > 5


def walked(seed: int) -> Counter[str]:
    return Walk(seed).walk(OPERATIONS // PARTS)


@pytest.mark.fuzz
def test_a_hundred_thousand_operations(capsys: pytest.CaptureFixture[str]) -> None:
    seed, start, total = secrets.randbits(31), time.perf_counter(), Counter[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for done in pool.map(walked, range(seed, seed + PARTS)):
            total.update(done)
    with capsys.disabled():
        print(
            f"\nwalk: {OPERATIONS:,} operations, seed {seed}, {time.perf_counter() - start:.0f} s: "
            f"{total['chosen']:,} selections equal to the true rows, {total['refused']:,} refusals "
            "undone; 0 faults, 0 leaks"
        )
    assert sum(total[act] for act in ACTS) == OPERATIONS
