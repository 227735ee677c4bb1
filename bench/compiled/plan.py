"""Which launcher calls compile which kernels.

`plan` runs every call on every device with the compiler left out, and keeps the first call that
asks for a kernel: the same kernel is compiled once, however many configurations end in it.
`compile_jobs` runs some again, one after another, and compiles what they were kept for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from triton import knobs

from bench.compiled.call import Call
from bench.compiled.code import Code, Compiled, read
from bench.compiled.device import DEVICES, pretended

Hook = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A call on an architecture, and the specialisations of kernels that it is to compile."""

    call: str
    arch: int
    keys: frozenset[str]


@dataclass
class Done:
    """Kernels of a job: (kernel name, code) each, what went wrong, and processor time."""

    job: Job
    kernels: list[tuple[str, Code]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def plan(calls: Mapping[str, Call], archs: tuple[int, ...]) -> tuple[list[Job], list[Done]]:
    """The jobs that compile every kernel once, and the calls that failed before the compiler."""
    known: set[tuple[int, str]] = set()
    jobs, failed = [], []
    for arch in archs:
        for name, call in calls.items():
            if arch not in call.archs:
                continue
            asked: list[str] = []
            try:
                with pretended(DEVICES[arch]), _asked(asked):
                    call.launch()
            except Exception as error:  # a launcher may fail in any way: the gate reports it
                job = Job(name, arch, frozenset())
                failed.append(Done(job, errors=[words(error)]))
            new = {key for key in asked if (arch, key) not in known}
            known |= {(arch, key) for key in new}
            if new:
                jobs.append(Job(name, arch, frozenset(new)))
    return jobs, failed


def compile_jobs(calls: Mapping[str, Call], jobs: Sequence[Job]) -> list[Done]:
    """Compile what jobs of one architecture ask for and read it."""
    begun = processor_seconds()
    results, compiled = [], []
    for job in jobs:
        kernels: list[Compiled] = []
        results.append(Done(job, errors=_compile(calls[job.call], job, kernels)))
        compiled.append(kernels)
    codes = iter(read(jobs[0].arch, [each for kernels in compiled for each in kernels]))
    for done, kernels in zip(results, compiled, strict=True):
        done.kernels = [(each.kernel, next(codes)) for each in kernels]
        done.seconds = (processor_seconds() - begun) / len(jobs)
    return results


def _compile(call: Call, job: Job, kernels: list[Compiled]) -> list[str]:
    """Compile what a job asks for into ``kernels``; errors in words."""

    def keep(*, src: Any, metadata: Hook, metadata_group: Mapping[str, str], **_: Any) -> None:
        kernels.append(Compiled(src.fn.__name__, metadata, metadata_group))

    try:
        with pretended(DEVICES[job.arch]), _only(job.keys), knobs.compilation.scope():
            knobs.compilation.listener = keep
            call.launch()
    except Exception as error:  # the compiler's errors have no common class
        return [words(error)]
    missing = len(job.keys) - len(kernels)
    return [f"{missing} kernels were asked for and not compiled"] if missing else []


def words(error: BaseException) -> str:
    """An error in a line: its class and first line, and the last line of what caused it."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    first, last = (str(each).strip().splitlines() or [""] for each in (error, root))
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys([first[0], last[-1].strip()]))}"


def processor_seconds() -> float:
    """Of this process and the compilers that it has waited for."""
    return sum(os.times()[:4])


@contextmanager
def _asked(keys: list[str]) -> Iterator[None]:
    """Compile nothing; list what would be."""

    def skip(*, key: str, fn: Any, **_: Any) -> bool:
        keys.append(f"{fn.module}.{fn.name} {key}")
        return True

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = skip
        yield


@contextmanager
def _only(keys: frozenset[str]) -> Iterator[None]:
    """Compile these alone."""

    def skip(*, key: str, fn: Any, **_: Any) -> bool:
        return f"{fn.module}.{fn.name} {key}" not in keys

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = skip
        yield
