"""Laws of `cascade`: the result without sharing, and a shared row is read in one place only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed, tolerance
from tests.caches import layout_of, rows
from tests.decoding import plain, spread
from tests.guard import outcome
from tests.places import PLACES
from vattn.cache import KVCache
from vattn.kernels.cascade import (
    Prefixes,
    cascade,
    cascade_lse,
    levels,
    parts_for,
    tile_for,
    traffic,
)
from vattn.kernels.decode import decode_lse
from vattn.kernels.gpu import A100, B200, H100, Device, pretend
from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores, reference
from vattn.prefix import shared_prefixes

SMALL = Device(80, 2, 163 << 10)
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_device(one_thread: None) -> Iterator[None]:
    """New memory holds NaN, and a launch has few programs."""
    fresh_seed()
    torch.use_deterministic_algorithms(True)
    with pretend(SMALL):
        yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Sequences with rows in common. Of these only the first member of a group holds numbers: in
    the others, as wherever no row counts, memory is NaN."""

    lengths: list[int] = field(default_factory=lambda: [70, 40, 66, 40])
    groups: list = field(default_factory=lambda: [((0, 2), 0, 64), ((3, 1), 0, 33)])
    starts: list[int] | None = None
    slots: list[int] | None = None
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    token_major: bool = False
    scores: dict = field(default_factory=dict)
    alibi: bool = False
    sink_logits: bool = False

    def make(self, place: str) -> tuple[Tensor, KV, KV, Scores]:
        """Query, K and V as above, the same with the shared rows in every member, scores."""
        batch = len(self.lengths)
        slots = self.slots or list(range(batch))
        query = torch.randn(batch, self.heads, self.tokens, self.dim).to(self.dtype).to(place)
        read, whole = [], []
        for dim in (self.dim, self.value_dim):
            shape = (max(slots) + 1, self.kv_heads, max(self.lengths) + 9, dim)
            full = torch.full(shape, NAN)
            for b, slot in enumerate(slots):
                full[slot, :, : self.lengths[b]] = torch.randn(self.kv_heads, self.lengths[b], dim)
            for members, begin, end in self.groups:
                for b in members[1:]:
                    full[slots[b], :, begin:end] = full[slots[members[0]], :, begin:end]
            whole.append(full.to(self.stored or self.dtype).to(place))
            holes = full.clone()
            for members, begin, end in self.groups:
                for b in members[1:]:
                    holes[slots[b], :, begin:end] = NAN
            if self.token_major:
                holes = holes.transpose(1, 2).contiguous().transpose(1, 2)
            read.append(holes.to(self.stored or self.dtype).to(place))
        scale = {}
        if self.stored is not None:
            scale = {
                "key_scale": torch.rand(self.kv_heads, device=place) + 0.5,
                "value_scale": torch.rand(1, device=place) + 0.5,
            }
        counts = [
            None if values is None else torch.tensor(values, dtype=torch.int32, device=place)
            for values in (self.lengths, self.starts, self.slots)
        ]
        extra = {
            "alibi": torch.rand(self.heads, device=place) if self.alibi else None,
            "sink_logits": torch.randn(self.heads, device=place) if self.sink_logits else None,
        }
        scores = Scores(**self.scores, **extra)
        return query, KV(*read, *counts, **scale), KV(*whole, *counts, **scale), scores


def exact(query: Tensor, kv: KV, scores: Scores) -> tuple[Tensor, Tensor]:
    """The definition in float64, a sequence at a time, nothing shared."""
    found = []
    for b in range(kv.batch):
        slot = b if kv.slots is None else int(kv.slots[b])
        start = 0 if kv.starts is None else int(kv.starts[b])
        length = kv.key.shape[2] if kv.lengths is None else int(kv.lengths[b])
        key, value = kv.key[slot].double(), kv.value[slot].double()
        if kv.key_scale is not None and kv.value_scale is not None:
            key = key * kv.key_scale.double()[:, None, None]
            value = value * kv.value_scale.double()[:, None, None]
        found.append(reference(query[b], key, value, scores, length=length, start=start))
    outs, lses = zip(*found, strict=True)
    return torch.stack(outs), torch.stack(lses)


