"""Small caches in every layout, and what a failing call must leave as it was."""

from __future__ import annotations

import torch

from vattn.cache import KVCache
from vattn.layout import Layout

LAYERS, HEADS, DIM = 3, 2, 16
LAYOUTS = {
    "per_layer": {},
    "token_major": {"rows": "token_major"},
    "grouped": {"group_layers": 2},
    "all_layers": {"rows": "token_major", "group_layers": 3},
    "shared_layers": {"layer_map": (0, 1, 0)},
}


def layout_of(name: str, max_tokens: int = 400, dtype: str = "float32") -> Layout:
    return Layout(LAYERS, HEADS, DIM, max_tokens, dtype=dtype, page_bytes=4096, **LAYOUTS[name])


def rows(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=rng)


def fill(cache: KVCache, sequences, tokens: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Append to every physical layer; returns K and V by physical layer."""
    out = []
    for physical in range(cache.layout.physical_layers):
        k, v = rows(rng, len(sequences), HEADS, tokens), rows(rng, len(sequences), HEADS, tokens)
        layer = (
            physical if cache.layout.layer_map is None else cache.layout.layer_map.index(physical)
        )
        cache.append(layer, k.to(cache.dtype), v.to(cache.dtype), sequences)
        out.append((k, v))
    return out


def state(cache: KVCache) -> dict[str, object]:
    """Everything that a failing call must leave as it was."""
    return {
        "lengths": cache.lengths.tolist(),
        "starts": cache.starts.tolist(),
        "tokens": cache.tokens.tolist(),
        "open": (cache.opened % 2).tolist(),  # a failed fork opened and closed a slot
        "mapped": [cache.arena.ids(cache.arena.mapped(s)).tolist() for s in range(cache.slots)],
        "counts": (cache.pool.free, cache.pool.mapped, cache.pool.pending),
        "maps": cache.arena.maps,
        "bytes": [
            sequence.k[layer].clone() for sequence in cache.sequences for layer in range(LAYERS)
        ],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for name in before:
        if name == "bytes":
            assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        else:
            assert before[name] == after[name], name
