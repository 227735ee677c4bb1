"""The conformance suite: vattn passes, right implementations pass, flawed ones do not."""

from __future__ import annotations

import itertools
import json
import secrets

import pytest
import torch
import typer

from bench import sdpa_contract
from bench.contract import FLAWS, HONEST, examine, mutate, suite
from bench.contract.call import FLOATS, Call, exact
from bench.contract.cases import Probe
from bench.contract.forced import KERNELS, TORCHS, Forced, thinned, triton
from bench.contract.grid import covering
from bench.contract.inputs import LAYOUTS, Random, laid_out
from bench.contract.judge import Differs, close
from bench.contract.suite import BLOCKS
from bench.harness import Bench
from vattn import scaled_dot_product_attention

SEED = secrets.randbits(31)
SLOW = {*sdpa_contract.COMPILING, "double_backward", "forward_mode"}


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    """The quick suite with a fresh seed, without torch's samples, which take seconds to import."""
    print("seed", SEED)
    return list(suite(SEED, quick=True, families=("refusals", "laws", "grid")))


def forward_only(probes: list[Probe]) -> list[Probe]:
    return [p for p in probes if p.family == "grid" and p.check in ("forward", "parallel")]


# ---- implementations -----------------------------------------------------------------------------
def test_vattn_is_torchs_function(probes):
    report = examine(scaled_dot_product_attention, probes, SEED)
    assert not report.differences, report.digest()
    assert set(report.checks) == {"refusals", "laws", "grid"}


@pytest.mark.parametrize("forced", KERNELS, ids=lambda forced: forced.impl)
def test_kernels_by_name_give_torchs_values(forced: Forced, probes):
    forced.forget()
    report = examine(forced, forward_only(probes), SEED)
    assert not report.differences, report.digest()
    if forced.impl != "stream":  # which needs numba
        assert forced.served > 200


@pytest.mark.parametrize("name", ["identity", "rounding"])
def test_right_implementations_pass(name: str, probes):
    """The tolerance is fair: to torch itself, and to a blockwise kernel with rounded weights."""
    chosen = [p for p in probes if (p.family == "grid") is (name != "identity")]
    chosen = [p for p in chosen if p.check not in (*SLOW, "parallel")][::2]
    report = examine(HONEST[name], chosen, SEED)
    assert not report.differences, report.digest()


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_is_seen(name: str, probes):
    (verdict,) = mutate([p for p in probes if p.check not in SLOW], SEED, [FLAWS[name]])
    assert verdict.seen is not None, f"{name} passes the whole suite, seed {SEED}"
    assert f"--seed {SEED}" in str(verdict)


def test_torchs_samples_are_those_of_its_own_tests():
    pytest.importorskip("expecttest", reason="torch's test samples need it")
    from bench.contract.samples import opinfo_cases

    cases = [case for case in opinfo_cases(SEED) if case.name.startswith("torch")]
    assert len(cases) >= 4 * 25
    assert {case.call.query.dtype for case in cases} == set(FLOATS)


# ---- the command ---------------------------------------------------------------------------------
def test_a_difference_turns_the_command_red_and_its_label_runs_it_again(capsys):
    name = "tests.test_contract:nan_rows"
    bench = Bench(quick=True, as_json=True, seed=SEED)
    sdpa_contract.run(bench, impl=name, only="grid/mask_entries")
    printed = capsys.readouterr()
    differences, checks, _ = (json.loads(line) for line in printed.out.splitlines())
    assert bench.exit_code == 1
    assert differences["value"] > 0
    assert not differences["met"]
    assert checks["gate"].startswith("red")
    label = differences["extra"]["labels"][name][0]
    assert f"{label} --seed {SEED}" in printed.err
    again = Bench(as_json=True, seed=SEED)
    sdpa_contract.run(again, impl=name, only=label)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["value"] == 1


def nan_rows(*args, **options):
    """torch's function with one flaw, to be named on the command line."""
    flaw = FLAWS["NaN rows where nothing is attended"]
    tensors = dict(zip(("query", "key", "value"), args, strict=True))
    names = {"mask": "attn_mask", "dropout": "dropout_p", "causal": "is_causal"}
    names |= {"scale": "scale", "gqa": "enable_gqa"}
    return flaw.compute(Call(**tensors, **{n: options[theirs] for n, theirs in names.items()}))


