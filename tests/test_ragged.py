"""attend: ragged sequences of a real cache against float64, with and without the stream kernel."""

from __future__ import annotations

import pytest
import torch

from tests.attention import fresh_seed, tolerance
from tests.caches import DIM, HEADS, LAYERS, LAYOUTS, layout_of
from vattn import KVCache
from vattn import ragged as module
from vattn.allocator.errors import ClosedError
from vattn.kernels import stream
from vattn.kernels.contract import reference
from vattn.layout import LayoutError
from vattn.ragged import attend, attend_lse

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = 3


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=["stream", "packed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "packed":
        monkeypatch.setattr(module, "STREAM_ROWS", 0)
    elif stream.available() is not None:
        pytest.skip(str(stream.available()))
    return request.param


def filled(layout: str, lengths: list[int], dtype: str = "float32"):
    """A cache with one sequence of each length, in slots that do not follow each other."""
    cache = KVCache(layout_of(layout, dtype=dtype), slots=len(lengths) + 2, budget_bytes=64 << 20)
    spare = cache.open()
    sequences = [cache.open() for _ in lengths]
    spare.close()
    sequences.reverse()
    for sequence, tokens in zip(sequences, lengths, strict=True):
        for layer in range(LAYERS) if layout != "shared_layers" else (0, 1):
            rows = torch.randn(2, 1, HEADS, tokens, DIM).to(cache.dtype)
            cache.append(layer, rows[0], rows[1], [sequence])
    return cache, sequences


def check(cache, sequences, layer: int, length: int, window: int | None, **options) -> None:
    query = torch.randn(len(sequences), HEADS * GROUPS, length, DIM).to(cache.dtype)
    out, lse = attend_lse(query, cache.view(sequences), layer, window_tokens=window, **options)
    assert out.dtype == cache.dtype
    assert lse.dtype == torch.float32
    for i, sequence in enumerate(sequences):
        key, value = sequence.k[layer][None], sequence.v[layer][None]
        keys = torch.arange(key.shape[2])
        queries = keys[-length:, None]
        keep = (keys <= queries) & (keys > queries - (window or 1 << 30))
        exact, exact_lse = reference(query[i : i + 1], key, value, keep, **options)
        limit = tolerance(exact, cache.dtype, key.shape[2])
        assert (out[i : i + 1].double() - exact).abs().max().item() <= 2 * limit
        assert (lse[i : i + 1].double() - exact_lse).abs().max().item() <= 2e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_ragged_lengths(layout: str, length: int, window: int | None, way: str) -> None:
    cache, sequences = filled(layout, [5, 131, 64, 17])
    with cache:
        for layer in range(LAYERS):
            check(cache, sequences, layer, length, window)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, way: str) -> None:
    cache, sequences = filled("per_layer", [40, 7, 300], dtype)
    with cache:
        check(cache, sequences, 1, 4, None)
        check(cache, sequences, 1, 1, 20)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scales(scale: float, way: str) -> None:
    cache, sequences = filled("token_major", [40, 7])
    with cache:
        check(cache, sequences, 0, 3, None, scale=scale)


def test_prefill_attends_to_itself(way: str) -> None:
    cache, sequences = filled("per_layer", [33])
    with cache:
        check(cache, sequences, 0, 33, None)
        check(cache, sequences, 0, 33, 9)


def test_released_tokens_are_not_seen(way: str) -> None:
    cache, sequences = filled("per_layer", [200, 150])
    with cache:
        sequences[0].release_before(1, 100)
        assert sequences[0].k[1].shape[1] < 200
        check(cache, sequences, 1, 2, 30)
        check(cache, sequences, 1, 1, None)


def test_a_batch_of_equal_lengths(way: str) -> None:
    with KVCache(layout_of("per_layer"), slots=4, budget_bytes=64 << 20) as cache:
        sequences = [cache.open() for _ in range(3)]
        cache.append(0, torch.randn(3, HEADS, 50, DIM), torch.randn(3, HEADS, 50, DIM), sequences)
        check(cache, sequences, 0, 2, None)


def test_no_queries_no_rows(way: str) -> None:
    cache, sequences = filled("per_layer", [5, 6])
    with cache:
        out = attend(torch.randn(2, HEADS, 0, DIM), cache.view(sequences), 0)
        assert out.shape == (2, HEADS, 0, DIM)


def test_refused_with_the_reason() -> None:
    cache, sequences = filled("per_layer", [5, 6])
    with cache:
        view, query = cache.view(sequences), torch.randn(2, HEADS * 2, 1, DIM)
        for given, words in [
            (query[:1], r"must be \[2 sequences, heads, tokens, 16\]"),
            (query[..., :8], r"must be \[2 sequences, heads, tokens, 16\]"),
            (query.half(), "query is torch.float16 on cpu, the cache torch.float32"),
            (query[:, :3], "3 query heads are no multiple of 2"),
            (query.expand(2, HEADS * 2, 6, DIM), "6 query tokens in a sequence that holds 5"),
            (query.clone().requires_grad_(), "no gradient"),
        ]:
            with pytest.raises(LayoutError, match=words):
                attend(given, view, 0)
        with pytest.raises(LayoutError, match="window_tokens must be at least 1"):
            attend(query, view, 0, window_tokens=0)
        with pytest.raises(LayoutError):
            attend(query, view, LAYERS)
        sequences[0].truncate(2)
        with pytest.raises(ClosedError, match="truncated"):
            attend(query, view, 0)


def test_absent_numba_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, sequences = filled("per_layer", [40, 7, 300])
    with cache:
        query = torch.randn(3, HEADS * GROUPS, 2, DIM)
        first = attend(query, cache.view(sequences), 2)
        monkeypatch.setattr(stream, "available", lambda: "not here")
        second = attend(query, cache.view(sequences), 2)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 4, 40])
@pytest.mark.parametrize("form", ["transposed", "permuted", "overlapping", "negated"])
def test_queries_of_any_strides(form: str, length: int, way: str) -> None:
    cache, sequences = filled("per_layer", [60, 131])
    heads = HEADS * GROUPS
    made = {
        "transposed": lambda: torch.randn(2, heads, DIM, length).mT,
        "permuted": lambda: torch.randn(length, 2, DIM, heads).permute(1, 3, 0, 2),
        "overlapping": lambda: torch.randn(2, heads, length + DIM).unfold(2, DIM, 1)[:, :, :length],
        "negated": lambda: torch._neg_view(torch.randn(2, heads, length, DIM)),
    }
    query = made[form]()
    with cache:
        view = cache.view(sequences)
        plain = torch.empty(query.shape).copy_(query)
        limit = tolerance(plain.double(), torch.float32, 131)
        error = (attend(query, view, 0) - attend(plain, view, 0)).abs().max().item()
        assert error <= limit


def test_a_dtype_that_no_kernel_takes_is_refused() -> None:
    cache, sequences = filled("per_layer", [20], "float8_e4m3fn")
    query = torch.randn(1, HEADS * GROUPS, 1, DIM).to(cache.dtype)
    with cache, pytest.raises(LayoutError, match="serves float32, bfloat16 and float16"):
        attend(query, cache.view(sequences), 0)
