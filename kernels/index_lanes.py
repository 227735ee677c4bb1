"""Words for the records of an index: `lanes` goes on, with eight-bit and sixteen-bit lanes.

    u8x32    32 bytes: one of each of 32 tokens
    u16x16   16 sums of bytes

A table of sixteen bytes is looked up in 32 places at once by the byte shuffle of the processor:
with AVX2, SSSE3 or NEON.

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from vattn.kernels import lanes as v

TOKENS = 32  # of a group whose codes are turned together
CODES = 16  # bytes of a token's code that are turned together
TABLE_BYTES = 64  # a table's low bytes, twice, and its high bytes, twice

_i8, _i16, _i32 = (ir.IntType(bits) for bits in (8, 16, 32))
_f32 = ir.FloatType()
_half, _bytes, _shorts = (ir.VectorType(_i8, 16), ir.VectorType(_i8, 32), ir.VectorType(_i16, 16))
_lanes = ir.VectorType(_f32, v.WIDTH)
_many = ir.VectorType(_f32, TOKENS)


class Bytes(types.Type):
    """The numba type of 32 bytes."""

    def __init__(self) -> None:
        super().__init__(name="u8x32")


class Shorts(types.Type):
    """The numba type of sixteen 16-bit numbers."""

    def __init__(self) -> None:
        super().__init__(name="u16x16")


@register_model(Bytes)
class BytesModel(models.PrimitiveModel):
    """In memory and in registers alike: LLVM's vector."""

    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _bytes)


@register_model(Shorts)
class ShortsModel(models.PrimitiveModel):
    """In memory and in registers alike: LLVM's vector."""

    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _shorts)


u8x32, u16x16 = Bytes(), Shorts()


# ---- pieces of code ------------------------------------------------------------------------------
def _load(b: Any, place: Any, kind: ir.Type) -> Any:
    loaded = b.load(b.inttoptr(place, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _store(b: Any, place: Any, value: Any, offset: int = 0) -> None:
    place = b.add(place, ir.Constant(place.type, offset))
    b.store(value, b.inttoptr(place, value.type.as_pointer())).align = 1


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _order(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_i32, len(order)), order))


def _spread(b: Any, value: Any, width: int) -> Any:
    kind = ir.VectorType(value.type, width)
    nothing = ir.Constant(kind, ir.Undefined)
    return _order(b, b.insert_element(nothing, value, _i32(0)), nothing, [0] * width)


def _shuffled(b: Any, table: Any, index: Any) -> Any:
    """Bytes of ``table`` (twice 16) at ``index``, each below 16."""
    features = binding.get_host_cpu_features()
    name, kind = "llvm.aarch64.neon.tbl1.v16i8", _half
    if binding.get_process_triple().startswith("x86_64"):
        name = "llvm.x86.ssse3.pshuf.b.128"
        if features.get("avx2"):
            name, kind = "llvm.x86.avx2.pshuf.b", _bytes
    take = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), name)
    if kind == _bytes:
        return b.call(take, [table, index])
    parts = [(list(range(16)), 0), (list(range(16, 32)), 1)]
    halves = [
        b.call(take, [_order(b, table, table, part), _order(b, index, index, part)])
        for part, _ in parts
    ]
    return _order(b, halves[0], halves[1], list(range(32)))


# ---- sums of looked-up bytes ---------------------------------------------------------------------
@v.word(u8x32, v.address)
def load_bytes(b: Any, place: Any) -> Any:
    """32 bytes."""
    return _load(b, place, _bytes)


@v.word(u8x32, u8x32, u8x32)
def lookup(b: Any, table: Any, index: Any) -> Any:
    """Bytes of a table (sixteen, twice) at 32 places below 16."""
    return _shuffled(b, table, index)


@v.word(u8x32, u8x32, u8x32)
def add_bytes(b: Any, x: Any, y: Any) -> Any:
    """x + y; neither may be above 127."""
    return b.add(x, y)


@v.word(u16x16)
def no_sums(b: Any) -> Any:
    """Sixteen zeros."""
    return _all(_shorts, 0)


@v.word(u16x16, u16x16, u8x32)
def add_both(b: Any, sums: Any, some: Any) -> Any:
    """Add even bytes, and 256 times the odd ones, modulo 65536."""
    return b.add(sums, b.bitcast(some, _shorts))


@v.word(u16x16, u16x16, u8x32)
def add_odd(b: Any, sums: Any, some: Any) -> Any:
    """Add odd bytes."""
    return b.add(sums, b.lshr(b.bitcast(some, _shorts), _all(_shorts, 8)))


@v.word(types.void, u16x16, u16x16, u16x16, u16x16, v.scalar, v.scalar, v.address, v.address)
def settle(
    b: Any,
    low: Any,
    low_odd: Any,
    high: Any,
    high_odd: Any,
    step: Any,
    offset: Any,
    factors: Any,
    target: Any,
) -> None:
    """Write (sum of low bytes + 128 * sum of high bytes) * step + offset, times each token's
    factor (float32), for 32 tokens."""

    def numbers(both: Any, odd: Any) -> Any:
        even = b.sub(both, b.shl(odd, _all(_shorts, 8)))
        order = [place for i in range(16) for place in (i, 16 + i)]
        wide = b.zext(_order(b, even, odd, order), ir.VectorType(_i32, TOKENS))
        return b.sitofp(wide, _many)

    total = b.fadd(numbers(low, low_odd), b.fmul(numbers(high, high_odd), _all(_many, 128.0)))
    total = b.fadd(b.fmul(total, _spread(b, step, TOKENS)), _spread(b, offset, TOKENS))
    _store(b, target, b.fmul(total, _load(b, factors, _many)))


