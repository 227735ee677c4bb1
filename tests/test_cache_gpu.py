"""Laws of KVCache on a real CUDA device. What needs no device is in `test_cache_cuda`."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vattn.cache import KVCache
from vattn.layout import Layout
from vattn.tensor import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
MIB = 1 << 20
LAYERS, HEADS, DIM = 3, 2, 64
SHAPE = (LAYERS, HEADS, DIM)
# 1,365 tokens a page where all layers lie in one lane; 16,384 where each head has its own.
LAYOUTS = {
    "all_layers": Layout.all_layers(*SHAPE, 8192, dtype="float16", page_bytes=2 * MIB),
    "per_layer": Layout(*SHAPE, 8192, dtype="float16", page_bytes=2 * MIB),
    "large_pages": Layout.all_layers(*SHAPE, 32768, dtype="float16", page_bytes=16 * MIB),
}


@pytest.fixture(params=LAYOUTS)
def cache(request: pytest.FixtureRequest) -> Any:
    with KVCache(LAYOUTS[request.param], slots=6, device="cuda", budget_bytes=512 * MIB) as made:
        yield made
        torch.cuda.synchronize()  # a fault of any kernel before shows here
        made.check()


def rows(cache: KVCache, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, device=cache.device).to(cache.dtype)


def fill(cache: KVCache, sequences: list[Any], tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Append to every layer; returns K and V by layer."""
    out = []
    for layer in range(LAYERS):
        k, v = (rows(cache, len(sequences), HEADS, tokens) for _ in range(2))
        cache.append(layer, k, v, sequences)
        out.append((k, v))
    return out


# ---- tensors -------------------------------------------------------------------------------------
def test_views_are_on_the_device_and_never_move(cache: KVCache) -> None:
    pair = cache.open_batch(2)
    first = fill(cache, pair, 10)
    view = pair[0].k[0]
    assert view.device == cache.device == torch.device("cuda", torch.cuda.current_device())
    address, kept = view.data_ptr(), view.clone()
    assert torch.equal(view, first[0][0][0])
    fill(cache, pair, 5000)  # over several pages
    assert pair[0].k[0].data_ptr() == address
    assert torch.equal(view, kept)
    view[:, :10] = 7.0
    assert bool((pair[0].k[0][:, :10] == 7.0).all())
    assert cache.view(pair).v[1].shape == (2, HEADS, 5010, DIM)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_round_trips(dtype: str) -> None:
    layout = Layout.all_layers(*SHAPE, 4096, dtype=dtype, page_bytes=2 * MIB)
    with KVCache(layout, slots=1, device="cuda", budget_bytes=64 * MIB) as cache:
        sequence = cache.open()
        written = fill(cache, [sequence], 3000)
        assert sequence.v[1].dtype == DTYPES[dtype]
        assert torch.equal(sequence.v[1].float(), written[1][1][0].float())


def test_new_pages_show_nobodys_bytes(cache: KVCache) -> None:
    """A static row that nobody wrote is zero, whatever torch left in the device's memory."""
    junk = torch.full((256 * MIB,), 0x5A, dtype=torch.uint8, device=cache.device)
    del junk
    torch.cuda.empty_cache()
    sequence = cache.open()
    cache.extend([sequence], 4000)
    cache.commit([sequence], 4000)
    assert not sequence.k[0].any()
    assert not sequence.v[LAYERS - 1].any()


def test_any_attention_reads_a_view_as_it_is(cache: KVCache) -> None:
    pair = cache.open_batch(2)
    written = fill(cache, pair, 3000)
    q = rows(cache, 2, 4, 1)
    for layer, (k, v) in enumerate(written):
        view = cache.view(pair)
        ours = scaled_dot_product_attention(q, view.k[layer], view.v[layer], enable_gqa=True)
        native = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(ours, native, atol=2e-3, rtol=2e-3)


