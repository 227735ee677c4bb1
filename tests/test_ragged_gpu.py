"""attend by the Triton kernels over a real cache: its own memory, of which rows behind a sequence
are not mapped, and one fixed set of addresses for any lengths."""

from __future__ import annotations

import pytest
import torch

from tests.attention import fresh_seed, tolerance
from tests.caches import DIM, HEADS, LAYERS, LAYOUTS, layout_of
from tests.places import PLACES
from vattn import KVCache, batch_invariant
from vattn.allocator.errors import ClosedError
from vattn.kernels.contract import reference
from vattn.layout import LayoutError
from vattn.paths import ImplError
from vattn.ragged import attend, attend_lse
from vattn.ragged_gpu import FixedView

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
GROUPS = 3
PAGE = {"cpu": 4096, "cuda": 2 << 20}


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def filled(place: str, layout: str, lengths: list[int], dtype: str = "float32"):
    """A cache with one sequence of each length, in slots that do not follow each other."""
    made = layout_of(layout, dtype=dtype).with_(page_bytes=PAGE[place])
    slots = len(lengths) + 2
    cache = KVCache(made, slots=slots, budget_bytes=1 << 30, device=place, retain_bytes=0)
    spare = cache.open()
    sequences = [cache.open() for _ in lengths]
    spare.close()
    sequences.reverse()
    for sequence, tokens in zip(sequences, lengths, strict=True):
        grow(cache, sequence, tokens)
    return cache, sequences


def grow(cache, sequence, tokens: int) -> None:
    """Append to every physical layer."""
    layers = cache.layout.layer_map or range(LAYERS)
    for layer in {physical: layer for layer, physical in enumerate(layers)}.values():
        rows = torch.randn(2, 1, HEADS, tokens, DIM).to(cache.device, cache.dtype)
        cache.append(layer, rows[0], rows[1], [sequence])


def query_of(cache, batch: int, length: int):
    return torch.randn(batch, HEADS * GROUPS, length, DIM).to(cache.device, cache.dtype)


def agrees(found, query, sequences, layer: int, window: int | None, scale=None) -> None:
    """Results and log-sum-exps against float64, sequence by sequence."""
    out, lse = found
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    for i, sequence in enumerate(sequences):
        key, value = sequence.k[layer][None], sequence.v[layer][None]
        keys = torch.arange(key.shape[2], device=query.device)
        queries = keys[-query.shape[2] :, None]
        keep = (keys <= queries) & (keys > queries - (window or 1 << 30))
        exact, exact_lse = reference(query[i : i + 1], key, value, keep, scale=scale)
        # The interpreter cuts float32 off where a device rounds it to bfloat16.
        limit = 2 * tolerance(exact, query.dtype, key.shape[2])
        assert (out[i : i + 1].double() - exact).abs().max().item() <= 2 * limit
        assert (lse[i : i + 1].double() - exact_lse).abs().max().item() <= 2e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("length", "window"), [(1, None), (1, 7), (5, None), (18, 9)])
def test_ragged_lengths(layout: str, length: int, window: int | None, place: str) -> None:
    cache, sequences = filled(place, layout, [18, 131])
    with cache:
        view, query = cache.view(sequences), query_of(cache, 2, length)
        for layer in (0, LAYERS - 1)[length > 1 :]:
            found = attend_lse(query, view, layer, window_tokens=window, impl="triton")
            agrees(found, query, sequences, layer, window)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_and_scales(dtype: str, place: str) -> None:
    cache, sequences = filled(place, "token_major", [40, 21], dtype)
    with cache:
        for length in (1, 17):
            query = query_of(cache, 2, length)
            found = attend_lse(query, cache.view(sequences), 1, scale=-0.5, impl="triton")
            agrees(found, query, sequences, 1, None, -0.5)


