"""Policies at the command line: what is listed, what --policy keeps, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import vattn.evictors
import vattn.policies
from tests.cli import complaint, run_json, runner
from vattn.cli import app
from vattn.evictor import Evictor, EvictorError
from vattn.evictors import H2O, SnapKV
from vattn.evictors.names import evictor, named
from vattn.generate import Generator
from vattn.keeps import HELD
from vattn.kept_picture import colours, mixed
from vattn.names import kebab
from vattn.policies.names import named as selectors
from vattn.request import Request
from vattn.selector import Selector

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator() -> Generator:
    """Our model and 160 tokens of a prompt, to run with one policy after the other."""
    return Generator(Request(context=160, new_tokens=3, policy="h2o", dtype="float32"))


# ---- names ---------------------------------------------------------------------------------------
def test_names_are_those_of_the_classes():
    assert kebab("SlidingWindow") == "sliding-window"
    assert kebab("SnapKV") == "snapkv"
    assert {"h2o", "snapkv", "streaming", "sliding-window"} <= set(named())
    assert evictor("h2o", 0.25) == H2O(budget=0.25)
    assert evictor("snapkv", 128) == SnapKV(budget=128)
    assert evictor("snapkv") == SnapKV()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(EvictorError) as found:
        evictor("quest")
    assert all(name in str(found.value) for name in named())


def test_all_policies_are_listed():
    listed = run_json("policies")["policies"]
    for module, base, kind in (
        (vattn.evictors, Evictor, "evictor"),
        (vattn.policies, Selector, "selector"),
    ):
        classes = (getattr(module, name) for name in module.__all__)
        want = {kebab(c.__name__) for c in classes if isinstance(c, type) and issubclass(c, base)}
        assert {row["name"] for row in listed if row["kind"] == kind} == want
    for row in listed:
        assert all(row[field] for field in ("scores", "source", "evidence")), row
        assert row["grain"] in ("token", "page")
        assert row["returns_memory"] == (row["kind"] != "selector")
    usable = {row["name"]: row["option"] for row in listed if row["option"]}
    assert usable == {
        **dict.fromkeys(selectors(), "--select"),
        **dict.fromkeys(named(), "--policy"),
        "lorc": "--lorc",
    }


def test_policies_for_people_name_paper_and_grain():
    done = runner.invoke(app, ["policies"])
    assert done.exit_code == 0
    words = done.stdout.split()
    assert {"h2o", "quest", "2306.14048", "token", "page"} <= set(words)


# ---- generating ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(named()))
def test_every_policy_generates(generator, name):
    policy = evictor(name, 0.5)
    generator.policy = policy
    run = generator.run("vattn")
    kept = run.cache.kept()
    assert len(kept) == 5
    assert run.tokens.shape == (1, 3)
    assert all(layer.seen == 162 for layer in kept)
    if not policy.adaptive:
        # Half of the prompt on average, and at most the steps' tokens more.
        chosen = [x.held for i, x in enumerate(kept) if i not in policy.dense_layers]
        assert 72 <= np.mean(chosen) <= 83, (name, [layer.held for layer in kept])
    run.cache.kv.check()


@pytest.mark.parametrize(("budget", "rows"), [("25%", 100), ("64", 64)])
def test_generate_reports_what_was_kept(budget, rows):
    options = ["--context", 400, "--max-new-tokens", 5, "--policy", "h2o", "--budget", budget]
    report = run_json("generate", *options, "--page-bytes", 4096)
    assert [layer["held"] for layer in report["kept"]] == [rows] * 5
    assert all(layer["share"] == rows / 404 for layer in report["kept"])
    memory = report["memory"]
    assert memory["used_bytes"] == rows * 5 * 2 * 2 * 32 * 4  # 5 layers, 2 heads, K and V
    full = run_json("generate", "--context", 400, "--max-new-tokens", 5, "--page-bytes", 4096)
    assert memory["mapped_bytes"] < full["memory"]["mapped_bytes"] / 2
    assert "kept" not in full


def test_with_room_for_all_the_tokens_are_those_of_the_stock_cache():
    options = ["--context", 200, "--max-new-tokens", 20, "--policy", "snapkv", "--budget", "100%"]
    report = run_json("generate", *options, "--compare")
    assert report["compare"]["identical"]


def test_a_padded_batch_is_drawn_and_told(tmp_path):
    picture = tmp_path / "kept.png"
    prompts = [
        "--prompt",
        "It is a truth universally acknowledged " * 4,
        "--prompt",
        "A single man",
    ]
    options = ["--max-new-tokens", 6, "--policy", "streaming", "--budget", 40, "--plot", picture]
    done = runner.invoke(app, ["generate", *map(str, [*prompts, *options])])
    assert done.exit_code == 0, done.output + done.stderr
    assert picture.read_bytes()[1:4] == b"PNG"
    assert "Tokens kept" in done.stdout
    assert "plot written to" in done.stdout


def test_the_log_of_what_is_kept_is_what_the_heads_hold(generator):
    generator.policy = evictor("h2o", 40)
    run = generator.run("vattn", curve=True)
    log, heads = run.keeps, run.cache.store.kept.heads
    assert log.tokens == [160, 161, 162]
    assert log.rows == [40, 40, 40]
    assert log.gone.shape == (5, 2, 162)
    for layer in range(5):
        for h, (at, count) in enumerate(
            zip(heads.positions(layer)[0], heads.lengths(layer)[0], strict=True)
        ):
            held = np.flatnonzero(log.gone[layer, h] == HELD).tolist()
            assert held == sorted(at[:count].tolist())
            went = log.gone[layer, h]
            assert [(went == step).sum() for step in (0, 1, 2)] == [120, 1, 1]


def test_colours_tell_kept_dropped_early_and_late_apart():
    shown = colours(np.array([[np.inf, 0.0, 0.1, 1.0]]))
    assert len({tuple(each) for each in shown[0].round(3).tolist()}) == 4
    assert shown[0, 3].sum() < shown[0, 2].sum()  # later is darker
    wide = np.repeat(shown, 500, axis=1)
    assert mixed(wide, 100).shape == (1, 100, 3)
    assert np.allclose(mixed(wide, 100).mean(1), wide.mean(1))
    assert mixed(shown, 100) is shown


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "h2o", "--select", "quest"), "pass one"),
        (("--policy", "h2o", "--attn", "sdpa"), "--attn vattn"),
        (("--policy", "h2o", "--cache", "dynamic"), "--cache vattn"),
        (("--policy", "h2o", "--host-tier", "4M"), "--host-tier"),
        (("--policy", "h2o", "--snapshot", "x.pickle"), "--snapshot"),
        (("--policy", "h2o", "--budget", "many"), "such as 25%"),
        (("--policy", "h2o", "--budget", "0"), "budget"),
        (("--policy", "snapkv", "--budget", "8"), "budget must be >= 32"),
        (("--policy", "quest"), "snapkv"),
        (("--budget", "10%"), "name a selector or a policy"),
    ],
)
def test_bad_options_are_named(options, words):
    assert words in complaint("generate", "--prompt", "It is a truth", *options)
