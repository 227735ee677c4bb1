"""Every probe of the suite, by family: refusals, laws, opinfo, grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.contract import autograd, modes, overrides, tracing
from bench.contract.blocks import MASKS, SHAPES
from bench.contract.blocks_values import VALUES
from bench.contract.cases import Case, Probe
from bench.contract.checks import Check, backward, forward, gradcheck, noncontiguous
from bench.contract.forms import SMALL, form_case, heads, long, masked
from bench.contract.refusals import refusals
from bench.contract.samples import opinfo_cases

FAMILIES = ("refusals", "laws", "opinfo", "grid")
BLOCKS = (*SHAPES, *MASKS, *VALUES)
LAWS = (*overrides.LAWS, *autograd.LAWS, *modes.LAWS, *tracing.LAWS)
LAWS_LONG = tuple(law for law in LAWS if law not in modes.DROPOUT)  # many draws of much
INDUCTOR = (heads, masked, long)  # forms compiled with the default backend, seconds each
COMPILED_DTYPES = (torch.float32, torch.bfloat16)


def suite(
    seed: int,
    *,
    quick: bool = False,
    every: bool = False,
    families: Sequence[str] = FAMILIES,
    strength: int | None = None,
) -> Iterator[Probe]:
    """The probes of some families, made as they are asked for.

    ``every`` takes all combinations of the grid, those too that the full form leaves to chance;
    ``strength`` few: any values of so many axes meet.
    """
    if "refusals" in families:
        yield from refusals(seed)
    if "laws" in families:
        yield from laws(seed, quick=quick)
    if "opinfo" in families:
        yield from samples(seed, quick=quick)
    if "grid" in families:
        yield from grid(seed, quick=quick, every=every, strength=strength)


def probe(check: Check, case: Case) -> Probe:
    return Probe(case.family, check.__name__, case.name, lambda attend: check(attend, case))


def laws(seed: int, *, quick: bool) -> Iterator[Probe]:
    """Each law on each form; compilation on two of them when quick."""
    for form in (*SMALL, long):
        case = form_case(form, "laws", seed, torch.float32)
        yield from (probe(law, case) for law in (LAWS if form in SMALL else LAWS_LONG))
        if form is masked and quick:
            yield probe(tracing.compiled, case)  # each compilation takes a good part of a second
        elif form is long or not quick:
            yield from (probe(law, case) for law in tracing.COMPILED)
        if form in INDUCTOR and not quick:
            yield probe(tracing.inductor, case)
    case = form_case(long, "laws", seed, torch.bfloat16)
    yield from (probe(law, case) for law in LAWS_LONG if law not in autograd.LAWS)
    yield probe(overrides.nested, form_case(heads, "laws", seed, torch.float32))
    for form in SMALL:
        case = form_case(form, "laws", seed, torch.float64)
        yield from (probe(law, case) for law in autograd.LAWS_DOUBLE)


def samples(seed: int, *, quick: bool) -> Iterator[Probe]:
    """torch's samples; those with dropout are judged by its laws."""
    for case in opinfo_cases(seed):
        call = case.call
        checks: list[Check] = [tracing.fake, tracing.meta]
        if call.dropout:
            checks += [modes.dropout_mean, modes.dropout_seeded, modes.dropout_gradient]
        else:
            checks += [forward, noncontiguous, backward, tracing.vmapped]
            if call.query.dtype == torch.float64:
                checks.append(gradcheck)
            if not quick and call.query.dtype in COMPILED_DTYPES:
                checks.append(tracing.compiled)
        yield from (probe(check, case) for check in checks)


def grid(
    seed: int, *, quick: bool, every: bool = False, strength: int | None = None
) -> Iterator[Probe]:
    """Values of every case, gradients where the block has any."""
    for block in BLOCKS:
        for case in block.cases(seed, quick=quick, every=every, strength=strength):
            yield probe(forward, case)
            if "parallel" in case.marks:
                yield probe(modes.parallel, case)
            if case.leaves:
                yield probe(backward, case)
