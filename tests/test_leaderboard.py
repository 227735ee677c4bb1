"""A runner over a cache that forgets is the model; scripts, recordings, gates are as they say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import freed, leaderboard
from bench.harness import Bench
from bench.kept import recording, roster, scripts
from bench.kept.cells import Cell, Cells, Key, Mean
from bench.kept.playing import EVERYTHING, apart, play, resized
from bench.kept.reading import Mark, Reading, read
from bench.kept.roster import Facts, Grain
from bench.toys.net import Sizes, Toy, dense
from vattn.eviction import SCORE
from vattn.evictor import EvictorError
from vattn.evictors.combined import Protected
from vattn.evictors.h2o import H2O
from vattn.evictors.snapkv import SnapKV
from vattn.evictors.streaming import Streaming

CONTEXT, VOCAB = 72, 320
GRAIN = Grain(2, 4, 8)


def toy(seed: int = 0) -> Toy:
    """Random weights, large enough for attention to be peaked."""
    made = Toy(Sizes(VOCAB, layers=2, width=32, head_dim=16, ffn=32), seed).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.q.weight.mul_(3)
            block.smear.fill_(0.3)
    return made


def script(net: Toy, *, batch: int = 3, questions: int = 2, length: int = 3) -> scripts.Script:
    """Random questions to random contexts."""
    rng = torch.Generator().manual_seed(5)
    context = torch.randint(VOCAB, (batch, CONTEXT), generator=rng)
    asked = torch.randint(VOCAB, (questions, batch, length), generator=rng)
    scored = torch.zeros_like(asked, dtype=torch.bool)
    scored[..., 1:] = True
    return scripts.Script(read(net, context), asked, scored)


def whole(net: Toy, some: scripts.Script) -> torch.Tensor:
    """What the model itself says where a token is to be known."""
    found = []
    for asked in some.asked:
        with torch.no_grad():
            logits = dense(net, torch.cat([some.prompt.ids, asked], 1))
        found.append(logits[:, CONTEXT - 1 : -1])
    return torch.stack(found)[some.scored]


# ---- the runner ----------------------------------------------------------------------------------
def test_a_reading_without_an_evictor_is_the_model():
    net = toy()
    some = script(net)
    ours, want = play(net, None, some), whole(net, some)
    assert (ours.logits - want).abs().max() < 1e-5 * want.abs().max()
    assert (ours.evicted, ours.held) == (0, CONTEXT)
    assert ours.footprint == 2 * ((CONTEXT + 1) + (CONTEXT + 2))


@pytest.mark.parametrize("name", ["H2O", "H2O, steps", "SnapKV", "TOVA", "PoolCounter", "AdaKV"])
def test_a_budget_of_everything_is_dense(name):
    net = toy()
    some = script(net)
    ours = play(net, roster.roster()[name](CONTEXT + 8, GRAIN, Facts(CONTEXT)), some)
    assert torch.equal(ours.logits, play(net, None, some).logits)
    assert ours.evicted == 0


def test_less_than_everything_is_held_and_seen():
    net = toy()
    some = script(net)
    known = play(net, None, some)
    ours = play(net, Streaming(budget=16, recent_tokens=4), some)
    assert ours.held == 16
    assert ours.evicted >= net.layers * net.kv_heads * 3 * (CONTEXT - 16)
    assert apart(ours.logits, known.logits) > 0.01
    # A question's two tokens drive out two others, and go.
    assert ours.footprint == 16 + 16 + 15 + 16
    assert apart(known.logits + 3, known.logits) < 1e-6  # of what softmax ignores nothing is seen


def test_a_rewound_question_leaves_no_trace():
    net = toy()
    some = script(net)
    reading = Reading(net, None, some.prompt, 4)
    start = reading.mark()
    first = reading.feed(some.asked[0, :, :1])
    reading.feed(some.asked[1, :, :2])
    reading.rewind(start)
    assert torch.equal(reading.feed(some.asked[0, :, :1]), first)
    reading.close()


def test_steps_count_from_the_end_of_a_prompt_that_was_rewound():
    net = toy()
    rng = torch.Generator().manual_seed(6)
    prompt = read(net, torch.randint(VOCAB, (2, CONTEXT), generator=rng))
    reading = Reading(net, Streaming(budget=24, recent_tokens=4, every=4), prompt, 4)
    reading.rewind(Mark(CONTEXT - 3, [part.hidden[:, -4:-3] for part in prompt.parts]))
    held = []
    for _ in range(4):
        reading.feed(torch.randint(VOCAB, (2, 1), generator=rng))
        held.append(reading.held())
    assert held == [22, 23, 24, 24]
    reading.close()


@pytest.mark.parametrize("name", ["H2O", "SnapKV", "PoolFifo", "KeyDiff", "Elastic", "CAKE"])
def test_what_was_watched_is_evicted_to_the_budget(name):
    net = scripts.toy("pairs")
    some = scripts.requery(net, 3, 2)
    evictor = roster.roster()[name](48, Grain(0, 0, 32), Facts(416))
    ours = play(net, evictor, some)
    assert 46 <= ours.held <= 48
    assert ours.asked == 2 * scripts.QUERIES


def test_a_wrapper_is_resized_by_its_base():
    found = resized(Protected(SnapKV(budget=40)), 100, 5)
    assert (found.budget, found.recent_tokens) == (100, 37)


# ---- scripts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1])
def test_queries_are_of_the_context_and_some_pairs_are_never_asked_for(seed):
    some = scripts.requery(toy(), seed, 40)
    asked = torch.cat([some.watched[..., 0], some.asked[..., 0]]).T
    counts = []
    for context, keys, row in zip(some.prompt.ids, asked, some.asked.transpose(0, 1), strict=True):
        for key, value in row.tolist():
            assert context[context.tolist().index(key) + 1] == value
        pairs = set(context[context < 128].tolist())
        assert len(pairs) == scripts.PAIRS
        assert len(pairs - set(keys.tolist())) >= scripts.PAIRS - scripts.ASKED_FOR
        counts.append(np.sort(np.bincount(keys))[::-1][:2] / len(keys))
    first, second = np.mean(counts, 0)
    shares = np.arange(1, scripts.ASKED_FOR + 1) ** -scripts.ZIPF
    assert abs(first - shares[0] / shares.sum()) < 0.06
    assert first > 1.4 * second


def test_scored_bytes_of_the_shipped_model_are_digits():
    from bench.toys.shipped import Shipped

    some = scripts.shipped_script(512)(Shipped(), 0, 2)
    assert some.asked.shape[:2] == some.scored.shape[:2] == (5, 2)
    known = some.asked[some.scored]
    assert bytes(known.tolist()).isdigit()
    assert some.context == 512


# ---- recordings ----------------------------------------------------------------------------------
def test_the_future_is_the_attention_of_the_questions():
    net = toy()
    some = script(net)
    future = recording.future(net, some)
    group = net.sizes.heads // net.kv_heads
    fed = some.asked.shape[0] * (some.asked.shape[2] - 1)
    assert torch.allclose(future.sum(-1), torch.tensor(float(fed * group)), rtol=1e-5)
    question = torch.cat([some.prompt.ids, some.asked[0, :, :1]], 1)
    other = torch.cat([some.prompt.ids, some.asked[1, :, :1]], 1)
    single = replace(some, asked=some.asked[:, :, :2], scored=some.scored[:, :, :2])
    want = torch.zeros(3, net.kv_heads, CONTEXT + 1, dtype=torch.float64)
    for ids in (question, other):
        part = read(net, ids).parts[0]
        q = part.query[:, :, -1:].double().unflatten(1, (net.kv_heads, group))
        scores = q @ part.key.double()[:, :, None].mT * part.key.shape[3] ** -0.5
        want += scores.softmax(-1).sum((2, 3)).detach()
    found = recording.future(net, single)[0, ..., : CONTEXT + 1]
    assert (found - want).abs().max() < 1e-4


def test_a_replay_has_the_most_attention_of_any_query():
    net = toy()
    prompt = script(net).prompt
    found = recording.replay(net, prompt)
    part = read(net, torch.cat([prompt.ids, prompt.ids], 1)).parts[1]
    group = part.query.shape[1] // part.key.shape[1]
    keys = part.key.double().repeat_interleave(group, 1)
    scores = part.query.double() @ keys.mT * part.key.shape[3] ** -0.5
    seen = torch.ones(2 * CONTEXT, 2 * CONTEXT, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, CONTEXT:, :CONTEXT]
    want = weights.amax(2).unflatten(1, (-1, group)).amax(2)
    assert (found[1] - want).abs().max() < 1e-5


def test_mass_of_steps_alone_forgets_the_prompt():
    net = toy()
    some = script(net)
    reading = Reading(net, H2O(budget=EVERYTHING, decode_only=True), some.prompt, 8)
    for token in some.asked[0].unbind(1):
        reading.feed(token[:, None])
    mass = reading.heads.track(1, SCORE).clone()
    reading.close()
    group = net.sizes.heads // net.kv_heads
    steps = some.asked.shape[2]
    # Each step's weights sum to 1 for each query head; the prompt's 32 queries add a millionth.
    assert (mass.sum(-1) - steps * group).abs().max() < 1e-3
    with torch.no_grad():
        everything = read(net, torch.cat([some.prompt.ids, some.asked[0]], 1)).parts[1]
    q = everything.query[:, :, -steps:].double().unflatten(1, (net.kv_heads, group))
    scores = q @ everything.key.double()[:, :, None].mT * everything.key.shape[3] ** -0.5
    seen = torch.ones(steps, CONTEXT + steps, dtype=torch.bool).tril(CONTEXT)
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1).sum((2, 3))
    assert (mass - want).abs().max() < 1e-3


def test_a_share_that_leaves_nothing_to_choose_is_refused():
    with pytest.raises(EvictorError, match=r"recent_share must be >= 0 and < 1, got 1\.0"):
        H2O(recent_share=1.0)


def test_every_policy_is_on_the_roster():
    assert roster.left_out() == []
    assert set(leaderboard.ORDER) | set(leaderboard.QUICK) <= roster.roster().keys()


# ---- the benchmarks ------------------------------------------------------------------------------
def test_a_quick_run_is_green_and_goes_on_from_its_state(tmp_path, capsys, monkeypatch):
    options = {
        "tasks": ["pairs"],
        "policies": ["H2O", "RandomTokens"],
        "state": str(tmp_path / "cells"),
        "plot": tmp_path / "plot.png",
    }
    pytest.importorskip("matplotlib")
    first = Bench(quick=True, as_json=True)
    leaderboard.run(first, **options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [line["name"].removeprefix("leaderboard/pairs/") for line in lines]
    assert names == ["dense", "H2O", "RandomTokens"]
    assert all(line["gate"] == "green" for line in lines), lines
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    played = []
    monkeypatch.setattr(leaderboard, "play", lambda *given: played.append(given[1]) or play(*given))
    second = Bench(quick=True, as_json=True)
    leaderboard.run(second, **options)
    assert [f.value for f in second.figures] == [f.value for f in first.figures]
    assert set(played) == {None}  # the gate alone


def mean(**numbers: float) -> Mean:
    known = {
        "right": 5,
        "asked": 10,
        "loss": 1.0,
        "held": 20.0,
        "evicted": 7,
        "returned": 0.5,
        "footprint": 0.5,
        "error": 0.1,
    }
    key = Key("pairs", "H2O", 20, 0, 2, 100)
    return Mean((Cell(key, **{**known, **numbers}),))  # type: ignore[arg-type]


def test_a_policy_that_evicts_nothing_or_holds_too_much_is_seen():
    plan = leaderboard.Plan(Bench(quick=True), leaderboard.TASKS["pairs"], 1, ["H2O"], 1)
    assert leaderboard.active(plan, "H2O", {20: mean()})
    with pytest.raises(AssertionError, match="nothing was evicted"):
        leaderboard.active(plan, "H2O", {20: mean(evicted=0)})
    with pytest.raises(AssertionError, match="rows held of 20"):
        leaderboard.active(plan, "H2O", {20: mean(held=22.0)})


def test_policies_out_of_order_turn_the_gate_red():
    names = leaderboard.ORDER
    board = {(n, leaderboard.JUDGED): mean(right=i + 1) for i, n in enumerate(names)}
    bench = Bench()
    leaderboard.order(bench, board)
    assert bench.figures[0].value == pytest.approx(10)
    board[names[2], leaderboard.JUDGED] = mean(right=9)
    leaderboard.order(bench, board)
    assert bench.figures[1].gate.startswith("red: PoolFifo 10.0")
    leaderboard.order(bench, {key: board[key] for key in list(board)[1:]})
    assert bench.figures[2].gate == "red: not on the roster: PoolFifo"


def test_cells_come_back_from_their_file(tmp_path):
    (cell,) = mean().cells
    Cells(tmp_path / "file").get(cell.key, lambda: cell)
    assert Cells(tmp_path / "file").found == {cell.key: cell}


def test_bytes_that_did_not_go_back_are_seen():
    good = freed.Freed(1000, 600, 300, 4, 100, 1e-5)
    assert good.check()
    for wrong, match in (
        (replace(good, pages=3), "3 pages"),
        (replace(good, dropped=0), "nothing was dropped"),
        (replace(good, apart=0.01), "masked reference"),
    ):
        with pytest.raises(AssertionError, match=match):
            wrong.check()
