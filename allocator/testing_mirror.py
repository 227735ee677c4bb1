"""For `testing`: a model of an arena in plain Python lists, kept side by side with the real one.

A `Sheet` is one physical page: what each of its words must hold, as far as anybody wrote it. A lane
is a list of sheets with the page number of the first; slots that alias a page hold the same sheet.
Words name their writer in the top byte, so a byte of another tenant is seen wherever it turns up.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections import Counter
from pathlib import Path

import numpy as np

from .arena import Arena

PAGE = 4096
WORDS = PAGE // 8
_stamp = 0


def words_at(address: int, count: int = WORDS) -> np.ndarray:
    """The memory itself."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))


def maps_within(address: int, nbytes: int) -> int:
    """Kernel maps that reach into a range, as /proc/self/maps has them."""
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(x, 16) for x in line.split(" ", 1)[0].split("-"))
        count += low < address + nbytes and high > address
    return count


def open_things() -> tuple[list[str], int]:
    """File descriptors and kernel maps of this process."""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_bytes().count(b"\n")


class Sheet:
    """One physical page; ``owner`` None: bytes of several tenants."""

    def __init__(self, tenant: int | None, count: int, *, zeros: bool = False) -> None:
        self.owner, self.count = tenant, count  # words of the page
        self.words = np.zeros(count, np.uint64)
        self.known = np.full(count, zeros)
        self.readers = {tenant}  # whose words may stand where nobody wrote

    def copy(self, nbytes: int, tenant: int, *, zeros: bool) -> Sheet:
        """A new page that begins with our first ``nbytes`` bytes."""
        new, count = Sheet(tenant, self.count, zeros=zeros), nbytes // 8
        new.words[:count], new.known[:count] = self.words[:count], self.known[:count]
        new.readers = {tenant, *self.readers}
        if self.owner != tenant:
            new.owner = None
        return new

    def write(self, address: int, tenant: int) -> None:
        """New contents, through one of the page's addresses."""
        global _stamp
        _stamp += 1
        self.words[:] = np.arange(self.count, dtype=np.uint64) + np.uint64(
            ((tenant + 1) << 56) + (_stamp << 16)
        )
        self.known[:] = True
        words_at(address, self.count)[:] = self.words

    def verify(self, real: np.ndarray) -> None:
        """What is read is what was written, or nobody else's."""
        if self.known.all():
            assert (real == self.words).all(), "a written word changed"
            return
        assert (real[self.known] == self.words[self.known]).all(), "a written word changed"
        rest = real[~self.known]
        writers = set((rest[rest != 0] >> np.uint64(56)).tolist())
        assert writers <= {t + 1 for t in self.readers if t is not None}, "another tenant's bytes"


