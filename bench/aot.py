"""Every Triton kernel compiled for Ampere, Hopper and Blackwell, with no GPU: the compile gate.

The launchers themselves are called, on a device that claims to be an A100, H100 or B200: what is
compiled is what they would launch. The machine code is then read. A kernel fails that spills, does
not fit, loads K and V in pieces of fewer than 128 bits, or lacks the matrix instructions or the
specialised warps it is built for; and one that got worse than bench/results/aot.json says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.compiled import table
from bench.compiled.call import Call
from bench.compiled.calls import CALLS
from bench.compiled.device import DEVICES
from bench.compiled.need import Need
from bench.compiled.plan import Done, Job, plan
from bench.compiled.workers import compile_all
from bench.harness import Bench

SECONDS, SECONDS_QUICK = 360, 60
FEWER = "ratio >= 1.25"  # a fifth fewer instructions than with a block table


def run(
    bench: Bench,
    only: Annotated[str, typer.Option(help="Configurations with this in their name.")] = "",
    update: Annotated[bool, typer.Option(help="Write bench/results/aot.json anew.")] = False,
    processes: Annotated[int, typer.Option(help="Compilers at once.")] = 2,
    arch: Annotated[list[int], typer.Option(help="Of 80, 90, 100.")] = [80, 90, 100],
) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise typer.BadParameter("TRITON_INTERPRET is set: Triton would interpret, not compile")
    if not set(arch) <= set(DEVICES):
        raise typer.BadParameter(f"--arch {arch}: must be of {', '.join(map(str, DEVICES))}")
    whole = not only and not bench.quick and set(arch) == set(DEVICES)
    if update and not whole:
        raise typer.BadParameter("--update writes the whole table: leave out what makes it less")
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what is read is of this tree, not of a cache
        gate(bench, chosen(bench, only), tuple(arch), processes, whole=whole, update=update)


def gate(
    bench: Bench,
    calls: dict[str, Call],
    archs: tuple[int, ...],
    processes: int,
    *,
    whole: bool,
    update: bool,
) -> None:
    """Plan, compile, judge, and record the figures."""
    begun = perf_counter()
    jobs, results = plan(calls, archs)
    found = failures(bench, results, calls)
    for some in compiled(jobs, processes):
        results += some
        found += failures(bench, some, calls)
    seconds = perf_counter() - begun
    processor_seconds = round(sum(done.seconds for done in results), 1)
    rows = table.rows_of(results)
    bench.note(f"{len(rows)} kernels, {seconds:.0f} s, of processors {processor_seconds:.0f} s")
    if update:
        table.save(rows)
    else:
        found += regressions(bench, rows, whole=whole)

    def green() -> bool:
        assert not found, f"{len(found)} failures, each named above"
        return True

    spilled = sum(code.spill_bytes for code in rows.values())
    limit = bench.pick(SECONDS, SECONDS_QUICK)
    bench.figure("aot/kernels", len(rows), "compiled", gate=green, configurations=len(calls))
    bench.figure("aot/spilled", spilled, "bytes", gate=green, target="<= 0")
    bench.figure(
        "aot/seconds",
        seconds,
        "s",
        gate=green,
        target=f"<= {limit}" if whole or bench.quick else None,
        processor_seconds=processor_seconds,
        processes=processes,
    )
    against_paged(bench, rows)


def against_paged(bench: Bench, rows: table.Rows) -> None:
    """Instructions of the hot loop, against those of the same loop over a block table."""
    for arch in DEVICES:
        ours = rows.get(f"_decode decode/bf16/d128 sm_{arch}")
        for form, target in (("", FEWER), ("/constant", None)):
            paged = rows.get(f"paged_kernel paged/bf16/d128{form} sm_{arch}")
            if ours is None or paged is None:
                continue
            bench.figure(
                f"aot/loop{form}/sm_{arch}",
                ours.loop_instructions,
                "instructions",
                gate=ours.loop_matrix == paged.loop_matrix and ours.dependent_loads == 0,
                peer="paged",
                peer_value=paged.loop_instructions,
                target=target,
                loads_at_loaded_addresses=paged.dependent_loads,
            )


def chosen(bench: Bench, only: str) -> dict[str, Call]:
    """The configurations to compile."""
    calls = {
        name: call
        for name, call in CALLS.items()
        if only in name and (call.quick or not bench.quick)
    }
    if not calls:
        raise typer.BadParameter(f"--only {only}: no configuration has this in its name")
    return calls


def compiled(jobs: list[Job], processes: int) -> Iterator[list[Done]]:
    """Compile all jobs behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("compiling", total=len(jobs))
        for done in compile_all(jobs, processes):
            bar.update(task, advance=len(done), description=done[-1].job.call)
            yield done


def failures(bench: Bench, results: list[Done], calls: Mapping[str, Call]) -> list[str]:
    """What could not be compiled, and what compiled kernels do not show; noted as well."""
    found = []
    for done in results:
        call, arch = done.job.call, done.job.arch
        if done.errors:
            found.append(f"{call} sm_{arch}: {'; '.join(done.errors)}")
        for kernel, code in done.kernels:
            need = calls[call].needs.get(kernel, Need())
            row = table.name(kernel, call, arch)
            found += [f"{row}: {text}" for text in need.failures(arch, code)]
    for text in found:
        bench.note(text)
    return found


def regressions(bench: Bench, rows: table.Rows, *, whole: bool) -> list[str]:
    """What got worse than the committed table says; noted as well."""
    before = table.load()
    if before is None:
        bench.note("no table that this version of triton wrote: nothing to compare with")
        return ["bench/results/aot.json is missing"] if whole and not table.FILE.exists() else []
    found = table.regressions(before, rows, whole=whole)
    for text in found:
        bench.note(text)
    return found