def assert_exact(out: Tensor, lse: Tensor, query: Tensor, kv: KV, scores: Scores) -> None:
    right, right_lse = exact(query, kv, scores)
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    error = (out.double() - right).abs().max().item()
    assert error <= tolerance(right, query.dtype, kv.key.shape[2]), error
    gap = (lse.double() - right_lse).abs().max().item()
    assert gap <= tolerance(right_lse, torch.float32, query.shape[3]), gap


@pytest.mark.parametrize("form", ["strided", "expanded"])
@pytest.mark.parametrize("place", PLACES)
def test_strides_of_counts_and_scores_do_not_matter(form: str, place: str) -> None:
    case = Case(
        lengths=[70, 66, 68], groups=[((0, 2, 1), 0, 60)], starts=[3, 0, 1], slots=[2, 0, 1],
        alibi=True, sink_logits=True,
    )  # fmt: skip
    query, _, kv, scores = case.make(place)
    scales = {name: torch.rand(2, device=place) + 0.5 for name in ("key_scale", "value_scale")}
    kv, scores = replace(kv, **scales), replace(scores, alibi=torch.rand(3, 4, device=place))
    spread_kv, spread_scores = spread(kv, form), spread(scores, form)
    prefixes = levels(case.groups, place)
    wanted = cascade_lse(query, plain(spread_kv), prefixes, plain(spread_scores))
    found = cascade_lse(query, spread_kv, prefixes, spread_scores)
    assert wanted[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


BOTTOM = {"causal": "bottom_right"}
CASES = {
    "plain": Case(),
    "causal": Case(tokens=3, scores=BOTTOM),
    "top_left": Case(tokens=3, scores={"causal": "top_left"}),
    "softcap": Case(scores={"softcap": 2.0, **BOTTOM}),
    "alibi": Case(tokens=2, alibi=True, scores=BOTTOM),
    "alibi_not_causal": Case(alibi=True),
    "negative_scale": Case(scores={"scale": -0.3}),
    "sink_logits": Case(sink_logits=True, scores=BOTTOM),
    "window_over_all": Case(tokens=2, scores={"window": 80, **BOTTOM}),
    "window_cuts_the_prefix": Case(tokens=2, scores={"window": 20, **BOTTOM}),
    "window_with_sinks": Case(tokens=2, scores={"window": 20, "sink_tokens": 3, **BOTTOM}),
    "released_rows": Case(starts=[0, 12, 40, 30]),
    "slots": Case(slots=[3, 0, 5, 1], token_major=True),
    "one_head": Case(heads=1, kv_heads=1),
    "dims": Case(dim=20, value_dim=48),
    "queries_inside_of_the_prefix": Case(lengths=[64, 40, 66, 34], tokens=4, scores=BOTTOM),
    "nothing_behind_the_prefix": Case(lengths=[64, 33, 64, 33], scores=BOTTOM),
    "a_group_of_one_and_one_in_none": Case(groups=[((2,), 0, 40), ((0, 3), 0, 40)]),
    "nested": Case(
        groups=[((0, 1, 2, 3), 0, 20), ((0, 2), 20, 64), ((1, 3), 20, 39)], scores=BOTTOM
    ),
    "float16": Case(dtype=torch.float16, tokens=2, scores=BOTTOM),
    "bfloat16": Case(dtype=torch.bfloat16, token_major=True),
    "e4m3": Case(dtype=torch.float16, stored=torch.float8_e4m3fn),
    "e5m2": Case(dtype=torch.float16, stored=torch.float8_e5m2, scores=BOTTOM),
    "more_tokens_than_decode_takes": Case(tokens=17, scores=BOTTOM),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_without_sharing(name, place):
    case = CASES[name]
    query, kv, whole, scores = case.make(place)
    out, lse = cascade_lse(query, kv, levels(case.groups, place), scores)
    assert_exact(out, lse, query, whole, scores)


@pytest.mark.parametrize("place", PLACES)
def test_parts_of_a_long_prefix(place):
    """Cut for two programs, of which one has rows that not every query sees."""
    case = Case(
        lengths=[700, 650, 672],
        groups=[((2, 0, 1), 0, 649)],
        tokens=2,
        heads=2,
        kv_heads=1,
        dtype=torch.float16,
        scores=BOTTOM,
    )
    with pretend(Device(80, 8, 163 << 10)):
        query, kv, whole, scores = case.make(place)
        assert parts_for(Device(80, 8, 163 << 10), 1, 649) == 2
        assert_exact(
            *cascade_lse(query, kv, levels(case.groups, place), scores), query, whole, scores
        )


@pytest.mark.parametrize("place", PLACES)
def test_more_rows_than_a_tile(place):
    """Three members with 24 query rows each are three tiles of rows of one prefix."""
    case = Case(
        lengths=[30] * 3, groups=[((0, 1, 2), 0, 21)], tokens=3, heads=8, kv_heads=1, scores=BOTTOM
    )
    query, kv, whole, scores = case.make(place)
    assert 2 * tile_for(SMALL, 72, 16, 4).rows < 72
    assert_exact(*cascade_lse(query, kv, levels(case.groups, place), scores), query, whole, scores)


def test_without_prefixes_it_is_decode():
    query, kv, _, scores = Case(lengths=[20, 9], groups=[], heads=2).make("cpu")
    pairs = zip(cascade_lse(query, kv, [], scores), decode_lse(query, kv, scores), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(cascade(query, kv, []), decode_lse(query, kv)[0])


@pytest.mark.parametrize("place", PLACES)
def test_the_same_launch_serves_other_groups(place):
    """As in a captured graph: groups are exchanged in place, one is empty, members are fewer."""
    case = Case(groups=[((1, 3), 0, 30)])
    query, kv, whole, scores = case.make(place)
    ints = {"dtype": torch.int32, "device": place}
    members = torch.tensor([0, 2, 0, 0], **ints)
    firsts, ends = torch.tensor([0, 2, 2], **ints), torch.tensor([64, 0], **ints)
    prefixes = Prefixes(members, firsts, torch.zeros(2, **ints), ends, 4, 64)
    members.copy_(torch.tensor([1, 3, 7, 9], **ints))
    firsts.copy_(torch.tensor([0, 0, 2], **ints))
    ends.copy_(torch.tensor([64, 30], **ints))
    assert_exact(*cascade_lse(query, kv, prefixes, scores), query, whole, scores)


# ---- a cache of its own ------------------------------------------------------------------------
def test_six_sequences_of_a_cache():
    """From the page map to the result; a row that is not mapped would end the process."""
    code, said = outcome("tests.test_cascade:six_sequences")
    assert code == 0, said


def six_sequences() -> None:
    for layout in ("per_layer", "all_layers"):
        with KVCache(layout_of(layout), slots=6) as cache, pretend(SMALL):
            check_cache(cache, torch.Generator().manual_seed(17))


def check_cache(cache: KVCache, rng: torch.Generator) -> None:
    donor, own = cache.open(), {}
    before = grow(cache, donor, 130, rng)
    sequences = [donor, *(donor.fork() for _ in range(5))]
    for sequence in sequences:
        tail = grow(cache, sequence, 1 + sequence.slot, rng)
        own[sequence.slot] = [torch.cat(pair, 1) for pair in zip(before, tail, strict=True)]
    found = shared_prefixes(cache, sequences, least_tokens=32)
    assert [prefix.members for prefix in found] == [tuple(range(6))]
    assert 96 <= found[0].tokens <= 130
    lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32)
    slots = torch.tensor([sequence.slot for sequence in sequences], dtype=torch.int32)
    query = torch.randn(6, 4, 1, cache.layout.head_dim, generator=rng)
    kv = KV(*cache.reserved(1), lengths, slots=slots)
    got = cascade(query, kv, levels(found, "cpu"))
    for b, sequence in enumerate(sequences):
        right, _ = reference(query[b], *own[sequence.slot], Scores())
        error = (got[b].double() - right).abs().max().item()
        assert error <= tolerance(right, torch.float32, 200), error


def grow(cache: KVCache, sequence, tokens: int, rng: torch.Generator) -> list[Tensor]:
    """Append to every layer; K and V of layer 1."""
    new = []
    for layer in range(cache.layout.layers):
        k, v = (rows(rng, 1, cache.layout.kv_heads, tokens) for _ in range(2))
        cache.append(layer, k, v, [sequence])
        new.append([k[0], v[0]])
    return new[1]


# ---- tiles and traffic -------------------------------------------------------------------------
@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda device: str(device.arch))
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(device, dim, itemsize):
    tile = tile_for(device, 256, dim, itemsize)
    wide = max(2, itemsize)
    assert (tile.rows + 2 * tile.stages * tile.keys) * dim * wide <= device.shared_bytes
    assert tile_for(device, 3, dim, itemsize).rows == 16


def test_64_sequences_on_one_prefix_read_ten_times_fewer_bytes():
    moved = traffic(
        [32768 + 256] * 64, [(range(64), 0, 32768)],
        heads=32, kv_heads=8, dim=128, itemsize=2, device=H100,
    )  # fmt: skip
    assert moved.unshared == 64 * 33024 * 4096
    assert moved.shared == (32768 + 64 * 256) * 4096
    assert moved.unshared >= 10 * (moved.shared + moved.partials)


def test_nothing_shared_moves_nothing_more():
    moved = traffic([100, 7], [], heads=4, kv_heads=1, dim=64, itemsize=4, device=A100)
    assert moved == (107 * 512, 107 * 512, 0)


@pytest.mark.parametrize(("programs", "tokens", "parts"), [
    (16, 32768, 9), (132, 32768, 1), (1, 1 << 20, 32), (8, 600, 2), (8, 100, 1), (0, 0, 1),
])  # fmt: skip
def test_parts_keep_the_device_busy(programs, tokens, parts):
    assert parts_for(H100, programs, tokens) == parts


# ---- levels and refusals -----------------------------------------------------------------------
def test_levels_hold_each_sequence_once():
    made = levels([((0, 1, 2), 0, 9), ((4, 3), 0, 5), ((0, 2), 9, 20), ((3, 4), 5, 6)], "cpu")
    assert [level.members.tolist() for level in made] == [[0, 1, 2, 4, 3], [0, 2, 3, 4]]
    assert [level.firsts.tolist() for level in made] == [[0, 3, 5], [0, 2, 4]]
    assert [level.begins.tolist() for level in made] == [[0, 0], [9, 5]]
    assert [level.ends.tolist() for level in made] == [[9, 5], [20, 6]]
    assert [(level.most_members, level.most_tokens) for level in made] == [(3, 9), (2, 11)]
    lines = [getattr(level, name) for level in made for name in ("members", "firsts", "ends")]
    assert len({line.untyped_storage().data_ptr() for line in lines}) == 1  # one copy
    assert all(line.storage_offset() % 4 == 0 for line in lines)  # 16 bytes
    assert levels([], "cpu") == []


def refusals():
    line = torch.zeros(2, dtype=torch.int32)
    yield r"ends is \(2,\) and begins \(1,\)", (line, line, line[:1], line, 1, 1)
    yield r"firsts is \(2,\)", (line, line, line, line, 1, 1)
    yield "members is torch.int64", (line.long(), line, line[:1], line[:1], 1, 1)
    yield "ends is on meta", (line, line, line[:1], line[:1].to("meta"), 1, 1)
    yield "most_members=-1", (line, line, line[:1], line[:1], -1, 1)


@pytest.mark.parametrize(("message", "fields"), list(refusals()), ids=lambda value: str(value)[:16])
def test_prefixes_of_other_shapes_are_refused(message, fields):
    with pytest.raises(ValueError, match=message):
        Prefixes(*fields)


def test_calls_of_other_shapes_are_refused():
    case = Case()
    query, kv, _, _ = case.make("cpu")
    prefixes = levels(case.groups, "cpu")
    with pytest.raises(ValueError, match=r"must be \[B, heads, tokens, head_dim\]"):
        cascade(query[:, :, 0], kv, prefixes)
    with pytest.raises(ValueError, match="no multiple"):
        cascade(query[:, :3], kv, prefixes)
    with pytest.raises(ValueError, match="prefixes are on meta, query on cpu"):
        cascade(query, kv, levels(case.groups, "meta"))
    with pytest.raises(ValueError, match="alibi"):
        cascade(query, kv, prefixes, Scores(alibi=torch.zeros(3)))
