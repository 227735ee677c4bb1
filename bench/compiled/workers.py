"""Two processes that compile: the parent waits, and survives a compiler that dies.

LLVM aborts the process on some inputs. The job in hand is then reported as failed, with the exit
code, and a new process takes its place.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import IO

from bench.compiled.plan import Done, Job, compile_jobs

CALLS = "bench.compiled.calls"
BATCH = 8  # jobs
SPAWN = multiprocessing.get_context("spawn")  # a fork of torch's threads may hang


def compile_all(jobs: list[Job], processes: int = 2, calls: str = CALLS) -> Iterator[list[Done]]:
    """What the jobs gave, a batch at a time; ``calls`` is the module that holds CALLS."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    batches = batched(jobs, processes)
    workers = [Worker(calls) for _ in range(min(processes, len(batches)))]
    for worker in workers:
        idle.put(worker)

    def one(batch: list[Job]) -> list[Done]:
        worker = idle.get()
        try:
            return worker.compile(batch)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            futures: list[Future[list[Done]]] = [threads.submit(one, batch) for batch in batches]
            for future in as_completed(futures):
                yield future.result()
    finally:
        for worker in workers:
            worker.close()


def batched(jobs: list[Job], processes: int) -> list[list[Job]]:
    """Batches of jobs of one architecture, small enough that no process waits long at the end."""
    size = max(1, min(BATCH, len(jobs) // (4 * processes)))
    archs = dict.fromkeys(job.arch for job in jobs)
    alike = [[job for job in jobs if job.arch == arch] for arch in archs]
    return [some[at : at + size] for some in alike for at in range(0, len(some), size)]


class Worker:
    """One compiling process; started again when it has died."""

    def __init__(self, calls: str) -> None:
        self._calls = calls
        self._start()

    def _start(self) -> None:
        self._connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=serve, args=(theirs, self._calls), daemon=True)
        self._process.start()
        theirs.close()

    def compile(self, batch: list[Job]) -> list[Done]:
        try:
            self._connection.send(batch)
            results: list[Done] = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._start()
            if len(batch) > 1:  # to find which of them it was
                return [done for job in batch for done in self.compile([job])]
            return [Done(batch[0], errors=[f"the compiler ended its process, exit code {code}"])]
        return results

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        self._process.terminate()


def serve(connection: Connection, module: str) -> None:
    """Compile what comes until the parent closes the connection."""
    calls = importlib.import_module(module).CALLS
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)  # a failing pass of the compiler prints megabytes
        os.dup2(log.fileno(), 2)
        while True:
            try:
                batch: list[Job] = connection.recv()
            except EOFError:
                return
            results = compile_jobs(calls, batch)
            for done in results:
                done.errors += said(log) if done.errors else []
            connection.send(results)
            log.seek(0)
            log.truncate()


def said(log: IO[str]) -> list[str]:
    """The compiler's first error line, if there is one."""
    sys.stdout.flush()
    log.seek(0)
    return [line.strip() for line in log if "error:" in line][:1]
