"""Every kernel in every form that its launcher can choose: one file for each family."""

from __future__ import annotations

from bench.compiled.call import Call
from bench.compiled.calls.append import APPEND
from bench.compiled.calls.backward import BACKWARD
from bench.compiled.calls.cascade import CASCADE
from bench.compiled.calls.decode import DECODE
from bench.compiled.calls.eviction import EVICTION
from bench.compiled.calls.hopper import HOPPER
from bench.compiled.calls.paged import PAGED
from bench.compiled.calls.prefill import PREFILL
from bench.compiled.calls.sparse import SPARSE

FAMILIES: tuple[list[Call], ...] = (
    APPEND,
    DECODE,
    PAGED,
    CASCADE,
    PREFILL,
    HOPPER,
    BACKWARD,
    SPARSE,
    EVICTION,
)

# The quick ones first: a kernel that several calls end in bears the first one's name.
CALLS: dict[str, Call] = {
    call.name: call
    for call in sorted((call for family in FAMILIES for call in family), key=lambda c: not c.quick)
}
