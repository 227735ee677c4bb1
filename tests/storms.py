"""The storm of `vattn.allocator.testing` over every backend, also in processes of their own.

python -m tests.storms BACKEND OPERATIONS SEED      one of them again
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.emulator.control import NOTHING, Emulator, ready
from tests.mirror import PAGE
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import DriverError
from vattn.allocator.host import HostBackend
from vattn.allocator.testing_storm import Storm, storm

UNKNOWN = 999  # CUresult that the emulator gives only when told to


class EmulatedDevice:
    """`testing.Device`: kernels on the emulator, held back until somebody waits for them."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        emulator.set(delay=1)

    def kernel(self, thread: int, address: int, nbytes: int) -> None:
        self.emulator.kernel(address, nbytes, stream=thread % 2)

    def progress(self, n: int) -> None:
        self.emulator.run(n)

    def fail(self, n: int) -> None:
        self.emulator.fail(n, UNKNOWN)

    @property
    def failing(self) -> bool:
        return self.emulator.failing

    def injected(self, error: DriverError) -> bool:
        return error.code == UNKNOWN

    def check(self) -> None:
        assert self.emulator.faults == 0, self.emulator.fault

    def settle(self) -> None:
        self.emulator.set(delay=0)


def over_host(operations: int, seed: int) -> Storm:
    return storm(lambda: HostBackend(PAGE), operations=operations, seed=seed)


def over_checked(operations: int, seed: int) -> Storm:
    return storm(lambda: CheckedBackend(HostBackend(PAGE)), operations=operations, seed=seed)


def over_emulator(operations: int, seed: int) -> Storm:
    """Waits are for all work with an even seed, for streams 0 and 1 with an odd one."""
    emulator = ready(granularity=PAGE)
    emulator.set(poison=1)
    streams = (lambda: (0, 1)) if seed % 2 else None
    done = storm(
        lambda: CudaBackend(PAGE, streams=streams),
        operations=operations,
        seed=seed,
        device=EmulatedDevice(emulator),
    )
    assert emulator.live == NOTHING, emulator.live
    return done


BACKENDS = {"host": over_host, "checked": over_checked, "emulator": over_emulator}
PARTS = 14  # of the storm over each backend: a failure is known soon, no process idles at the end


def everywhere(operations: int, seed: int, *, processes: int = 2) -> Iterator[tuple[str, Storm]]:
    """So many operations, split over all backends; each part, as it is done, from a process of its
    own."""
    parts = [(name, seed + i) for i in range(PARTS) for name in BACKENDS]
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=faulthandler.enable,
        max_tasks_per_child=1,
    ) as pool:
        running = {}
        for i, (name, part) in enumerate(parts):
            size = operations // len(parts) + (i < operations % len(parts))
            running[pool.submit(BACKENDS[name], size, part)] = name
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    faulthandler.enable()
    print(BACKENDS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3])))
