"""The Hopper prefill: its schedule in torch and its machine code here, its numbers on a GPU.

Gluon has no interpreter. The schedule's reference shares the kernel's index arithmetic; the kernel
is compiled in a child process, where Triton does not interpret, and its code is read.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.hopper_code import child
from tests.prefills import HALVES, agree, expected, rows
from vattn.cache import KVCache
from vattn.kernels import prefill_hopper_reference
from vattn.kernels.gpu import A100, H100, pretend
from vattn.kernels.kv import KV
from vattn.kernels.prefill_hopper import (
    _checked_out,
    _checked_tile,
    prefill_hopper,
    prefill_hopper_lse,
    why_not,
)
from vattn.kernels.prefill_hopper_reference import attend
from vattn.kernels.prefill_hopper_tiles import (
    DIMS,
    MOST_HELD,
    SHARED_BYTES,
    Tile,
    held,
    shared_bytes,
    steps_of,
    tile_of,
)
from vattn.kernels.scores import Scores, reference
from vattn.layout import Layout

NAN = float("nan")
CAUSAL = (None, "top_left", "bottom_right")


# ---- the schedule -------------------------------------------------------------------------------


def random_scores(draw: random.Random) -> Scores:
    causal = draw.choice(CAUSAL)
    return Scores(
        scale=draw.choice([None, 0.7, -0.7, 0.0]),
        causal=causal,
        window=draw.choice([None, 1, 20, 90]) if causal else None,
        softcap=draw.choice([None, None, 1.5]),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", range(30))
def test_schedule_is_attention_whatever_the_timing(seed: int) -> None:
    """Float64 throughout: what differs from the definition is rounding alone."""
    draw = random.Random(seed)
    scores, tokens, reserved = random_scores(draw), draw.randint(1, 300), draw.randint(1, 260)
    length = draw.choice([0, reserved, draw.randint(0, reserved)])
    start = draw.choice([0, draw.randint(0, length)])
    torch.manual_seed(seed)
    query, key, value = torch.randn(tokens, 4), torch.randn(reserved, 4), torch.randn(reserved, 4)
    outside = torch.ones(reserved, dtype=torch.bool)
    outside[start:length] = False
    key[outside] = NAN
    value[outside] = NAN
    tile = Tile(draw.choice([16, 32, 64]), draw.choice([2, 3, 4]), draw.random() < 0.5)
    out, lse = attend(
        query, key, value, scores, tile, length=length, start=start, seed=draw.getrandbits(30)
    )
    wanted, wanted_lse = reference(
        query[None], key[None], value[None], scores, length=length, start=start
    )
    torch.testing.assert_close(out, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong", [lambda i, n: (i % n, 0), lambda i, n: (i % n, i % 2)])
def test_schedule_notices_a_wrong_parity(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the simulated barriers are not satisfied by anything."""

    class Wrong:
        fn = staticmethod(wrong)

    monkeypatch.setattr(prefill_hopper_reference, "turn", Wrong)
    query, key = torch.randn(64, 4), torch.randn(200, 4)
    with pytest.raises((RuntimeError, AssertionError)):
        attend(query, key, key, Scores(), Tile(16, 3, alternate=False), length=200)


def test_steps_hold_all_visible_keys_and_mask_where_needed() -> None:
    draw = random.Random(5)
    for _ in range(500):
        check_steps(draw)


