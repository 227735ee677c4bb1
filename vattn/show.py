"""The memory map of a cache: taken from the allocator's record, drawn as text or as a picture.

    lane of a sequence   |########===+oo.......|
                          used    │  ││ └ reserved only: address space, no memory
                          shared ─┘  │└ retained: mapped, but no live token lies in it
                          tail ──────┘ partly filled

Lanes of one sequence that look alike (usually all of them) are drawn once, as one *band*.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vattn.allocator.errors import VattnError
from vattn.report import size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.text import Text

    from vattn.cache import KVCache

USED, SHARED, TAIL, RETAINED, RESERVED = "#", "=", "+", "o", "."
KINDS = {
    USED: "used",
    SHARED: "shared",
    TAIL: "tail, partly filled",
    RETAINED: "retained",
    RESERVED: "reserved only",
}
_STYLES = {USED: "blue", SHARED: "magenta", TAIL: "yellow", RETAINED: "bright_black", RESERVED: ""}
# Where one character stands for several pages, the rarer kind wins, so that nothing is hidden.
_PRECEDENCE = (TAIL, SHARED, USED, RETAINED, RESERVED)
SCHEMA = "vattn.map.v1"


class MapError(VattnError, ValueError):
    """A saved memory map cannot be read."""


@dataclass(frozen=True)
class Band:
    """Lanes of one sequence with the same pages mapped: ``runs`` of (kind, pages) from page 0 on.

    What follows the last run is reserved only.
    """

    owner: str
    lanes: str
    lane_count: int
    tokens: int
    runs: tuple[tuple[str, int], ...]

    @property
    def mapped_end(self) -> int:
        """Pages up to the last mapped one."""
        ends, total = 0, 0
        for kind, count in self.runs:
            total += count
            ends = total if kind != RESERVED else ends
        return ends


@dataclass(frozen=True)
class MemoryMap:
    """Every mapped page of a cache at one moment, ready to draw or to save."""

    page_bytes: int
    row_bytes: int
    lane_pages: int
    bands: tuple[Band, ...]
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_page(self) -> float:
        return self.page_bytes / self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        bands = [
            {**vars(band), "runs": [[KINDS[kind], count] for kind, count in band.runs]}
            for band in self.bands
        ]
        return {"schema": SCHEMA, **vars(self), "bands": bands, "stats": dict(self.stats)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> MemoryMap:
        """Read what `to_dict` wrote, or a report that carries it under ``map``.

        Raises:
            MapError: it is neither.
        """
        saved = saved.get("map") or saved
        if saved.get("schema") != SCHEMA:
            raise MapError(f"not a memory map: schema {saved.get('schema')!r}, wanted {SCHEMA!r}")
        letters = {name: letter for letter, name in KINDS.items()}
        try:
            bands = tuple(
                Band(**{**band, "runs": tuple((letters[k], int(n)) for k, n in band["runs"])})
                for band in saved["bands"]
            )
            return cls(
                saved["page_bytes"], saved["row_bytes"], saved["lane_pages"], bands, saved["stats"]
            )
        except (KeyError, TypeError) as error:
            raise MapError(f"damaged memory map: {error}") from error


def runs_of(cells: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Run lengths of a row of kinds, without the reserved end."""
    runs = [(kind, len(list(same))) for kind, same in groupby(cells)]
    while runs and runs[-1][0] == RESERVED:
        runs.pop()
    return tuple(runs)


def map_of(cache: KVCache) -> MemoryMap:
    """The map of a cache as it is now, from the allocator's own record."""
    import numpy as np

    from vattn.usage import page_rows

    layout, arena = cache.layout, cache.arena
    ids, live = page_rows(cache)
    shared = cache.pool.refs(ids) > 1
    kinds = np.select([live == 0, shared, live < layout.page], [RETAINED, SHARED, TAIL], USED)
    bands: list[Band] = []
    done = 0
    for slot in np.flatnonzero((arena.last > arena.first).any(axis=1)).tolist():
        pages = arena.mapped(slot) - slot * arena.slot_pages
        cells = np.full(arena.slot_pages, RESERVED)
        cells[pages] = kinds[done : done + len(pages)]
        done += len(pages)
        bands += _bands(cache, slot, cells.reshape(arena.lanes, arena.lane_pages))
    return MemoryMap(
        layout.page, layout.row_bytes, arena.lane_pages, tuple(bands), cache.stats().to_dict()
    )