class Mirror:
    """The model of one arena: ``lanes[slot][lane]`` is a list of sheets from page ``first`` on."""

    def __init__(self, arena: Arena) -> None:
        self.arena, self.page_words = arena, arena.page_bytes // 8
        shape = range(arena.slots), range(arena.lanes)
        self.lanes: list[list[list[Sheet]]] = [[[] for _ in shape[1]] for _ in shape[0]]
        self.first = [[0 for _ in shape[1]] for _ in shape[0]]
        self.tenant = [0 for _ in shape[0]]
        self.pins: Counter[int] = Counter()
        # The whole range, mapped or not.
        self.words = words_at(arena.address, arena.pages * self.page_words)

    # ---- looking -----------------------------------------------------------------------------
    def last(self, slot: int, lane: int) -> int:
        return self.first[slot][lane] + len(self.lanes[slot][lane])

    def empty(self, slot: int) -> bool:
        return not any(self.lanes[slot])

    def address(self, slot: int, lane: int, page: int) -> int:
        number = (slot * self.arena.lanes + lane) * self.arena.lane_pages + page
        return self.arena.address + number * self.arena.page_bytes

    def sheets(self) -> list[Sheet]:
        return [sheet for slot in self.lanes for lane in slot for sheet in lane]

    def verify(self) -> None:
        """Frontiers and every byte are as the model has them."""
        for slot, lanes in enumerate(self.lanes):
            for lane, sheets in enumerate(lanes):
                first = self.first[slot][lane]
                real = int(self.arena.first[slot, lane]), int(self.arena.last[slot, lane])
                if sheets:
                    assert real == (first, first + len(sheets))
                else:
                    assert real[0] == real[1]
                for i, sheet in enumerate(sheets):
                    at = (self.address(slot, lane, first + i) - self.arena.address) // 8
                    sheet.verify(self.words[at : at + self.page_words])
            assert self.arena.pins[slot] == self.pins[slot]

    # ---- verbs -------------------------------------------------------------------------------
    def new(self, slot: int) -> Sheet:
        return Sheet(self.tenant[slot], self.page_words, zeros=self.arena.zero_backed)

    def sync(self, slot: int) -> None:
        """An empty lane may stand anywhere: take its place from the arena."""
        for lane, sheets in enumerate(self.lanes[slot]):
            if not sheets:
                self.first[slot][lane] = int(self.arena.first[slot, lane])

    def grow(self, slots: list[int], to: list[int]) -> None:
        for slot, want in zip(slots, to, strict=True):
            for lane, sheets in enumerate(self.lanes[slot]):
                while self.last(slot, lane) < want:
                    sheets.append(self.new(slot))

    def trim(self, slot: int, first: int, last: int) -> None:
        for lane, sheets in enumerate(self.lanes[slot]):
            low = self.first[slot][lane]
            keep = range(max(first, low), max(first, low, min(last, low + len(sheets))))
            self.lanes[slot][lane] = [s for i, s in enumerate(sheets, low) if i in keep]
            self.first[slot][lane] = keep.start
        self.sync(slot)

    def shift(self, slot: int, lane: int, gap: int, count: int) -> None:
        at = gap - self.first[slot][lane]
        del self.lanes[slot][lane][at : at + count]

    def share(
        self, slot: int, lane: int, first: int, sheets: list[Sheet], *, dry: bool = False
    ) -> bool:
        """Put ``sheets`` at page ``first``; pages mapped behind them stay if nothing lies between.
        True if pages had to be unmapped; ``dry``: only tell."""
        old_first, old, end = self.first[slot][lane], self.lanes[slot][lane], first + len(sheets)
        touching = bool(old) and old_first <= end
        behind = old[end - old_first :] if touching and end > old_first else old if touching else []
        gone = [i for i in range(old_first, old_first + len(old)) if i < first]
        if not dry:
            self.first[slot][lane], self.lanes[slot][lane] = first, [*sheets, *behind]
        return bool(gone) or (bool(old) and not touching)

    def moves(
        self, source: int, slot: int, full: int, tail_bytes: int, nbytes: int, *, whole: bool
    ) -> list[tuple[int, list[Sheet]]]:
        """Per lane, the first page and the sheets that ``slot`` gets from ``source``."""
        out = []
        for lane, sheets in enumerate(self.lanes[source]):
            low = self.first[source][lane]
            first = min(low, full)
            got = sheets[: full - first] if low <= full else []
            if tail_bytes and low <= full:
                tail = sheets[full - low]
                zeros = self.arena.zero_backed
                got = [*got, tail if whole else tail.copy(nbytes, self.tenant[slot], zeros=zeros)]
            out.append((first, list(got)))
        return out

    def put(self, slot: int, moves: list[tuple[int, list[Sheet]]], *, dry: bool = False) -> bool:
        """Do `share` in every lane. A sheet stays its owner's only while all its holders agree."""
        for sheet in {s for _, sheets in moves for s in sheets} if not dry else ():
            if sheet.owner != self.tenant[slot]:
                sheet.owner = None
        changed = [self.share(slot, i, *move, dry=dry) for i, move in enumerate(moves)]
        return any(changed)

    def permutation(
        self, slots: list[int], order: list[int], full: list[int], tails: list[int]
    ) -> list[tuple[int, list[tuple[int, list[Sheet]]]]]:
        """What every slot that changes gets: all from the state before."""
        out, kept = [], {j for i, j in enumerate(order) if i == j}
        for i, j in enumerate(order):
            if i != j:
                whole = j not in kept
                moves = self.moves(slots[j], slots[i], full[j], tails[j], max(tails), whole=whole)
                kept.add(j)
                out.append((slots[i], moves))
        return out

    def holders(self, others: list[Mirror]) -> Counter[Sheet]:
        return Counter(s for mirror in others for s in mirror.sheets())

    def unshare(self, slot: int, first: int, last: int, holders: Counter[Sheet]) -> None:
        for lane, sheets in enumerate(self.lanes[slot]):
            low = self.first[slot][lane]
            for i in range(max(first, low), min(last, low + len(sheets))):
                if holders[sheets[i - low]] > 1:
                    shared, nbytes = sheets[i - low], self.arena.page_bytes
                    sheets[i - low] = shared.copy(nbytes, self.tenant[slot], zeros=False)

    def retenant(self, slot: int, tenant: int) -> None:
        self.tenant[slot] = tenant
        for sheets in self.lanes[slot]:
            for i, sheet in enumerate(sheets):
                if sheet.owner != tenant:
                    zeros = self.arena.zero_backed
                    sheets[i] = Sheet(tenant, self.page_words, zeros=zeros)
