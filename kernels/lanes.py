"""Eight float32 numbers in one register, for numba: the words that the stream kernel is written in.

numba has no vector type, and its compiler makes slow code of scalar loops over 16-bit floats.
`f32x8` is LLVM's <8 x float>: one AVX register, two NEON registers, correct everywhere. Memory is
addressed by integers, in bytes; addresses need the alignment of one element only.

Rows are read 16 elements at a time into two registers. Which element lies in which lane differs by
element type, but alike in `pair_load` and `pair_store`; sums over elements do not care:

    bfloat16   low = even elements, high = odd ones      shift and mask of eight 32-bit words
    others     low = elements 0..7, high = 8..15

The element type is named by a *tag*, a scalar of which only the type counts: BF16, F16, F32.
Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 8
BF16, F16, F32 = np.uint16(0), np.int16(0), np.float32(0)
EMPTY = float("-inf")

_i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_f16, _f32 = ir.HalfType(), ir.FloatType()
_lanes, _words = ir.VectorType(_f32, WIDTH), ir.VectorType(_i32, WIDTH)


class Lanes(types.Type):
    """The numba type of eight float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="f32x8")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """In memory and in registers alike: LLVM's vector."""

    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _lanes)


f32x8, address, scalar, TAG = Lanes(), types.int64, types.float32, None


def word(result: types.Type, *given: types.Type | None) -> Callable[[Callable[..., Any]], Any]:
    """Make a word of `emit(builder, *values)`, which writes the code; a TAG comes as its type."""

    def make(emit: Callable[..., Any]) -> Any:
        def typed(typingctx: Any, *args: Any) -> Any:
            kinds = [arg if kind is TAG else kind for kind, arg in zip(given, args, strict=True)]

            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                read = [
                    arg if kind is TAG else value
                    for kind, arg, value in zip(given, args, values, strict=True)
                ]
                found = emit(builder, *read)
                return context.get_dummy_value() if found is None else found

            return result(*kinds), code

        # numba asks the signature for the number of arguments.
        names = ["typingctx", *list(signature(emit).parameters)[1:]]
        typed.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_ONLY) for name in names]
        )
        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typed)

    return make


# ---- pieces of code ------------------------------------------------------------------------------
def _read(b: Any, place: Any, kind: ir.Type, align: int) -> Any:
    loaded = b.load(b.inttoptr(place, kind.as_pointer()))
    loaded.align = align
    return loaded


def _write(b: Any, place: Any, value: Any, align: int) -> None:
    b.store(value, b.inttoptr(place, value.type.as_pointer())).align = align


def _behind(b: Any, place: Any, offset: int) -> Any:
    return b.add(place, ir.Constant(_i64, offset))


def _number(value: float) -> ir.Constant:
    return ir.Constant(_lanes, [ir.Constant(_f32, float(np.float32(value)))] * WIDTH)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_words, [ir.Constant(_i32, value)] * WIDTH)


def _shuffle(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_i32, WIDTH), order))


def _spread(b: Any, value: Any) -> Any:
    nothing = ir.Constant(_lanes, ir.Undefined)
    return _shuffle(b, b.insert_element(nothing, value, _i32(0)), nothing, [0] * WIDTH)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_lanes, [_lanes] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v8f32"), [x, y, z])


def _rounded(b: Any, lanes: Any) -> Any:
    """Float32 bits with those of the nearest bfloat16, ties to even, on top; NaN stays NaN."""
    bits = b.bitcast(lanes, _words)
    odd = b.and_(b.lshr(bits, _integer(16)), _integer(1))
    near = b.add(bits, b.add(odd, _integer(0x7FFF)))
    return b.select(b.fcmp_unordered("uno", lanes, lanes), _integer(0x7FC00000), near)


def _kind(tag: Any) -> ir.Type:
    return {types.uint16: _i16, types.int16: _f16, types.float32: _f32}[tag]


def _bytes(tag: Any) -> int:
    return 4 if tag == types.float32 else 2


# ---- memory --------------------------------------------------------------------------------------
@word(f32x8, address)
def load(b: Any, place: Any) -> Any:
    """Eight float32."""
    return _read(b, place, _lanes, 4)


@word(types.void, address, f32x8)
def store(b: Any, place: Any, lanes: Any) -> None:
    """Write eight float32."""
    _write(b, place, lanes, 4)


@word(f32x8, address)
def spread(b: Any, place: Any) -> Any:
    """One float32 in all lanes."""
    return _spread(b, _read(b, place, _f32, 4))


