"""Law: a verb out of turn is refused before it reaches the backend; call n fails when told to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mirror import PAGE
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import DriverError, PageStateError
from vattn.allocator.host import HostBackend

Act = Callable[[CheckedBackend, int], None]


def make() -> tuple[CheckedBackend, int]:
    backend = CheckedBackend(HostBackend(PAGE))
    base = backend.reserve(4, home=0)
    backend.create(0, 3)
    backend.map(base, 0, 2)
    return backend, base


OUT_OF_TURN: dict[str, Act] = {
    "create of an existing page": lambda b, base: b.create(2, 1),
    "destroy of no page": lambda b, base: b.destroy(2, 2),
    "destroy of a mapped page": lambda b, base: b.destroy(1, 1),
    "map over a map": lambda b, base: b.map(base + PAGE, 2, 1),
    "map of missing pages": lambda b, base: b.map(base + 2 * PAGE, 2, 2),
    "map outside of every": lambda b, base: b.map(base + 3 * PAGE, 0, 2),
    "remap of missing": lambda b, base: b.remap(base, 9, 1),
    "unmap of page 2 where None is": lambda b, base: b.unmap(base + 2 * PAGE, 2, 1),
    "unmap of page 1 where 0 is": lambda b, base: b.unmap(base, 1, 1),
    "release of no reservation": lambda b, base: b.release(base, 3),
    "zero of unmapped bytes": lambda b, base: b.zero(base + PAGE + 64, PAGE),
    "copy between missing pages": lambda b, base: b.duplicate(0, 7, 8),
    "copy into a mapped page": lambda b, base: b.duplicate(0, 1, 8),
    "warm of no page": lambda b, base: b.warm(2, 2),
}


@pytest.mark.parametrize("what", OUT_OF_TURN)
def test_an_illegal_edge_does_not_reach_the_backend(what: str) -> None:
    backend, base = make()
    before = dict(backend.at), set(backend.created), dict(backend.inner.calls)
    message = what.replace("map of missing", "missing").replace("remap of", "").strip()
    with pytest.raises(PageStateError, match=message.removeprefix("re")):
        OUT_OF_TURN[what](backend, base)
    assert (dict(backend.at), set(backend.created), dict(backend.inner.calls)) == before


def test_the_nth_call_fails_and_does_nothing() -> None:
    backend, base = make()
    backend.fail_at = backend.count + 1
    backend.unmap(base, 0, 1)
    with pytest.raises(DriverError, match=r"map failed.*Injected") as error:
        backend.map(base, 0, 1)
    assert (error.value.call, error.value.address, error.value.nbytes) == ("map", base, 1)
    assert base not in backend.at
    backend.map(base, 0, 1)
    assert backend.calls["map"] == 3


def test_every_failable_verb_exists() -> None:
    assert all(callable(getattr(CheckedBackend, verb)) for verb in CheckedBackend.FAILABLE)
