"""The kernels of `paths` as one torch operation: what a compiled graph calls.

    vattn::attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, str impl)

A graph that contained the kernels' own steps would be guarded by every size they branch on. The
operation has no gradient: a call that wants one is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vattn import paths
from vattn.kernels import contract, stream
from vattn.sdpa_checks import FLOATS


@torch.library.custom_op(
    "vattn::attend",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, str impl)"
    " -> Tensor",
)
def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, impl: str
) -> Tensor:
    """Run the kernel ``impl``: shapes, dtypes and strides as in `scaled_dot_product_attention`.

    Raises ValueError for tensors that the kernel cannot take: the operation is public, and a
    compiler may hand it other strides than it traced.
    """
    rows = mask[None] if mask is not None and mask.dim() == 3 else mask
    contract.check(query, key, value, rows, stream.DTYPES if impl == "stream" else FLOATS)
    if impl != "grouped":
        contract.check_rows(key, value)
    if impl == "packed" and key.shape[3] != value.shape[3]:
        raise ValueError(f"packed needs one head_dim, got {key.shape[3]} and {value.shape[3]}")
    return paths.run(impl, query, key, value, mask, scale)


@attend.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, impl: str
) -> Tensor:
    if paths.strided_like_query(query, key, value, mask):
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:3], value.shape[3]))


@attend.register_vmap
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, int]:
    """Make the mapped dimension part of the batch."""

    def merged(tensor: Tensor, at: int | None) -> Tensor:
        tensor = (
            tensor.expand(info.batch_size, *tensor.shape) if at is None else tensor.movedim(at, 0)
        )
        return tensor.flatten(0, 1)

    batch = query.shape[0 if in_dims[0] != 0 else 1]
    query, key, value = (
        merged(tensor, at) for tensor, at in zip((query, key, value), in_dims[:3], strict=True)
    )
    if mask is not None:
        at = in_dims[3]
        mask = mask.expand(info.batch_size, *mask.shape) if at is None else mask.movedim(at, 0)
        mask = mask.reshape(info.batch_size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(-1, batch, -1, -1, -1).flatten(0, 1)
    out = attend(query, key, value, mask, scale, impl)
    return out.unflatten(0, (info.batch_size, batch)), 0