def test_released_tokens_are_not_seen(place: str) -> None:
    cache, sequences = filled(place, "per_layer", [200, 50])
    with cache:
        sequences[0].release_before(1, 100)
        cache.advance()
        assert sequences[0].k[1].shape[1] < 200
        for length, window in ((2, 30), (1, None), (20, None)):
            query = query_of(cache, 2, length)
            view = cache.view(sequences)
            found = attend_lse(query, view, 1, window_tokens=window, impl="triton")
            agrees(found, query, sequences, 1, window)


def test_the_last_row_before_an_unmapped_page(place: str) -> None:
    """A sequence that fills its pages: reading one row more would be a fault."""
    cache, sequences = filled(place, "per_layer", [1])
    with cache:
        whole = cache.layout.room(1) - 1
        grow(cache, sequences[0], whole) if place == "cpu" else grow(cache, sequences[0], 300)
        for length in (1, 17):
            query = query_of(cache, 1, length)
            agrees(
                attend_lse(query, cache.view(sequences), 0, impl="triton"),
                query,
                sequences,
                0,
                None,
            )


def test_a_cache_on_a_device_needs_no_name(place: str) -> None:
    cache, sequences = filled(place, "per_layer", [12])
    with cache:
        query = query_of(cache, 1, 1)
        agrees(attend_lse(query, cache.view(sequences), 0), query, sequences, 0, None)


# ---- fixed addresses -----------------------------------------------------------------------------
def test_a_fixed_view_serves_other_sequences_at_the_same_addresses(place: str) -> None:
    cache, sequences = filled(place, "per_layer", [9, 30, 14])
    with cache:
        fixed = FixedView(cache, batch=2)
        address = fixed.counts.data_ptr()
        for chosen in (sequences[:2], sequences[1:]):
            fixed.refresh(cache.view(chosen))
            query = query_of(cache, 2, 1)
            agrees(attend_lse(query, fixed, 2), query, chosen, 2, None)
            grow(cache, chosen[0], 3)
            fixed.refresh(cache.view(chosen))
            agrees(attend_lse(query, fixed, 2), query, chosen, 2, None)
        assert fixed.counts.data_ptr() == address
        assert all(t.data_ptr() % 16 == 0 for t in fixed.lanes(1)[2:])
        with pytest.raises(
            LayoutError, match="the view is of 3 sequences: this one was made for 2"
        ):
            fixed.refresh(cache.view(sequences))
        view = cache.view(sequences[:2])
        sequences[0].truncate(2)
        with pytest.raises(ClosedError, match="truncated"):
            fixed.refresh(view)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths() -> None:
    cache, sequences = filled("cuda", "per_layer", [20, 90], "bfloat16")
    with cache:
        fixed, query = FixedView(cache, batch=2), query_of(cache, 2, 1)
        fixed.refresh(cache.view(sequences))
        attend(query, fixed, 0)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = attend_lse(query, fixed, 0)
        for _ in range(3):
            grow(cache, sequences[1], 40)
            fixed.refresh(cache.view(sequences))
            query.copy_(query_of(cache, 2, 1))
            graph.replay()
            agrees(found, query, sequences, 0, None)


# ---- appending -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ragged_batch_is_written_by_one_launch(layout: str, dtype: str, place: str) -> None:
    """Over the rows that copies wrote, so that they are mapped; no other row changes."""
    cache, sequences = filled(place, layout, [18, 131, 5], dtype)
    with cache:
        batch, layer, count = cache.batch(sequences), LAYERS - 1, 3
        physical = cache.layout.physical(layer)
        before = cache.lengths[batch.slots, physical]
        grow(cache, sequences[0], 2)  # rows behind, which must stay
        for sequence in sequences:
            grow(cache, sequence, count)
        held = [(each.k[layer].clone(), each.v[layer].clone()) for each in sequences]
        shape = (2, len(sequences), HEADS, count, DIM)
        wide = torch.randn(*shape[:-1], 2 * DIM).to(cache.device, cache.dtype)
        for new in (wide[..., :DIM], wide[..., ::2]):
            cache._rows._launch(physical, batch.slots, before, *new)
            for i, (sequence, rows) in enumerate(zip(sequences, held, strict=True)):
                at = slice(int(before[i]), int(before[i]) + count)
                for side, now in enumerate((sequence.k[layer], sequence.v[layer])):
                    expected = rows[side].float()
                    expected[:, at] = new[side, i].float()
                    assert torch.equal(now.float(), expected)


