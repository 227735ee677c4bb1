"""The bench harness: statistics on known numbers, gates, targets, peers, the command line."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated

import pytest
import typer

import bench.__main__ as command_line
from bench.harness import Bench, Comparison, Ratio, Sample, Target, measure, race

KEYS = {"name", "value", "unit", "peer", "ratio", "ratio_spread", "gate", "target", "met"}
KEYS |= {"n", "quick", "seed", "stat", "spread", "peer_value", "note", "extra", "versions"}


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_sample_statistics():
    sample = Sample(tuple(float(s) for s in range(1, 102)))
    assert (sample.n, sample.min, sample.max) == (101, 1.0, 101.0)
    assert sample.median == sample.p50 == 51.0
    assert sample.p99 == 100.0
    assert sample.mad == 25.0
    assert sample.iqr == (26.0, 76.0)


def test_ratio_is_the_median_of_paired_ratios():
    """A machine twice as slow in half of the rounds changes both sides, and not the ratio."""
    ours = Sample((1.0, 2.0, 1.0, 2.0, 1.0))
    peer = Sample((3.0, 6.0, 3.0, 6.0, 3.0))
    assert Ratio.of(ours, peer) == Ratio(3.0, 3.0, 3.0)
    noisy = Ratio.of(Sample((1.0,) * 5), Sample((2.0, 3.0, 4.0, 5.0, 6.0)))
    assert noisy.value == 4.0
    assert 2.0 <= noisy.low < 4.0 < noisy.high <= 6.0


@pytest.mark.parametrize("make", [lambda: Sample(()), lambda: Target.parse("about 3")])
def test_bad_values_are_named(make):
    with pytest.raises(ValueError, match=r"repeat must be|about 3"):
        make()
    with pytest.raises(ValueError, match="ours 1, peer 2"):
        Ratio.of(Sample((1.0,)), Sample((1.0, 2.0)))


def test_race_interleaves_warms_up_and_keeps_the_collector_out():
    order: list[str] = []
    states: list[bool] = []

    def contestant(name: str):
        return lambda: (order.append(name), states.append(gc.isenabled()))

    samples = race({"a": contestant("a"), "b": contestant("b")}, warmup=1, repeat=3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"
    assert {name: sample.n for name, sample in samples.items()} == {"a": 3, "b": 3}
    assert not any(states)
    assert gc.isenabled()


def test_setup_makes_a_fresh_argument_for_every_call():
    made: list[int] = []
    seen: list[int] = []

    def setup() -> int:
        made.append(len(made))
        return made[-1]

    measure(seen.append, setup=setup, warmup=2, repeat=3)
    assert seen == made == [0, 1, 2, 3, 4]


def test_calls_share_one_reading_of_the_clock():
    count = iter(range(1000))
    assert measure(lambda: next(count), warmup=0, repeat=2, calls=10, clock="thread").n == 2
    assert next(count) == 20


def test_json_line_of_a_comparison(capsys):
    bench = Bench(quick=True, as_json=True, seed=7)
    pair = Comparison(Sample((2e-6,) * 3), Sample((8e-6,) * 3), Ratio(4.0, 3.0, 5.0))
    bench.figure("append", pair, "us", gate=True, peer="cat", target="ratio >= 3.5", context=1024)
    (line,) = lines(capsys)
    assert set(line) == KEYS
    assert line["value"] == pytest.approx(2.0)
    assert line["peer_value"] == pytest.approx(8.0)
    assert (line["ratio"], line["ratio_spread"], line["met"]) == (4.0, [3.0, 5.0], True)
    assert (line["quick"], line["seed"], line["n"], line["gate"]) == (True, 7, 3, "green")
    assert line["extra"] == {"context": 1024}
    assert {"vattn", "python", "numpy", "kernel", "cpu", "commit"} <= line["versions"].keys()
    assert bench.exit_code == 0


def test_plain_numbers_and_missed_targets(capsys):
    bench = Bench(as_json=True)
    bench.figure("mapped", 120, "bytes", gate=True, peer="paged", peer_value=60, target="<= 100")
    (line,) = lines(capsys)
    assert (line["value"], line["ratio"], line["met"], line["n"]) == (120.0, 0.5, False, None)
    assert bench.exit_code == 0


def differs() -> None:
    raise AssertionError("row 3 differs")


@pytest.mark.parametrize(
    ("gate", "verdict"), [(False, "red"), (lambda: 0, "red"), (differs, "red: row 3 differs")]
)
def test_red_gate_hides_the_number(gate, verdict, capsys):
    bench = Bench(as_json=True)
    bench.figure("speed", lambda: pytest.fail("timed behind a red gate"), "us", gate=gate)
    bench.figure("size", 3.0, "bytes", gate=True)
    red, green = lines(capsys)
    assert red["value"] is None
    assert red["gate"] == verdict
    assert green["value"] == 3.0
    assert bench.exit_code == 1


def test_red_gate_hides_the_number_in_the_table(capsys):
    bench = Bench()
    bench.figure("speed", Sample((123.0,)), "s", gate=False)
    bench.show()
    shown = capsys.readouterr().out
    assert "hidden" in shown
    assert "123" not in shown


def test_missing_peer_is_said_not_hidden(capsys):
    bench = Bench(as_json=True)
    assert bench.peer("no_such_rival") is None
    assert bench.peer("json") is json
    bench.figure("plan", Sample((1e-6,)), "us", gate=True, peer="no_such_rival")
    printed = capsys.readouterr()
    assert "no_such_rival" in printed.err
    line = json.loads(printed.out)
    assert "ModuleNotFoundError" in line["note"]
    assert line["ratio"] is None


def test_nothing_measured_is_an_error_unless_a_reason_is_given():
    bench = Bench()
    assert bench.exit_code == 1
    bench.skip("no CUDA device")
    assert bench.exit_code == 0


def test_listing_reads_docstrings_without_importing(tmp_path):
    (tmp_path / "page.py").write_text('"""One line.\n\nMore."""\nimport nothing\ndef run(b): ...\n')
    (tmp_path / "harness.py").write_text('"""No run here."""\n')
    assert command_line.benches(tmp_path) == {"page": "One line."}


def test_command_line(capsys):
    with pytest.raises(SystemExit) as listed:
        command_line.main([])
    assert listed.value.code == 0
    with pytest.raises(SystemExit) as unknown:
        command_line.main(["no_such_bench"])
    assert unknown.value.code == 2
    assert "no_such_bench" in capsys.readouterr().err


def test_every_bench_has_a_first_line():
    assert all(command_line.benches().values())


def test_parameters_of_run_become_options(capsys):
    def run(
        bench: Bench,
        traces: Annotated[Path, typer.Option(help="Folder of traces.")] = Path("."),
        context: list[int] = [1024],  # noqa: B006
    ) -> None:
        """A figure made of its options."""
        value = sum(context) + len(traces.name)
        bench.figure("options", value, "tokens", gate=not bench.quick)

    def invoke(*options: str) -> int:
        app = typer.Typer(add_completion=False)
        app.command()(command_line.command(run))
        with pytest.raises(SystemExit) as done:
            app(list(options))
        return done.value.code

    assert invoke("--json", "--traces", "abc", "--context", "1", "--context", "2") == 0
    assert lines(capsys)[0]["value"] == 6.0
    assert invoke("--json", "--quick", "--seed", "5") == 1
    (line,) = lines(capsys)
    assert (line["value"], line["quick"], line["seed"]) == (None, True, 5)