@word(types.UniTuple(f32x8, 2), TAG, address)
def pair_load(b: Any, tag: Any, place: Any) -> Any:
    """Sixteen elements, (low, high)."""
    if tag == types.uint16:
        words = _read(b, place, _words, 2)
        halves = [b.shl(words, _integer(16)), b.and_(words, _integer(-65536))]
        return cgutils.pack_array(b, [b.bitcast(half, _lanes) for half in halves])
    kind = ir.VectorType(_kind(tag), WIDTH)
    some = [
        _read(b, _behind(b, place, offset), kind, _bytes(tag)) for offset in (0, 8 * _bytes(tag))
    ]
    return cgutils.pack_array(
        b, [b.fpext(half, _lanes) for half in some] if kind != _lanes else some
    )


@word(types.void, TAG, address, f32x8, f32x8)
def pair_store(b: Any, tag: Any, place: Any, low: Any, high: Any) -> None:
    """Write sixteen elements, rounded to nearest."""
    if tag == types.uint16:
        below = b.lshr(_rounded(b, low), _integer(16))
        above = b.and_(_rounded(b, high), _integer(-65536))
        _write(b, place, b.or_(below, above), 2)
        return
    for offset, lanes in ((0, low), (8 * _bytes(tag), high)):
        if tag == types.int16:
            lanes = b.fptrunc(lanes, ir.VectorType(_f16, WIDTH))
        _write(b, _behind(b, place, offset), lanes, _bytes(tag))


@word(types.void, TAG, address, f32x8, f32x8)
def wide_store(b: Any, tag: Any, place: Any, low: Any, high: Any) -> None:
    """Write sixteen elements, as `pair_load` gives them, as float32."""
    if tag == types.uint16:  # the even ones and the odd ones
        orders = [0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]
        low, high = (_shuffle(b, low, high, order) for order in orders)
    _write(b, place, low, 4)
    _write(b, _behind(b, place, 32), high, 4)


@word(types.void, address, address, types.int64)
def turn(b: Any, target: Any, source: Any, stride: Any) -> None:
    """Write float32 [8][4] as four lines of eight, ``stride`` bytes apart."""
    pairs = [_read(b, _behind(b, source, 32 * i), _lanes, 4) for i in range(4)]
    for line in range(4):
        order = [line + 4 * i for i in range(4)] * 2
        low, high = (_shuffle(b, pairs[i], pairs[i + 1], order) for i in (0, 2))
        _write(b, target, _shuffle(b, low, high, [0, 1, 2, 3, 8, 9, 10, 11]), 4)
        target = b.add(target, stride)


@word(scalar, TAG, address)
def read(b: Any, tag: Any, place: Any) -> Any:
    """One element as float32."""
    found = _read(b, place, _kind(tag), _bytes(tag))
    if tag == types.uint16:
        return b.bitcast(b.shl(b.zext(found, _i32), ir.Constant(_i32, 16)), _f32)
    return b.fpext(found, _f32) if tag == types.int16 else found


@word(types.void, address, scalar)
def write(b: Any, place: Any, value: Any) -> None:
    """Write one float32."""
    _write(b, place, value, 4)


@word(types.int64, address)
def integer(b: Any, place: Any) -> Any:
    """One int64."""
    return _read(b, place, _i64, 8)


@word(types.int64, address)
def byte(b: Any, place: Any) -> Any:
    """One byte."""
    return b.zext(_read(b, place, _i8, 1), _i64)


@word(types.int64, TAG)
def size(b: Any, tag: Any) -> Any:
    """Bytes of an element."""
    return ir.Constant(_i64, _bytes(tag))


@word(types.void, address, address, types.int64)
def copy(b: Any, target: Any, source: Any, count: Any) -> None:
    """Copy ``count`` bytes."""
    target, source = (b.inttoptr(place, _i8.as_pointer()) for place in (target, source))
    cgutils.raw_memcpy(b, target, source, count, 1)


@word(types.void, address, types.int64)
def clear(b: Any, target: Any, count: Any) -> None:
    """Write ``count`` zero bytes."""
    cgutils.memset(b, b.inttoptr(target, _i8.as_pointer()), count, 0)


@word(types.void, address)
def prefetch(b: Any, place: Any) -> None:
    """Ask for a cache line; any address will do."""
    pointer = b.inttoptr(place, _i8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32])
    ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(ask, [pointer, _i32(0), _i32(3), _i32(1)])


