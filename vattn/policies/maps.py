"""Linear maps of keys and queries that keep their products, for codes that keep less than a key.

    key    x = (k - centre) @ key_map      D -> r, of a layer and KV head
    query  y = q @ query_map               D -> r

Where key_map @ query_map^T is the identity, x . y = q . k - q . centre: a query's own constant, of
which a softmax knows nothing. What a code loses of x depends on the axes, so the maps are chosen
for the code; they are fixed before the first key, since records are written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels.signs import rotation
from vattn.selector import SelectorError


@dataclass(frozen=True, eq=False)
class Map:
    """A centre and two maps for each layer and KV head; see above.

    Args:
        centre: [layers, Hkv, D] float32.
        key_map, query_map: [layers, Hkv, D, r] float32. One layer, or one head, stands for all.

    The tensors should lie on the cache's device: from another one they are copied at each use.

    Raises:
        SelectorError: the shapes do not agree.
    """

    centre: Tensor
    key_map: Tensor
    query_map: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.centre, self.key_map, self.query_map)]
        if len(shapes[1]) != 4 or shapes[1] != shapes[2] or shapes[0] != shapes[1][:3]:
            raise SelectorError(
                f"centre, key_map, query_map are {shapes}: must be [layers, KV heads, D] and twice "
                "[layers, KV heads, D, r]"
            )

    @property
    def rank(self) -> int:
        """r, channels of what is coded."""
        return self.key_map.shape[-1]

    def keys(self, layer: int, keys: Tensor) -> Tensor:
        """Keys [Hkv, n, S, D] -> [Hkv, n, S, r] float32."""
        centre, matrix = (_of(t, layer, keys) for t in (self.centre, self.key_map))
        return (keys.float() - centre[:, None, None]) @ matrix[:, None]

    def queries(self, layer: int, query: Tensor, kv_heads: int) -> Tensor:
        """Query [B, Hq, L, D] -> [B, Hq, L, r] float32, each head by the map of its KV head."""
        rows = query.float().unflatten(1, (kv_heads, -1))
        return (rows @ _of(self.query_map, layer, query)[:, None]).flatten(1, 2)

    def spread(self, first: int = 0, *, seed: int = 0) -> Map:
        """The same with channels ``first`` and up rotated at random, which makes them alike."""
        turn = torch.eye(self.rank)
        turn[first:, first:] = rotation(self.rank - first, seed=seed)
        turn = turn.to(self.key_map.device)
        return Map(self.centre, self.key_map @ turn, self.query_map @ turn)


def centred(keys: Tensor) -> Map:
    """The mean of recorded keys [layers, Hkv, n, D] as the centre, and the axes as they are."""
    centre, _ = _moments(keys)
    layers, heads, dim = centre.shape
    axes = torch.eye(dim, device=keys.device).expand(layers, heads, dim, dim)
    return Map(centre, axes, axes)


def principal(keys: Tensor, rank: int | None = None) -> Map:
    """The mean and the ``rank`` first principal axes (None: all) of recorded keys, [layers, Hkv, n,
    D] after the rotary embedding."""
    centre, spread = _moments(keys)
    axes = torch.linalg.eigh(spread).eigenvectors.flip(-1)[..., :rank].float()
    return Map(centre, axes, axes)


def channels(keys: Tensor, queries: Tensor, rank: int) -> Map:
    """The ``rank`` channels of largest mean |q_c k_c|: keys [layers, Hkv, n, D], and queries
    [layers, Hq, m, D] of any other number of tokens."""
    layers, heads, _, dim = keys.shape
    size = queries.float().abs().mean(2).unflatten(1, (heads, -1)).mean(2)
    best = (size * keys.float().abs().mean(2)).argsort(dim=-1, descending=True, stable=True)
    picked = best[..., :rank].sort(dim=-1).values
    axes = torch.nn.functional.one_hot(picked, dim).mT.float()
    return Map(axes.new_zeros(layers, heads, dim), axes, axes)


def _moments(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [layers, Hkv, D] float32, and covariance [layers, Hkv, D, D] float64."""
    if keys.dim() != 4 or keys.shape[2] < 2:
        raise SelectorError(
            f"keys are {tuple(keys.shape)}: must be [layers, KV heads, tokens, D] of 2 tokens or "
            "more"
        )
    wide = keys.double()
    centre = wide.mean(2)
    wide = wide - centre[:, :, None]
    return centre.float(), wide.mT @ wide / keys.shape[2]


def _of(tensor: Tensor, layer: int, like: Tensor) -> Tensor:
    return tensor[layer if len(tensor) > 1 else 0].to(like.device)
