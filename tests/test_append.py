"""Laws of `append`: rows land behind the lengths, nothing else is touched, 8 bits are torch's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton
from torch import Tensor

from tests.caches import LAYOUTS, layout_of
from tests.guard import outcome
from tests.places import PLACES
from vattn.cache import KVCache
from vattn.kernels.append import append, reference, tile
from vattn.kernels.gpu import A100, B200, H100, interpreted
from vattn.kernels.kv import DTYPES, KV

HEADS, LAYERS = 3, 2
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(params=[*PLACES, pytest.param("torch", id="torch")])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where rows are appended: by the kernel, or by torch on CPU tensors."""
    if request.param == "torch":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        return "cpu"
    return str(request.param)


def storage(layout: str, sequences: int, tokens: int, dim: int, dtype, place: str) -> Tensor:
    """K and V [2, layers, N, Hkv, S, D] in one of the layouts of a cache, full of NaN."""
    sizes = {"L": LAYERS, "N": sequences, "H": HEADS, "S": tokens, "K": 2, "D": dim}
    order = {"head_major": "NLKHSD", "token_major": "NLKSHD", "grouped": "NHSLKD"}[layout]
    shape = [sizes[axis] for axis in order]
    data = torch.full(shape, float("nan"), device=place).to(dtype)
    return data.permute([order.index(axis) for axis in "KLNHSD"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, place: str = "cpu"):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(dtype).to(place)


def ints(place: str, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=place)


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def assert_as_defined(make, new_key: Tensor, new_value: Tensor, lengths: list[int], **form) -> None:
    """``make()`` gives a view and the storage behind it: all of it must become what the definition
    makes of it, and lengths and drops what they say."""
    kv, data = make()
    expected, expected_data = make()
    written = reference(new_key, new_value, expected, **form)
    offered = form["starts"].diff() if form.get("starts") is not None else form.get("counts")
    offered = [new_key.shape[-2]] * kv.batch if offered is None else offered.tolist()
    dropped = torch.full((kv.batch,), 5, dtype=torch.int64, device=kv.key.device)
    append(new_key, new_value, kv, advance=True, dropped=dropped, **form)
    assert torch.equal(bits(data), bits(expected_data))
    assert kv.lengths.tolist() == [a + b for a, b in zip(lengths, written, strict=True)]
    assert dropped.tolist() == [5 + a - b for a, b in zip(offered, written, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["head_major", "token_major", "grouped"])
def test_layouts(place, layout, dtype):
    def make() -> tuple[KV, Tensor]:
        data = storage(layout, 2, 24, 16, dtype, place)
        return KV(data[0, 1], data[1, 1], ints(place, 3, 20)), data

    new = normal(1, 2, 2, HEADS, 4, 16, dtype=dtype, place=place)
    assert_as_defined(make, new[0], new[1], [3, 20])


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (80, 48), (13, 64), (1, 5)])
def test_dims_and_strides(place, dim, value_dim):
    def make() -> tuple[KV, Tensor]:
        data = torch.full((2, 20, HEADS, dim + value_dim + 1), float("nan"), device=place)
        rows = data.transpose(1, 2)
        return KV(rows[..., :dim], rows[..., dim + 1 :], ints(place, 0, 11)), data

    new_key = normal(2, 2, HEADS, 5, dim, place=place)
    new_value = normal(3, 2, 5, HEADS, value_dim, place=place).transpose(1, 2)
    assert_as_defined(make, new_key, new_value, [0, 11])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_ragged_rows_with_counts(place, index):
    """Counts, slots and room of any order; lengths are a column of a table, as a cache has them."""

    def make() -> tuple[KV, Tensor]:
        data = storage("token_major", 6, 30, 8, torch.float16, place)
        table = torch.zeros(4, 3, dtype=index, device=place)
        table[:, 1] = ints(place, 0, 7, 29, 12)
        slots = ints(place, 5, 0, 3, 1, dtype=index)
        return KV(data[0, 0], data[1, 0], table[:, 1], slots=slots), data

    new = normal(4, 2, 4, HEADS, 6, 8, dtype=torch.float16, place=place)
    counts = ints(place, 6, 0, 4, 3, dtype=index)
    room = ints(place, 4, 30, 64, 12, dtype=index)
    assert_as_defined(make, new[0], new[1], [0, 7, 29, 12], counts=counts)
    assert_as_defined(make, new[0], new[1], [0, 7, 29, 12], counts=counts, room=room)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_rows(place, index):
    """Empty sequences at both ends and between, and padding before and behind."""

    def make() -> tuple[KV, Tensor]:
        data = storage("head_major", 6, 12, 8, torch.bfloat16, place)
        return KV(data[0, 0], data[1, 0], ints(place, 1, 0, 10, 0, 4, 2, dtype=index)), data

    new = normal(5, 2, 16, HEADS, 8, dtype=torch.bfloat16, place=place)
    starts = ints(place, 2, 2, 7, 12, 12, 13, 13, dtype=index)
    room = ints(place, 9, 4, 12, 12, 12, 12, dtype=index)
    assert_as_defined(make, new[0], new[1], [1, 0, 10, 0, 4, 2], starts=starts, room=room)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
