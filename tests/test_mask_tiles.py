"""Masks: what is found out about their tiles, and prefill under them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.places import PLACES
from tests.prefills import SMALL, agree, expected, rows
from vattn.kernels.kv import KV
from vattn.kernels.mask_tiles import EMPTY, FULL, MIXED, classify, four_dim, order_kernel, reference
from vattn.kernels.prefill import prefill, prefill_lse
from vattn.kernels.prefill_tiles import Tile
from vattn.kernels.scores import Scores

NAN, INFINITY = float("nan"), float("inf")
B, H, L, S = 2, 2, 40, 70  # of which the tests below have masks


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Fresh numbers, and NaN in whatever torch.empty gives."""
    torch.manual_seed(11)
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


def blocks(*shape: int, place: str = "cpu") -> Tensor:
    """A bool mask with tiles of each kind."""
    cells = torch.rand(shape) < 0.6
    coarse = torch.randint(3, (*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 16)))
    coarse = coarse.repeat_interleave(16, -2).repeat_interleave(16, -1)
    coarse = coarse[..., : shape[-2], : shape[-1]]
    return torch.where(coarse == 0, False, torch.where(coarse == 1, True, cells)).to(place)


def added(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same as a number to add."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -INFINITY)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize(
    "shape", [(L, S), (1, S), (L, 1), (1, H, L, S), (B, 1, 1, S), (1, H, 1, S)]
)
def test_states(place: str, pack: int, shape: tuple[int, ...]) -> None:
    mask = blocks(*shape, place=place)
    whole = mask.expand(B, H, L, S)
    wanted = reference(whole, pack, 16, 32)
    for form in (mask, added(mask, torch.bfloat16), added(mask)):
        found = classify(four_dim(form, torch.bfloat16, (B, H, L, S)), pack, 16, 32)
        assert torch.equal(found.states.expand(wanted.shape), wanted)
        assert found.steps[0] == 0 if len(shape) == 2 or shape[0] == 1 else found.steps[0] > 0
    assert {EMPTY.value, FULL.value, MIXED.value} >= set(wanted.unique().tolist())


