"""K and V of a batch as the Triton kernels see them: affine addresses and lengths, no table.

    key   [N, Hkv, S, D]     row (b, h, s) at  key + slots[b] * s_n + h * s_h + s * s_s
    value [N, Hkv, S, Dv]    the same

S counts reserved rows: of sequence b only rows ``starts[b] <= s < lengths[b]`` are mapped and may
be read. Lengths, starts and slots lie on the device, so that a captured CUDA graph stays right when
they change: no kernel, grid or workspace depends on their values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vattn.kernels.contract import check_row

HALF = (torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*HALF, torch.float32)
MOST_DIM = 256
MOST_TOKENS = 16  # of queries that `decode` takes


def scale_stride(scale: Tensor | None) -> int:
    """From a KV head's scale to the next; 0 where one is for all."""
    return 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)


@dataclass(frozen=True, eq=False, repr=False)
class KV:
    """Where K and V lie.

    Args:
        key, value: [N, Hkv, S, D] and [N, Hkv, S, Dv], elements of a row side by side; bfloat16,
            float16, float32, float8_e4m3fn or float8_e5m2. The other tensors have any strides.
        lengths: [B] int32 or int64, rows that sequence b holds, at most S; None: S each.
        starts: [B] int32 or int64, the first of these that may still be read; None: 0.
        slots: [B] int32 or int64, which of N sequence b is; None: b itself, and B = N.
        key_scale, value_scale: float32 [1] or [Hkv], what a stored number is multiplied by;
            None: 1.

    Raises:
        ValueError: shapes, dtypes, devices or strides are none of these; the message names them.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None
    slots: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        key, value = self.key, self.value
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"key is {tuple(key.shape)} and value {tuple(value.shape)}: must be [N, KV heads, "
                "tokens, head_dim] and differ in head_dim alone"
            )
        if key.dtype != value.dtype or key.dtype not in (*DTYPES, *FP8):
            raise ValueError(
                f"key is {key.dtype} and value {value.dtype}: must be the same, and bfloat16, "
                "float16, float32, float8_e4m3fn or float8_e5m2"
            )
        if not 0 < key.shape[3] <= MOST_DIM or not 0 < value.shape[3] <= MOST_DIM:
            raise ValueError(
                f"head_dim is {key.shape[3]} and {value.shape[3]}: must be 1 to {MOST_DIM}"
            )
        for name, tensor in (("key", key), ("value", value)):
            check_row(name, tensor)
        self._check_counts()
        self._check_scales()

    def __repr__(self) -> str:
        """Shapes alone: rows beyond the lengths may not be mapped, and are not for printing."""
        key = self.key
        return (
            f"<KV {self.batch} sequences, key {tuple(key.shape)}, value {tuple(self.value.shape)}, "
            f"{key.dtype} on {key.device}>"
        )

    @property
    def batch(self) -> int:
        """Sequences."""
        for counts in (self.slots, self.lengths, self.starts):
            if counts is not None:
                return counts.shape[0]
        return self.key.shape[0]

    def _check_counts(self) -> None:
        batch = self.batch
        if self.slots is None and batch != self.key.shape[0]:
            raise ValueError(
                f"{batch} lengths for {self.key.shape[0]} sequences: pass slots to choose"
            )
        for name in ("lengths", "starts", "slots"):
            counts = getattr(self, name)
            if counts is None:
                continue
            if counts.shape != (batch,) or counts.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} is {counts.dtype} {tuple(counts.shape)}: must be int32 or int64 "
                    f"({batch},)"
                )
            self._check_device(name, counts)
        self._check_device("value", self.value)

    def _check_scales(self) -> None:
        for name in ("key_scale", "value_scale"):
            scale = getattr(self, name)
            if scale is None:
                continue
            if scale.dtype != torch.float32 or scale.shape not in ((1,), (self.key.shape[1],)):
                raise ValueError(
                    f"{name} is {scale.dtype} {tuple(scale.shape)}: must be float32 (1,) or "
                    f"({self.key.shape[1]},)"
                )
            self._check_device(name, scale)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.key.device:
            raise ValueError(f"{name} is on {tensor.device} and key on {self.key.device}")

    def dense(self) -> KV:
        """The same K and V with counts and scales whose elements lie side by side, as kernels read
        them: itself if they do. Copies are made on the device, in a captured graph as well."""
        strided = {
            name: tensor.contiguous()
            for name in ("lengths", "starts", "slots", "key_scale", "value_scale")
            if (tensor := getattr(self, name)) is not None and not tensor.is_contiguous()
        }
        return replace(self, **strided) if strided else self

    def check_query(self, query: Tensor) -> None:
        """Raise ValueError unless ``query`` [..., Hq, L, D] (or packed [T, Hq, D]) suits K."""
        heads, kv_heads = query.shape[1] if query.dim() > 2 else 0, self.key.shape[1]
        if query.dim() not in (3, 4) or query.shape[-1] != self.key.shape[3]:
            raise ValueError(
                f"query is {tuple(query.shape)}: must be [{self.batch}, heads, tokens, "
                f"{self.key.shape[3]}] or packed [tokens, heads, {self.key.shape[3]}]"
            )
        if query.dim() == 4 and query.shape[0] != self.batch:
            raise ValueError(f"query has {query.shape[0]} sequences, K and V {self.batch}")
        if not kv_heads or heads % kv_heads:
            raise ValueError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
        if query.dtype not in DTYPES or (
            self.key.dtype not in FP8 and query.dtype != self.key.dtype
        ):
            raise ValueError(
                f"query is {query.dtype} and key {self.key.dtype}: must be the same of bfloat16, "
                "float16, float32; a key of 8 bits goes with any of these"
            )
        self._check_device("query", query)
