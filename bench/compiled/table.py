"""The committed table of compiled kernels, and what counts as a regression.

The figures are of one compiler: a table that another version of triton wrote is not compared with.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import triton

from bench.compiled.code import Code
from bench.compiled.plan import Done

Rows = dict[str, Code]
FILE = Path(__file__).resolve().parent.parent / "results" / "aot.json"

# ptxas schedules differently after a change elsewhere in a kernel: what may grow without a word.
REGISTERS = 8
LOOP = 1.05
COLUMNS = ("registers", "spill bytes", "shared KiB", "programs", "loop", "matrix", "loads")


def name(kernel: str, call: str, arch: int) -> str:
    """A row's name: kernel, configuration, architecture."""
    return f"{kernel} {call} sm_{arch}"


def rows_of(results: list[Done]) -> Rows:
    """One row for each kernel compiled; a kernel's second form in one call is numbered."""
    rows: Rows = {}
    for done in sorted(results, key=lambda done: (done.job.call, done.job.arch)):
        for kernel, code in done.kernels:
            row = name(kernel, done.job.call, done.job.arch)
            number = sum(each == row or each.startswith(f"{row} #") for each in rows)
            rows[f"{row} #{number + 1}" if number else row] = code
    return rows


def load(path: Path = FILE) -> Rows | None:
    """The committed rows; None where there is no table, or another compiler wrote it."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["triton"] != triton.__version__:
        return None
    return {row: Code(**fields) for row, fields in found["kernels"].items()}


def save(rows: Rows, path: Path = FILE) -> None:
    """Write the table, a line for each kernel, and a readable one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(row)}: {json.dumps(asdict(rows[row]))}" for row in sorted(rows)]
    body = ",\n".join(lines)
    path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{body}\n}}}}\n')
    path.with_suffix(".md").write_text(markdown(rows))


def regressions(before: Rows, after: Rows, *, whole: bool = True) -> list[str]:
    """What got worse, in words; rows of ``before`` must be in ``after`` if that is ``whole``."""
    found = [f"{row}: was compiled before and is not now" for row in before if row not in after]
    found = found if whole else []
    for row, now in after.items():
        if row in before:
            found += [f"{row}: {text}" for text in worse(before[row], now)]
    return found


def worse(before: Code, now: Code) -> list[str]:
    """How one kernel got worse."""

    def line(what: str, old: object, new: object) -> str:
        return f"{what}: {old} before, {new} now"

    checks = [
        (now.spill_bytes <= before.spill_bytes, "bytes spilled", "spill_bytes"),
        (now.registers <= before.registers + REGISTERS, "registers", "registers"),
        (now.programs >= before.programs, "programs on a processor", "programs"),
        (
            now.loop_instructions <= before.loop_instructions * LOOP,
            "instructions of the hot loop",
            "loop_instructions",
        ),
        (now.loop_narrow <= before.loop_narrow, "loads narrower than 128 bits", "loop_narrow"),
        (
            now.dependent_loads <= before.dependent_loads,
            "loads at loaded addresses",
            "dependent_loads",
        ),
    ]
    found = [
        line(what, getattr(before, field), getattr(now, field))
        for holds, what, field in checks
        if not holds
    ]
    gone = [kind for kind in before.mix if kind not in now.mix and not kind.startswith("spill")]
    return found + [line(f"{kind} instructions", before.mix[kind], 0) for kind in gone]


def markdown(rows: Rows) -> str:
    """The table to read: a line for each kernel and configuration, its architectures beside."""
    lines: dict[str, dict[str, Code]] = {}
    for row, code in sorted(rows.items()):
        what, _, arch = row.rpartition(" sm_")
        lines.setdefault(what, {})[arch] = code
    text = [
        "# Compiled kernels",
        "",
        f"Written by `python -m bench aot --update`, triton {triton.__version__}. Registers,",
        "programs a processor (CTA), shared memory; of the hot loop its instructions, its matrix",
        "instructions and its global loads; spilled bytes where there are any.",
        "",
        "| kernel | configuration | sm_80 | sm_90 | sm_100 |",
        "|---|---|---|---|---|",
    ]
    for what, archs in lines.items():
        kernel, _, call = what.partition(" ")
        cells = [cell(archs.get(arch)) for arch in ("80", "90", "100")]
        text.append(f"| {kernel} | {call} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def cell(code: Code | None) -> str:
    """One kernel on one architecture."""
    if code is None:
        return "-"
    spills = f", {code.spill_bytes} B spilled" if code.spill_bytes else ""
    loop = f"{code.loop_instructions} / {code.loop_matrix} / {code.loop_loads}"
    shared = f"{code.shared_bytes / 1024:.0f} KiB"
    return f"{code.registers} regs, {code.programs} CTA, {shared}; {loop}{spills}"
