"""Laws of KVCache on a CUDA backend: all of `test_cache` and `test_cache_model`, over the driver
emulator. Its device memory is host memory, so that the tensors are torch's own host tensors, made
the way device tensors are: by a capsule that names the device.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import settings

from tests import test_cache, test_cache_model
from tests.caches import DIM, HEADS, LAYERS, fill, layout_of, rows
from tests.emulator.control import NOTHING, Emulator, ready
from tests.mirror import PAGE
from vattn import device as places
from vattn import tensor
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import NoDeviceError, OutOfDeviceMemory
from vattn.allocator.pool import Pool
from vattn.cache import KVCache
from vattn.layout import Layout, LayoutError

# About the host's kernel maps and file descriptors, told anew below; or about arguments only.
NOT_HERE = {
    "test_a_view_outlives_everything_and_then_all_is_gone",
    "test_a_refused_call_names_the_value_and_changes_nothing",
    "test_token_counts_are_checked",
}
globals().update(
    {
        name: law
        for name, law in vars(test_cache).items()
        if name.startswith("test_") and name not in NOT_HERE
    }
)
cache, rng = test_cache.cache, test_cache.rng


def emulated(page_bytes: int = PAGE) -> CudaBackend:
    """A backend on the emulated device, whose memory the processor reads."""
    backend = CudaBackend(page_bytes)
    backend.devices = ("cpu",)
    return backend


@pytest.fixture(autouse=True)
def over_the_emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (places, test_cache):
        monkeypatch.setattr(module, "HostBackend", emulated)
    monkeypatch.setitem(tensor.MAKERS, "cpu", tensor.from_capsule)


# ---- side by side with a model -------------------------------------------------------------------
class CacheOnDevice(test_cache_model.CacheAndModel):
    """The histories of `test_cache_model` on an emulated device with dirty memory."""

    def open_backend(self) -> CudaBackend:
        self.emulator = ready(granularity=PAGE)
        self.emulator.set(poison=1)
        return emulated()

    def assert_gone(self) -> None:
        assert self.emulator.faults == 0
        assert self.emulator.live == NOTHING


CacheOnDevice.TestCase.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
TestCacheOnDevice = CacheOnDevice.TestCase


# ---- tensors -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", sorted(tensor.DTYPES.keys() - {"uint8"}))
def test_every_dtype_reads_what_was_written(dtype: str, rng: torch.Generator) -> None:
    layout = layout_of("per_layer", dtype=dtype)
    with KVCache(layout, slots=2, budget_bytes=1 << 20) as cache:
        pair = cache.open_batch(2)
        new = rows(rng, 2, HEADS, 40).to(cache.dtype)
        for layer in range(LAYERS):
            cache.append(layer, new, new, pair)
        view = cache.view(pair).k[1]
        assert (view.dtype, view.device) == (new.dtype, cache.device)
        assert torch.equal(view.float(), new.float())


def test_a_view_outlives_everything_and_then_all_is_gone(
    emulator: Emulator, rng: torch.Generator
) -> None:
    cache = KVCache(layout_of("per_layer"), slots=2, budget_bytes=1 << 20)
    sequence = cache.open()
    fill(cache, [sequence], 100, rng)
    view = sequence.v[2][0, 5:].view(-1, 2, DIM // 2)[:, 1]
    expected = view.clone()
    sequence.close()
    cache.close()
    del cache, sequence
    gc.collect()
    assert torch.equal(view, expected)
    assert emulator.live.mappings > 0
    thread = threading.Thread(target=lambda kept: kept.clear(), args=([view],))
    del view
    thread.start()
    thread.join()
    gc.collect()
    assert emulator.live == NOTHING


def test_a_view_reaches_mapped_rows_only(emulator: Emulator, rng: torch.Generator) -> None:
    """A kernel that reads every element of every view touches nothing that is not mapped."""
    with KVCache(layout_of("per_layer"), slots=3, budget_bytes=1 << 20) as cache:
        pair = cache.open_batch(2)
        fill(cache, pair, 37, rng)
        views = [*cache.view(pair).k[0], *cache.view(pair).v[LAYERS - 1], pair[1].k[1]]
        for head in [head for view in views for head in view]:
            emulator.kernel(head.data_ptr(), head.numel() * head.element_size())
    assert emulator.faults == 0


def test_inference_mode_does_not_stick(rng: torch.Generator) -> None:
    with torch.inference_mode():
        cache = KVCache(layout_of("per_layer"), slots=1, budget_bytes=1 << 20)
        fill(cache, [sequence := cache.open()], 5, rng)
    with cache:
        fill(cache, [sequence], 5, rng)
        assert not sequence.k[0].is_inference()


# ---- choosing a device ---------------------------------------------------------------------------
@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that says it has the emulated device, and gives host tensors for it."""

    def on_the_host(buffer, device, dtype, count, offset):
        return tensor.from_capsule(buffer, torch.device("cpu"), dtype, count, offset)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(tensor.MAKERS, "cuda", on_the_host)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_cuda_makes_a_pool_of_the_device(
    device: str, pretended: None, emulator: Emulator, rng: torch.Generator
) -> None:
    emulator.set(memory=100 * PAGE)
    with KVCache(layout_of("per_layer"), slots=2, device=device) as cache:
        backend = cache.pool.backend
        assert isinstance(backend, CudaBackend)
        assert backend.devices == ("cuda:0",)
        assert backend.handles.on_out_of_memory is torch.cuda.empty_cache
        assert cache.pool.total == 80
        sequence = cache.open()
        written = fill(cache, [sequence], 30, rng)
        assert torch.equal(sequence.k[0], written[0][0][0])
        with KVCache(cache.layout, slots=1, pool=cache.pool) as other:
            fill(other, [other.open()], 3, rng)
        with pytest.raises(LayoutError, match="read by cuda:0, not by cpu"):
            KVCache(cache.layout, slots=1, pool=cache.pool, device="cpu")


