"""Law: whatever is done, in whatever order, whichever call fails, memory holds what was written.

The state machine is a product: `vattn.allocator.testing`. Here it runs over host memory, in
`test_cuda_faults` over the CUDA backend.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.rig import done
from vattn.allocator.host import HostBackend
from vattn.allocator.testing import state_machine
from vattn.allocator.testing_machine import FlatTwins, Twins, settings_for, slot_of, which_of

__all__ = ["FlatTwins", "Twins", "settings_for", "slot_of", "which_of"]

NIGHTLY_OPERATIONS = 40_000  # the volume is `test_storm`


@pytest.mark.parametrize("machine", [Twins, FlatTwins])
def test_memory_holds_what_was_written_whatever_fails(machine: type[Twins]) -> None:
    failures = done["failures"]
    run_state_machine_as_test(machine, settings=settings_for(15, 40))
    assert done["failures"] > failures


@pytest.mark.fuzz
def test_memory_holds_what_was_written_for_a_night(capsys: pytest.CaptureFixture[str]) -> None:
    done.update(operations=0, failures=0, runs=0)
    while done["operations"] < NIGHTLY_OPERATIONS:
        for machine in (Twins, FlatTwins):
            run_state_machine_as_test(machine, settings=settings_for(150, 100))
    with capsys.disabled():
        print(
            f"\nfuzz: {done['operations']:,} operations in {done['runs']:,} runs, "
            f"{done['failures']:,} injected failures undone exactly; 0 faults, 0 leaks, "
            "0 double owners"
        )


# ---- for backends of others ----------------------------------------------------------------------
def test_a_backend_of_ones_own_is_checked_by_one_call() -> None:
    runs = done["runs"]
    state_machine(lambda: HostBackend(16384), lanes=1, examples=3, steps=10).TestCase(
        "runTest"
    ).run()
    assert done["runs"] >= runs + 3


@pytest.mark.parametrize("verb", ["kept bytes", "wrong page", "late copy"])
def test_a_flawed_backend_is_seen(verb: str) -> None:
    class Flawed(HostBackend):
        def destroy(self, page: int, count: int) -> None:
            if verb != "kept bytes":
                super().destroy(page, count)

        def map(self, address: int, page: int, count: int) -> None:
            if verb == "wrong page" and page % 2 == 1:
                page -= 1  # the neighbour's bytes
            super().map(address, page, count)

        def duplicate(self, source: int, target: int, nbytes: int) -> None:
            if verb != "late copy":
                super().duplicate(source, target, nbytes)

    machine = state_machine(lambda: Flawed(4096), examples=400, steps=30)
    # Shrinking is slow; and what is seen once is seen always.
    short = settings(machine.TestCase.settings, phases=[Phase.generate], derandomize=True)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(machine, settings=short)
