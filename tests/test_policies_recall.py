"""The scenes that indexes are compared on are what they claim, and the comparison sees a cheat."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import recall_scene
from bench.indexes import FORCED, INDEXES
from bench.recall_scene import Contest
from bench.recorded import SETTINGS, Scene, neighbours, rotary, synthetic
from vattn.kernels import sparse
from vattn.kernels.kv import KV
from vattn.kernels.selection import reference
from vattn.policies import Exact, Window
from vattn.policies.members import every_page

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, QUERIES = 512, 3


@pytest.fixture(scope="module")
def scene() -> Scene:
    return synthetic("plain", TOKENS, QUERIES, 5)


def test_a_scene_has_outliers_a_sink_and_no_look_ahead(scene: Scene) -> None:
    assert scene.query.shape[:2] == (QUERIES, 8)
    assert int(scene.places.max()) < TOKENS
    spread = scene.key[:, 1:].square().mean(1).sqrt()
    setting = SETTINGS["plain"]
    assert bool((spread.amax(1) > setting.loud / 4 * spread.median(1).values).all())
    share = Contest(scene).weight[..., 0].mean()
    assert setting.sink / 3 < float(share) < 3 * setting.sink
    again, other = (synthetic("plain", TOKENS, QUERIES, seed) for seed in (5, 6))
    assert torch.equal(again.key, scene.key)
    assert not torch.equal(other.key, scene.key)
    assert not torch.equal(scene.known_keys, scene.key)


def test_neighbours_are_as_alike_as_was_asked() -> None:
    x = neighbours(2, 4000, 0.9, torch.Generator().manual_seed(1))
    assert float(x.var()) == pytest.approx(1, abs=0.1)
    assert float((x[:, 1:] * x[:, :-1]).mean()) == pytest.approx(0.9, abs=0.1)


def test_the_rotary_embedding_keeps_what_depends_on_distance() -> None:
    a, b = torch.randn(2, 1, 16)
    near = rotary(a, torch.tensor([3]), 1e4) @ rotary(b, torch.tensor([10]), 1e4).T
    far = rotary(a, torch.tensor([103]), 1e4) @ rotary(b, torch.tensor([110]), 1e4).T
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_the_dense_weights_are_those_of_the_definition(scene: Scene) -> None:
    contest = Contest(scene)
    lengths = scene.places + 1
    kv = KV(scene.key[None], scene.value[None], lengths, slots=torch.zeros_like(lengths))
    whole = every_page(contest.look((), 1), 1, 2)
    out, _, mass = reference(scene.query[:, :, None], kv, whole)
    torch.testing.assert_close(
        contest.out.flatten(1, 2), out[:, :, 0].float(), rtol=1e-3, atol=1e-4
    )
    longest = mass.shape[-1]
    torch.testing.assert_close(
        contest.weight.sum(2)[..., :longest], mass.float(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", INDEXES)
def test_every_index_takes_part(name: str, scene: Scene) -> None:
    contest = Contest(scene)
    best = contest.found(INDEXES["Exact"](scene), [128], None)
    (found,) = contest.found(INDEXES[name](scene), [128], best)
    assert not found.wrong
    assert 0 < found.recall <= 1.001
    assert 0 < found.read <= 1


def test_all_queries_at_once_choose_as_one_by_one(scene: Scene) -> None:
    contest = Contest(scene)
    for name in ("Quest 16", "Graded 8+80", "Exact"):
        selector = INDEXES[name](scene)(96)
        parts = contest.index(selector)
        found = contest.chosen(selector, parts)
        exact = selector.select(scene.query[:, :, None], contest.look(parts, selector.page_tokens))
        assert exact is not None
        masses = [contest.weighed(s, 96, None).mass for s in (found, exact)]
        assert masses[0] == pytest.approx(masses[1], abs=1e-3)


def test_a_choice_beyond_the_budget_is_seen(scene: Scene) -> None:
    contest = Contest(scene)
    greedy = Window(budget_tokens=96, page_tokens=1, **FORCED)
    found = contest.weighed(contest.chosen(greedy, ()), 64, None)
    assert found.wrong == "96 tokens of 64"


def test_more_mass_than_the_best_has_is_seen(scene: Scene) -> None:
    contest = Contest(scene)
    (best,) = contest.found(INDEXES["Exact"](scene), [64], None)
    (found,) = contest.found(lambda budget: Exact(budget_tokens=128, **FORCED), [128], [best])
    assert "of the best" in found.wrong


def test_a_kernel_that_reads_other_tokens_is_seen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(query, kv, selection, **options):
        wrong = dataclasses.replace(selection, ids=(selection.ids - 1).clamp_min(0))
        return sparse.gathered(query, kv, wrong, **options)

    monkeypatch.setattr(recall_scene.sparse, "attend", shifted)
    (found,) = Contest(scene).found(INDEXES["Exact"](scene), [64], None)
    assert "log-sum-exp of the kernel" in found.wrong