def test_a_page_that_does_not_suit_the_device_is_refused_with_a_remedy(
    pretended: None, emulator: Emulator
) -> None:
    emulator.reset(granularity=2 << 20)
    with pytest.raises(LayoutError, match=r"multiple of 2097152 .*got 8192.*page_bytes=2 << 20"):
        KVCache(Layout(2, 2, 128, 64), device="cuda")
    layout = Layout.all_layers(2, 2, 128, 64, page_bytes=2 << 20)
    with KVCache(layout, slots=1, device="cuda") as cache:
        cache.extend([cache.open()], 64)
        assert emulator.live.mappings == layout.lane_pages


def test_streams_that_are_named_are_those_waited_for(pretended: None, emulator: Emulator) -> None:
    with KVCache(layout_of("per_layer"), slots=1, device="cuda", streams=lambda: [0]) as cache:
        sequence = cache.open()
        cache.extend([sequence], 30)
        sequence.close()
        before = emulator.calls("cuStreamSynchronize"), emulator.calls("cuCtxSynchronize")
        cache.trim()
        after = emulator.calls("cuStreamSynchronize"), emulator.calls("cuCtxSynchronize")
        assert after[0] > before[0]
        assert after[1] == before[1]


def test_memory_that_torch_holds_is_asked_for_once(
    pretended: None, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(1))
    layout = layout_of("per_layer")
    with KVCache(layout, slots=2, device="cuda", budget_bytes=1 << 20) as cache:
        emulator.set(memory=layout.lanes * PAGE)
        sequence = cache.open()
        written = fill(cache, [sequence], layout.room(1), rng)
        before = test_cache.state(cache)
        with pytest.raises(OutOfDeviceMemory, match="empty_cache"):
            cache.extend([sequence], 1)
        test_cache.assert_same(before, test_cache.state(cache))
        assert asked == [1]
        emulator.set(memory=1 << 30)
        cache.extend([sequence], 1)
        assert torch.equal(sequence.k[0], written[0][0][0])


@pytest.mark.parametrize("device", ["mps", "meta", "nowhere", 3.5])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(LayoutError, match="cpu, cuda or cuda:N"):
        KVCache(layout_of("per_layer"), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a device here")
def test_cuda_without_a_device_says_so() -> None:
    with pytest.raises(NoDeviceError, match=r"torch .* sees no CUDA device.*doctor"):
        KVCache(layout_of("per_layer"), device="cuda")
    pool = Pool(CudaBackend(PAGE), budget_bytes=1 << 20)
    with pytest.raises(NoDeviceError, match="sees no CUDA device"):
        KVCache(layout_of("per_layer"), pool=pool)
    pool.close()
