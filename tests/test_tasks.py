"""The problems are what they say, reading side by side is decoding, and wrong readers are seen."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import tasks
from bench.harness import Bench
from bench.toys.net import HERE, Sizes, Toy, dense
from bench.toys.problems import PROBLEMS, Batch
from bench.toys.reading import Asked, answer, prefill
from vattn import KVCache, Layout
from vattn.policies import Exact, Nibbles, Quest
from vattn.selector import Selector
from vattn.sparse import SparseAttention

CONTEXT = 96
BUDGET = {"budget_tokens": 24, "sink_tokens": 0, "recent_tokens": 4}
SELECTORS = [Quest(page_tokens=4, **BUDGET), Nibbles(**BUDGET), Exact(**BUDGET)]


def drawn(name: str, context: int = CONTEXT, load: int = 6, seed: int = 0) -> Batch:
    return PROBLEMS[name].draw(np.random.default_rng(seed), 3, context, load, 4)


# ---- problems ------------------------------------------------------------------------------------
def solve(name: str, context: list[int], asked: list[int]) -> list[int]:
    """What a reader of the whole context says."""
    if name == "frequent":
        return sorted(set(context), key=context.count, reverse=True)[:1]
    told = []
    for _ in range(3 if name == "tracking" else 1):  # of a name's places the first says what it is
        place = context.index(asked[-1])
        told.append(context[place + 1])
        asked = told
    return told


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_context_says_the_answers(name, seed):
    batch, ask = drawn(name, seed=seed), PROBLEMS[name].ask
    for context, questions in zip(batch.context.tolist(), batch.questions.tolist(), strict=True):
        for question in questions:
            assert solve(name, context, question[:ask]) == question[ask:]


@pytest.mark.parametrize("name", PROBLEMS)
def test_tokens_are_in_the_vocabulary_and_the_same_for_a_seed(name):
    batch, again, other = drawn(name), drawn(name), drawn(name, seed=1)
    assert batch.context.shape == (3, CONTEXT)
    many = 1 if name == "frequent" else 4
    assert batch.questions.shape == (3, many, PROBLEMS[name].ask + PROBLEMS[name].tell)
    assert torch.equal(batch.context, again.context)
    assert not torch.equal(batch.context, other.context)
    for tokens in (batch.context, batch.questions):
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < PROBLEMS[name].vocab


# ---- reading -------------------------------------------------------------------------------------
def toy(seed: int = 0) -> Toy:
    """Random weights, large enough for attention to be peaked."""
    made = Toy(Sizes(320, layers=2, width=32, head_dim=16, ffn=32), seed).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.q.weight.mul_(3)
            block.smear.fill_(0.3)
    return made


def questions(seed: int = 0) -> Asked:
    batch = drawn("pairs", seed=seed)
    tokens = batch.questions.flatten(0, 1)
    of = torch.arange(3).repeat_interleave(4)
    return Asked(
        batch.context, of, tokens, torch.ones(12, dtype=int), torch.full((12,), 2, dtype=int)
    )


def test_a_question_behind_a_context_is_one_text():
    net, asked = toy(), questions()
    ours = answer(net, prefill(net, asked.context), asked, None)
    with torch.no_grad():
        whole = dense(net, torch.cat([asked.context[asked.of], asked.tokens], 1))[:, CONTEXT:]
    assert (ours.logits - whole).abs().max() < 1e-5 * whole.abs().max()
    assert torch.equal(ours.right, whole[:, 0].argmax(-1) == asked.tokens[:, 1])
    assert ours.read == ours.there


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda each: type(each).__name__)
def test_reading_side_by_side_is_decoding_one_token_after_the_other(selector):
    net, asked = toy(), questions()
    known = prefill(net, asked.context)
    ours = answer(net, known, asked, selector)
    assert 0 < ours.read < 0.27 * ours.there
    for row in (0, 5, 11):
        layout = Layout(net.layers, net.kv_heads, 16, 256, dtype="float32", page_bytes=4096)
        cache = KVCache(layout, slots=1)
        sequence, sparse = cache.open(), SparseAttention(cache, selector)
        with torch.no_grad():
            logits = decoded(net, known, asked, row, cache, sequence, sparse)
        assert (logits - ours.logits[row]).abs().max() < 1e-4 * logits.abs().max()
        assert sparse.activity()[0].share < 0.27
        sparse.close()
        cache.close()


def decoded(net, known, asked, row, cache, sequence, sparse) -> torch.Tensor:
    """Logits [L, vocabulary] of a question's tokens, one step each, over the engine's cache."""
    context = int(asked.of[row])
    before = [last[context : context + 1] for last in known.last]
    for layer in range(net.layers):
        keys, values = (side[layer][context : context + 1] for side in (known.keys, known.values))
        cache.append(layer, keys, values, [sequence])
    found = []
    for at, token in enumerate(asked.tokens[row]):
        hidden = net.embed(token.view(1, 1))
        for layer in range(net.layers):
            q, k, v = net.project(layer, hidden, CONTEXT + at, before[layer])
            before[layer] = hidden
            cache.append(layer, k, v, [sequence])
            out = sparse.attend(q, cache.view([sequence]), layer)
            hidden = net.finish(layer, hidden, out)
        found.append(net.logits(hidden)[0, 0])
    return torch.stack(found)


def test_a_budget_of_everything_reads_everything():
    net, asked = toy(), questions()
    known = prefill(net, asked.context)
    plain, whole = (
        answer(net, known, asked, each) for each in (None, replace(SELECTORS[2], budget_tokens=200))
    )
    assert torch.equal(plain.logits, whole.logits)
    assert whole.read == whole.there


# ---- toys ----------------------------------------------------------------------------------------
def test_weights_come_back_from_their_file(tmp_path):
    net = toy()
    net.save(tmp_path / "toy.npz")
    again = Toy.load(tmp_path / "toy.npz")
    assert again.sizes == net.sizes
    for name, weights in net.state_dict().items():
        rounding = weights.abs().amax(-1, keepdim=True) / 127 if weights.dim() == 2 else 1e-3
        assert ((again.state_dict()[name] - weights).abs() <= 0.6 * rounding + 1e-4).all(), name


def test_the_toys_are_small():
    assert sum(path.stat().st_size for path in HERE.glob("*.npz")) < 500_000
    assert {path.stem for path in HERE.glob("*.npz")} == set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_toy_solves_its_problem_and_reading_by_chance_does_not(name):
    task = tasks.task_of(name)
    asked = task.ask(5, 3)
    known = prefill(task.net, asked.context)
    right = answer(task.net, known, asked, None).right.float().mean()
    assert right >= tasks.LEAST_RIGHT
    chance = tasks.selectors(task, tasks.TOY_CONTEXT // tasks.JUDGED)[tasks.CHANCE]
    if name != "frequent":  # of which any sample says something
        assert answer(task.net, known, asked, chance).right.float().mean() < tasks.BY_CHANCE


# ---- the benchmark -------------------------------------------------------------------------------
def test_a_quick_run_is_green_and_goes_on_from_its_state(tmp_path, capsys, monkeypatch):
    state = tmp_path / "cells"
    first = Bench(quick=True, as_json=True)
    tasks.run(first, only=["pairs"], state=str(state))
    assert first.exit_code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["name"] == "tasks/pairs/dense"
    assert lines[-1]["name"] == f"tasks/pairs/loss_of_best/{tasks.JUDGED}"
    assert all(line["gate"] == "green" for line in lines)
    asked: list[Selector | None] = []
    monkeypatch.setattr(tasks, "answer", lambda *given: asked.append(given[3]) or answer(*given))
    second = Bench(quick=True, as_json=True)
    tasks.run(second, only=["pairs"], state=str(state))
    assert [f.value for f in second.figures] == [f.value for f in first.figures]
    assert set(asked) == {None}  # the gate alone


def cells(**numbers: int) -> list[tasks.Cell]:
    known = {"right": 9, "asked": 10, "read": 10, "there": 100, "share": 8, **numbers}
    return [tasks.Cell("pairs", "quest", seed=0, **known)]


@pytest.mark.parametrize(("read", "match"), [(0, "budget"), (13, "budget"), (100, "budget")])
def test_a_selector_that_reads_nothing_or_too_much_is_seen(read, match):
    assert tasks.active(cells(read=12))()
    with pytest.raises(AssertionError, match=match):
        tasks.active(cells(read=read))()


def test_a_model_that_is_wrong_and_a_task_that_chance_solves_are_seen():
    def judged(dense_right: int, chance_right: int) -> bool:
        some = cells(right=dense_right, share=1) + cells(right=chance_right)
        named = [replace(c, selector=n) for c, n in zip(some, ("dense", "random"), strict=True)]
        return tasks.check(tasks.task_of("pairs"), named)()

    assert judged(10, 2)
    with pytest.raises(AssertionError, match=r"right in 0\.800"):
        judged(8, 2)
    with pytest.raises(AssertionError, match=r"chance answers 0\.600"):
        judged(10, 6)