def _bands(cache: KVCache, slot: int, lanes: NDArray[np.str_]) -> Iterator[Band]:
    """The lanes of a slot, those that look alike together."""
    layout = cache.layout
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for lane, cells in enumerate(lanes):
        end = int(cache.arena.last[slot, lane])
        alike.setdefault(runs_of(cells[:end].tolist()), []).append(lane)
    opened = bool(cache.opened[slot] % 2)
    for runs, members in alike.items():
        groups = sorted({lane // layout.lanes_per_group for lane in members})
        layers = [
            layer
            for layer in range(layout.physical_layers)
            if layer // layout.group_layers in groups
        ]
        yield Band(
            owner=f"sequence {slot}" if opened else f"slot {slot}, parked",
            lanes=f"layers {_ranges(layers)}",
            lane_count=len(members),
            tokens=int(cache.lengths[slot, layers].max()),
            runs=runs,
        )


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    parts = []
    for _, same in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in same]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(parts)


# ---- text ------------------------------------------------------------------------------------
def ascii_map(memory: MemoryMap, *, width: int = 64) -> str:
    """The map as text, one line for each band, at most ``width`` characters of pages."""
    if not memory.bands:
        return "nothing is mapped"
    end, per_cell = _scale(memory, width)
    labels = [
        f"{band.owner}  {band.tokens:,} tokens  {band.lanes} ({band.lane_count} lanes)"
        for band in memory.bands
    ]
    margin = max(map(len, labels))
    lines = [
        f"{label:<{margin}} |{_cells(band, end, per_cell)}|"
        for label, band in zip(labels, memory.bands, strict=True)
    ]
    shown = {kind for line in lines for kind in line[margin + 2 : -1]}
    legend = "   ".join(f"{kind} {name}" for kind, name in KINDS.items() if kind in shown)
    cell_tokens = per_cell * memory.tokens_per_page
    pages = "page" if per_cell == 1 else f"{per_cell} pages"
    lines += [
        "",
        legend,
        f"one character: {pages} of {size(memory.page_bytes)}, {cell_tokens:g} tokens of a lane; "
        f"each lane is reserved to {memory.lane_pages * memory.tokens_per_page:,.0f} tokens",
    ]
    if memory.stats:
        lines.append(_balance(memory.stats))
    return "\n".join(lines)


def _balance(stats: Mapping[str, Any]) -> str:
    """Where the mapped bytes are, as one equation."""
    parts = {name: size(stats[f"{name}_bytes"]) for name in ("used", "wasted", "retained")}
    text = f"mapped {size(stats['mapped_bytes'])} = "
    text += " + ".join(f"{name} {amount}" for name, amount in parts.items())
    if stats.get("shared_bytes"):
        text += f"; sharing saves {size(stats['shared_bytes'])}"
    return text


def colored(text: str) -> Text:
    """`ascii_map`'s text with the pages in colour."""
    from rich.text import Text

    out = Text()
    for line in text.splitlines(keepends=True):
        label, bar, rest = line.partition("|")
        cells, _, end = rest.rpartition("|")
        out.append(label)
        if bar:
            out.append(bar, "dim")
            for kind, same in groupby(cells):
                out.append("".join(same), _STYLES.get(kind, ""))
            out.append("|" + end, "dim")
    return out


def _scale(memory: MemoryMap, width: int) -> tuple[int, int]:
    """Pages to draw (a little beyond the last mapped one) and pages per character."""
    mapped = max(band.mapped_end for band in memory.bands)
    end = min(memory.lane_pages, max(mapped + max(4, mapped // 8), 8))
    return end, -(-end // width)


def _cells(band: Band, end: int, per_cell: int) -> str:
    row = "".join(kind * count for kind, count in band.runs)[:end].ljust(end, RESERVED)
    cells = (row[i : i + per_cell] for i in range(0, end, per_cell))
    return "".join(next(k for k in _PRECEDENCE if k in cell) for cell in cells)


# ---- torch's memory snapshot -------------------------------------------------------------------
def snapshot_of(cache: KVCache) -> dict[str, Any]:
    """`memory_snapshot` of a cache made with ``trace=True``; its slots are the owners.

    Raises:
        MapError: the cache was made without.
    """
    if cache.trace is None:
        raise MapError("this cache keeps no trace; make it with trace=True")
    base, stride = cache.arena.address, cache.layout.slot_bytes
    return memory_snapshot(
        (time_ns, action, address, nbytes, f"slot {(address - base) // stride}")
        for time_ns, action, address, nbytes, _ in cache.trace
    )


def memory_snapshot(trace: Iterable[Any]) -> dict[str, Any]:
    """Map and unmap events in the format of ``torch.cuda.memory._snapshot()``.

    Pickled, it opens in torch's own viewer: ``python -m torch.cuda._memory_viz trace_plot FILE``.
    Addresses are virtual: a page mapped at two addresses is drawn at both. A map is written as
    ``segment_map`` plus ``alloc``, an unmap as ``free_requested``, ``free_completed`` and
    ``segment_unmap``, because the viewer's timeline counts the former and its history the latter.
    """
    record = _Record()
    for time_ns, action, address, nbytes, owner in trace:
        record.stamp = time_ns // 1000
        if action in ("map", "unmap"):
            record.free(address, nbytes)
        if action == "map":
            record.note("segment_map", address, nbytes, str(owner))
            record.alloc(address, nbytes, str(owner))
    return {
        "segments": record.segments(),
        "device_traces": [record.events],
        "allocator_settings": {},
    }


class _Record:
    """What is mapped while a trace is replayed, and the events so far."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.stamp = 0
        self._starts: list[int] = []  # ascending, disjoint
        self._live: dict[int, tuple[int, str]] = {}  # start -> (bytes, owner)

    def note(self, action: str, address: int, nbytes: int, owner: str) -> None:
        self.events.append(
            {
                "action": action,
                "addr": address,
                "size": nbytes,
                "stream": 0,
                "device": 0,
                "time_us": self.stamp,
                "frames": _frames(owner),
            }
        )

    def alloc(self, address: int, nbytes: int, owner: str) -> None:
        bisect.insort(self._starts, address)
        self._live[address] = (nbytes, owner)
        self.note("alloc", address, nbytes, owner)

    def free(self, address: int, nbytes: int) -> None:
        """Free what is live in a range; what reaches beyond the range is allocated again."""
        end = address + nbytes
        first = max(0, bisect.bisect_right(self._starts, address) - 1)
        last = bisect.bisect_left(self._starts, end)
        for base in self._starts[first:last]:
            length, owner = self._live[base]
            if base + length <= address:
                continue
            self._starts.remove(base)
            del self._live[base]
            self.note("free_requested", base, length, owner)
            self.note("free_completed", base, length, owner)
            low, high = max(base, address), min(base + length, end)
            self.note("segment_unmap", low, high - low, owner)
            if base < low:
                self.alloc(base, low - base, owner)
            if high < base + length:
                self.alloc(high, base + length - high, owner)

    def segments(self) -> list[dict[str, Any]]:
        """What is mapped now: one segment for each run of adjacent maps."""
        segments: list[dict[str, Any]] = []
        for address in self._starts:
            nbytes, owner = self._live[address]
            if not segments or segments[-1]["address"] + segments[-1]["total_size"] != address:
                segments.append(_segment(address))
            segment = segments[-1]
            for name in _SIZES:
                segment[name] += nbytes
            segment["blocks"].append(
                {
                    "address": address,
                    "size": nbytes,
                    "requested_size": nbytes,
                    "state": "active_allocated",
                    "frames": _frames(owner),
                }
            )
        return segments


_SIZES = ("total_size", "allocated_size", "active_size", "requested_size")


def _segment(address: int) -> dict[str, Any]:
    return {
        "device": 0,
        "address": address,
        **dict.fromkeys(_SIZES, 0),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": True,
        "frames": [],
        "blocks": [],
    }


def _frames(owner: str) -> list[dict[str, Any]]:
    return [{"filename": "vattn", "line": 0, "name": owner}]
