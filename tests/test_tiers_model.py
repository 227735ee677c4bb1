"""Caches with tiers side by side with plain tensors: the histories of `test_cache_model`, and moves
between them; and volume, by `tier_storm`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from tests import test_cache_model
from tests.caches import LAYERS
from tests.emulator.control import NOTHING, ready
from tests.mirror import PAGE
from tests.test_cache_cuda import emulated
from tests.tier_storm import TierStorm
from vattn import tensor
from vattn.allocator.errors import OutOfPages
from vattn.allocator.host import HostBackend
from vattn.allocator.vmm import Backend
from vattn.tiers import Tiers


class TieredCaches(test_cache_model.CacheAndModel):
    """The pages of the first of two caches move, too."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list = []

    @property
    def ours(self) -> list[tuple]:
        """Sequences of the cache with tiers."""
        return [entry for entry in self.model if entry[0].cache is self.tiers.cache]

    @rule(
        victims=st.sampled_from(["fifo", "lru", "counter"]),
        pages=st.integers(5, 100),
        piece=st.integers(1, 9),
    )
    @precondition(lambda self: not hasattr(self, "tiers"))
    def begin(self, victims: str, pages: int, piece: int) -> None:
        self.tiers = Tiers(self.caches[0], slow_bytes=pages * PAGE, victims=victims)
        self.tiers.mover.piece_pages = piece

    @precondition(lambda self: hasattr(self, "tiers") and self.ours)
    @rule(
        data=st.data(),
        layer=st.none() | st.integers(0, LAYERS - 1),
        verb=st.sampled_from(["demote", "promote", "start_demote", "start_promote"]),
    )
    def move(self, data, layer, verb) -> None:
        sequence = data.draw(st.sampled_from(self.ours))[0]
        length = int(sequence.lengths.max())
        ends = st.integers(0, length)
        tokens = data.draw(st.none() | st.tuples(ends, ends).map(lambda two: tuple(sorted(two))))
        try:
            moved = getattr(self.tiers, verb)(sequence, layer, tokens)
        except OutOfPages:
            return
        if verb.startswith("start"):
            self.moves.append(moved)

    @precondition(lambda self: self.moves)
    @rule(cancel=st.booleans())
    def wait(self, cancel) -> None:
        move = self.moves.pop()
        if cancel:
            move.cancel()
        assert move.wait(30)
        assert move.done

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "caches"):
            return
        for cache in self.caches:
            cache.check()
        for sequence, model, starts in self.model:
            for layer in range(LAYERS):
                assert torch.equal(sequence.k[layer], model[layer][:, starts[layer] :])
                assert torch.equal(sequence.v[layer], -model[layer][:, starts[layer] :])

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "tiers"):
            assert (self.tiers.slow.mapped, self.tiers.slow.copies) == (0, 0)


class TieredCachesOnDevice(TieredCaches):
    """On an emulated device with dirty memory."""

    def open_backend(self) -> Backend:
        self.emulator = ready(granularity=PAGE)
        self.emulator.set(poison=1)
        return emulated()

    def assert_gone(self) -> None:
        assert self.emulator.faults == 0
        assert self.emulator.live == NOTHING


TieredCaches.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestTieredCaches = TieredCaches.TestCase


def open_emulated() -> Backend:
    ready(granularity=PAGE).set(poison=1)
    return emulated()


@pytest.fixture(params=["host", "cuda"])
def open_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Backend]:
    if request.param == "host":
        return lambda: HostBackend(PAGE)
    monkeypatch.setitem(tensor.MAKERS, "cpu", tensor.from_capsule)
    return open_emulated


def test_histories_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensor.MAKERS, "cpu", tensor.from_capsule)
    few = settings(max_examples=8, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(TieredCachesOnDevice, settings=few)


@pytest.mark.parametrize("victims", ["lru", "counter"])
def test_a_short_storm(open_backend: Callable[[], Backend], victims: str) -> None:
    storm = TierStorm(open_backend(), seed=11, victims=victims)
    storm.run(800)
    assert storm.failures
    assert storm.tiers.stats().demoted_bytes


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(5))
def test_a_million_operations(open_backend: Callable[[], Backend], seed: int) -> None:
    """100,000 each on two backends, and five seeds."""
    TierStorm(open_backend(), seed=seed, victims=["lru", "fifo", "counter"][seed % 3]).run(100_000)


@pytest.mark.fuzz
def test_long_histories() -> None:
    many = settings(max_examples=300, stateful_step_count=100, deadline=None)
    run_state_machine_as_test(TieredCaches, settings=many)