@pytest.mark.parametrize("place", PLACES)
def test_documents_visit_their_own_tiles(place: str) -> None:
    """Three documents in a row: a line of tiles has one tile that is read, and no cell of it."""
    document = torch.arange(96, device=place) // 32
    mask = document[:, None] == document
    found = classify(four_dim(mask, torch.float32, (1, 1, 96, 96)), 1, 16, 32)
    full, mixed = found.before[0, 0, :, :, -1].unbind(1)
    assert full.tolist() == [1] * 6
    assert mixed.tolist() == [0] * 6
    assert found.order[0, 0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("place", PLACES)
def test_not_a_number_is_mixed(place: str) -> None:
    mask = torch.zeros(16, 64, device=place)
    mask[:, 16:32] = -INFINITY
    mask[3, 5], mask[3, 20], mask[3, 40] = NAN, NAN, INFINITY
    states = classify(four_dim(mask, torch.float32, (1, 1, 16, 64)), 1, 16, 16).states
    assert states.flatten().tolist() == [MIXED.value, MIXED.value, MIXED.value, FULL.value]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tiles", [1, 1023, 2500])
def test_order(place: str, tiles: int) -> None:
    """Any range of tiles is a run of full ones and a run of mixed ones."""
    states = torch.randint(3, (2, tiles), dtype=torch.int8, device=place)
    before = torch.empty((2, 2, tiles + 1), dtype=torch.int32, device=place)
    order = torch.empty((2, tiles), dtype=torch.int32, device=place)
    order_kernel[(2,)](states, before, order, tiles, BLOCK=1024)
    for line, (a, b) in product(range(2), [(0, tiles), (tiles // 3, tiles // 2), (tiles, tiles)]):
        for kind, run in ((FULL, order[line]), (MIXED, order[line].flip(0))):
            counts = before[line, 0 if kind is FULL else 1]
            wanted = (states[line, a:b] == kind.value).nonzero().flatten() + a
            assert torch.equal(run[counts[a] : counts[b]], wanted.to(torch.int32))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (2, 1, 1, 40), (1, 2, 20, 1), (2, 2, 20, 40)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16])
def test_forms(place: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    """Every broadcast form and dtype, transposed and expanded."""
    keys = shape[-1] if shape[-1] > 1 else 33
    query = rows(2, 2, 20, 16, dtype=torch.float16, place=place)
    kv = KV(*(rows(2, 1, keys, 16, dtype=torch.float16, place=place) for _ in range(2)))
    cells = (torch.rand(shape).mT.contiguous().mT < 0.7).to(place)
    mask = cells if kind == torch.bool else added(cells, kind) + cells.to(kind) / 3
    wanted = expected(query, kv, mask=mask)
    agree(prefill_lse(query, kv, mask=mask, tile=SMALL, find_tiles=True), wanted, kv)
    wide = mask.expand(2, 2, 20, keys)
    agree(prefill_lse(query, kv, mask=wide, tile=SMALL, find_tiles=False), wanted, kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("find", [True, False])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_equivalences(place: str, find: bool, causal) -> None:
    """Causal is a lower triangle; a mask that hides nothing is none."""
    query = rows(1, 1, 40, 16, place=place)
    kv = KV(*(rows(1, 1, 70, 16, place=place) for _ in range(2)))
    triangle = torch.ones(40, 70, dtype=torch.bool, device=place)
    triangle = triangle.tril(0 if causal == "top_left" else 30)
    wanted = prefill(query, kv, Scores(causal=causal), tile=SMALL)
    for mask in (triangle, added(triangle)):
        out = prefill(query, kv, mask=mask, tile=SMALL, find_tiles=find)
        torch.testing.assert_close(out, wanted)
    both = prefill(query, kv, Scores(causal=causal), mask=mask, tile=SMALL, find_tiles=find)
    torch.testing.assert_close(both, wanted)
    nothing_hidden = torch.ones(1, 1, dtype=torch.bool, device=place)
    out = prefill(query, kv, mask=nothing_hidden, tile=SMALL, find_tiles=find)
    assert torch.equal(out, prefill(query, kv, tile=SMALL))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tokens", [5, 32], ids=["heads in one tile", "heads apart"])
@pytest.mark.parametrize(("causal", "heads"), [(None, 2), ("bottom_right", 1)])
def test_blocks(place: str, tokens: int, causal, heads: int) -> None:
    """Masks with tiles of each kind."""
    query = rows(1, 2, tokens, 16, place=place)
    kv = KV(*(rows(1, 1, 60, 16, place=place) for _ in range(2)))
    scores = Scores(causal=causal)
    for lines in {1, tokens}:
        mask = blocks(1, heads, lines, 60, place=place)
        wanted = expected(query, kv, scores, mask)
        found = prefill_lse(query, kv, scores, mask=mask, tile=Tile(16, 16, 4, 1), find_tiles=True)
        agree(found, wanted, kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bounds", [{}, {"window": 40, "sink_tokens": 20}])
def test_empty_tiles_are_not_read(place: str, bounds: dict) -> None:
    """NaN lies in K and V where whole tiles are hidden, at causal edges too."""
    hidden = torch.zeros(32, 96, dtype=torch.bool, device=place)
    hidden[:, 16:32] = True
    hidden[:, 64:80] = True
    hidden[7, 40] = True
    key = rows(1, 1, 96, 16, place=place)
    poisoned = key.clone()
    poisoned[:, :, 16:32] = NAN
    poisoned[:, :, 64:80] = NAN
    query, scores = rows(1, 1, 32, 16, place=place), Scores(causal="bottom_right", **bounds)
    kv, tile = KV(key, key), Tile(16, 16, 4, 1)
    for mask in (~hidden, added(~hidden)):
        found = prefill_lse(
            query, KV(poisoned, poisoned), scores, mask=mask, tile=tile, find_tiles=True
        )
        agree(found, expected(query, kv, scores, mask), kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "find"), [(torch.float32, True), (torch.bfloat16, False)])
def test_special_numbers(place: str, dtype: torch.dtype, find: bool) -> None:
    """NaN and +inf poison their rows alone; -inf rows are 0; the least number is a tie."""
    query = rows(1, 1, 30, 16, dtype=dtype, place=place)
    kv = KV(*(rows(1, 1, 50, 16, dtype=dtype, place=place) for _ in range(2)))
    mask = torch.zeros(30, 50, device=place)
    least = torch.finfo(torch.float32).min
    mask[3, 7], mask[5, 9] = NAN, INFINITY
    mask[9], mask[11], mask[12, 1:] = -INFINITY, least, least
    out, lse = prefill_lse(query, kv, mask=mask, tile=SMALL, find_tiles=find)
    poisoned = torch.zeros(30, dtype=torch.bool, device=place)
    poisoned[[3, 5]] = True
    assert torch.equal(out.isnan().all(-1).flatten(), poisoned)
    assert torch.equal(out.isnan().any(-1).flatten(), poisoned)
    assert torch.equal(lse.isnan().flatten(), poisoned)
    assert (out[0, 0, 9] == 0.0).all()
    assert lse[0, 0, 9] == -INFINITY
    mean = kv.value[0, 0].double().mean(0)
    torch.testing.assert_close(out[0, 0, 11].double(), mean, rtol=0, atol=0.02)
    assert torch.equal(out[0, 0, 12], kv.value[0, 0, 0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("find", [True, False])
def test_a_sink_alone(place: str, find: bool) -> None:
    """A row that sees the sink's score alone is 0, and its log-sum-exp is that score."""
    query = rows(1, 2, 20, 16, place=place)
    kv = KV(*(rows(1, 2, 30, 16, place=place) for _ in range(2)))
    sinks = torch.tensor([0.5, -2.0], device=place)
    mask = torch.zeros(20, 30, dtype=torch.bool, device=place)
    out, lse = prefill_lse(
        query, kv, Scores(sink_logits=sinks), mask=mask, tile=SMALL, find_tiles=find
    )
    assert (out == 0.0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 20))
