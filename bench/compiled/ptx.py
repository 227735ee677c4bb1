"""PTX: is a load's address made from a number that the same loop loaded?

In PTX a register holds one value, so what an address is made of can be followed; in machine code
registers are used again. Innermost loops with matrix instructions are looked at, or all innermost
loops where none has any. A number may come through shared memory, where a pipelined load puts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^(\$\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
REGISTER = re.compile(r"%(?!p\d)[a-z]+\d+")
LOAD = re.compile(
    r"\bld\.(?P<space>global|shared)[\w.:]*\s+(?P<to>\{[^}]*\}|%\w+),\s*\[(?P<at>[^\]]*)\]"
)
COPY = re.compile(r"\bcp\.async\.c[ag][\w.:]*\s+\[[^\]]*\],\s*\[(?P<at>[^\]]*)\]")
MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
# Lines whose first operand is no result; and results of matrix instructions, which are data.
NO_RESULT = re.compile(r"\b(?:st|red|cp|bra|bar|mbarrier|setmaxnreg|stmatrix)\b")


@dataclass(frozen=True)
class Loop:
    """Lines ``first`` to ``last``, the backward branch."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def dependent_loads(text: str) -> int:
    """Loads from global memory whose address was loaded in the same turn of the loop, or before."""
    lines = text.splitlines()
    found = loops(lines)
    with_matrix = [
        loop for loop in found if any(map(MATRIX.search, lines[loop.first : loop.last + 1]))
    ]
    candidates = with_matrix or found
    inner = [loop for loop in candidates if not any(map(loop.holds, candidates))]
    return max((dependent(lines[loop.first : loop.last + 1]) for loop in inner), default=0)


def loops(lines: list[str]) -> list[Loop]:
    """The loops: from the target of a backward branch to the last such branch."""
    heads: dict[str, int] = {}
    ends: dict[str, int] = {}
    for number, line in enumerate(lines):
        if label := LABEL.match(line):
            heads[label[1]] = number
        elif (branch := BRANCH.search(line)) and branch[1] in heads:
            ends[branch[1]] = number
    return [Loop(heads[label], end) for label, end in ends.items()]


def dependent(body: list[str]) -> int:
    """How many global loads of a loop have an address made from a number loaded in it."""
    loads = [match for line in body if (match := LOAD.search(line))]
    copies = [match for line in body if (match := COPY.search(line))]
    steps = [step for line in body if (step := assignment(line))]
    loaded = {register for load in loads for register in REGISTER.findall(load["to"])}
    before = -1
    while len(loaded) != before:
        before = len(loaded)
        for results, operands in steps:
            if not loaded.isdisjoint(operands):
                loaded |= results
    addresses = [load["at"] for load in loads if load["space"] == "global"]
    addresses += [copy["at"] for copy in copies]
    return sum(not loaded.isdisjoint(REGISTER.findall(at)) for at in addresses)


def assignment(line: str) -> tuple[set[str], set[str]] | None:
    """(results, operands) of a line that computes numbers from numbers, else None."""
    if "%" not in line or LOAD.search(line) or MATRIX.search(line) or NO_RESULT.search(line):
        return None
    operands = re.sub(r"^\s*(?:@!?%\w+\s+)?\S+\s+", "", line)
    to, _, sources = operands.partition("}" if operands.startswith("{") else ",")
    return set(REGISTER.findall(to)), set(REGISTER.findall(sources))
