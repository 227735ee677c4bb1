"""What the layers of one transformers cache agree on: their batch, its rows and its order."""

from __future__ import annotations

from torch import Tensor

from vattn.hf_attention import UnsupportedError
from vattn.layout import Layout, LayoutError


class Orders:
    """What was asked of single layers, until it is the same for all.

    transformers reorders a batch layer after layer; whole sequences move, once.
    """

    def __init__(self) -> None:
        self._asked: dict[int, list[int]] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._asked

    def ask(self, layer: int, order: list[int], layers: int) -> list[int] | None:
        """Batch row i of a layer is to hold what row ``order[i]`` holds. Returns the order of the
        whole batch as soon as all ``layers`` layers were asked the same."""
        before = self._asked.get(layer)
        self._asked[layer] = order if before is None else [before[i] for i in order]
        orders = list(self._asked.values())
        if len(orders) != layers or any(each != orders[0] for each in orders):
            return None
        self._asked.clear()
        return orders[0]

    def pop(self, layer: int) -> list[int] | None:
        """Forget what was asked of a layer alone, and return it."""
        return self._asked.pop(layer, None)


def fits(rows: Tensor, kv_heads: int, layout: Layout) -> bool:
    """Whether rows [B, Hkv, n, D] are like those of a layout, of which there are ``kv_heads``."""
    shape = (kv_heads, layout.head_dim, layout.dtype)
    return shape == (rows.shape[1], rows.shape[3], str(rows.dtype).removeprefix("torch."))


def check_fits(layer: int, rows: Tensor, batch: int, kv_heads: int, layout: Layout) -> None:
    """Raise unless rows of a further layer go with those that the cache holds.

    Raises:
        LayoutError: another batch. UnsupportedError: another shape or type.
    """
    if rows.shape[0] != batch:
        raise LayoutError(
            f"layer {layer} got a batch of {rows.shape[0]}, but the cache holds {batch} sequences; "
            "reset() the cache before a batch of another size"
        )
    if not fits(rows, kv_heads, layout):
        raise UnsupportedError(
            f"layer {layer} has {rows.shape[1]} KV heads of {rows.shape[3]} in {rows.dtype}, but "
            f"the first had {kv_heads} of {layout.head_dim} in {layout.dtype}: layers of different "
            "shapes do not share a cache; use transformers' DynamicCache"
        )