def test_packed_rows_find_their_sequence(place, batch):
    counts = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(batch))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(place)

    def make() -> tuple[KV, Tensor]:
        data = storage("head_major", batch, 8, 4, torch.float32, place)
        return KV(data[0, 0], data[1, 0], torch.zeros(batch, dtype=torch.int32).to(place)), data

    new = normal(6, 2, int(counts.sum()) + 1, HEADS, 4, place=place)
    assert_as_defined(make, new[0], new[1], [0] * batch, starts=starts)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of signalling NaNs
def test_every_half_becomes_torchs_8_bits(place, source, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(source)
    data = torch.zeros(2, 1, 1, 512, 128, device=place).to(dtype)
    new = every.view(1, 1, 512, 128).to(place)
    append(new, new, KV(data[0], data[1], ints(place, 0)))
    top = torch.finfo(dtype).max
    expected = every.float().clamp(-top, top).to(dtype).view(1, 1, 512, 128)
    for got in data.cpu():
        nan = got.float().isnan()
        assert torch.equal(nan, every.isnan().view_as(nan))
        assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scales", ["none", "one", "heads"])
def test_floats_with_scales_become_torchs_8_bits(place, scales, dtype):
    """Over all magnitudes, and at the middle between two neighbours, where ties go to even."""
    wide = normal(7, 1, HEADS, 96, 64) * torch.exp2(normal(8, 1, HEADS, 96, 64) * 12)
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    wide[0, :, 0, :] = middles[torch.linspace(0, len(middles) - 1, HEADS * 64).long()].view(3, 64)
    scale = {"none": None, "one": torch.tensor([0.37]), "heads": torch.tensor([1.0, 0.37, 8.0])}
    scale = None if scale[scales] is None else scale[scales].to(place)

    def make() -> tuple[KV, Tensor]:
        data = storage("token_major", 1, 100, 64, dtype, place)
        return KV(data[0, 0], data[1, 1], ints(place, 2), key_scale=scale, value_scale=scale), data

    wide = wide.to(place)
    assert_as_defined(make, wide, wide.flip(2), [2])


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_rows_of_8_bits_are_copied_as_they_are(place, dtype):
    def make() -> tuple[KV, Tensor]:
        data = storage("head_major", 1, 9, 16, dtype, place)
        return KV(data[0, 0], data[1, 0], ints(place, 5), key_scale=torch.ones(1).to(place)), data

    new = normal(9, 2, 1, HEADS, 3, 16, place=place).to(dtype)
    assert_as_defined(make, new[0], new[1], [5])


@pytest.mark.parametrize(
    ("source", "dtype"), [pair for pair in product(DTYPES, DTYPES) if pair[0] != pair[1]], ids=str
)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, of what becomes infinity
def test_rows_of_another_dtype_are_cast(place, source, dtype):
    """Over all magnitudes: numbers too small for all bits of a float16, and too large for one."""

    def make() -> tuple[KV, Tensor]:
        data = storage("token_major", 2, 12, 16, dtype, place)
        return KV(data[0, 0], data[1, 1], ints(place, 3, 0)), data

    new = normal(11, 2, 2, HEADS, 8, 16) * torch.exp2(normal(12, 2, 2, HEADS, 8, 16) * 8)
    if dtype == torch.bfloat16 and place == "cpu" and interpreted():
        new = new.to(dtype).float()  # the interpreter cuts bits off where a device rounds
    new = new.to(source).to(place)
    assert_as_defined(make, new[0], new[1], [3, 0])


def test_scales_of_any_strides(place):
    """One for all heads by a stride of 0, and a column of a table."""
    table = torch.tensor([[0.37, 9.0], [2.0, 9.0], [8.0, 9.0]], device=place)

    def make() -> tuple[KV, Tensor]:
        data = storage("token_major", 1, 9, 16, FP8[0], place)
        scales = {"key_scale": table[:, 0], "value_scale": table[0, :1].expand(HEADS)}
        return KV(data[0, 0], data[1, 1], ints(place, 2), **scales), data

    new = normal(13, 2, 1, HEADS, 4, 16, place=place)
    assert_as_defined(make, new[0], new[1], [2])


def test_nothing_to_append(place):
    data = storage("head_major", 2, 4, 8, torch.float32, place)
    kv = KV(data[0, 0], data[1, 0], ints(place, 1, 4))
    empty = torch.empty(2, HEADS, 0, 8, device=place)
    append(empty, empty, kv, advance=True)
    packed = torch.empty(0, HEADS, 8, device=place)
    append(packed, packed, kv, starts=ints(place, 0, 0, 0), advance=True)
    assert kv.lengths.tolist() == [1, 4]
    assert data.isnan().all()


def test_a_cache_gets_its_rows_and_unmapped_pages_are_not_written():
    """The pages behind ``room`` are not mapped: a write there would end the process."""
    code, said = outcome("tests.test_append:fill_caches")
    assert code == 0, said


def fill_caches() -> None:
    for layout in LAYOUTS:
        for interpret in (True, False):
            triton.knobs.runtime.interpret = interpret
            with KVCache(layout_of(layout), slots=3) as cache:
                fill_cache(cache)


def fill_cache(cache: KVCache) -> None:
    """Layer 1 of three sequences, by two rows more than their pages have room for."""
    sequences = cache.open_batch(3)
    batch = cache.batch(sequences)
    cache.extend(batch, 5)
    room = torch.from_numpy(cache.room[batch.slots].copy())
    tokens = int(room.max()) + 2
    new = normal(10, 2, 3, cache.layout.kv_heads, tokens, cache.layout.head_dim)
    lengths, dropped = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    kv = KV(*cache.reserved(1), lengths)
    append(new[0], new[1], kv, room=room, advance=True, dropped=dropped)
    assert lengths.tolist() == room.tolist()
    assert dropped.tolist() == (tokens - room).tolist()
    for row, sequence in enumerate(sequences):
        many = int(room[row])
        cache.commit([sequence], many, 1)
        assert torch.equal(sequence.k[1], new[0, row, :, :many])
        assert torch.equal(sequence.v[1], new[1, row, :, :many])


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda device: str(device.arch))
@pytest.mark.parametrize("dim", [13, 64, 128, 192, 256])
@pytest.mark.parametrize("rows", [8, 512, 65536])
def test_a_tile_gives_each_thread_16_bytes(device, dim, rows):
    shape = tile(device, rows, dim)
    assert shape.rows * triton.next_power_of_2(dim) >= 32 * shape.warps * 8
    assert shape.warps == 1 or rows >= shape.rows * device.processors


