"""The two roles of a Hopper prefill program, in Gluon: one warp copies, two warpgroups compute.

    producer      K0   K1 V0   K2 V1   ...   Vn      TMA into two rings, as slots get free
    consumer      S0 = Q K0
                  for i = 1 .. n:   issue S = Q Ki; issue O += P V(i-1)
                                    wait for S;  P = exp2(S - m)      while P V is multiplied
                                    wait for O;  O *= exp2(m_old - m)
                  O += P Vn

A ring is (tiles [STAGES, BLOCK, DIM], full, empty): a slot's "full" barrier ends a phase when the
bytes of a tile have arrived, its "empty" barrier when both consumers' products with it are done.
Consumers may take turns to issue the products of a step, so that one's softmax falls into the
other's products as well: `new_order`.

Source: FlashAttention-3, algorithm 2, https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vattn.kernels.prefill_hopper_tiles import issue_parity, turn

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def new_ring(
    dtype: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    DIM: gl.constexpr,
    READERS: gl.constexpr,
):
    """A ring of empty slots."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, DIM], dtype)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
        mbarrier.init(empty.index(at), count=READERS)
    return tiles, full, empty


@gluon.jit
def new_order():
    """For two consumers that take turns: (barrier of one's turn, of the other's turn, place)."""
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    return (turns.index(0), turns.index(1), 0), (turns.index(1), turns.index(0), 1)


@gluon.jit
def slot(i, ring):
    """Where the i-th tile of a ring lies: (tile, full, empty, parity)."""
    tiles, full, empty = ring
    at, parity = turn(i, tiles.shape[0])
    return tiles.index(at), full.index(at), empty.index(at), parity


# ---- producer -----------------------------------------------------------------------------------


@gluon.jit
def rows_of(pointer, stride, keys, ring):
    """Rows 0 to keys - 1 as TMA sees them: of a box it zeroes the rest, and reads none of it."""
    tiles = ring[0]
    BLOCK: gl.constexpr = tiles.shape[1]
    DIM: gl.constexpr = tiles.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, DIM], tiles.dtype)
    return tma.make_tensor_descriptor(pointer, [keys, DIM], [stride, 1], [BLOCK, DIM], LAYOUT)


@gluon.jit
def copy(i, tile, rows, ring):
    """Start to copy ``tile`` of the rows into the ring, as its i-th, once the slot is empty."""
    into, full, empty, parity = slot(i, ring)
    mbarrier.wait(empty, parity ^ 1)
    mbarrier.expect(full, rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [tile * rows.block_type.shape[0], 0], full, into)


@gluon.jit
def produce(key, value, keys, key_ring, value_ring, plan):
    """Copy K and V of all steps, V a step behind: K is needed first."""
    last, _edge, _inner, total = plan
    if total > 0:
        key_rows = rows_of(key[0], key[1], keys, key_ring)
        value_rows = rows_of(value[0], value[1], keys, value_ring)
        copy(0, last, key_rows, key_ring)
        for i in range(1, total):
            copy(i, last - i, key_rows, key_ring)
            copy(i - 1, last - i + 1, value_rows, value_ring)
        copy(total - 1, last - total + 1, value_rows, value_ring)


# ---- consumers ----------------------------------------------------------------------------------


