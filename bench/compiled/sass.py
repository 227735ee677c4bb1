"""Machine code (SASS) as nvdisasm prints it: instructions, loops, what they are made of.

/*1c70*/                   LDSM.16.M88.4 R28, [R5] ;           the head of a loop
/*1c80*/               @P2 LDG.E.128 R12, desc[UR12][R4.64] ;
/*3290*/              @!P1 BRA 0x1c70 ;                        its end: a backward branch
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*)"
)
BRANCH = re.compile(r"BRA(?:\.|$)")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")

# A name for what is counted, and the instructions that count.
MIX = {
    "wgmma": r"[HQI]GMMA",
    "tcgen05": r"UTC\w*MMA",
    "mma": r"[HQID]MMA",
    "multiply_adds": r"FFMA2?",
    "ldmatrix": r"LDSM",
    "async_copies": r"LDGSTS",
    "tma_loads": r"UTMALDG|UBLKCP",
    "tma_stores": r"UTMASTG",
    "global_loads": r"LDG",
    "global_stores": r"STG",
    "wide_loads": r"(?:LDG|LDGSTS)\.[\w.]*(?:128|256)",
    "wide_stores": r"STG\.[\w.]*(?:128|256)",
    "atomics": r"(?:ATOMG|RED|REDG|ATOM)",
    "exp2": r"MUFU\.EX2",
    "setmaxnreg": r"USETMAXREG",
    "spill_loads": r"LDL",
    "spill_stores": r"STL",
}
_MIX = {name: re.compile(rf"(?:{pattern})(?:\.|$)") for name, pattern in MIX.items()}
MATRIX = ("wgmma", "tcgen05", "mma")
WAIT = 16  # instructions: a shorter loop polls a barrier or counts down, it does no work


@dataclass(frozen=True)
class Instruction:
    """``op`` with its modifiers; ``target`` is the address a branch goes to."""

    address: int
    op: str
    target: int | None = None


Code = Sequence[Instruction]


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    found = []
    for line in LINE.finditer(text):
        branch = TARGET.search(line["rest"]) if BRANCH.match(line["op"]) else None
        target = int(branch[1], 16) if branch else None
        found.append(Instruction(int(line["address"], 16), line["op"], target))
    return found


def mix(code: Code) -> dict[str, int]:
    """How many instructions of each kind of `MIX` there are; kinds without any are left out."""
    counts = {
        name: sum(pattern.match(each.op) is not None for each in code)
        for name, pattern in _MIX.items()
    }
    return {name: count for name, count in counts.items() if count}


def spilled(code: Code) -> int:
    """Bytes of spill stores and loads, as `ptxas -v` counts them: each instruction once."""
    spills = [each.op for each in code if re.match(r"(?:STL|LDL)\b", each.op)]
    widths = [re.search(r"\.(64|128)", op) for op in spills]
    return sum(int(width[1]) // 8 if width else 4 for width in widths)


def matrix(code: Code) -> int:
    """Matrix instructions."""
    counts = mix(code)
    return sum(counts.get(name, 0) for name in MATRIX)


def loops(code: Code) -> list[list[Instruction]]:
    """The loops of a kernel: from the target of a backward branch to the last such branch."""
    ends: dict[int, int] = {}
    for each in code:
        if each.target is not None and each.target <= each.address:
            ends[each.target] = max(each.address, ends.get(each.target, 0))
    return [[each for each in code if head <= each.address <= end] for head, end in ends.items()]


def multiply_adds(code: Code) -> int:
    """Multiply-adds in float32, of which products of float32 consist."""
    return mix(code).get("multiply_adds", 0)


def hot_loop(code: Code) -> list[Instruction]:
    """The loop that takes the time, [] if there is none.

    Of the innermost loops with matrix instructions the one with most of them, and of those the
    shortest: the loop over whole tiles, where masked tiles have another. Without matrix
    instructions the same of multiply-adds, and without these the longest that does not just wait.
    """
    found = [loop for loop in loops(code) if len(loop) >= WAIT]
    for work in (matrix, multiply_adds):
        working = innermost([loop for loop in found if work(loop)])
        if working:
            return max(working, key=lambda loop: (work(loop), -len(loop)))
    return max(innermost(found), key=len, default=[])


def innermost(found: list[list[Instruction]]) -> list[list[Instruction]]:
    """The loops that hold no other of them."""

    def holds(outer: list[Instruction], inner: list[Instruction]) -> bool:
        first, last = inner[0].address, inner[-1].address
        return outer is not inner and outer[0].address <= first and last <= outer[-1].address

    return [loop for loop in found if not any(holds(loop, other) for other in found)]
