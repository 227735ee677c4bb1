"""Where a row of K or V lies: the only arithmetic between tokens, bytes and pages.

A sequence is a *slot* of equal *lanes*. In a lane one token follows the other at ``row_bytes``, so
a lane grows at its end and any prefix of whole pages can be aliased. What a row holds is a choice:

    rows          group_layers   lanes of a slot          a row holds            reads of one layer
    head_major    1              (layer, K|V, head)       one head               contiguous by head
    token_major   1              (layer, K|V)             all heads              contiguous
    head_major    g > 1          (group, head)            g layers x K,V         strided
    token_major   g > 1          (group,)                 g layers x K,V, heads  strided
                  g = layers     one lane: a token's whole KV side by side ("all_layers")

More lanes waste more tail pages and take more kernel maps; fewer lanes stride the reads of a layer.
On average half a page a lane is wasted: ``waste / used = tokens_per_page / 2 / tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, Literal

from .allocator.errors import VattnError

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 4 << 10, 2 << 20
# A page of 32 tokens wastes 16 rows a lane on average: 1.1% of real chat traffic (Azure 2023).
TOKENS_PER_PAGE = 32
MAX_SLOT_BYTES = 1 << 46  # half of what a process can address


class LayoutError(VattnError, ValueError):
    """A layer, dtype, shape or device that this cache does not hold."""


def default_page_bytes(row_bytes: int) -> int:
    """The largest power of two, 4 KiB to 2 MiB, that holds at most 32 rows."""
    page = MIN_PAGE_BYTES
    while page * 2 <= min(MAX_PAGE_BYTES, TOKENS_PER_PAGE * row_bytes):
        page *= 2
    return page


@dataclass(frozen=True)
class Layout:
    """Shape of a KV cache and the place of every row. All sizes in bytes unless named otherwise.

    Args:
        layers: attention layers of the model.
        kv_heads, head_dim: of K and of V.
        max_tokens: most tokens of a sequence; address space only.
        dtype: "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2" or "uint8".
        rows, group_layers: see the table above.
        page_bytes: a multiple of 4 KiB; None picks `default_page_bytes` of the row.
        layer_map: physical layer of each layer, where several layers share one KV
            (cross-layer sharing, Layer-Condensed KV); None gives each layer its own.
        sides: tensors of a layer: 2, K and V; 1 for what is kept of K (`vattn.records`).

    Raises:
        LayoutError: a field is out of range; the message names it.
    """

    layers: int
    kv_heads: int
    head_dim: int
    max_tokens: int
    dtype: str = "bfloat16"
    rows: Literal["head_major", "token_major"] = "head_major"
    group_layers: int = 1
    page_bytes: int | None = None
    layer_map: tuple[int, ...] | None = None
    sides: Literal[1, 2] = 2
    page: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "max_tokens", "group_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LayoutError(f"{name} must be a positive int, got {value!r}")
        if self.dtype not in ITEM_BYTES:
            raise LayoutError(f"dtype must be one of {sorted(ITEM_BYTES)}, got {self.dtype!r}")
        if self.rows not in ("head_major", "token_major"):
            raise LayoutError(f"rows must be 'head_major' or 'token_major', got {self.rows!r}")
        if self.sides not in (1, 2):
            raise LayoutError(f"sides must be 1 or 2, got {self.sides!r}")
        self._check_layer_map()
        if self.group_layers > self.physical_layers:
            raise LayoutError(
                f"group_layers must be <= {self.physical_layers} layers, got {self.group_layers}"
            )
        page = default_page_bytes(self.row_bytes) if self.page_bytes is None else self.page_bytes
        if page <= 0 or page % MIN_PAGE_BYTES:
            raise LayoutError(f"page_bytes must be a multiple of {MIN_PAGE_BYTES}, got {page}")
        object.__setattr__(self, "page", page)
        if self.slot_bytes > MAX_SLOT_BYTES:
            raise LayoutError(
                f"max_tokens {self.max_tokens} would reserve {self.slot_bytes} bytes a sequence; "
                f"the limit is {MAX_SLOT_BYTES}: lower max_tokens"
            )

    @classmethod
    def all_layers(
        cls, layers: int, kv_heads: int, head_dim: int, max_tokens: int, **more: Any
    ) -> Layout:
        """One lane: K and V of all layers of a token side by side; any prefix is one map."""
        layer_map = more.get("layer_map")
        group = layers if layer_map is None else max(layer_map) + 1
        return cls(
            layers, kv_heads, head_dim, max_tokens, rows="token_major", group_layers=group, **more
        )

    def with_(self, **changes: Any) -> Layout:
        """A copy with some fields changed."""
        return replace(self, **changes)

    # ---- sizes -------------------------------------------------------------------------------
    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def physical_layers(self) -> int:
        """Layers that hold a KV of their own."""
        return self.layers if self.layer_map is None else max(self.layer_map) + 1

    @cached_property
    def groups(self) -> int:
        """Groups of layers whose rows lie side by side."""
        return -(-self.physical_layers // self.group_layers)

    @cached_property
    def lanes_per_group(self) -> int:
        """Lanes that hold one group of layers."""
        heads = self.kv_heads if self.rows == "head_major" else 1
        return heads * (self.sides if self.group_layers == 1 else 1)

    @cached_property
    def lanes(self) -> int:
        """Virtual ranges of a sequence that grow in step."""
        return self.groups * self.lanes_per_group

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token in one lane."""
        heads = 1 if self.rows == "head_major" else self.kv_heads
        sides = 1 if self.group_layers == 1 else self.sides * self.group_layers
        return sides * heads * self.head_dim * self.item_bytes

    @cached_property
    def lane_pages(self) -> int:
        """Pages of address space of one lane."""
        return self.pages(self.max_tokens)

    @cached_property
    def lane_bytes(self) -> int:
        """Address space of one lane."""
        return self.lane_pages * self.page

    @cached_property
    def slot_bytes(self) -> int:
        """Address space of one sequence."""
        return self.lanes * self.lane_bytes

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.lanes * self.row_bytes

    @cached_property
    def tokens_per_page(self) -> float:
        """Tokens in a page of one lane."""
        return self.page / self.row_bytes

    # ---- tokens and pages --------------------------------------------------------------------
    def pages(self, tokens: int) -> int:
        """Pages of one lane that hold ``tokens`` tokens."""
        return -(-tokens * self.row_bytes // self.page)

    def room(self, pages: int) -> int:
        """Tokens that ``pages`` pages of one lane hold."""
        return min(self.max_tokens, pages * self.page // self.row_bytes)

    def split(self, tokens: int) -> tuple[int, int]:
        """``tokens`` as whole pages of a lane and the bytes in the next, partly filled one."""
        return divmod(tokens * self.row_bytes, self.page)

    # ---- places ------------------------------------------------------------------------------
    def physical(self, layer: int) -> int:
        """Physical layer of a layer; negative counts from the end.

        Raises:
            LayoutError: there is no such layer.
        """
        if not hasattr(layer, "__index__"):
            raise LayoutError(f"a layer is an int, got {layer!r}")
        layer = index(layer)
        if not -self.layers <= layer < self.layers:
            raise LayoutError(f"layer {layer} does not exist: the cache has {self.layers} layers")
        layer %= self.layers
        return layer if self.layer_map is None else self.layer_map[layer]

    def offset(self, physical: int, side: int) -> int:
        """Byte offset in the slot of token 0, head 0 of K (``side`` 0) or V (1)."""
        if not 0 <= side < self.sides:
            raise LayoutError(f"side {side} does not exist: the layout has {self.sides}")
        group, inner = divmod(physical, self.group_layers)
        lane = group * self.lanes_per_group
        if self.group_layers == 1:
            return (lane + side * (self.lanes_per_group // self.sides)) * self.lane_bytes
        heads = 1 if self.rows == "head_major" else self.kv_heads
        within = (inner * self.sides + side) * heads * self.head_dim * self.item_bytes
        return lane * self.lane_bytes + within

    def layers_of(self, lane: int) -> range:
        """Physical layers whose rows lie in a lane."""
        first = lane // self.lanes_per_group * self.group_layers
        return range(first, min(first + self.group_layers, self.physical_layers))

    @cached_property
    def strides(self) -> tuple[int, int, int]:
        """Element strides of (head, token, dim) of any layer's K or V."""
        head = self.lane_bytes if self.rows == "head_major" else self.head_dim * self.item_bytes
        return head // self.item_bytes, self.row_bytes // self.item_bytes, 1

    # ---- the trade-off in numbers ------------------------------------------------------------
    def waste(self, tokens: int) -> int:
        """Bytes mapped but not used by a sequence of exactly ``tokens`` tokens."""
        return self.lanes * (self.pages(tokens) * self.page - tokens * self.row_bytes)

    def expected_waste(self) -> int:
        """Bytes wasted by a sequence on average: half a page in every lane."""
        return self.lanes * self.page // 2

    def maps_per_sequence(self) -> int:
        """Kernel maps that one growing sequence takes: a mapped and a reserved part a lane."""
        return 2 * self.lanes

    def share_calls(self, tokens: int) -> int:
        """Map calls to alias a prefix: one a lane, whatever its length."""
        return self.lanes if self.split(tokens)[0] else 0

    def tlb_reach_tokens(self, entries: int) -> int:
        """Tokens of one layer that ``entries`` page translations cover."""
        return int(entries * self.tokens_per_page / self.lanes_per_group)

    def _check_layer_map(self) -> None:
        if self.layer_map is None:
            return
        if len(self.layer_map) != self.layers:
            raise LayoutError(
                f"layer_map must name {self.layers} layers, got {len(self.layer_map)}"
            )
        if set(self.layer_map) != set(range(max(self.layer_map) + 1)):
            raise LayoutError(
                f"layer_map must use every physical layer from 0 on, got {self.layer_map}"
            )
