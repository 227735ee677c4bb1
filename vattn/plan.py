"""Layouts and page sizes for a model, weighed against each other, and one recommended.

All numbers are arithmetic on the model's config; nothing is allocated and torch is not needed.
For a lane (one virtual range of a sequence) with rows of ``row`` bytes in pages of ``page`` bytes:

    tokens per page     page / row
    waste, on average   lanes * page / 2              a lane's last page is half empty
    waste at T tokens   lanes * page * ceil(T * row / page) - used bytes
    kernel maps         2 * lanes per sequence        the mapped part and the reserved part
    calls to share      host: one mmap per lane       pages of a lane are adjacent in the page file
                        cuda: one cuMemMap per page
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from vattn.allocator.errors import VattnError
from vattn.allocator.host import MAP_LIMIT_SHARE, max_map_count
from vattn.layout import ITEM_BYTES, Layout
from vattn.report import size
from vattn.shape import ModelShape

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HOST_PAGES = tuple(4096 << shift for shift in (0, 1, 2, 4, 6, 9))
CUDA_PAGES = tuple(2 << shift for shift in (20, 22, 24))
PREFIX_TOKENS = 32_768
WASTE_GOAL = 0.02
SEQUENCES_WANTED = 32
# Entries of a second-level TLB: the smaller ones of current x86 server cores have this many.
TLB_ENTRIES = 1536
_PTE_BYTES, _HUGE_BYTES = 4096, 2 << 20  # the two units of translation on x86
_DEFAULT_CONTEXT = 32_768
Rows = Literal["head_major", "token_major"]


class PlanError(VattnError, ValueError):
    """A plan was asked for with numbers that make no sense."""


@dataclass(frozen=True)
class Option:
    """One layout with one page size. ``waste_share`` has one value for each length asked for.

    ``max_sequences`` (the kernel's map limit) and ``tlb_reach_tokens`` are None on CUDA.
    """

    layout: str
    rows: str
    group_layers: int
    page_bytes: int
    lanes: int
    row_bytes: int
    tokens_per_page: float
    expected_waste_bytes: int
    waste_share: tuple[float, ...]
    maps_per_sequence: int
    max_sequences: int | None
    tlb_reach_tokens: int | None
    share_grain_tokens: int
    share_calls: int


@dataclass(frozen=True)
class Plan:
    """Every option for a model, and the one to take."""

    shape: ModelShape
    target: str
    max_tokens: int
    tokens: tuple[int, ...]
    options: tuple[Option, ...]
    recommended: Option
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": "vattn.plan.v1",
            "model": {
                **asdict(self.shape),
                "layers": self.shape.layers,
                "bytes_per_token": self.shape.bytes_per_token,
                "layer_row_bytes": self.shape.row_bytes,
            },
            "target": self.target,
            "max_tokens": self.max_tokens,
            "tokens": list(self.tokens),
            "used_bytes": [self.shape.used_bytes(n) for n in self.tokens],
            "prefix_tokens": PREFIX_TOKENS,
            "options": [asdict(option) for option in self.options],
            "recommended": asdict(self.recommended),
            "why": self.why,
        }


def make_plan(
    shape: ModelShape,
    *,
    tokens: Sequence[int] = (1366,),
    max_tokens: int | None = None,
    target: str = "host",
) -> Plan:
    """Weigh every layout with every page size of a target.

    Raises:
        PlanError: an unknown target or dtype, or lengths beyond what is reserved.
    """
    pages = {"host": HOST_PAGES, "cuda": CUDA_PAGES}.get(target)
    if pages is None:
        raise PlanError(f"--target is host or cuda, got {target!r}")
    if shape.dtype not in ITEM_BYTES:
        raise PlanError(f"--dtype is auto or one of {', '.join(ITEM_BYTES)}, got {shape.dtype!r}")
    room = max_tokens or max(shape.max_positions or _DEFAULT_CONTEXT, *tokens)
    if min(tokens) < 1 or max(tokens) > room:
        raise PlanError(f"--tokens must lie in 1..{room} (--max-tokens), got {list(tokens)}")
    options = tuple(
        _weigh(shape, name, rows, group, page, tuple(tokens), room, target)
        for name, rows, group in _layouts(shape, target)
        for page in pages
    )
    best, why = _recommend(shape, options, tokens)
    return Plan(shape, target, room, tuple(tokens), options, best, why)


def _layouts(shape: ModelShape, target: str) -> list[tuple[str, Rows, int]]:
    """(name, rows, layers of a group), fastest to read first."""
    group = next((g for g in (4, 3, 2) if shape.layers % g == 0 and shape.layers > g), 1)
    layouts: list[tuple[str, Rows, int]] = [
        ("per_layer, head-major", "head_major", 1),
        ("per_layer, token-major", "token_major", 1),
        (f"groups of {group} layers", "token_major", group),
        ("all_layers", "token_major", shape.layers),
    ]
    if target == "cuda":  # kernels there read either order at full speed; head-major only costs
        del layouts[0]
    return [entry for entry in layouts if entry[2] > 1 or not entry[0].startswith("groups")]


def _weigh(
    shape: ModelShape,
    name: str,
    rows: Rows,
    group: int,
    page: int,
    tokens: tuple[int, ...],
    room: int,
    target: str,
) -> Option:
    layout = Layout(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_tokens=room,
        dtype=shape.dtype,
        rows=rows,
        group_layers=group,
        page_bytes=page,
    )
    maps = layout.maps_per_sequence()
    calls = layout.share_calls(PREFIX_TOKENS)
    return Option(
        layout=name,
        rows=rows,
        group_layers=group,
        page_bytes=page,
        lanes=layout.lanes,
        row_bytes=layout.row_bytes,
        tokens_per_page=layout.tokens_per_page,
        expected_waste_bytes=layout.expected_waste(),
        waste_share=tuple(
            mapped_bytes(shape, layout, n) / shape.used_bytes(n) - 1.0 for n in tokens
        ),
        maps_per_sequence=maps,
        max_sequences=int(max_map_count() * MAP_LIMIT_SHARE) // maps if target == "host" else None,
        tlb_reach_tokens=_tlb_reach(layout) if target == "host" else None,
        share_grain_tokens=math.ceil(layout.tokens_per_page),
        share_calls=calls if target == "host" else calls * layout.split(PREFIX_TOKENS)[0],
    )


def _tlb_reach(layout: Layout) -> int:
    """Tokens of one layer that the TLB covers: it translates 4 KiB, or 2 MiB of a huge page."""
    unit = _HUGE_BYTES if layout.page >= _HUGE_BYTES else _PTE_BYTES
    return layout.with_(page_bytes=unit).tlb_reach_tokens(TLB_ENTRIES)


def mapped_bytes(shape: ModelShape, layout: Layout, tokens: int) -> int:
    """Bytes of pages that a sequence of ``tokens`` tokens holds in a layout.

    A page goes back once every layer whose rows it holds has moved its window past it, so a group
    that mixes windowed and full layers keeps every page.
    """
    size, last, pages = layout.group_layers, layout.pages(tokens), 0
    for group in range(layout.groups):
        windows = shape.windows[group * size : (group + 1) * size]
        start = min(max(0, tokens - (window or tokens)) for window in windows)
        pages += last - layout.split(start)[0]
    return layout.lanes_per_group * pages * layout.page


def _recommend(
    shape: ModelShape, options: Sequence[Option], tokens: Sequence[int]
) -> tuple[Option, str]:
    """The first layout (fastest first) with a page that wastes little enough; its largest page."""
    used = sum(shape.used_bytes(n) for n in tokens) / len(tokens)

    def waste(option: Option) -> float:
        return max(option.expected_waste_bytes / used, sum(option.waste_share) / len(tokens))

    passed_over: dict[str, str] = {}
    for layout in dict.fromkeys(option.layout for option in options):
        pages = [option for option in options if option.layout == layout]
        thrifty = [option for option in pages if waste(option) <= WASTE_GOAL]
        if not thrifty:
            passed_over[layout] = f"wastes {min(map(waste, pages)):.0%} at the least"
        elif (thrifty[-1].max_sequences or SEQUENCES_WANTED) < SEQUENCES_WANTED:
            passed_over[layout] = f"fits {thrifty[-1].max_sequences} sequences under the map limit"
        else:
            return thrifty[-1], _reason(thrifty[-1], used, tokens, passed_over)
    best = min(options, key=waste)
    return best, (
        f"No layout keeps the waste within {WASTE_GOAL:.0%} at {_lengths(tokens)}; this one wastes "
        f"the least, {waste(best):.1%}."
    )


def _reason(
    best: Option, used: float, tokens: Sequence[int], passed_over: Mapping[str, str]
) -> str:
    """Why this layout and this page, in words."""
    before = "; ".join(f"{name} {fault}" for name, fault in passed_over.items())
    reads = {
        "head_major": "a head's tokens lie side by side, which plain CPU attention reads fastest",
        "token_major": "each layer reads rows of all its heads at one stride",
    }[best.rows]
    text = f"Layouts are tried fastest first ({before}). " if before else ""
    text += (
        f"{best.layout}: {reads}. Its largest page whose mean waste, half a page in each of "
        f"{best.lanes} lanes = {size(best.expected_waste_bytes)}, stays within {WASTE_GOAL:.0%} of "
        f"the {size(used)} in use at {_lengths(tokens)}."
    )
    if best.max_sequences is not None:
        text += f" {best.max_sequences:,} sequences fit under this kernel's map limit."
    return text


def _lengths(tokens: Sequence[int]) -> str:
    average = " tokens (average)" if len(tokens) > 1 else " tokens"
    return ", ".join(f"{n:,}" for n in tokens) + average


def render(plan: Plan, console: Console) -> None:
    """Print the plan for people."""
    from rich.padding import Padding

    console.print(_headline(plan.shape), highlight=False)
    console.print(
        f"{plan.target} pages, {plan.max_tokens:,} tokens reserved per sequence\n", highlight=False
    )
    for layout in dict.fromkeys(option.layout for option in plan.options):
        options = [option for option in plan.options if option.layout == layout]
        first = options[0]
        console.print(
            f"[bold]{layout}[/]: lanes of a sequence {first.lanes:,}, rows of "
            f"{size(first.row_bytes)}, {first.maps_per_sequence:,} maps a sequence"
            + (f" (at most {first.max_sequences:,} sequences)" if first.max_sequences else "")
            + f", {_calls(options)} map calls to share {PREFIX_TOKENS // 1024}k tokens",
            highlight=False,
        )
        console.print(Padding(_table(plan, options), (0, 0, 1, 2)))
    console.print(
        "tokens: of a lane, in a page. share grain: tokens in whole pages, which alone are shared. "
        f"TLB reach: tokens of one layer under {TLB_ENTRIES:,} entries.\n",
        style="dim",
        highlight=False,
    )
    best = plan.recommended
    console.print(
        f"[bold green]recommended[/]: {best.layout}, pages of {size(best.page_bytes)} "
        f"(rows={best.rows}, group_layers={best.group_layers}, page_bytes={best.page_bytes})",
        highlight=False,
    )
    console.print(plan.why, highlight=False)


def _headline(shape: ModelShape) -> str:
    windows = [window for window in shape.windows if window is not None]
    sliding = f", {len(windows)} of them with a window of {windows[0]:,} tokens" if windows else ""
    return (
        f"[bold]{shape.name}[/]: {shape.layers} layers{sliding}; {shape.query_heads} query and "
        f"{shape.kv_heads} KV heads of {shape.head_dim}; {shape.dtype}; "
        f"{size(shape.bytes_per_token)} of KV a token"
    )


def _calls(options: Sequence[Option]) -> str:
    calls = sorted({option.share_calls for option in options})
    return f"{calls[0]:,}" if len(calls) == 1 else f"{calls[0]:,} to {calls[-1]:,}"


def _table(plan: Plan, options: Sequence[Option]) -> Table:
    """The page sizes of one layout."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    columns = ["page", "tokens", "share grain", "mean waste"]
    columns += [f"waste at {n:,}" for n in plan.tokens]
    columns += ["TLB reach"] if plan.target == "host" else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for option in options:
        cells = [
            size(option.page_bytes),
            f"{option.tokens_per_page:,.4g}",
            f"{option.share_grain_tokens:,}",
            size(option.expected_waste_bytes),
            *(f"{share:.1%}" for share in option.waste_share),
        ]
        if option.tlb_reach_tokens is not None:
            cells.append(f"{option.tlb_reach_tokens:,}")
        table.add_row(*cells, style="bold green" if option == plan.recommended else "")
    return table
