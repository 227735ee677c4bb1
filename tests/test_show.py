"""What is drawn is what is mapped."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from vattn.cache import KVCache
from vattn.layout import Layout
from vattn.picture import History, draw
from vattn.show import (
    RESERVED,
    RETAINED,
    SHARED,
    TAIL,
    USED,
    Band,
    MapError,
    MemoryMap,
    ascii_map,
    map_of,
    memory_snapshot,
    runs_of,
    snapshot_of,
)

TOKENS_PER_PAGE = 16
LAYOUT = Layout(2, 1, 64, 512, dtype="float32", page_bytes=4096)


def append(cache: KVCache, sequence, tokens: int) -> None:
    rows = torch.zeros(1, 1, tokens, 64)
    for layer in range(2):
        cache.append(layer, rows, rows, [sequence])


@pytest.fixture
def memory() -> MemoryMap:
    """Two full pages shared, a tail each; a window in layer 1; a parked slot."""
    with KVCache(LAYOUT, slots=4) as cache:
        first = cache.open()
        append(cache, first, 40)
        second = first.fork()
        append(cache, second, 20)
        third = cache.open()
        append(cache, third, 64)
        third.release_before(1, 40)
        cache.advance()
        cache.advance()
        parked = cache.open()
        append(cache, parked, 32)
        parked.close()
        drawn = map_of(cache)
        cache.check()
    return drawn


def test_map_names_every_page_by_what_it_holds(memory):
    runs = {(band.owner, band.lanes): band.runs for band in memory.bands}
    assert runs == {
        ("sequence 0", "layers 0-1"): ((SHARED, 2), (TAIL, 1)),
        ("sequence 1", "layers 0-1"): ((SHARED, 2), (USED, 1), (TAIL, 1)),
        ("sequence 2", "layers 0"): ((USED, 4),),
        ("sequence 2", "layers 1"): ((RESERVED, 2), (TAIL, 1), (USED, 1)),
        ("slot 3, parked", "layers 0-1"): ((RETAINED, 2),),
    }


def test_map_counts_the_same_pages_as_the_statistics(memory):
    drawn = sum(
        count * band.lane_count
        for band in memory.bands
        for kind, count in band.runs
        if kind != RESERVED
    )
    aliased = memory.stats["shared_bytes"] // memory.page_bytes
    assert drawn == memory.stats["pages"] + aliased


def test_ascii_draws_one_character_a_page(memory):
    lines = ascii_map(memory, width=40).splitlines()
    assert lines[0].endswith("|==+.....|")
    assert lines[1].endswith("|==#+....|")
    assert lines[3].endswith("|..+#....|")
    assert lines[4].endswith("|oo......|")
    assert any("mapped" in line and "used" in line for line in lines)


def test_ascii_keeps_rare_kinds_when_a_character_is_many_pages():
    band = Band("sequence 0", "layers 0", 1, 1000, ((USED, 99), (TAIL, 1)))
    text = ascii_map(MemoryMap(4096, 256, 1000, (band,)), width=10)
    first = text.splitlines()[0]
    assert len(first.split("|")[1]) <= 10
    assert TAIL in first


def test_empty_cache_is_drawn_too(tmp_path):
    with KVCache(LAYOUT, slots=1) as cache:
        memory = map_of(cache)
    assert ascii_map(memory) == "nothing is mapped"
    draw(tmp_path / "empty.png", memory, None, title="empty")


def test_map_survives_json(memory):
    assert MemoryMap.from_dict(memory.to_dict()) == memory
    assert MemoryMap.from_dict({"map": memory.to_dict()}) == memory
    with pytest.raises(MapError, match="schema"):
        MemoryMap.from_dict({"schema": "other"})
    with pytest.raises(MapError, match="damaged"):
        MemoryMap.from_dict({**memory.to_dict(), "bands": [{"owner": "x"}]})


def test_runs_drop_the_reserved_end():
    assert runs_of("##+...") == ((USED, 2), (TAIL, 1))
    assert runs_of("....") == ()


def test_picture_has_the_colours_of_what_is_mapped(memory, tmp_path):
    import matplotlib.image

    path = tmp_path / "map.png"
    history = History(
        "tokens",
        [(1, 4096, 1000), (2, 8192, 5000)],
        levels={"static": 9000, "far": 10**12},
        curves={"dynamic": [(1, 2000), (2, 9000)]},
    )
    draw(path, memory, history, title="test")
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    for color in ((0x2F, 0x6D, 0xB5), (0x82, 0x57, 0xB8), (0xF0, 0xA1, 0x3A), (0xAE, 0xB8, 0xC2)):
        assert (pixels == color).all(axis=-1).sum() > 500


PAGE = 4096
EVENTS = [
    (1_000, "map", 10 * PAGE, 2 * PAGE, "slot 0"),
    (2_000, "map", 12 * PAGE, PAGE, "slot 0"),
    (3_000, "create", 0, PAGE, "pool"),
    (4_000, "unmap", 11 * PAGE, 2 * PAGE, "slot 0"),
    (5_000, "map", 10 * PAGE, PAGE, "slot 0"),
    (6_000, "map", 50 * PAGE, 3 * PAGE, "slot 1"),
]


def test_snapshot_ends_with_what_is_mapped():
    snapshot = memory_snapshot(EVENTS)
    ends = [(seg["address"] // PAGE, seg["total_size"] // PAGE) for seg in snapshot["segments"]]
    assert ends == [(10, 1), (50, 3)]
    balance = 0
    for event in snapshot["device_traces"][0]:
        balance += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
    assert balance == 4 * PAGE


def test_snapshot_of_a_cache_balances_with_what_is_mapped():
    with KVCache(LAYOUT, slots=4, trace=True) as cache:
        first = cache.open()
        append(cache, first, 40)
        second = first.fork()
        append(cache, second, 20)
        first.close()
        cache.advance()
        snapshot = snapshot_of(cache)
        mapped = sum(cache.arena.mapped_pages(slot) for slot in range(4)) * PAGE
        assert sum(segment["total_size"] for segment in snapshot["segments"]) == mapped
        names = {event["frames"][0]["name"] for event in snapshot["device_traces"][0]}
        assert names == {"slot 0", "slot 1"}
    with KVCache(LAYOUT, slots=1) as cache, pytest.raises(MapError, match="trace=True"):
        snapshot_of(cache)


def test_snapshot_opens_in_torchs_viewer(tmp_path: Path):
    from torch.cuda import _memory_viz

    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(memory_snapshot(EVENTS)))
    snapshot = pickle.loads(path.read_bytes())
    assert "total_allocated: 16.0KiB" in _memory_viz.segsum(snapshot)
    assert "segment_map" in _memory_viz.trace(snapshot)
    for picture in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "snapshot.pickle" in picture(snapshot)
