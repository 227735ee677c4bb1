"""What a cache holds, beside what other caches would hold, and how fast the tokens came.

Measured numbers come from the cache that ran. Numbers of caches that did not run are computed from
the shapes (`peer_rows`), and every table says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vattn.shape import ModelShape

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class MemoryRow:
    """One line of the memory table, in bytes; None where the figure has no meaning."""

    name: str
    measured: bool
    reserved_bytes: int
    mapped_bytes: int
    used_bytes: int
    peak_bytes: int
    copied_bytes: int

    @property
    def wasted_bytes(self) -> int:
        return self.mapped_bytes - self.used_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "wasted_bytes": self.wasted_bytes}


@dataclass(frozen=True)
class Timing:
    """Times of one generation, in seconds. ``steps`` leaves out the prompt's own step."""

    prefill: float
    steps: tuple[float, ...]
    batch: int

    @property
    def tokens_per_second(self) -> float:
        return self.batch * len(self.steps) / sum(self.steps) if self.steps else 0.0

    def quantile(self, share: float) -> float:
        """The nearest-rank quantile of the time per step."""
        if not self.steps:
            return 0.0
        ranked = sorted(self.steps)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]

    def to_dict(self) -> dict[str, Any]:
        return {
            "prefill_seconds": self.prefill,
            "decode_seconds": sum(self.steps),
            "tokens_per_second": self.tokens_per_second,
            "step_seconds_p50": statistics.median(self.steps) if self.steps else 0.0,
            "step_seconds_p99": self.quantile(0.99),
        }


def static_row(shape: ModelShape, lengths: Sequence[int], room: int, name: str) -> MemoryRow:
    """A StaticCache with ``room`` tokens for each sequence: everything is held from the start."""
    held = len(lengths) * shape.used_bytes(room)
    used = sum(shape.used_bytes(n) for n in lengths)
    return MemoryRow(name, False, held, held, used, held, 0)


def dynamic_row(shape: ModelShape, lengths: Sequence[int], prompt: int) -> MemoryRow:
    """A DynamicCache: `torch.cat` makes new tensors at each step and copies every row into them.

    While a layer grows, its old and its new tensors are alive together: that is the peak.
    """
    held = sum(2 * shape.row_bytes * sum(cat_rows(shape, prompt, n)) for n in lengths)
    used = sum(shape.used_bytes(n) for n in lengths)
    peak = sum(cat_peak(shape, prompt, n) for n in lengths)
    copied = sum(shape.used_bytes(n) for end in lengths for n in range(prompt, end))
    return MemoryRow("DynamicCache", False, held, held, used, peak, copied)


def cat_rows(shape: ModelShape, prompt: int, tokens: int) -> list[int]:
    """Rows in each layer's K tensor of a DynamicCache that read ``prompt`` tokens and has grown to
    ``tokens``. A window's tensor is a slice of what the last step made: that stays alive whole."""
    step = prompt if tokens == prompt else 1
    return [
        tokens if window is None else min(tokens - step, window - 1) + step
        for window in shape.windows
    ]


def cat_peak(shape: ModelShape, prompt: int, tokens: int) -> int:
    """Most bytes of one sequence that are alive at once while a DynamicCache grows to ``tokens``:
    reading the prompt, in the first step after it, or in the last one."""
    return max(step_peak(shape, prompt, n) for n in (prompt, min(prompt + 1, tokens), tokens))


def step_peak(shape: ModelShape, prompt: int, tokens: int) -> int:
    """Most bytes alive at once in the step that brings a DynamicCache to ``tokens`` tokens.

    Full layers replace K, then V; layers with a window make both before they let go of either.
    """
    after = cat_rows(shape, prompt, tokens)
    if tokens == prompt:
        return 2 * shape.row_bytes * sum(after)
    before = cat_rows(shape, prompt, tokens - 1)
    alive, peak = 2 * sum(before), 0
    for old, new, window in zip(before, after, shape.windows, strict=True):
        grown = alive + (new - old if window is None else new)
        peak = max(peak, grown + new)
        alive += 2 * (new - old)
    return shape.row_bytes * peak


def peer_rows(
    shape: ModelShape, lengths: Sequence[int], *, prompt: int, room: int
) -> list[MemoryRow]:
    """What stock caches hold after the same generation, computed from the shapes.

    Args:
        lengths: tokens of each sequence at the end.
        prompt: tokens of each sequence before the first step.
        room: tokens that the request may reach (prompt and ``--max-new-tokens``). A StaticCache of
            that room is its best case; where lengths are not known it needs the model's context.
    """
    rows = [
        dynamic_row(shape, lengths, prompt),
        static_row(shape, lengths, room, f"StaticCache {room:,}"),
    ]
    context = shape.max_positions
    if context is not None and context > room:
        rows.append(static_row(shape, lengths, context, f"StaticCache {context:,}"))
    return rows


def vattn_row(stats: Mapping[str, Any], peak: int) -> MemoryRow:
    """The line of a KVCache, measured: ``KVCache.stats().to_dict()`` and the most bytes of pages
    that existed at once."""
    reserved, mapped, used = (
        int(stats[f"{name}_bytes"]) for name in ("reserved", "mapped", "used")
    )
    return MemoryRow("vattn", True, reserved, mapped, used, max(peak, mapped), 0)


def size(nbytes: float) -> str:
    """Bytes in the unit that people read: ``960 B``, ``67.6 KiB``, ``128 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" or abs(nbytes) >= 99.95 else f"{nbytes:.1f} {unit}"


def plain_table(title: str) -> Table:
    """A table that fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """The memory of the caches side by side."""
    table = plain_table("KV cache memory")
    table.add_column("cache", no_wrap=True)
    for column in ("reserved", "mapped", "used", "wasted", "peak", "copied"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        figures = (
            row.reserved_bytes,
            row.mapped_bytes,
            row.used_bytes,
            row.wasted_bytes,
            row.peak_bytes,
            row.copied_bytes,
        )
        table.add_row(
            row.name if row.measured else f"{row.name}*",
            *(size(figure) for figure in figures),
            style="bold" if row.measured else "dim",
        )
    table.caption = (
        "* computed from the shapes, not run. StaticCache n: room for n tokens from the start. "
        "copied: rows moved to new tensors in order to grow."
    )
    table.caption_justify = "left"
    return table