@word(types.int64, address, types.int64)
def fetch_add(b: Any, place: Any, value: Any) -> Any:
    """Add to an int64 in one step, as all threads see it; what it was before."""
    return b.atomic_rmw("add", b.inttoptr(place, _i64.as_pointer()), value, "acq_rel")


# ---- arithmetic ----------------------------------------------------------------------------------
@word(f32x8, scalar)
def fill(b: Any, value: Any) -> Any:
    """A number in all lanes."""
    return _spread(b, value)


@word(f32x8, scalar, scalar)
def halves(b: Any, low: Any, high: Any) -> Any:
    """One number in lanes 0..3, another in lanes 4..7."""
    return _shuffle(b, _spread(b, low), _spread(b, high), [0, 1, 2, 3, 12, 13, 14, 15])


@word(f32x8, f32x8, types.int64)
def lane(b: Any, lanes: Any, index: Any) -> Any:
    """One lane in all lanes."""
    return _spread(b, b.extract_element(lanes, index))


@word(scalar, f32x8)
def number(b: Any, lanes: Any) -> Any:
    """The first lane's number."""
    return b.extract_element(lanes, _i32(0))


@word(f32x8, f32x8)
def swap(b: Any, lanes: Any) -> Any:
    """Lanes 4..7 before lanes 0..3."""
    return _shuffle(b, lanes, lanes, [4, 5, 6, 7, 0, 1, 2, 3])


@word(f32x8, f32x8, f32x8, f32x8)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return _fma(b, x, y, z)


@word(f32x8, f32x8, f32x8)
def mul(b: Any, x: Any, y: Any) -> Any:
    """x * y."""
    return b.fmul(x, y)


@word(f32x8, f32x8, f32x8)
def add(b: Any, x: Any, y: Any) -> Any:
    """x + y."""
    return b.fadd(x, y)


@word(f32x8, f32x8, f32x8)
def sub(b: Any, x: Any, y: Any) -> Any:
    """x - y."""
    return b.fsub(x, y)


@word(f32x8, f32x8, f32x8)
def larger(b: Any, x: Any, y: Any) -> Any:
    """The larger number of each lane; y where x is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@word(f32x8, f32x8)
def zero_if_empty(b: Any, lanes: Any) -> Any:
    """0 in place of -inf."""
    return b.select(b.fcmp_ordered("==", lanes, _number(EMPTY)), _number(0.0), lanes)


@word(types.boolean, f32x8)
def all_zero(b: Any, lanes: Any) -> Any:
    """Whether every lane is 0; NaN is not."""
    differ = b.bitcast(b.fcmp_unordered("!=", lanes, _number(0.0)), _i8)
    return b.icmp_unsigned("==", differ, ir.Constant(_i8, 0))


@word(f32x8, *([f32x8] * WIDTH))
def sums(b: Any, r0: Any, r1: Any, r2: Any, r3: Any, r4: Any, r5: Any, r6: Any, r7: Any) -> Any:
    """The sum of each register's lanes: that of r0 in lane 0, that of r7 in lane 7."""

    def neighbours(x: Any, y: Any) -> Any:
        even = _shuffle(b, x, y, [0, 2, 8, 10, 4, 6, 12, 14])
        return b.fadd(even, _shuffle(b, x, y, [1, 3, 9, 11, 5, 7, 13, 15]))

    low = neighbours(neighbours(r0, r1), neighbours(r2, r3))
    high = neighbours(neighbours(r4, r5), neighbours(r6, r7))
    first = _shuffle(b, low, high, [0, 1, 2, 3, 8, 9, 10, 11])
    return b.fadd(first, _shuffle(b, low, high, [4, 5, 6, 7, 12, 13, 14, 15]))


@word(f32x8, f32x8)
def exp(b: Any, x: Any) -> Any:
    """e to the power of x <= 0, within 1 ulp; 0 below -87.3 and for -inf, NaN for NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2: 2^n times the Taylor terms of exp(r) up to r^7 / 7!.
    """
    # Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
    shifted = _fma(b, x, _number(1.44269504), _number(12582912.0))
    n = b.fsub(shifted, _number(12582912.0))
    r = _fma(b, n, _number(-0.693359375), x)
    r = _fma(b, n, _number(2.12194440e-4), r)
    total = _number(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        total = _fma(b, total, r, _number(term))
    power = b.shl(b.bitcast(shifted, _words), _integer(23))
    found = b.bitcast(b.add(b.bitcast(total, _words), power), _lanes)
    found = b.select(b.fcmp_ordered("<", x, _number(-87.3)), _number(0.0), found)
    return b.select(b.fcmp_unordered("uno", x, x), x, found)
