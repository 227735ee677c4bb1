"""The benchmarks themselves: all load, the cheap ones run, and a wrong result turns a gate red."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import torch

import bench.__main__ as command_line
from bench import alias, hf_generate, model_card, plan_step, waste
from bench.harness import Bench
from bench.workload import Request
from vattn import KVCache, Layout
from vattn.sequence import Sequence

EXPECTED = {"alias", "hf_generate", "import_time", "model_card", "page", "plan_step", "reserve"}
EXPECTED |= {"decode_cpu", "gather", "sdpa_contract", "sdpa_dropin", "waste"}
ON_DEVICE = {"append", "cascade", "decode", "gpu_vmm", "masked", "prefill"}
EXPECTED |= ON_DEVICE | {"aot", "roofline"}


def test_every_bench_of_the_project_is_listed():
    assert command_line.benches().keys() >= EXPECTED


@pytest.mark.parametrize("name", sorted(command_line.benches()))
def test_every_bench_loads_and_says_what_it_does(name):
    module = importlib.import_module(f"bench.{name}")
    assert module.__doc__
    first, *others = inspect.signature(module.run, eval_str=True).parameters.values()
    assert first.annotation is Bench
    assert all(option.default is not inspect.Parameter.empty for option in others)


@pytest.fixture
def few_rounds(monkeypatch):
    """Figures are made and judged as ever; how exact they are does not matter here."""
    race = Bench.race

    def short(bench, contestants, *, repeat=30, **options):
        return race(bench, contestants, repeat=min(repeat, 10), **options)

    monkeypatch.setattr(Bench, "race", short)


@pytest.mark.parametrize("name", ["page", "plan_step", "reserve"])
def test_cheap_benches_run(name, few_rounds, capsys):
    bench = Bench(quick=True, as_json=True)
    importlib.import_module(f"bench.{name}").run(bench)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines
    for line in lines:
        assert line["gate"] == "green", line
        assert line["name"].startswith(name)
        assert line["value"] > 0
        assert line["quick"] is True
        assert line["unit"] in ("us", "ms")
        assert (line["met"] is None) == (line["target"] is None)
    assert bench.exit_code == 0


@pytest.mark.parametrize("name", sorted(ON_DEVICE))
def test_a_bench_for_a_device_says_what_is_known_without_one(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = Bench(quick=True, as_json=True)
    importlib.import_module(f"bench.{name}").run(bench)
    assert bench.skipped.startswith("torch sees no CUDA device")
    assert bench.exit_code == 0
    names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert all(each.startswith(("roofline/", "compiled/")) for each in names)


# ---- red gates -----------------------------------------------------------------------------------
def test_a_plan_that_forgets_a_sequence_is_seen(monkeypatch):
    plan = KVCache.plan

    def forgetful(self, batch, tokens=1, **options):
        found = plan(self, batch, tokens, **options)
        return found if found is None else found._replace(slots=found.slots[1:], to=found.to[1:])

    assert plan_step.agrees(Bench(), 64, shuffled=True)
    monkeypatch.setattr(KVCache, "plan", forgetful)
    with pytest.raises(AssertionError):
        plan_step.agrees(Bench(), 64, shuffled=True)


def test_a_prefix_that_is_not_shared_is_seen(monkeypatch):
    def copied(self, tokens):
        child = self.cache.open()
        self.cache.extend([child], tokens)
        self.cache.commit([child], tokens)
        return child

    layout = Layout.all_layers(*alias.SHAPE_8B, 2 * alias.TOKENS, page_bytes=2 << 20)
    monkeypatch.setattr(Sequence, "share", copied)
    with pytest.raises(AssertionError, match="shared"):
        alias.shares(Bench(), layout, alias.TOKENS)


def test_bytes_that_are_counted_wrongly_are_seen(monkeypatch):
    requests = [Request(0.0, 100, 3), Request(0.1, 50, 3)]
    layout = Layout(1, 2, 64, 128)
    monkeypatch.setattr(Layout, "waste", lambda self, tokens: 0)
    verdict = waste.attempt(waste.Replay(layout, requests, audit=waste.count, audits=2))
    assert verdict.startswith("AssertionError")


@pytest.mark.parametrize("dtype", hf_generate.DTYPES)
def test_a_cache_with_one_wrong_row_is_seen(dtype):
    contest = hf_generate.Contest(Bench(), layers=2, tokens=96, dtype=dtype)
    assert contest.agree(2)
    assert contest.counts()
    with torch.no_grad():
        contest.caches["vattn"].layers[1].keys[:, :, 40] *= -1
    with pytest.raises(AssertionError):
        contest.agree(2)


def test_the_model_evaluation_is_calibrated():
    text = bytes(range(32, 127)) * 4
    assert model_card.seer(text)(torch.tensor([list(text[:-1])])).argmax(-1)[0].tolist() == list(
        text[1:]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grow", "ipc", "budget"])
def test_benches_of_the_allocator_have_green_gates(name, few_rounds, capsys):
    bench = Bench(quick=True, as_json=True)
    importlib.import_module(f"bench.{name}").run(bench)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert bench.skipped or lines
    assert all(line["gate"] == "green" for line in lines), lines