@v.word(types.void, v.address, v.scalar, v.scalar, v.address)
def tabulate(b: Any, q: Any, base: Any, factor: Any, target: Any) -> None:
    """Sums of four numbers with all signs, + where a bit is set, as 14 bits: table n holds
    (base + sum) * factor, rounded, as seven low bits and seven high ones."""
    wide = ir.VectorType(_f32, 16)
    total = _spread(b, base, 16)
    for bit in range(4):
        number = _load(b, b.add(q, ir.Constant(q.type, 4 * bit)), _f32)
        signs = ir.Constant(
            wide, [ir.Constant(_f32, 1.0 if n >> bit & 1 else -1.0) for n in range(16)]
        )
        total = b.fadd(total, b.fmul(_spread(b, number, 16), signs))
    total = b.fadd(b.fmul(total, _spread(b, factor, 16)), _all(wide, 0.5))
    whole = b.fptosi(total, ir.VectorType(_i32, 16))
    for plane, some in (
        (0, b.and_(whole, _all(whole.type, 127))),
        (32, b.lshr(whole, _all(whole.type, 7))),
    ):
        table = b.trunc(some, _half)
        _store(b, target, table, plane)
        _store(b, target, table, plane + 16)


@v.word(types.void, v.address, types.int64, v.address)
def turn_codes(b: Any, codes: Any, row: Any, target: Any) -> None:
    """Codes of 32 tokens, sixteen bytes each, as [32 nibbles][32 tokens]; low nibbles first."""
    some = []
    for token in range(16):
        places = [b.add(codes, b.mul(row, ir.Constant(row.type, token + lane))) for lane in (0, 16)]
        pair = [_load(b, place, _half) for place in places]
        some.append(_order(b, pair[0], pair[1], list(range(32))))
    low = [place for lane in (0, 16) for i in range(8) for place in (lane + i, 32 + lane + i)]
    high = [place + 8 for place in low]
    # Each turn moves one bit of a byte's place in its register to the register's own number.
    for _ in range(4):
        some = [_order(b, some[i], some[i + 8], order) for i in range(8) for order in (low, high)]
    fifteen = _all(_bytes, 15)
    for i, codes_of in enumerate(some):
        shifted = b.bitcast(b.lshr(b.bitcast(codes_of, _shorts), _all(_shorts, 4)), _bytes)
        _store(b, target, b.and_(codes_of, fifteen), 64 * i)
        _store(b, target, b.and_(shifted, fifteen), 64 * i + 32)


# ---- numbers -------------------------------------------------------------------------------------
@v.word(types.UniTuple(v.f32x8, 2), v.TAG, v.address)
def ordered(b: Any, tag: Any, place: Any) -> Any:
    """Sixteen float32 in the lanes that `lanes.pair_load` gives elements of another type."""
    both = _load(b, place, ir.VectorType(_f32, 16))
    low, high = list(range(8)), list(range(8, 16))
    if tag == types.uint16:
        low, high = list(range(0, 16, 2)), list(range(1, 16, 2))
    return cgutils.pack_array(b, [_order(b, both, both, low), _order(b, both, both, high)])


@v.word(types.UniTuple(v.f32x8, 2), v.address)
def nibbles(b: Any, place: Any) -> Any:
    """Sixteen nibbles of eight bytes as float32, in the lanes of bfloat16."""
    wide = ir.VectorType(_i32, 8)
    codes = b.zext(_load(b, place, ir.VectorType(_i8, 8)), wide)
    halves = [b.and_(codes, _all(wide, 15)), b.lshr(codes, _all(wide, 4))]
    return cgutils.pack_array(b, [b.sitofp(half, _lanes) for half in halves])


@v.word(v.f32x8, v.f32x8)
def absolute(b: Any, x: Any) -> Any:
    """|x|."""
    kind = ir.FunctionType(_lanes, [_lanes])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fabs.v8f32"), [x])


@v.word(types.UniTuple(v.f32x8, 4), *([v.f32x8] * 4))
def turn(b: Any, r0: Any, r1: Any, r2: Any, r3: Any) -> Any:
    """Four registers of two tokens and four rows each, as four rows of eight tokens."""
    low = [_order(b, x, y, [0, 4, 8, 12, 1, 5, 9, 13]) for x, y in ((r0, r1), (r2, r3))]
    high = [_order(b, x, y, [2, 6, 10, 14, 3, 7, 11, 15]) for x, y in ((r0, r1), (r2, r3))]
    first, second = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    rows = [_order(b, x, y, order) for x, y in (low, high) for order in (first, second)]
    return cgutils.pack_array(b, rows)


@v.word(v.scalar, v.f32x8)
def first(b: Any, lanes: Any) -> Any:
    """Lane 0."""
    return b.extract_element(lanes, _i32(0))


@v.word(v.scalar, v.f32x8, types.int64)
def pick(b: Any, lanes: Any, index: Any) -> Any:
    """One lane."""
    return b.extract_element(lanes, index)


@v.word(types.boolean, v.f32x8, v.f32x8)
def any_above(b: Any, x: Any, y: Any) -> Any:
    """Whether x > y in any lane."""
    above = b.bitcast(b.fcmp_ordered(">", x, y), _i8)
    return b.icmp_unsigned("!=", above, ir.Constant(_i8, 0))


@v.word(v.scalar, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""
    return b.bitcast(b.trunc(bits, _i32), _f32)
