"""For `testing`: a storm of random operations by several threads over one pool.

`storm` is the volume beside the state machine of `testing_machine`: it shrinks nothing, and takes
tens of microseconds an operation. Every thread drives arenas of its own (`testing_verbs`); all of
them share one pool (`testing_world`) whose budget is too small for them, and

    reclaim      a thread that wants pages unmaps what another one has parked
    views        are made on one thread and die on another, under changes of their arena
    budget       goes up and down under them
    failures     now and then a call fails, on whatever thread makes it, and is tried again
    the device   kernels read pages late, where there is a device

After an operation its thread checks what it touched: mapped where its own model says
(`testing_ledger`), every written word as it was, no stranger's word in a new page, nothing unmapped
under a live view; after a failure or a refusal, that its arena is as before. Every few hundred
operations, between two changes of anybody, it checks all laws over every page, and that the
references of all pages are the mappings of all arenas. At the end everything is given back to the
last byte.

One thread is exactly repeatable from its seed; several are as far as their scheduling lets them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from time import perf_counter

from .errors import VattnError
from .testing_verbs import BUDGETS, Verbs
from .testing_worker import Worker
from .testing_world import Device, World
from .vmm import Backend

__all__ = ["Device", "Storm", "StormError", "storm"]


@dataclass(frozen=True)
class Storm:
    """What was done: no fault, no leak and no double owner in all of it."""

    seed: int
    threads: int
    seconds: float
    verbs: dict[str, int]  # operations, by name
    failures: int  # injected, and undone exactly
    refusals: int  # for want of pages, nothing changed
    reclaimed: int  # pages taken from a thread that had parked them

    @property
    def operations(self) -> int:
        return sum(self.verbs.values())

    def __str__(self) -> str:
        return (
            f"{self.operations:,} operations, {self.threads} threads, seed {self.seed}, "
            f"{self.seconds:.0f} s: {self.failures:,} injected failures undone exactly, "
            f"{self.refusals:,} refusals, {self.reclaimed:,} pages reclaimed; "
            "0 faults, 0 leaks, 0 double owners"
        )


class StormError(VattnError, AssertionError):
    """A law was broken. The message names seed, thread and operation, and the last operations of
    every thread; the cause is what was seen."""


def storm(
    open_backend: Callable[[], Backend],
    *,
    operations: int,
    seed: int,
    threads: int = 2,
    device: Device | None = None,
) -> Storm:
    """Drive a new backend by random operations of several threads, and check all laws.

    Args:
        open_backend: makes the backend, which is closed at the end. Its pages hold at least 4 words
            and are read by the processor.
        operations: verbs called, of all threads together.
        seed: of everything that is drawn.
        device: what reads pages late, and fails driver calls.

    Raises:
        StormError: a law was broken.
    """
    start = perf_counter()
    world = World(open_backend(), device, threads=threads, budget_pages=BUDGETS[1])
    share = [operations // threads + (i < operations % threads) for i in range(threads)]
    workers = [Verbs(world, i, share[i], seed) for i in range(threads)]
    running = [Thread(target=worker.run, name=f"storm {worker.thread}") for worker in workers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for worker in workers:
        if worker.error is not None:
            world.abandon()
            raise _error(seed, worker, workers) from worker.error
    try:
        world.end()
    except AssertionError as error:
        world.abandon()
        raise StormError(f"seed {seed}, at the end: {error}") from error
    return Storm(
        seed,
        threads,
        perf_counter() - start,
        dict(sum((worker.verbs for worker in workers), Counter())),
        sum(worker.failures for worker in workers),
        sum(worker.refusals for worker in workers),
        sum(worker.reclaimed for worker in workers),
    )


def _error(seed: int, worker: Worker, workers: Sequence[Worker]) -> StormError:
    traces = [
        f"thread {other.thread}:\n" + "\n".join(f"  {line}" for line in other.trace)
        for other in workers
    ]
    what = f"{type(worker.error).__name__}: {worker.error}"
    return StormError(
        f"seed {seed}, thread {worker.thread}, operation {worker.done}: {what}\n"
        + "\n".join(traces)
    )
