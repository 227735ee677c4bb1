"""A decode step at its budget: what is dropped, and what takes its place."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from vattn.kernels import evict, stream

SHAPES = [(1, 1, 1), (1, 8, 300), (3, 2, 65)]


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(stream, "available", lambda: "not wanted")
    elif stream.available() is not None:
        pytest.skip(str(stream.available()))


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 3, 4, 8), (1, 8, 7, 301)])
def test_mass_is_the_sum_of_attention(shape: tuple[int, int, int, int], way: None) -> None:
    logits = torch.randn(shape) * 4
    logits[..., 1:].masked_fill_(torch.rand(*shape[:3], shape[3] - 1) < 0.3, -torch.inf)
    lse, shares = logits.logsumexp(-1), torch.rand(shape[2])
    exact = (logits.double().softmax(-1) * shares[:, None]).sum(2)
    found = evict.mass(logits, lse, shares)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-6 * shape[2], rtol=0)


def wanted(score: Tensor, forced: Tensor, positions: Tensor, count: int) -> int:
    """One head, read off the definition."""
    free = [i for i in range(count) if not forced[i] and score[i] < torch.inf]
    if free:
        lowest = min(float(score[i]) for i in free)
        return max(i for i in free if float(score[i]) == lowest)
    return min(range(count), key=lambda i: int(positions[i]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["any", "equals", "all forced", "some forced", "inf and nan"])
def test_the_least_of_the_others(kind: str, shape: tuple[int, int, int], way: None) -> None:
    room = torch.randn(*shape[:2], shape[2] + 5)
    if kind == "equals":
        room = room.round()
    if kind == "inf and nan":
        room[torch.rand(room.shape) < 0.4] = torch.inf
        room[torch.rand(room.shape) < 0.4] = torch.nan
    score = room[..., : shape[2]]  # strided, as tracks are
    share = {"all forced": 1.1, "some forced": 0.7}.get(kind, 0.0)
    forced = torch.rand(shape) < share
    counts = torch.randint(1, shape[2] + 1, shape[:2])
    positions = torch.rand(shape).argsort(-1) * 3
    before = [t.clone() for t in (score, forced, counts, positions)]
    last = torch.full(shape[:1], 3 * shape[2])
    found = evict.least(score, counts, positions, 0, last, forced)
    for b in range(shape[0]):
        for h in range(shape[1]):
            line = score[b, h], forced[b, h], positions[b, h], int(counts[b, h])
            assert found[b, h] == wanted(*line)
    for now, then in zip((score, forced, counts, positions), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


def test_expanded_masks_and_scores(way: None) -> None:
    score, counts = torch.randn(2, 1, 9).expand(2, 4, 9), torch.full((2, 4), 9)
    forced = torch.zeros(1, 1, 1, dtype=torch.bool).expand(2, 4, 9)
    positions = torch.arange(9).expand(2, 4, 9)
    last = torch.full((2,), 9)
    found = evict.least(score, counts, positions, 0, last, forced)
    assert torch.equal(found, score.argmin(-1))


def test_ends_of_the_text_stay(way: None) -> None:
    score, counts = torch.randn(2, 3, 90), torch.randint(20, 91, (2, 3))
    positions, last = torch.rand(2, 3, 90).argsort(-1), torch.tensor([70, 12])
    found = evict.least(score, counts, positions, 10, last)
    for b, h in torch.ones(2, 3).nonzero().tolist():
        ends = (positions[b, h] < 10) | (positions[b, h] >= last[b])
        assert found[b, h] == wanted(score[b, h], ends, positions[b, h], int(counts[b, h]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [1, 80])
def test_the_last_row_takes_the_place(dim: int, dtype: torch.dtype, way: None) -> None:
    side = torch.randn(7, 40, dim).to(dtype)
    slots = torch.randperm(7)[:6].view(2, 3)
    last = torch.randint(0, 40, (2, 3))
    rows = (torch.rand(2, 3) * (last + 1)).long()
    rows[0, 0] = last[0, 0]
    rows[1, 2] = -1
    exact = side.float()
    for slot, row, end in zip(*(t.flatten().tolist() for t in (slots, rows, last)), strict=True):
        if row >= 0:
            exact[slot, row] = exact[slot, end]
    twin = side.clone()
    counts = last.numpy() + 1
    left = counts - (rows >= 0).numpy()
    evict.drop([evict.Lines(side, slots)], rows, counts)
    assert torch.equal(side.float(), exact)
    assert (counts == left).all()
    evict.drop([evict.Lines(twin, slots, clear=True)], rows, last.numpy() + 1)
    exact[slots[rows >= 0], last[rows >= 0]] = 0
    assert torch.equal(twin.float(), exact)


def test_rows_that_are_not_there_are_not_dropped(way: None) -> None:
    side, slots = torch.randn(6, 9, 4), torch.arange(6).view(2, 3)
    before, counts = side.clone(), np.array([[9, 0, 3], [1, 2, 9]])
    empty = torch.tensor([[8, -1, 0], [0, -1, 4]])
    for wrong, at in ((0, (0, 1)), (3, (0, 2)), (-2, (1, 0)), (1 << 40, (1, 1))):
        rows = empty.clone()
        rows[at] = wrong
        with pytest.raises(ValueError, match=f"{wrong}.* to drop are not in 0"):
            evict.drop([evict.Lines(side, slots)], rows, counts)
    with pytest.raises(ValueError, match=r"rows is torch.int32 \(2, 3\)"):
        evict.drop([evict.Lines(side, slots)], empty.int(), counts)
    assert torch.equal(side, before)
    assert counts.tolist() == [[9, 0, 3], [1, 2, 9]]
    evict.drop([evict.Lines(side, slots)], empty, counts)
    assert counts.tolist() == [[8, 0, 2], [0, 2, 8]]


def test_other_types_and_shapes_are_refused(way: None) -> None:
    score, counts = torch.randn(2, 3, 9), torch.full((2, 3), 9)
    positions, last = torch.arange(9).expand(2, 3, 9), torch.full((2,), 9)
    forced = torch.zeros(2, 3, 9, dtype=torch.bool)
    given: dict[str, Tensor] = {"score": score, "counts": counts, "positions": positions}
    given |= {"last": last, "forced": forced}
    for name, wrong in (
        ("score", score.double()),
        ("score", score[:, :1]),
        ("counts", counts.int()),
        ("positions", positions[..., :8]),
        ("last", last.float()),
        ("forced", forced[:, :1]),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            evict.least(first=0, **{**given, name: wrong})  # type: ignore[arg-type]
    logits, lse = torch.randn(2, 3, 4, 9), torch.randn(2, 3, 4)
    for shares in (torch.ones(3), torch.ones(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="shares is"):
            evict.mass(logits, lse, shares)


@pytest.mark.skipif(stream.available() is not None, reason=str(stream.available()))
def test_kept_code_is_of_the_words_that_there_are() -> None:
    from vattn.kernels import calls, evict_loops

    for loop in (evict_loops.mass, evict_loops.least, evict_loops.drop):
        assert inspect.getclosurevars(loop.py_func).nonlocals["sources"] == calls.sources()


# ---- choice and all by one call -----------------------------------------------------------------
LOOPS = pytest.mark.skipif(stream.available() is not None, reason=str(stream.available()))


@dataclass
class Scene:
    """Heads of any lengths, each one row beyond its limit."""

    draft: int = 0

    def __post_init__(self) -> None:
        self.score = torch.rand(2, 3, 50)
        self.counts = torch.randint(12, 50, (2, 3)).numpy()
        self.positions = torch.rand(2, 3, 50).argsort(-1)
        self.tokens = np.array([50, 50])
        self.limits = self.counts - 1 - self.draft
        self.side, self.slots = torch.randn(8, 50, 5), torch.randperm(8)[:6].view(2, 3)

    def lines(self, side: Tensor) -> list[evict.Lines]:
        return [
            evict.Lines(side, self.slots),
            evict.Lines(self.score.view(6, 50, 1), torch.arange(6), clear=True),
        ]

    def made(self, rule: evict.Rule) -> evict.DropLeast:
        given = self.counts, self.tokens, self.score, self.positions
        return evict.DropLeast(rule, *given, self.lines(self.side))


@LOOPS
@pytest.mark.parametrize("draft", [0, 3])
def test_the_least_goes_by_one_call(draft: int) -> None:
    fresh_seed()
    scene = Scene(draft)
    recent, counts = np.array([9, 20]), scene.counts.copy()
    last = torch.from_numpy(scene.tokens - draft - recent)
    score, twin = scene.score.clone(), scene.side.clone()
    rows = evict.reference(score, torch.from_numpy(counts), scene.positions, 4, last)
    act = scene.made(evict.Rule(scene.limits, recent, 4))
    assert act(draft + 1) == 0, "none is too many"
    assert act(draft) == 6
    evict.drop([evict.Lines(twin, scene.slots)], rows, counts)
    assert torch.equal(scene.side, twin)
    assert (scene.counts == counts).all()
    for i, row in np.ndenumerate(rows.numpy()):
        assert scene.score[i][counts[i]] == 0
        assert row == counts[i] or scene.score[i][row] == score[i][counts[i]]
    scene.counts[1, 2] += 2
    before = scene.side.clone()
    assert act(draft) == -1
    assert torch.equal(scene.side, before)


@LOOPS
def test_only_heads_beyond_their_limits_lose_a_row() -> None:
    fresh_seed()
    scene = Scene()
    scene.limits[0] += 1
    scene.limits[1, 1] = 1 << 62
    counts, before = scene.counts.copy(), scene.side.clone()
    assert scene.made(evict.Rule(scene.limits, np.zeros(2, np.int64), 0))() == 2
    assert (counts - scene.counts).tolist() == [[0, 0, 0], [1, 0, 1]]
    for slot in scene.slots[scene.limits == counts].tolist():
        assert torch.equal(scene.side[slot], before[slot])


@LOOPS
def test_scores_that_are_known_before_tokens_come() -> None:
    fresh_seed()
    scene, ahead = Scene(), torch.rand(2, 3, 4)
    scene.score.fill_(0.5)
    scene.counts[:] = 30
    scene.limits[:] = 29
    rule = evict.Rule(scene.limits, np.zeros(2, np.int64), 0, 0, ahead, np.array([49, 46]))
    act = scene.made(rule)
    assert act() == 6
    for i, at in ((0, 0), (1, 3)):  # the last row's score is that of token 49
        for h in range(3):
            lost = ahead[i, h, at] <= 0.5
            assert (scene.score[i, h, :29] == 0.5).all() == lost
    scene.counts[:] = 30
    scene.tokens[0] = 54
    assert act() == -1, "nobody knows that far ahead"


@LOOPS
def test_one_place_in_the_text_goes_or_nothing() -> None:
    fresh_seed()
    scene = Scene()
    scene.positions = torch.arange(50).flip(0).expand(2, 3, 50).contiguous()
    scene.tokens[:] = 50
    act = scene.made(evict.Rule(scene.limits, np.array([5, 5]), 0, within=1))
    wanted = scene.side[scene.slots, torch.from_numpy(scene.counts - 1)]
    assert act() == 6
    assert torch.equal(scene.side[scene.slots, 5], wanted), "position 44 is row 5"
    scene.counts[:] += 1
    scene.positions[1, 1, 5] = 60
    before = scene.side.clone()
    assert act() == -1
    assert torch.equal(scene.side, before)


@LOOPS
def test_what_one_call_is_made_of_is_checked() -> None:
    scene = Scene()
    recent = np.zeros(2, np.int64)
    for name, rule in (
        ("limits", evict.Rule(scene.limits.astype(np.int32), recent, 0)),
        ("limits", evict.Rule(scene.limits[:1], recent, 0)),
        ("recent", evict.Rule(scene.limits, recent[:1], 0)),
        ("ahead", evict.Rule(scene.limits, recent, 0, 0, torch.rand(2, 2, 4), recent)),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            scene.made(rule)
    scene.positions = scene.positions.int()
    with pytest.raises(ValueError, match=r"^positions is"):
        scene.made(evict.Rule(scene.limits, recent, 0))
