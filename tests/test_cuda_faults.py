"""Law: whichever driver call fails, the CUDA backend and all above it are as they were before.

The script of `test_rollback` and the state machine of `test_fuzz`, over the driver emulator.
"""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import rule, run_state_machine_as_test

from tests import test_fuzz
from tests.arenas import state_of
from tests.devices import MEMORY, UNKNOWN, make_arena
from tests.emulator.control import NOTHING, Emulator
from tests.mirror import PAGE
from tests.rig import done
from tests.test_rollback import SCRIPT
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import (
    DriverError,
)
from vattn.allocator.vmm import Backend


# ---- any call fails --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lanes", "zero_backed", "code"),
    [(1, False, MEMORY), (1, True, UNKNOWN), (3, False, UNKNOWN), (3, True, MEMORY)],
)
def test_every_driver_call_fails_once_and_is_undone_exactly(
    lanes: int, zero_backed: bool, code: int, emulator: Emulator
) -> None:
    """The script of all verbs, a driver call of it failed at each index. A failure that the backend
    absorbs ends its round; the next round goes on behind it."""
    tried: Counter[str] = Counter()
    failures = 0
    absorbed = True
    while absorbed:
        absorbed = False
        emulator.reset(granularity=PAGE)
        arena = make_arena(
            CheckedBackend(CudaBackend(PAGE, streams=lambda: (0,))),
            lanes=lanes,
            zero_backed=zero_backed,
        )
        arena.backend.create(1 << 20, 1)  # so that the scratch addresses are there
        arena.backend.warm(1 << 20, 1)
        arena.backend.destroy(1 << 20, 1)
        for name, act in SCRIPT:
            for index in range(tried[name], 1000):
                before = None if arena.closed else (state_of(arena), emulator.live)
                emulator.fail(index + 1, code)
                try:
                    act(arena)
                    break
                except DriverError:
                    failures += 1
                    tried[name] = index + 1
                    arena.pool.check()
                    if name == "close":
                        assert not arena._torn_down
                    elif name not in ("lower the budget", "give memory back", "next step"):
                        after = state_of(arena), emulator.live
                        assert after == before, f"{name}: call {index} was not undone"
            else:
                raise AssertionError(f"{name} never ended")
            if not emulator.failing:
                absorbed = True
                tried[name] = index + 1
            emulator.fail(0)
            if not arena.closed:
                arena.check()
            arena.pool.check()
        arena.pool.advance()
        arena.pool.trim()
        assert arena.pool.created == 0
        assert arena.backend.resident_bytes() == 0
        arena.pool.close()
        assert emulator.live == NOTHING
        assert emulator.faults == 0
    assert failures > 100, failures


class CudaTwins(test_fuzz.Twins):
    """The state machine of `test_fuzz` on a device: kernels read pages, and run late."""

    kernel_maps = False

    def open_backend(self) -> Backend:
        self.emulator = Emulators.running
        return CudaBackend(PAGE, streams=None if done["runs"] % 2 else lambda: (0, 1))

    @rule(which=test_fuzz.which_of, slot=test_fuzz.slot_of, late=st.booleans())
    def kernel(self, which: int, slot: int, late: bool) -> None:
        """A kernel reads all pages of a slot, perhaps after whatever comes next."""
        arena = self.arenas[which]
        self.emulator.set(delay=late)
        for page in arena.mapped(slot).tolist():
            self.emulator.kernel(arena.address + page * PAGE, PAGE, int(late))
        assert self.emulator.faults == 0, self.emulator.fault

    def check(self) -> None:
        super().check()
        assert self.emulator.faults == 0, self.emulator.fault

    def teardown(self) -> None:
        self.emulator.run()
        self.emulator.set(delay=0)
        super().teardown()
        assert self.emulator.live == NOTHING
        assert self.emulator.faults == 0


class FlatCudaTwins(CudaTwins):
    """The same with one lane."""

    lanes = 1


class Emulators:
    """The emulator of the running test: Hypothesis makes the machines."""

    running: Emulator


@pytest.mark.parametrize("machine", [CudaTwins, FlatCudaTwins])
def test_memory_holds_what_was_written_whatever_fails(
    machine: type[CudaTwins], emulator: Emulator
) -> None:
    Emulators.running = emulator
    run_state_machine_as_test(machine, settings=test_fuzz.settings_for(10, 40))


@pytest.mark.fuzz
def test_memory_holds_what_was_written_for_a_night(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    Emulators.running = emulator
    done.update(operations=0, failures=0, runs=0)
    while done["operations"] < test_fuzz.NIGHTLY_OPERATIONS:
        for machine in (CudaTwins, FlatCudaTwins):
            run_state_machine_as_test(machine, settings=test_fuzz.settings_for(150, 100))
    with capsys.disabled():
        print(
            f"\nfuzz over the driver emulator: {done['operations']:,} operations in "
            f"{done['runs']:,} runs, {emulator.calls():,} driver calls, {done['failures']:,} "
            "injected failures undone exactly; 0 faults, 0 leaks, 0 double owners"
        )
