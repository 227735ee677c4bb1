"""Conformance of a scaled_dot_product_attention with torch's, and what the checks can see.

`--impl pkg.mod:fn` names the replacement to examine. Samples of torch's own tests, a grid of
shapes, masks, layouts and values, the errors of wrong calls, and the laws of autograd, transforms,
tracing and modes: `bench/contract/__init__.py` says what is compared with what. Differences are
listed on stderr; each begins with a label, which `--only LABEL --seed N` runs again by itself.
`--impl triton` examines the Triton kernels, interpreted on the CPU, on a grid that is thinned: some
minutes, and under one with `--quick`.

The mutation score is the share of implementations with one flaw that are told from a right one. It
is shown only when implementations without a flaw pass: torch's own, and a blockwise kernel in
float32, with and without weights rounded to half precision. Needs `pip install expecttest`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.harness import Bench

if TYPE_CHECKING:
    from bench.contract.cases import Probe
    from bench.contract.runner import Report

IMPL = "vattn.sdpa:scaled_dot_product_attention"
TRITON = "triton"
NUMERIC = ("grid", "opinfo")  # the families that kernels without checks of arguments can pass
# The others have other dimensions than 4, are empty, or want gradients that are torch's alone.
LEAST_SHARE = 0.5
COMPILING = ("compiled", "compiled_shapes", "exported", "inductor")


def run(
    bench: Bench,
    impl: Annotated[
        str, typer.Option(help='The function to examine, as pkg.mod:fn; or "triton".')
    ] = IMPL,
    only: Annotated[str, typer.Option(help="Only the checks whose label contains this.")] = "",
) -> None:
    if impl == TRITON:
        return interpreted(bench, only)
    from bench.contract import FAMILIES, examine, suite

    attend = load(impl)
    begin = time.perf_counter()
    families = [family for family in FAMILIES if only.startswith(f"{family}/")] or FAMILIES
    probes: Iterable[Probe] = suite(
        bench.seed, quick=bench.quick, every=bool(only), families=families
    )
    if only:
        probes = [probe for probe in probes if only in probe.label]
    elif bench.quick:
        probes = list(probes)  # torch's answers are worked out once for ours and the controls
    reports = {impl: examine(attend, probes, bench.seed)}
    if not only:
        small = list(probes) if bench.quick else list(suite(bench.seed, quick=True))
        if impl == IMPL:
            reports |= kernels(small, bench.seed)
    show(bench, reports)
    if not only:
        mutation(bench, small)
    seconds = time.perf_counter() - begin
    target = None if only else bench.pick("<= 180", "<= 40")
    bench.figure("sdpa_contract/seconds", seconds, "s", gate=True, target=target)
    return None


def interpreted(bench: Bench, only: str = "") -> None:
    """The same for the Triton kernels: probes that they serve a part of, and fewer of them."""
    interpret()
    from bench.contract import examine, suite
    from bench.contract.forced import thinned, triton

    begin = time.perf_counter()
    strength = None if only else bench.pick(2, 1)
    probes = thinned(suite(bench.seed, quick=True, strength=strength), quick=bench.quick)
    probes = [probe for probe in probes if only in probe.label]
    triton.forget()
    grid = [probe for probe in probes if probe.family == "grid"]
    reports = {f"{TRITON}, grid": examine(triton, grid, bench.seed)}
    share = triton.share
    rest = [probe for probe in probes if probe.family != "grid"]
    reports[TRITON] = examine(triton, rest, bench.seed)
    say(f"triton served {triton.served} calls of {len(probes)} checks, by name")
    show(bench, reports)
    if not only:
        served = share >= LEAST_SHARE
        bench.figure("sdpa_contract/served", share, "of the grid's calls", gate=served)
    if not only and not bench.quick:
        mutation(bench, probes)
    seconds = time.perf_counter() - begin
    target = None if only else bench.pick("<= 600", "<= 60")
    bench.figure("sdpa_contract/seconds", seconds, "s", gate=True, target=target)


def interpret() -> None:
    """Let Triton run kernels on the CPU, in Python: it looks once, when it is imported.

    Raises BadParameter if that has happened.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    from vattn.kernels import gpu

    if not gpu.interpreted():
        raise typer.BadParameter(
            "triton was imported before: set TRITON_INTERPRET=1 in the environment"
        )