# ---- the same history on the device and on the host ----------------------------------------------
def history(cache: KVCache, seed: int, steps: int) -> list[torch.Tensor]:
    """Random changes; returns what every sequence holds after each of them."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    alive: list[Any] = [cache.open()]
    seen: list[torch.Tensor] = []
    for _ in range(steps):
        one = alive[int(rng.integers(len(alive)))]
        verb = rng.choice(["append", "append", "fork", "truncate", "reorder", "window", "close"])
        if verb == "append" and one.length < 3000:
            count = int(rng.integers(1, 1500))
            for layer in range(LAYERS):
                new = torch.randn(1, HEADS, count, DIM, generator=generator).half()
                new = new.to(cache.device)
                cache.append(layer, new, -new, [one])
        elif verb == "fork" and len(alive) < 5:
            alive.append(one.fork())
        elif verb == "truncate" and not one.starts.any():
            one.truncate(int(rng.integers(one.length + 1)))
        elif verb == "reorder":
            cache.reorder(alive, rng.integers(len(alive), size=len(alive)).tolist())
        elif verb == "window":
            for layer in range(LAYERS):
                one.release_before(layer, one.length // 2)
        elif verb == "close" and len(alive) > 1:
            alive.remove(one)
            one.close()
        cache.advance()
        seen += [each.k[layer].cpu() for each in alive for layer in range(LAYERS)]
        seen += [each.v[layer].cpu() for each in alive for layer in range(LAYERS)]
    return seen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_history_on_the_device_is_that_of_the_host(name: str, seed: int) -> None:
    both = []
    for device in ("cuda", "cpu"):
        with KVCache(LAYOUTS[name], slots=6, device=device, budget_bytes=2048 * MIB) as cache:
            both.append(history(cache, seed, 40))
            cache.check()
    assert len(both[0]) == len(both[1])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


# ---- lifetimes -----------------------------------------------------------------------------------
def test_a_view_outlives_its_cache_and_then_the_memory_is_back() -> None:
    torch.cuda.synchronize()
    gc.collect()
    free, _ = torch.cuda.mem_get_info()
    cache = KVCache(LAYOUTS["large_pages"], slots=2, device="cuda", budget_bytes=512 * MIB)
    sequence = cache.open()
    fill(cache, [sequence], 30000)
    view = sequence.k[1][:, 100:]
    kept = view.clone()
    sequence.close()
    cache.close()
    del cache, sequence
    gc.collect()
    assert torch.equal(view, kept)
    held = free - torch.cuda.mem_get_info()[0]
    assert held >= 48 * MIB
    del view
    gc.collect()
    assert free - torch.cuda.mem_get_info()[0] <= held - 48 * MIB


def test_pages_go_back_only_when_no_kernel_reads_them() -> None:
    """Work on a stream that nobody named still runs when its pages are wanted back."""
    layout = LAYOUTS["all_layers"]
    with KVCache(layout, slots=2, device="cuda", budget_bytes=512 * MIB) as cache:
        sequence = cache.open()
        fill(cache, [sequence], 8000)
        view = sequence.k[0]
        expected = view.float().sum()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
            found = view.float().sum()
        del view
        sequence.close()
        assert cache.trim() > 0
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


# ---- graphs --------------------------------------------------------------------------------------
def test_a_graph_replays_after_growth_without_recapture() -> None:
    """One capture over all of max_tokens; pages are mapped under it between replays."""
    layout = Layout.all_layers(1, HEADS, DIM, 16384, dtype="float16", page_bytes=2 * MIB)
    options: dict[str, Any] = {"device": "cuda", "zero_backed": True, "budget_bytes": 64 * MIB}
    with KVCache(layout, slots=1, **options) as cache:
        sequence = cache.open()
        cache.extend([sequence], 1)
        view = cache.static_view([sequence])
        k, v = view.k[0], view.v[0]
        at = torch.zeros(1, dtype=torch.long, device=cache.device)
        new, q = rows(cache, 1, HEADS, 1), rows(cache, 1, HEADS, 1)
        keep = torch.zeros(1, 1, 1, 16384, dtype=torch.bool, device=cache.device)

        def step() -> torch.Tensor:
            k.index_copy_(2, at, new)
            v.index_copy_(2, at, -new)
            keep.index_fill_(3, at, True)
            return scaled_dot_product_attention(q, k, v, attn_mask=keep)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        address, mapped = k.data_ptr(), cache.stats().mapped_bytes
        written = []
        for token in (0, 1, 4095, 4096, 10000, 16383):
            cache.extend([sequence], token + 1 - int(cache.tokens[sequence.slot]))
            cache.commit([sequence], token + 1 - int(cache.tokens[sequence.slot]))
            new.copy_(rows(cache, 1, HEADS, 1))
            at.fill_(token)
            graph.replay()
            written.append(new.clone())
            every = torch.cat(written, 2)
            expected = scaled_dot_product_attention(q, every, -every)
            torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
            assert torch.equal(sequence.k[0][:, token], new[0, :, 0])
        assert (k.data_ptr(), v.data_ptr() > address) == (address, True)
        assert cache.stats().mapped_bytes > mapped


def test_a_graph_over_a_prefix_stays_right_while_the_sequence_grows() -> None:
    with KVCache(LAYOUTS["all_layers"], slots=3, device="cuda", budget_bytes=512 * MIB) as cache:
        sequence = cache.open()
        fill(cache, [sequence], 1000)
        k = sequence.k[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total = k.float().sum(dim=(1, 2))
        expected = k.float().sum(dim=(1, 2))
        for _ in range(5):
            fill(cache, [sequence], 1300)
            other = cache.open()
            fill(cache, [other], 2000)
            other.close()
            cache.trim()  # unmaps in the same reservation, between replays
            graph.replay()
            torch.testing.assert_close(total, expected)


# ---- beside torch's own allocator ----------------------------------------------------------------
def test_memory_that_torch_only_caches_is_ours_to_have() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    most = free - 1024 * MIB
    torch.empty(most, dtype=torch.uint8, device="cuda")  # freed at once, and cached
    assert torch.cuda.memory_reserved() >= most
    layout = LAYOUTS["large_pages"]
    want = 4096 * MIB
    slots = want // layout.slot_bytes
    with KVCache(layout, slots=slots, device="cuda", budget_bytes=want) as cache:
        cache.extend(cache.open_batch(slots), layout.max_tokens)
        assert cache.stats().mapped_bytes > 2048 * MIB
        assert torch.cuda.memory_reserved() < most


def test_memory_that_is_given_back_is_torchs_to_have() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    layout = LAYOUTS["large_pages"]
    slots = (free - 2048 * MIB) // layout.slot_bytes
    with KVCache(layout, slots=slots, device="cuda", budget_bytes=free) as cache:
        sequences = cache.open_batch(slots)
        cache.extend(sequences, layout.max_tokens)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(8192 * MIB, dtype=torch.uint8, device="cuda")
        for sequence in sequences:
            sequence.close()
        cache.advance()
        cache.set_budget(free // 2)
        cache.trim()
        assert torch.empty(8192 * MIB, dtype=torch.uint8, device="cuda").numel() == 8192 * MIB
    torch.cuda.empty_cache()
