"""An eviction that is played token by token, and the rows that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from tests.evictor_cases import Text
from vattn.eviction import Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache
from vattn.kernels.columns import padded


@contextmanager
def session(
    one: Text, evictor: Evictor
) -> Iterator[tuple[HeadCache, Callable[[int, int], list[Tensor]]]]:
    """A cache, and an eviction over it that is told which tokens come next and answers with each
    layer's results."""
    batch, heads, tokens, dim = one.key[0].shape
    with HeadCache(
        one.layers, heads, dim, tokens, batch=batch, dtype="float32", device="cpu"
    ) as cache:
        eviction = Eviction(cache, evictor)

        def play(start: int, stop: int) -> list[Tensor]:
            outs = []
            for layer in range(one.layers):
                key, value, query = (
                    side[layer][:, :, start:stop] for side in (one.key, one.value, one.query)
                )
                eviction.append(layer, key, value)
                outs.append(eviction.attend(query.contiguous(), layer))
            return outs

        yield cache, play


def rows(cache: HeadCache, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, K, V [B, H, n, ..] and log weights of what a layer holds."""
    kv = cache.kv(layer)
    assert kv.lengths is not None
    sides = [padded(side, kv, kv.lengths.tolist())[:, 0] for side in (kv.key, kv.value)]
    key, value = (side.unflatten(0, (cache.batch, -1)).clone() for side in sides)
    return cache.positions(layer).clone(), key, value, cache.track(layer, "log_weight").clone()