@pytest.mark.parametrize(
    "impl", ["torch", "torch:", "no_such_module:f", "torch:nothing", "math:pi"]
)
def test_a_wrong_name_is_said(impl: str):
    with pytest.raises(typer.BadParameter, match=impl.partition(":")[0]):
        sdpa_contract.load(impl)


# ---- what the suite is made of -------------------------------------------------------------------
def test_quick_cases_hold_every_pair_of_values_of_the_full_grid():
    for block in BLOCKS:
        full = list(block.combinations())
        some = covering(full, 2, Random(SEED, block.name))
        pairs = [
            {p for each in part for p in itertools.combinations(map(str, each.items()), 2)}
            for part in (full, some)
        ]
        assert pairs[0] == pairs[1], block.name
        assert len(some) < len(full) or len(full) < 40


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_layouts_change_where_values_lie_and_nothing_else(layout: str):
    values = Random(SEED, layout).normal(2, 3, 5, 4)
    assert torch.equal(laid_out(values, layout), values)


def test_a_case_is_the_same_whenever_it_is_drawn():
    block = BLOCKS[0]
    values = next(v for v in block.combinations() if v["L"] == 3)
    first, second = (block.case(values, SEED).call for _ in range(2))
    assert torch.equal(first.query, second.query)
    assert not torch.equal(first.query, block.case(values, SEED + 1).call.query)


def test_truth_is_the_definition():
    query, key, value = (Random(SEED, "truth").normal(3, 4).double() for _ in range(3))
    keep = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    out = exact(Call(query, key, value, keep, scale=0.3))
    for row in range(3):
        weights = [torch.exp(query[row] @ key[s] * 0.3) * keep[row, s] for s in range(3)]
        total = sum(w * value[s] for s, w in enumerate(weights))
        torch.testing.assert_close(out[row], total / sum(weights) if row != 1 else 0 * total)


NAN = float("nan")


@pytest.mark.parametrize(
    ("out", "native", "truth", "fine"),
    [
        (1.0, 1.0, 1.0, True),
        (1.1, 1.0, 1.0, False),
        (1.02, 1.01, 1.0, True),  # torch is 0.01 off
        (1.5, 1.4, 1.0, False),  # torch is far off: that is no licence
        (NAN, 1.0, 1.0, False),
        (NAN, NAN, 1.0, True),  # torch leaks a NaN: leaking it
        (1.0, NAN, 1.0, True),  # and hiding it are both right
        (1.0, NAN, NAN, False),
        (1.0, 1.0, NAN, True),
        (float("inf"), 1.0, 1.0, False),
    ],
)
def test_judgement(out: float, native: float, truth: float, fine: bool):
    given = [torch.tensor([each, 1.0]) for each in (out, native, truth)]
    try:
        close(given[0], given[1], given[2].double())
        passed = True
    except Differs:
        passed = False
    assert passed is fine


# ---- the Triton kernels, interpreted -------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_triton_by_name_gives_torchs_values_and_gradients():
    """A part of `--impl triton --quick`, drawn anew every time."""
    families = ("laws", "grid")
    few = thinned(suite(SEED, quick=True, strength=1, families=families), quick=True)
    few = few[SEED % 8 :: 8]
    grid, laws = ([p for p in few if p.family == family] for family in ("grid", "laws"))
    triton.forget()
    reports = [examine(triton, grid, SEED)]
    # Of all of the grid's calls it is half at least (`sdpa_contract/served`); these are 20 or 30.
    assert triton.share > sdpa_contract.LEAST_SHARE / 2
    reports.append(examine(triton, laws, SEED))
    for report in reports:
        assert not report.differences, report.digest()


def test_what_is_thinned_out_is_torchs_or_large(probes):
    kept = {each.label for each in thinned(probes)}
    for each in probes:
        gone = each.check in TORCHS or each.name.startswith(("long", "large"))
        assert (each.label in kept) is not (gone or "float64" in each.name)