def refusals():
    data = torch.zeros(2, HEADS, 9, 8)
    new, lengths = torch.zeros(2, HEADS, 1, 8), torch.zeros(2, dtype=torch.int32)
    flat, scale = torch.zeros(2, HEADS, 8), torch.ones(1)
    kv = KV(data, data, lengths)
    eight = KV(data.to(FP8[0]), data.to(FP8[0]), lengths)
    packed = {"starts": torch.zeros(3, dtype=torch.int32)}
    yield "lengths is None", (new, new, KV(data, data)), {}
    yield "leave one out", (flat, flat, kv), {**packed, "counts": lengths}
    yield r"new_key is \(2, 3, 1, 7\)", (new[..., :7], new, kv), {}
    yield r"new_value is \(2, 3, 2, 8\)", (new, new.expand(2, HEADS, 2, 8), kv), {}
    yield r"must be \[tokens, KV heads, D\]", (new, new, kv), packed
    yield r"must be \[B, KV heads, tokens, D\]", (flat, flat, kv), {}
    bits = new.to(FP8[0])
    yield "new_key is torch.float8_e4m3fn and the cache torch.float32", (bits, bits, kv), {}
    yield "new_value is torch.float16", (new, new.half(), eight), {}
    yield "new_key is torch.float64", (new.double(), new.double(), eight), {}
    yield "stride 2", (torch.zeros(2, HEADS, 1, 16)[..., ::2], new, kv), {}
    yield "scales go with", (new, new, KV(data, data, lengths, key_scale=scale)), {}
    yield r"counts is torch.int32 \(1,\)", (new, new, kv), {"counts": lengths[:1]}
    yield r"room is torch.float32", (new, new, kv), {"room": lengths.float()}
    yield r"dropped is torch.int32", (new, new, kv), {"dropped": lengths}
    spread = torch.zeros(4, dtype=torch.int64)[::2]
    yield "stride 2 and is written", (new, new, kv), {"dropped": spread}
    yield "on meta and the cache on cpu", (new.to("meta"), new, kv), {}
    yield "room is on meta", (new, new, kv), {"room": lengths.to("meta")}


@pytest.mark.parametrize(
    ("message", "args", "form"), list(refusals()), ids=lambda value: str(value)[:24]
)
def test_what_does_not_fit_is_refused(message, args, form):
    with pytest.raises(ValueError, match=message):
        append(*args, **form)
