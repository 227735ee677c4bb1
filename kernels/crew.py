"""Run a call of compiled loops on several threads: the side of `calls` that needs no numba.

The caller works along, and returns once every unit is done; a thread that begins too late finds
none. An interrupted call lets the threads at work finish their unit, and keeps its memory for them.
"""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from vattn.kernels.pool import POOL
from vattn.kernels.stream import NAP, SPINS, available

# Words of `counts` before those of a kernel's own: next unit, finished units, threads.
COUNTS = 3


@cache
def loops(name: str) -> ModuleType:
    """A module of compiled loops; raises RuntimeError where it cannot be had."""
    reason = available()
    if reason is not None:
        raise RuntimeError(f"{name} cannot run: {reason}")
    return importlib.import_module(f"vattn.kernels.{name}")


def threads(units: int, moved: int, each: int) -> int:
    """How many threads to use for ``moved`` bytes of work, of which ``each`` pays for one."""
    return max(1, min(torch.get_num_threads(), units, moved // each))


def line(counts: Tensor | None) -> Tensor | None:
    """A line of counts as int64 side by side, as the loops read them."""
    if counts is None or (counts.dtype == torch.int64 and counts.is_contiguous()):
        return counts
    return counts.to(torch.int64).contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass
class Job:
    """What a helping thread calls, the memory that must outlive the call, and what it raised."""

    run: Callable[[], object]
    alive: tuple[object, ...]
    error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.error = error
            raise


def work(
    run: Callable[[], object], counts: array[int], units: int, threads: int, *alive: object
) -> None:
    """Call ``run``, which draws units until there are none, on ``threads`` threads."""
    if threads == 1:
        run()
        return
    finished = loops("calls").finished
    place = counts.buffer_info()[0]
    job = Job(run, (counts, alive))
    try:
        POOL.post(job, threads - 1)
        job.run()
        while not finished(place, units, SPINS):
            if job.error is not None:  # its unit will never be finished
                raise job.error
            time.sleep(NAP)
    except BaseException:
        counts[0] = units
        raise