# ---- laws ----------------------------------------------------------------------------------------
def test_bits_do_not_depend_on_the_batch(place: str) -> None:
    cache, sequences = filled(place, "per_layer", [20, 190, 135])
    with cache, batch_invariant(128):
        query = query_of(cache, 3, 1)
        together = attend(query, cache.view(sequences), 0, impl="triton")
        for i in range(3):
            alone = attend(query[i : i + 1], cache.view([sequences[i]]), 0, impl="triton")
            assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cache_of_8_bits(form: str, dtype: torch.dtype, length: int, place: str) -> None:
    cache, sequences = filled(place, "per_layer", [40, 21], form)
    with cache:
        view = cache.view(sequences)
        query = torch.randn(2, HEADS * GROUPS, length, DIM).to(cache.device, dtype)
        agrees(attend_lse(query, view, 1, impl="triton"), query, sequences, 1, None)
        with pytest.raises(LayoutError, match=f"must be bfloat16 or float16 over .*{form}"):
            attend(query.float(), view, 1, impl="triton")
        if place == "cpu":
            with pytest.raises(LayoutError, match="convert the query"):
                attend(query, view, 1)


@pytest.mark.parametrize("form", ["transposed", "overlapping", "negated"])
def test_queries_of_any_strides(form: str, place: str) -> None:
    cache, sequences = filled(place, "per_layer", [22])
    heads = HEADS * GROUPS
    made = {
        "transposed": lambda: torch.randn(1, heads, DIM, 2, device=place).mT,
        "overlapping": lambda: torch.randn(1, heads, 2 + DIM, device=place).unfold(2, DIM, 1)[
            :, :, :2
        ],
        "negated": lambda: torch._neg_view(torch.randn(1, heads, 2, DIM, device=place)),
    }
    with cache:
        query, view = made[form](), cache.view(sequences)
        plain = torch.empty(query.shape, device=place).copy_(query)
        out = attend(query, view, 0, impl="triton")
        torch.testing.assert_close(out, attend(plain, view, 0, impl="triton"), atol=1e-6, rtol=0)


def test_refused_with_the_reason(place: str) -> None:
    cache, sequences = filled(place, "per_layer", [5, 6])
    with cache:
        view, query = cache.view(sequences), query_of(cache, 2, 1)
        for given, words in [
            (query[:1], r"must be \[2 sequences, heads, tokens, 16\]"),
            (query.half(), "query is torch.float16"),
            (query[:, :3], "3 query heads are no multiple of 2"),
            (query.expand(-1, -1, 6, -1), "6 query tokens in a sequence that holds 5"),
            (query.clone().requires_grad_(), "no gradient"),
        ]:
            with pytest.raises(LayoutError, match=words):
                attend(given, view, 0, impl="triton")
        with pytest.raises(LayoutError, match="window_tokens must be at least 1"):
            attend(query, view, 0, window_tokens=0, impl="triton")
        with pytest.raises(LayoutError, match="does not exist"):
            attend(query, view, LAYERS, impl="triton")
        needs = "on meta: Triton kernels need a CUDA device; "
        remedies = {
            view: 'use impl="auto"' if place == "cpu" else "no other kernel reads a cache on a GPU",
            FixedView(cache, 2): "pass cache.view" if place == "cpu" else "no other kernel",
        }
        for held, remedy in remedies.items():
            with pytest.raises(ImplError, match=needs + remedy):
                attend(query.to("meta"), held, 0, impl="triton")
        with pytest.raises(ValueError, match="impl='fast' is unknown"):
            attend(query, view, 0, impl="fast")
        sequences[0].truncate(2)
        with pytest.raises(ClosedError, match="truncated"):
            attend(query, view, 0, impl="triton")