def load(impl: str) -> Callable[..., Any]:
    """The function that "pkg.mod:fn" names; BadParameter says what is wrong with the name."""
    module, colon, name = impl.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"--impl {impl!r} is not of the form pkg.mod:fn")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"--impl {impl!r}: {error}") from error
    if not callable(found):
        raise typer.BadParameter(f"--impl {impl!r} is a {type(found).__name__}, not a function")
    return found


def kernels(probes: list[Probe], seed: int) -> dict[str, Report]:
    """Values from vattn's kernels by name: by itself it leaves calls as small as these to torch."""
    from bench.contract import examine
    from bench.contract.forced import KERNELS

    values = [p for p in probes if p.family in NUMERIC and p.check in ("forward", "parallel")]
    found = {}
    for forced in KERNELS:
        forced.forget()
        found[f"bench.contract.forced:{forced.impl}"] = examine(forced, values, seed)
        say(f"{forced.impl} served {forced.served} of {len(values)} calls, by name")
    return found


def say(text: str) -> None:
    """A line for the reader, not wrapped: labels are there to be copied."""
    typer.echo(text, err=True)


def show(bench: Bench, reports: dict[str, Report]) -> None:
    """The figures of the examined functions; a difference turns the number of checks red."""
    total = sum(sum(report.checks.values()) for report in reports.values())
    labels = {
        impl: [each.probe.label for each in report.differences] for impl, report in reports.items()
    }
    count = sum(map(len, labels.values()))
    for impl, report in reports.items():
        say(f"{impl} --seed {report.seed}")
        for family, numbers in report.families.items():
            say("  {}: {checks} checks, {differences} differences".format(family, **numbers))
        if report.differences:
            say(report.digest())

    def agrees() -> bool:
        assert not count, f"{count} of {total} checks differ: see stderr"
        return total > 0

    bench.figure(
        "sdpa_contract/differences",
        count,
        "differences",
        gate=total > 0,
        target="<= 0",
        families={impl: report.families for impl, report in reports.items()},
        labels=labels,
    )
    bench.figure("sdpa_contract/checks", total, "checks", gate=agrees)


def mutation(bench: Bench, probes: list[Probe]) -> None:
    """The share of flawed implementations that are seen, behind the gate that right ones pass."""
    from bench.contract import mutate, score

    # Compilation tells no more of these than a fake tensor does, and takes most of the time.
    probes = [probe for probe in probes if probe.check not in COMPILING]
    verdicts = mutate(probes, bench.seed)
    for verdict in verdicts:
        say(f"  {verdict}"[:200])
    bench.figure(
        "sdpa_contract/mutation_score",
        score(verdicts),
        "of controls",
        gate=lambda: fair(probes, bench.seed, quick=bench.quick),
        target=">= 1",
        controls=len(verdicts),
        seen={v.flaw.name: v.seen.probe.label for v in verdicts if v.seen},
        missed=[v.flaw.name for v in verdicts if not v.seen],
    )


def fair(probes: list[Probe], seed: int, *, quick: bool) -> bool:
    """Implementations without a flaw pass: torch's own everything, kernels whatever is numbers."""
    from bench.contract import HONEST, examine

    for name, attend in HONEST.items():
        if quick and name == "blockwise":
            continue  # in float32 and float64 the same as "rounding", in half precision finer
        numeric = name != "identity"
        mine = [p for p in probes if (p.family in NUMERIC) is numeric or not (quick or numeric)]
        if quick:
            mine = [p for p in mine if p.check != "parallel"]
        found = examine(attend, mine, seed).differences
        assert not found, f"{name}, which is right, differs in {len(found)} checks: {found[0]}"
    return True