@gluon.jit
def products(q, k):
    """Issue Q K of two tiles in shared memory, [64, DIM] and [BLOCK, DIM]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k.shape[0], 16])
    nothing = gl.full([q.shape[0], k.shape[0]], 0.0, gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def reciprocal(x):
    """1 / x to one unit in the last place: a division takes four times the instructions."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def weigh(
    s,
    m,
    total,
    first,
    position,
    keys,
    window,
    factors,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Fold products s [64, BLOCK] with keys ``first`` and up in: (weights, shrink, m, total).

    ``factors`` is (factor, softcap, inside): s * factor is a score in units of log2; with a softcap
    softcap * tanh(s * inside / (2 log2 e)) is a natural score. factor > 0. m is the largest s,
    total the sum of exp2(factor * (s - m)); what was summed so far is to be multiplied by shrink.
    """
    factor, softcap, inside = factors
    if softcap is not None:
        # tanh x = 1 - 2 / (1 + e^2x), which overflows to the right limits.
        s = softcap - 2 * softcap * reciprocal(1 + gl.exp2(s * inside))
    if MASKED:
        j = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        p = position + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))[:, None]
        seen = j < keys
        if CAUSAL:
            seen = seen & (j <= p)
        if window is not None:
            seen = seen & (j > p - window)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    # A row that has seen nothing is shifted by 0: -inf - -inf is NaN.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new * factor)
    shrink = gl.exp2(m * factor - shift)
    weights = gl.exp2(s * factor - shift[:, None])
    return weights, shrink, m_new, total * shrink + gl.sum(weights, 1)


@gluon.jit
def advance(
    begin,
    end,
    state,
    q,
    position,
    order,
    shared,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Steps ``begin`` to ``end - 1``: Q Ki beside P V(i-1), and the softmax of the first while the
    second is multiplied. K of step ``begin`` has arrived. ``state`` is (P, O, m, total)."""
    key_ring, value_ring, plan, keys, window, factors, _sign = shared
    mine, other, place = order
    last, _edge, _inner, steps = plan
    p, acc, m, total = state
    OUT: gl.constexpr = acc.type.layout
    BLOCK: gl.constexpr = key_ring[0].shape[1]
    for i in range(begin, end):
        k, _full, key_empty, _parity = slot(i, key_ring)
        if mine is not None:
            mbarrier.wait(mine, issue_parity(i, place))
        s = products(q, k)
        v, full, value_empty, parity = slot(i - 1, value_ring)
        mbarrier.wait(full, parity)
        acc = warpgroup_mma(p, v, acc, is_async=True)
        if other is not None:
            mbarrier.arrive(other)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(key_empty)
        first = (last - i) * BLOCK
        w, shrink, m, total = weigh(
            s, m, total, first, position, keys, window, factors, CAUSAL, MASKED
        )
        # The next K is waited for here, not where it is used: the loop in this wait ends a basic
        # block, else ptxas moves the exponentials behind the wait for O, and nothing overlaps.
        _k, full, _empty, parity = slot(i + 1, key_ring)
        mbarrier.wait(full, parity, pred=i + 1 < steps)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(value_empty)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(w.to(v.dtype), p.type.layout)
    return p, acc, m, total


@gluon.jit
def attend(q, position, order, shared, CAUSAL: gl.constexpr):
    """All steps of a consumer: (O [64, DIM], m [64], total [64]) before the division."""
    key_ring, value_ring, plan, keys, window, factors, _sign = shared
    last, edge, inner, steps = plan
    BLOCK: gl.constexpr = key_ring[0].shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, q.shape[1], 16])
    m = gl.full([q.shape[0]], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([q.shape[0]], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.full([q.shape[0], q.shape[1]], 0.0, gl.float32, OUT)
    if steps > 0:
        k, full, empty, parity = slot(0, key_ring)
        mbarrier.wait(full, parity)
        s = warpgroup_mma_wait(0, deps=[products(q, k)])
        mbarrier.arrive(empty)
        w, _shrink, m, total = weigh(
            s, m, total, last * BLOCK, position, keys, window, factors, CAUSAL, True
        )
        p = gl.convert_layout(w.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
        _k, full, _empty, parity = slot(1, key_ring)
        mbarrier.wait(full, parity, pred=steps > 1)
        state = (p, acc, m, total)
        state = advance(1, edge, state, q, position, order, shared, CAUSAL, True)
        state = advance(max(edge, 1), inner, state, q, position, order, shared, CAUSAL, False)
        if window is not None:
            state = advance(max(inner, 1), steps, state, q, position, order, shared, CAUSAL, True)
        p, acc, m, total = state
        v, full, _empty, parity = slot(steps - 1, value_ring)
        mbarrier.wait(full, parity)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v, acc, is_async=True)])
    return acc, m, total


@gluon.jit
def consume(ends, q, row, position, order, shared, CAUSAL: gl.constexpr):
    """Results of query rows ``row`` to ``row + 63``, of which those below ``tokens`` exist.

    ``position`` is the position of the first; ``q`` [64, DIM] in shared memory is for Q; ``order``
    is `new_order`'s for this consumer, with None for barriers where they take no turns.
    """
    query, out, lse, tokens = ends
    factors, sign = shared[5], shared[6]
    ROWS: gl.constexpr = q.shape[0]
    DIM: gl.constexpr = q.shape[1]
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    line = row + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))[:, None]
    d = gl.arange(0, DIM, gl.SliceLayout(0, LOAD))[None, :]
    rows = gl.load(query[0] + line.to(gl.int64) * query[1] + d, line < tokens, 0.0)
    q.store((rows * sign).to(q.dtype))
    fence_async_shared()
    acc, m, total = attend(q, position, order, shared, CAUSAL)
    if lse is not None:
        natural = (m * factors[0] + gl.log2(total)) * LN2
        at = row + gl.arange(0, ROWS, m.type.layout)
        gl.store(lse + at, natural, at < tokens)
    scale = 1 / gl.where(total == 0.0, 1.0, total)
    acc = acc * gl.convert_layout(scale, gl.SliceLayout(1, acc.type.layout))[:, None]
    # Q is done with: in its place rows are turned, so that a thread stores 16 bytes at once.
    q.store(acc.to(q.dtype))
    gl.store(out[0] + line.to(gl.int64) * out[1] + d, q.load(LOAD), line < tokens)
