"""The attention calls that kernels are measured on: what they move, compute, and at least take.

Bytes count each row of K, V, query and result once; FLOP count two products a visible score. The
floor is the larger of bytes / bandwidth and FLOP / matrix rate of the data sheet: no kernel can be
faster, and none reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["decode", "prefill"]
HALF = 2  # bytes of bfloat16 and float16


@dataclass(frozen=True)
class Peak:
    """Data sheet of a device: dense bfloat16 matrix products, and memory."""

    name: str
    bytes_per_second: float
    flop_per_second: float


H100 = Peak("H100", 3.35e12, 989.4e12)
H200 = Peak("H200", 4.8e12, 989.4e12)
PEAKS = (H200, H100)


@dataclass(frozen=True)
class Shape:
    """One call. ``keys`` of each sequence, or of all; queries are the last of these if causal."""

    name: str
    kind: Kind
    batch: int
    queries: int
    keys: int | tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int = 128
    causal: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return (self.keys,) * self.batch if isinstance(self.keys, int) else self.keys

    @property
    def kv_bytes(self) -> int:
        """Rows of K and V, once."""
        return 2 * sum(self.lengths) * self.kv_heads * self.dim * HALF

    @property
    def nbytes(self) -> int:
        """K, V, the query and the result, once."""
        return self.kv_bytes + 2 * self.batch * self.queries * self.heads * self.dim * HALF

    @property
    def flop(self) -> int:
        """Two products for each score that is seen, 2 FLOP an element."""
        seen = 0
        for length in self.lengths:
            hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
            seen += self.queries * length - hidden
        return 4 * seen * self.heads * self.dim

    def floor_us(self, peak: Peak) -> float:
        """What the data sheet allows, in microseconds."""
        return 1e6 * max(self.nbytes / peak.bytes_per_second, self.flop / peak.flop_per_second)


def ragged(batch: int, longest: int, ratio: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths from ``longest / ratio`` to ``longest``, evenly spread in the logarithm, shuffled."""
    lengths = np.geomspace(longest / ratio, longest, batch).astype(int)
    return tuple(int(n) for n in np.random.default_rng(seed).permutation(lengths))


K = 1 << 10
DECODE = (
    Shape("b1_4k", "decode", 1, 1, 4 * K, 32, 8),
    Shape("b1_32k", "decode", 1, 1, 32 * K, 32, 8),
    Shape("b1_128k", "decode", 1, 1, 128 * K, 64, 8),
    Shape("b8_4k", "decode", 8, 1, 4 * K, 32, 8),
    Shape("b8_32k", "decode", 8, 1, 32 * K, 32, 8),
    Shape("b64_4k", "decode", 64, 1, 4 * K, 32, 8),
    Shape("b256_2k", "decode", 256, 1, 2 * K, 32, 8),
    Shape("b64_ragged", "decode", 64, 1, ragged(64, 16 * K, 16), 32, 8),
    Shape("b32_8k_d256", "decode", 32, 1, 8 * K, 16, 2, 256),
    Shape("b8_8k_verify4", "decode", 8, 4, 8 * K, 32, 8, 128, causal=True),
)
PREFILL = (
    Shape("b4_4k_d64_causal", "prefill", 4, 4 * K, 4 * K, 32, 32, 64, causal=True),
    Shape("b1_16k", "prefill", 1, 16 * K, 16 * K, 32, 32),
    Shape("b1_16k_causal", "prefill", 1, 16 * K, 16 * K, 32, 32, causal=True),
    Shape("b1_20k_8_1_causal", "prefill", 1, 20 * K, 20 * K, 8, 1, causal=True),
    Shape("b1_512_on_32k", "prefill", 1, 512, 32 * K, 32, 8, causal=True),
    Shape("b1_16k_d256_causal", "prefill", 1, 16 * K, 16 * K, 16, 16, 256, causal=True),
)
SHAPES = DECODE + PREFILL
