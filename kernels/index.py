"""What is known of the keys without reading them: one record for each full page of tokens.

An index is one or more *parts*, each a plain tensor beside K:

    parts[i]  [N, Hkv, P, width_i]   record p of sequence b and head h at [slots[b], h, p],
                                     elements side by side; of P reserved records only the first
                                     counts[b] are mapped and may be read
    record p tells of tokens p * page_tokens .. (p + 1) * page_tokens, all of them appended: a page
    that is still growing has no record, and is read in any case

So records, like rows of K, are written once and never change; a prefix of them can be shared.
The formats are `vattn.kernels.summaries`, `signs` and `nibbles`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY, check_row
from vattn.kernels.packed import pack_rows


@dataclass(frozen=True)
class Part:
    """One part of a record: ``width`` elements of ``dtype``."""

    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a record's part."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Records of the keys of a batch.

    Args:
        parts: tensors [N, Hkv, P, width] each, on one device.
        counts: [B] int32 or int64, records that sequence b has; None: P each.
        slots: [B] int32 or int64, which of N sequence b is; None: b itself, and B = N.

    Raises:
        ValueError: shapes, dtypes, devices or strides are none of these; the message names them.
    """

    parts: tuple[Tensor, ...]
    counts: Tensor | None = None
    slots: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.parts or self.parts[0].dim() != 4:
            raise ValueError(
                f"parts are {[tuple(p.shape) for p in self.parts]}: must be [N, KV heads, records, "
                "width] each"
            )
        first = self.parts[0]
        for part in self.parts:
            if part.shape[:3] != first.shape[:3] or part.device != first.device:
                raise ValueError(
                    f"a part is {tuple(part.shape)} on {part.device}, the first "
                    f"{tuple(first.shape)} on {first.device}: must differ in width alone"
                )
            check_row("a part", part)
        batch = self.batch
        if self.slots is None and batch != first.shape[0]:
            raise ValueError(f"{batch} counts for {first.shape[0]} sequences: pass slots to choose")
        for name in ("counts", "slots"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != (batch,) or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}: must be int32 or int64 "
                    f"({batch},)"
                )
            if tensor.device != first.device:
                raise ValueError(f"{name} is on {tensor.device}, the parts on {first.device}")

    def __repr__(self) -> str:
        """Shapes alone: records beyond the counts may not be mapped."""
        shapes = ", ".join(f"{tuple(p.shape)} {p.dtype}" for p in self.parts)
        return f"<Index {self.batch} sequences, {shapes}>"

    @property
    def batch(self) -> int:
        """Sequences."""
        for tensor in (self.slots, self.counts):
            if tensor is not None:
                return tensor.shape[0]
        return self.parts[0].shape[0]

    def rows(self, query: Tensor) -> Tensor:
        """Query [B, Hq, L, D] as [B, Hkv, R, D]: the R = Hq / Hkv * L rows that share a KV head.

        Raises:
            ValueError: the batch or the heads do not suit the index.
        """
        kv_heads = self.parts[0].shape[1]
        if query.dim() != 4 or query.shape[0] != self.batch or query.shape[1] % kv_heads:
            raise ValueError(
                f"query is {tuple(query.shape)}: must be [{self.batch}, a multiple of {kv_heads} "
                "heads, tokens, head_dim]"
            )
        return pack_rows(query, query.shape[1] // kv_heads)

    def read(self, b: int, records: int) -> tuple[tuple[Tensor, ...], int]:
        """Parts [Hkv, n, width] of sequence b's first ``records`` records or fewer, and n."""
        slot = b if self.slots is None else int(self.slots[b])
        held = self.parts[0].shape[2] if self.counts is None else int(self.counts[b])
        n = min(records, held)
        return tuple(part[slot, :, :n] for part in self.parts), n

    def blank(self, rows: Tensor, records: int) -> Tensor:
        """Scores to fill in, [B, Hkv, R, records] float32: -inf where there is no record."""
        return rows.new_full((*rows.shape[:3], records), EMPTY, dtype=torch.float32)
