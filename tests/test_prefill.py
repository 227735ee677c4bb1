"""Prefill against the definition in float64: interpreted on the CPU, compiled on a device."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tests import guard
from tests.decoding import Case, plain, scaled, spread
from tests.places import PLACES
from tests.prefills import HALVES, SMALL, Sequences, agree, expected, rows
from vattn.kernels import gpu
from vattn.kernels.kv import KV
from vattn.kernels.prefill import prefill, prefill_lse
from vattn.kernels.prefill_tiles import TILES, Tile, packed_heads, placed, tile_of
from vattn.kernels.scores import Scores

NAN, NOTHING = float("nan"), float("-inf")
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Fresh numbers, and NaN in whatever torch.empty gives."""
    torch.manual_seed(7)
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_dense(place: str, dtype: torch.dtype, causal) -> None:
    query = rows(1, 2, 50, 64, dtype=dtype, place=place)
    kv = KV(*(rows(1, 1, 80, 64, dtype=dtype, place=place) for _ in range(2)))
    scores = Scores(causal=causal)
    agree(prefill_lse(query, kv, scores, tile=SMALL), expected(query, kv, scores), kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("tokens", "keys"), [(70, 33), (33, 70), (1, 40), (40, 1)])
def test_other_lengths(place: str, causal, tokens: int, keys: int) -> None:
    query, kv = rows(1, 1, tokens, 16, place=place), KV(*(rows(1, 1, keys, 16, place=place),) * 2)
    scores = Scores(causal=causal)
    agree(prefill_lse(query, kv, scores, tile=SMALL), expected(query, kv, scores), kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dim", "value_dim"), [(13, 13), (72, 80), (96, 256), (1, 5), (40, 130)])
def test_head_dims(place: str, dim: int, value_dim: int) -> None:
    query = rows(1, 1, 20, dim, place=place)
    kv = KV(rows(1, 1, 40, dim, place=place), rows(1, 1, 40, value_dim, place=place))
    agree(prefill_lse(query, kv), expected(query, kv), kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", range(16))
def test_combinations(place: str, seed: int) -> None:
    """A seeded sample of all options at once, NaN in every row that must not be read."""
    sample = Sequences(random.Random(seed), place)
    agree(sample.run(), sample.expected(), sample.kv)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(place: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """K and V of 8 bits with a scale of each head, NaN beyond the length."""
    query = rows(1, 4, 40, 32, dtype=dtype, place=place)
    key, value = (rows(1, 2, 60, 32, place=place) for _ in range(2))
    key[:, :, 50:] = NAN
    value[:, :, 50:] = NAN
    kv = KV(
        key.to(stored),
        value.to(stored),
        lengths=torch.tensor([50], device=place),
        key_scale=torch.tensor([0.5, 2.0], device=place),
        value_scale=torch.tensor([3.0], device=place),
    )
    scores = Scores(causal="bottom_right")
    agree(prefill_lse(query, kv, scores, tile=SMALL), expected(query, kv, scores), kv)


@pytest.mark.parametrize("place", PLACES)
def test_window_skips(place: str) -> None:
    """Tiles before the window, and between sinks and window, are not visited: NaN lies there."""
    key = rows(1, 1, 224, 16, place=place)
    poisoned = key.clone()
    poisoned[:, :, 32:96] = NAN
    query = rows(1, 1, 32, 16, place=place)
    scores = Scores(causal="bottom_right", window=70, sink_tokens=4)
    found = prefill_lse(query, KV(poisoned, poisoned), scores, tile=SMALL)
    agree(found, expected(query, KV(key, key), scores), KV(key, key))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 40.0])
def test_scales(place: str, scale: float) -> None:
    query, kv = rows(1, 1, 20, 16, place=place), KV(*(rows(1, 1, 40, 16, place=place),) * 2)
    scores = Scores(scale=scale)
    agree(prefill_lse(query, kv, scores, tile=SMALL), expected(query, kv, scores), kv)


@pytest.mark.parametrize("place", PLACES)
def test_large_products(place: str) -> None:
    """<q, k> beyond float16's range: the scale is applied in float32 (pytorch issue 160841)."""
    query = torch.full((1, 1, 16, 80), 256.0, dtype=torch.float16, device=place)
    kv = KV(query, query)
    assert (prefill(query, kv) == 256.0).all()


@pytest.mark.parametrize("place", PLACES)
def test_tiles_do_not_matter(place: str) -> None:
    query, kv = rows(1, 4, 40, 32, place=place), KV(*(rows(1, 2, 70, 32, place=place),) * 2)
    scores = Scores(causal="bottom_right", window=37, sink_tokens=3)
    wanted = expected(query, kv, scores)
    for tile in (Tile(16, 16, 4, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 2), Tile(128, 128, 8, 2)):
        agree(prefill_lse(query, kv, scores, tile=tile), wanted, kv)


@pytest.mark.parametrize("place", PLACES)
def test_empty(place: str) -> None:
    """No keys, queries, sequences or heads: zeros and -inf, or an empty result."""
    for batch, heads, tokens, keys in ((2, 2, 5, 0), (2, 2, 0, 5), (0, 2, 5, 5), (2, 0, 5, 5)):
        query = rows(batch, heads, tokens, 16, place=place)
        value = rows(batch, max(1, heads // 2), keys, 24, place=place)
        kv = KV(value[..., :16], value)
        for mask in (None, torch.zeros(tokens, keys, dtype=torch.bool, device=place)):
            out, lse = prefill_lse(query, kv, mask=mask, tile=SMALL)
            assert out.shape == (batch, heads, tokens, 24)
            assert (out == 0.0).all()
            assert (lse == NOTHING).all()
            assert lse.shape == (batch, heads, tokens)


@pytest.mark.parametrize("place", PLACES)
def test_nothing_seen(place: str) -> None:
    """Rows before the first key of a bottom-right mask, and a sequence without rows."""
    query, key = rows(2, 1, 40, 16, place=place), rows(2, 1, 40, 16, place=place)
    kv = KV(key, key, lengths=torch.tensor([7, 0], device=place))
    out, lse = prefill_lse(query, kv, Scores(causal="bottom_right"), tile=SMALL)
    assert (out[0, :, :33] == 0.0).all()
    assert (lse[0, :, :33] == NOTHING).all()
    assert lse[0, :, 33:].isfinite().all()
    assert (out[1] == 0.0).all()
    assert (lse[1] == NOTHING).all()


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_no_sequence(place: str) -> None:
    """Packed rows beyond the last sequence keep what lay there."""
    query, kv = rows(20, 2, 16, place=place), KV(*(rows(2, 1, 8, 16, place=place),) * 2)
    out = torch.full_like(query, 5.0)
    ends = torch.tensor([0, 3, 11], dtype=torch.int32, device=place)
    assert prefill(query, kv, query_starts=ends, most_tokens=8, out=out) is out
    assert (out[11:] == 5.0).all()
    assert (out[:11] != 5.0).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value_dim", [16, 24])
def test_strides_of_the_result(place: str, value_dim: int) -> None:
    """Tokens before heads in, tokens before heads out: no copy where heads are joined."""
    query = rows(2, 9, 3, 16, place=place).transpose(1, 2)
    kv = KV(rows(2, 1, 9, 16, place=place), rows(2, 1, 9, value_dim, place=place))
    assert prefill(query, kv).stride() == (27 * value_dim, value_dim, 3 * value_dim, 1)
    heads_first = query.contiguous()
    assert prefill(heads_first, kv).stride() == (27 * value_dim, 9 * value_dim, value_dim, 1)


@pytest.mark.parametrize("place", PLACES)
def test_a_sink_of_no_weight_and_no_key(place: str) -> None:
    """-inf is no sink: an empty sequence is 0 with -inf then, and not NaN."""
    query, lengths = rows(2, 2, 20, 16, place=place), torch.tensor([0, 40], device=place)
    kv = KV(*(rows(2, 1, 40, 16, place=place) for _ in range(2)), lengths)
    scores = Scores(sink_logits=torch.tensor([NOTHING, 0.5], device=place))
    agree(prefill_lse(query, kv, scores, tile=SMALL), expected(query, kv, scores), kv)


@pytest.mark.parametrize("form", ["strided", "expanded"])
@pytest.mark.parametrize("place", PLACES)
def test_strides_of_counts_and_scores_do_not_matter(form: str, place: str) -> None:
    query, kv, scores, _ = Case(
        lengths=[40, 50], starts=[30, 3], slots=[2, 0], tokens=20, reserved=60, dim=16, alibi=True,
        sink_logits=True, place=place,
    ).make()  # fmt: skip
    kv, scores = scaled(kv, place), replace(scores, alibi=torch.rand(2, 4, device=place))
    spread_kv, spread_scores = spread(kv, form), spread(scores, form)
    wanted = prefill_lse(query, plain(spread_kv), plain(spread_scores), tile=SMALL)
    found = prefill_lse(query, spread_kv, spread_scores, tile=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    packed, ends = query.transpose(1, 2).flatten(0, 1), torch.tensor([0, 20, 40], device=place)
    ends = torch.stack([ends, ends * 0], 1).int()[:, 0]
    call = {"query_starts": ends, "most_tokens": 20, "tile": SMALL}
    again = prefill(packed, spread_kv, spread_scores, **call)
    torch.testing.assert_close(again, wanted[0].transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("place", PLACES)
def test_expanded_query(place: str) -> None:
    """One row for all sequences, heads and tokens."""
    query = rows(1, 1, 1, 16, place=place).expand(2, 4, 20, 16)
    kv = KV(*(rows(2, 2, 30, 16, place=place) for _ in range(2)))
    agree(prefill_lse(query, kv, tile=SMALL), expected(query, kv), kv)


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A float16 tensor over memory of which only touched pages exist."""
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * extent, flags), dtype=torch.float16)
    return memory.as_strided(shape, strides)


@pytest.mark.parametrize(
    "strides",
    [(2**33, 2**32, 2**28, 1), (2**31 + 64, 2**30, 16, 1), (40, 20, 2**31 + 40, 1)],
    ids=["rows", "heads", "far rows"],
)
def test_far_offsets(strides: tuple[int, ...]) -> None:
    """Offsets beyond 2**31 elements between rows, heads and sequences, and in the result."""
    tokens = 3 if strides[2] > 2**30 else 12
    query, key, out, mask = (far((2, 2, tokens, 16), strides) for _ in range(4))
    query.copy_(torch.randn(query.shape))
    key.copy_(torch.randn(key.shape))
    mask = mask[..., :1].transpose(2, 3).copy_(torch.randn(2, 2, 1, tokens))
    kv = KV(key, key)
    prefill(query, kv, mask=mask, out=out, tile=SMALL)
    wanted, _ = expected(query.clone(), KV(key.clone(), key.clone()), mask=mask.clone())
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=4e-3)


@pytest.mark.parametrize("place", PLACES)
def test_odd_strides(place: str) -> None:
    """Rows at addresses that are no multiple of 16 bytes."""
    query, key, value = (rows(2, 3, 40, 37, place=place)[..., 2:35] for _ in range(3))
    kv = KV(key[:, 1:], value[:, 1:])
    agree(prefill_lse(query[:, ::2], kv, tile=SMALL), expected(query[:, ::2], kv), kv)


def test_programs_cover_everything_once() -> None:
    """More than 65,535 planes, the longest tile of a section first, heads side by side."""
    for planes, tiles, section in ((70_001, 2, 16), (7, 5, 3), (6, 4, 6), (5, 1, 2)):
        order = [placed.fn(i, section, tiles, planes) for i in range(planes * tiles)]
        assert len(set(order)) == planes * tiles
        assert {plane for plane, _ in order} == set(range(planes))
        inside = min(section, planes)
        assert order[:inside] == [(plane, tiles - 1) for plane in range(inside)]


@pytest.mark.gpu
def test_many_planes() -> None:
    query = rows(70_000, 1, 2, 16, place="cuda")
    kv = KV(query, query)
    agree(prefill_lse(query, kv), expected(query, kv), kv)


def test_packing_rule() -> None:
    assert packed_heads(4, 1, 128, False) == 4
    assert packed_heads(4, 4096, 128, False) == 1
    assert packed_heads(4, 129, 128, False) == 4
    assert packed_heads(4, 4096, 128, True) == 4
    assert packed_heads(1, 1, 128, False) == 1


ADA = gpu.Device(89, 128, 99 << 10)


@pytest.mark.parametrize("device", [gpu.A100, gpu.H100, gpu.B200, ADA])
def test_tiles_fit(device: gpu.Device) -> None:
    """Q, and K and V in every stage, in shared memory; no more rows than there are."""
    for dim, itemsize, kind in product((16, 64, 80, 128, 192, 256), (2, 4), TILES):
        tile = tile_of(device, dim, itemsize, 4096, kind)
        wide = max(16, 1 << (dim - 1).bit_length()) * itemsize
        assert (tile.rows + 2 * tile.stages * tile.keys) * wide <= device.shared_bytes
        assert tile_of(device, dim, itemsize, 5, kind).rows == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": rows(2, 3, 4, 16)}, "no multiple"),
        ({"query": rows(2, 2, 16, 4).mT}, "last dimension"),
        ({"query": rows(2, 2, 4, 16).half()}, "must be the same"),
        ({"query": rows(8, 2, 16)}, "need query_starts"),
        ({"query_starts": torch.zeros(3, dtype=torch.int32)}, "for packed queries"),
        (
            {"query": rows(8, 2, 16), "query_starts": torch.zeros(2), "most_tokens": 4},
            "must be int32",
        ),
        (
            {
                "query": rows(8, 2, 16),
                "query_starts": torch.zeros(3, dtype=torch.int32),
                "most_tokens": 9,
            },
            "must be 0 to 8",
        ),
        ({"mask": torch.zeros(4, 5)}, "broadcast"),
        ({"mask": torch.zeros(6)}, "2-D or 4-D"),
        ({"mask": torch.zeros(4, 6).double()}, "must be bool, float32"),
        ({"out": rows(2, 2, 4, 17)}, "out is"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    call = {"query": rows(2, 2, 4, 16), **change}
    with pytest.raises(ValueError, match=message):
        prefill_lse(call.pop("query"), KV(rows(2, 2, 6, 16), rows(2, 2, 6, 16)), **call)


def between_closed_pages() -> None:
    """For a child process: 32 rows of K and V and of packed queries are open, and no others."""
    key, value = (guard.fenced((2, 1, 96, 64), torch.float16) for _ in range(2))
    query = guard.fenced((96, 1, 64), torch.float16)
    for rows_of in (key[1, 0], value[1, 0], query[:, 0]):
        guard.allow(rows_of[32:64]).normal_()
    lengths, starts, slots = (torch.tensor([n]) for n in (64, 32, 1))
    kv = KV(key, value, lengths, starts, slots)
    ends = torch.tensor([32, 64], dtype=torch.int32)
    for scores in (Scores(), Scores(causal="bottom_right"), Scores(causal="top_left", window=40)):
        for mask in (None, torch.rand(96, 96) < 0.5):
            call = {"query_starts": ends, "most_tokens": 96, "mask": mask, "tile": SMALL}
            prefill(query, kv, scores, **call)
    print("all read")


def test_no_other_row_is_touched() -> None:
    code, output = guard.outcome("tests.test_prefill:between_closed_pages")
    assert code == 0, output
    assert output == "all read\n"