def check_steps(draw: random.Random) -> None:
    row, count, keys = draw.randint(0, 200), draw.randint(1, 128), draw.randint(0, 400)
    diagonal = draw.choice([None, draw.randint(-150, 300)])
    window = None if diagonal is None else draw.choice([None, draw.randint(1, 200)])
    block = draw.choice([16, 32, 64, 128])
    last, edge, inner, total = steps_of.fn(row, count, keys, diagonal, window, block)
    j, line = torch.arange(block * (keys // block + 1)), row + torch.arange(count)[:, None]
    seen = (j < keys).expand(count, -1)
    if diagonal is not None:
        seen = seen & (j <= line + diagonal)
    if window is not None:
        seen = seen & (j > line + diagonal - window)
    tiles = seen.view(count, -1, block)
    some, every = tiles.any(2).any(0).tolist(), tiles.all(2).all(0).tolist()
    visited = [last - i for i in range(total)]
    assert {n for n, any_seen in enumerate(some) if any_seen} <= set(visited)
    assert 0 <= edge <= inner <= total
    assert all(every[n] for n in visited[edge:inner])
    assert not any(every[n] for n in visited[:edge] + visited[inner:])
    # No visit for nothing, but for a window that ends behind the keys in their last tile.
    assert all(some[n] for n in visited[:1] + visited[-1:]) or total == 1
    assert window is not None or inner == total


@pytest.mark.parametrize("dim", DIMS)
def test_tile_fits(dim: int) -> None:
    tile = tile_of(dim)
    assert tile.stages >= 2
    assert shared_bytes(tile, dim) <= SHARED_BYTES
    assert held(tile, dim) <= MOST_HELD


# ---- the contract -------------------------------------------------------------------------------


def call(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, KV]:
    query, key, value = (torch.zeros(1, 2, 8, dim, dtype=dtype) for _ in range(3))
    return query, KV(key, value)


def half(kv: KV) -> KV:
    return KV(kv.key[..., :32], kv.value[..., :32])


PLAIN = Scores()
SINK = Scores(causal="top_left", window=2, sink_tokens=1)
ONES = torch.ones(2)
REFUSED = {
    "packed": lambda q, kv: (q[0].transpose(0, 1), kv, PLAIN),
    "must both be": lambda q, kv: (q.float(), KV(kv.key.float(), kv.value.float()), PLAIN),
    "head_dim is 32": lambda q, kv: (q[..., :32], half(kv), PLAIN),
    "64 and 128": lambda q, kv: (q, KV(kv.key, kv.value.repeat(1, 1, 1, 2)), PLAIN),
    "last dimension": lambda q, kv: (q.mT.contiguous().mT, kv, PLAIN),
    "scales": lambda q, kv: (q, KV(kv.key, kv.value, key_scale=ONES), PLAIN),
    "alibi": lambda q, kv: (q, kv, Scores(alibi=ONES)),
    "sink_logits": lambda q, kv: (q, kv, Scores(sink_logits=ONES)),
    "sink_tokens": lambda q, kv: (q, kv, SINK),
    "interpreter": lambda q, kv: (q, kv, PLAIN),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_say_why(words: str) -> None:
    args = REFUSED[words](*call())
    with pretend(H100):
        assert words in (why_not(*args) or "")
        with pytest.raises(ValueError, match=words):
            prefill_hopper(*args)


def test_rows_that_tma_cannot_copy_are_refused() -> None:
    query, _ = call()
    raw = torch.zeros(1 * 2 * 8 * 72, dtype=torch.bfloat16)
    apart = raw.as_strided((1, 2, 8, 64), (8 * 72, 8 * 68, 68, 1))
    shifted = raw[4:].as_strided((1, 2, 8, 64), (0, 64, 64, 1))
    with pretend(H100):
        assert "strides" in (why_not(query, KV(apart, query)) or "")
        assert "multiples of 16 bytes" in (why_not(query, KV(query, shifted)) or "")


def test_tiles_and_results_that_do_not_suit_are_refused() -> None:
    query, _ = call()
    with pytest.raises(ValueError, match="power of 2"):
        _checked_tile(Tile(48, 2, alternate=False), 64)
    with pytest.raises(ValueError, match="shared memory"):
        _checked_tile(Tile(128, 4, alternate=False), 128)
    with pytest.raises(ValueError, match="registers a thread"):
        _checked_tile(Tile(256, 2, alternate=False), 64)
    with pytest.raises(ValueError, match="out is"):
        _checked_out(query[:, :1], query)


def test_shapes_that_do_not_go_together_are_refused() -> None:
    query, kv = call()
    with pytest.raises(ValueError, match="no multiple"):
        prefill_hopper_lse(query[:, :1].expand(-1, 3, -1, -1), kv)


# ---- the machine code ---------------------------------------------------------------------------


def check_code(dim: int, window: int | None, softcap: float | None, code: dict) -> None:
    tile = tile_of(dim)
    assert code["refused"] is None
    assert code["spilled"] == 0
    assert not code["serialised"]
    assert {"240", "24"} <= set(code["registers"])
    assert code["threads"] == 3 * 128
    assert code["shared"] <= shared_bytes(tile, dim) <= SHARED_BYTES
    assert min(code["wide"]) > 0
    # A consumer's loops: masked, whole, and masked again before a window.
    assert len(code["overlaps"]) == 2 * (2 if window is None else 3)
    both = dim // 16 * -(-tile.keys // 256) + tile.keys // 16 * -(-dim // 256)
    for issued, exponentials in code["overlaps"]:
        assert issued == both
        assert exponentials >= tile.keys // 2 * (1 if softcap is None else 2)


def test_code_overlaps_softmax_with_products() -> None:
    """Machine code, not PTX: ptxas moves instructions."""
    case = (128, "bfloat16", "bottom_right", None, None)
    (code,) = child(case)
    check_code(128, None, None, code)


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
def test_code_of_all_options(dim: int) -> None:
    # `make aot` compiles the others.
    cases = [(dim, "bfloat16", "bottom_right", 100, 30.0)]
    if dim == 128:
        cases += [(dim, "float16", None, None, None), (dim, "bfloat16", "top_left", None, None)]
    for (_, _, _, window, softcap), code in zip(cases, child(*cases), strict=True):
        check_code(dim, window, softcap, code)


# ---- on a Hopper GPU ----------------------------------------------------------------------------


def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def poisoned(kv: KV) -> KV:
    """NaN in every row that must not count."""
    assert kv.lengths is not None
    assert kv.starts is not None
    slots = range(kv.batch) if kv.slots is None else kv.slots.tolist()
    outside = torch.ones(kv.key.shape[0], kv.key.shape[2], dtype=torch.bool, device=kv.key.device)
    for slot, start, length in zip(slots, kv.starts.tolist(), kv.lengths.tolist(), strict=True):
        outside[slot, start:length] = False
    for tensor in (kv.key, kv.value):
        tensor.masked_fill_(outside[:, None, :, None], NAN)
    return kv


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("tokens", "reserved"), [(1, 1), (128, 128), (300, 700), (700, 300)])
def test_dense(dim: int, dtype: torch.dtype, causal, tokens: int, reserved: int) -> None:
    hopper()
    torch.manual_seed(dim + tokens)
    query = rows(2, 4, tokens, dim, dtype=dtype, place="cuda")
    kv = KV(*(rows(2, 2, reserved, dim, dtype=dtype, place="cuda") for _ in range(2)))
    scores = Scores(causal=causal)
    agree(prefill_hopper_lse(query, kv, scores), expected(query, kv, scores), kv)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_combinations(seed: int) -> None:
    """All options at once: ragged prefixes, slots, strides, GQA, NaN in rows that do not count."""
    hopper()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dim, dtype, scores = draw.choice(DIMS), draw.choice(HALVES), random_scores(draw)
    kv_heads, groups = draw.choice([(1, 1), (2, 1), (1, 5), (2, 4)])
    tokens, reserved = draw.randint(1, 400), draw.randint(1, 600)
    query = rows(2, tokens, kv_heads * groups, dim, dtype=dtype, place="cuda").transpose(1, 2)
    query = query if draw.random() < 0.5 else query.contiguous()
    heads_last = draw.random() < 0.5
    shape = (3, reserved, kv_heads, dim) if heads_last else (3, kv_heads, reserved, dim)
    key, value = (rows(*shape, dtype=dtype, place="cuda") for _ in range(2))
    if heads_last:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    lengths = [draw.randint(0, reserved), reserved]
    starts = [draw.choice([0, draw.randint(0, n)]) for n in lengths]
    index = draw.choice([torch.int32, torch.int64])
    tables = (torch.tensor(t, dtype=index, device="cuda") for t in (lengths, starts, [2, 0]))
    kv = poisoned(KV(key, value, *tables))
    tile = replace(tile_of(dim), alternate=draw.random() < 0.5)
    out, lse = prefill_hopper_lse(query, kv, scores, tile=tile)
    assert out.stride() == torch.empty_like(query).stride()
    agree((out, lse), expected(query, kv, scores), kv)
    again = prefill_hopper(query, kv, scores, tile=tile, out=torch.full_like(out, NAN))
    torch.testing.assert_close(again, out, rtol=0, atol=0)


@pytest.mark.gpu
def test_rows_of_pages_that_are_not_mapped_are_not_touched() -> None:
    """The prefix ends with a page or inside its last tile; behind the page nothing is mapped."""
    hopper()
    layout = Layout(1, 2, 128, 32768, dtype="bfloat16", page_bytes=2 << 20)
    mapped = int(layout.tokens_per_page)
    query, key, value = (
        rows(1, 2, tokens, 128, dtype=torch.bfloat16, place="cuda")
        for tokens in (300, mapped, mapped)
    )
    with KVCache(layout, slots=2, device="cuda", budget_bytes=64 << 20) as cache:
        sequence = cache.open()
        cache.append(0, key, value, [sequence])
        slots = torch.tensor([sequence.slot], device="cuda")
        for length in (mapped, mapped - 1, mapped - 100):
            kv = KV(*cache.reserved(0), torch.tensor([length], device="cuda"), slots=slots)
            live = KV(key[:, :, :length], value[:, :, :length])
            for causal in CAUSAL:
                found = prefill_hopper_lse(query, kv, Scores(causal=causal))
                agree(found, expected(query, live, Scores(causal=causal)), live)


@pytest.mark.gpu
def test_a_graph_follows_lengths_that_grow() -> None:
    hopper()
    query = rows(1, 2, 200, 128, dtype=torch.bfloat16, place="cuda")
    key, value = (rows(1, 1, 900, 128, dtype=torch.bfloat16, place="cuda") for _ in range(2))
    lengths = torch.tensor([400], dtype=torch.int32, device="cuda")
    kv, scores = KV(key, value, lengths), Scores(causal="bottom_right")
    prefill_hopper(query, kv, scores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prefill_hopper_lse(query, kv, scores)
    for length in (400, 777, 900, 256):
        lengths.fill_(length)
        graph.replay()
        agree(result, expected(query, kv, scores), kv)


@pytest.mark.gpu
def test_other_devices_are_refused() -> None:
    query, kv = call()
    with pretend(A100):
        assert "9.0" in (why_not(query, kv) or "")
