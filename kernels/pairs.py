"""Rows of 8-bit numbers read two at a time, for kernels that multiply in float16.

    tile [N, D / 2] int16    elements 2 d (lower byte) and 2 d + 1 of row n
    ->   two [N, D / 2] float16, the even and the odd elements

The matrix units take their operands from shared memory 16 bits at a time, transposed on the way
where need be; bytes they cannot transpose. A product over D is the sum of those over its even and
its odd elements, and a result's even and odd columns are two products, so that pairs stay side by
side until they are in registers. Two rows' pairs are widened by one chain of 32-bit operations
(PTX ISA, "prmt", "lop3", "cvt.rn.f16x2.e4m3x2"); the interpreter takes the same steps one by one.

An e4m3 number is a float16 of exponent bias 7 instead of 15: without a conversion unit (before
compute capability 8.9) it is left 2^8 too small, which `shrunk` says; its NaN stays one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.gpu import Device
from vattn.kernels.kv import FP8, HALF
from vattn.kernels.online import CONVERTS_FP8, INTERPRETED

_E5M2 = tl.constexpr("""
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32  $1, $2, 0xff00ff00;
""")
_E4M3 = tl.constexpr("""{
    .reg .b32 a, b, n;
    shl.b32 a, $2, 7;
    and.b32 a, a, 0x3f803f80;
    add.u32 n, a, 0x00800080;
    lop3.b32 a, n, 0x40004000, a, 0xea;
    shl.b32 b, $2, 8;
    lop3.b32 $0, b, 0x80008000, a, 0xea;
    shr.b32 a, $2, 1;
    and.b32 a, a, 0x3f803f80;
    add.u32 n, a, 0x00800080;
    lop3.b32 a, n, 0x40004000, a, 0xea;
    lop3.b32 $1, $2, 0x80008000, a, 0xea;
}""")
_E4M3_CONVERTED = tl.constexpr("""{
    .reg .b16 a, b;
    .reg .b32 c, d;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 c, a;
    cvt.rn.f16x2.e4m3x2 d, b;
    prmt.b32 $0, c, d, 0x5410;
    prmt.b32 $1, c, d, 0x7632;
}""")


def pairs_of(
    device: Device, query: Tensor, key: Tensor, value: Tensor
) -> tuple[str, Tensor, Tensor] | None:
    """(what `halves` is told, key, value as int16 pairs), or None: they are no pairs, or the query
    is float32, whose products are not for float16."""
    if key.dtype not in FP8 or query.dtype not in HALF:
        return None
    for tensor in (key, value):
        odd = tensor.shape[3] % 2 or tensor.storage_offset() % 2
        if odd or any(stride % 2 for stride in tensor.stride()[:3]):
            return None
    name = "e5m2" if key.dtype == torch.float8_e5m2 else "e4m3"
    if name == "e4m3" and device.arch >= CONVERTS_FP8:
        name = "e4m3 converted"
    return name, key.view(torch.int16), value.view(torch.int16)


@triton.jit
def halves(tile, PAIRS: tl.constexpr):
    """The even and the odd elements of int16 pairs as float16; times 2^-8 if ``shrunk``."""
    if INTERPRETED:
        even, odd = _stepwise(tile.to(tl.uint16, bitcast=True), PAIRS)
    elif PAIRS == "e5m2":
        even, odd = _asm(tile, _E5M2)
    elif PAIRS == "e4m3":
        even, odd = _asm(tile, _E4M3)
    else:
        even, odd = _asm(tile, _E4M3_CONVERTED)
    return even, odd


@triton.jit
def _asm(tile, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,r", [tile], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


@triton.jit
def _stepwise(bits, PAIRS: tl.constexpr):
    if PAIRS == "e5m2":
        return (bits << 8).to(tl.float16, bitcast=True), (bits & 0xFF00).to(
            tl.float16, bitcast=True
        )
    even = _from_e4m3((bits << 7) & 0x3F80, bits << 8)
    odd = _from_e4m3((bits >> 1) & 0x3F80, bits)
    if PAIRS == "e4m3 converted":
        even = even * 256.0
        odd = odd * 256.0
    return even, odd


@triton.jit
def _from_e4m3(size, sign):
    nan = (size + 0x0080) & 0x4000
    return (size | nan | (sign & 0x8000)).to(tl.float16, bitcast=True)
