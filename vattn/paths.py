"""Which CPU kernel serves an attention call: one table, read from the top; the first row that fits.

    over       the kernel of torch that would serve: "flash", "math" (where flash cannot), "any"
    rows       how the tokens of one head lie in K: "head" side by side, "token" with those of the
               other heads between them (token-major), "any"
    groups     query heads that share a KV head, at least
    queries    query rows of a KV head (groups * q_len), at most
    reads      bytes of K that torch's kernel would read, once a query head, at least: below, its
               own call is as fast

A call that no row takes is torch's. So is every call that `sdpa_checks.why_torch` names: gradients,
causality, dropout, transforms and modes. `paths_gpu` is the table of tensors on a GPU. Nothing is
measured or remembered at run time: the same arguments under the same torch settings give the same
path. The first call that `stream` serves loads numba, and the first ever compiles for some seconds;
what it compiled is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vattn.allocator.errors import VattnError
from vattn.kernels import grouped, packed, stream
from vattn.sdpa_checks import FLOATS, Sure

AUTO, NATIVE, TRITON = "auto", "native", "triton"
HALF, SINGLE = (torch.bfloat16, torch.float16), (torch.float32,)
WIDE = (torch.float32, torch.float64)


class Row(NamedTuple):
    """One line of the table: what a call must be to be served by ``impl``, and why that is best."""

    impl: str
    dtypes: tuple[torch.dtype, ...]
    over: str
    rows: str
    groups: int
    queries: int
    reads: int
    why: str


ONCE = "each row of K and V is read once, by all cores"
GROUP = "each row of K and V is read once a group"
MATH = "torch's flash kernel cannot serve"
TABLE = (
    Row("stream", HALF, "any", "any", 1, 128, 1 << 18, ONCE),
    Row("stream", SINGLE, "any", "any", 2, 32, 1 << 21, ONCE),
    Row("packed", HALF, "any", "any", 2, 256, 1 << 19, GROUP),
    Row("packed", WIDE, "any", "token", 2, 256, 1 << 23, GROUP),
    Row("packed", WIDE, "any", "head", 2, 256, 1 << 24, GROUP),
    Row("grouped", FLOATS, "math", "any", 1, 256, 1 << 18, MATH),
)
# No row takes more query tokens, or fewer bytes of this type: asked before anything that costs.
MOST_QUERIES = max(row.queries // row.groups for row in TABLE)
LEAST_READS = {
    dtype: min(row.reads for row in TABLE if dtype in row.dtypes) // dtype.itemsize
    for dtype in FLOATS
}
LEAST_READ = min(LEAST_READS.values())


class Call(NamedTuple):
    """What the table looks at."""

    dtype: torch.dtype
    over: str
    rows: str
    groups: int
    queries: int
    reads: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
        """Describe a call on plain 4-D tensors whose shapes fit each other."""
        _, kv_heads, _, dim = key.shape
        _, heads, length, _ = query.shape
        groups = heads // kv_heads
        over = "flash" if strided_like_query(query, key, value, mask) else "math"
        rows = "head" if key.stride()[2] <= dim else "token"
        reads = groups * key.numel() * key.itemsize
        return cls(query.dtype, over, rows, groups, groups * length, reads)


class ImplError(VattnError, RuntimeError):
    """An implementation was asked for by name and cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Choice:
    """Which implementation serves a call, why, and why each other one does not."""

    impl: str
    reason: str
    others: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.impl}: {self.reason}"]
        return "\n".join(lines + [f"  not {impl}: {why}" for impl, why in self.others])


def wanted(call: Call, sure: Sure = bool) -> bool:
    """Whether any row fits: asked before the tensors are looked at more closely."""
    reads = call.reads
    for row in TABLE:  # noqa: SIM110  (a generator would cost as much as the answer)
        if sure(reads >= row.reads) and _fits(row, call, sure):
            return True
    return False


def choose(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sure: Sure = bool
) -> str:
    """Return the implementation of the first row that fits and can, else "native"."""
    for row in TABLE:
        if _fits(row, call, sure) and IMPLS[row.impl].cannot(query, key, value, mask) is None:
            return row.impl
    return NATIVE


def explained(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Choice:
    """`choose`, with the reasons."""
    impl = choose(call, query, key, value, mask)
    others = dict.fromkeys((NATIVE, *IMPLS), "a row above it in the table fits")
    others[TRITON] = "for tensors on a GPU; on the CPU by name, where Triton is interpreted"
    reason = "no row of the table fits"
    for row in reversed(TABLE):
        why = _unlike(row, call) or IMPLS[row.impl].cannot(query, key, value, mask)
        if why is not None:
            others[row.impl] = why
        elif row.impl == impl:
            reason = row.why
    del others[impl]
    return Choice(impl, reason, tuple(others.items()))


def torchs(reason: str) -> Choice:
    """Return the choice of a call that no kernel may serve."""
    return Choice(NATIVE, reason, tuple((impl, reason) for impl in (*IMPLS, TRITON)))


def named(
    impl: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, why: str | None
) -> None:
    """Raise ImplError unless the kernel ``impl`` can serve; ``why`` is `why_torch`'s answer."""
    refuse(impl, why or IMPLS[impl].cannot(query, key, value, mask))


def refuse(impl: str, why: str | None, remedy: str = 'use impl="auto"') -> None:
    """Raise ImplError if there is a reason why ``impl`` cannot serve."""
    if why is not None:
        raise ImplError(f'impl="{impl}" cannot serve this call: {why}; {remedy}')


def known(impl: str) -> None:
    """Raise ValueError for a name that is no implementation."""
    if impl not in (AUTO, NATIVE, *IMPLS, TRITON):
        names = ", ".join(f'"{name}"' for name in (AUTO, NATIVE, *IMPLS, TRITON))
        raise ValueError(f"impl={impl!r} is unknown; choose one of {names}")


def _fits(row: Row, call: Call, sure: Sure) -> bool:
    return (
        call.dtype in row.dtypes
        and row.over in ("any", call.over)
        and row.rows in ("any", call.rows)
        and sure(call.reads >= row.reads)
        and sure(call.groups >= row.groups)
        and sure(call.queries <= row.queries)
    )


def _unlike(row: Row, call: Call) -> str | None:
    """Say what keeps a call from a row; None if it fits."""
    if call.dtype not in row.dtypes:
        return f"not for {call.dtype}"
    if row.over not in ("any", call.over):
        return f"in place of torch's {row.over} kernel, not of its {call.over} kernel"
    if row.rows not in ("any", call.rows):
        return f"for {row.rows}-major rows of K, not {call.rows}-major"
    if call.groups < row.groups:
        return f"{call.groups} query heads share a KV head: it pays from {row.groups}"
    if call.queries > row.queries:
        return f"{call.queries} query rows a KV head: it pays up to {row.queries}"
    if call.reads < row.reads:
        return f"torch would read {call.reads} bytes of K: it pays from {row.reads}"
    return None


def run(
    impl: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Run a kernel that can, and lay its result out as torch would."""
    rows = mask[None] if mask is not None and mask.dim() == 3 else mask
    out = IMPLS[impl].kernel(query, key, value, rows, scale)
    if not strided_like_query(query, key, value, mask):
        # Through one dimension: `contiguous` keeps any stride of a dimension of size 1.
        return out.contiguous().view(-1).view(out.shape)
    if out.stride() == query.stride():
        return out
    result = torch.empty_like(query)
    return out if out.stride() == result.stride() else result.copy_(out)


def strided_like_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's result is `empty_like(query)`, as its flash kernel makes it; else contiguous.

    Flash takes no 3-D mask, no other width of V and no rows with gaps between their elements.
    """
    if value.shape[3] != query.shape[3] or (mask is not None and mask.dim() == 3):
        return False
    return query.stride()[3] == 1 and key.stride()[3] == 1 and value.stride()[3] == 1


def _apart(key: Tensor, value: Tensor) -> str | None:
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "the elements of a row of K or V are not adjacent"
    return None


def _packed_cannot(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    if value.shape[3] != query.shape[3]:
        return f"head_dim {query.shape[3]} of K and {value.shape[3]} of V differ"
    return _apart(key, value)


def _grouped_cannot(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    return None


def _stream_cannot(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    if query.dtype not in stream.DTYPES:
        return f"it does not take {query.dtype}"
    # In a compiled graph torch makes such tensors real before the operation sees them.
    if not torch.compiler.is_compiling():
        for t in (query, key, value) if mask is None else (query, key, value, mask):
            cow: bool = torch._C._is_cow_tensor(t)  # type: ignore[attr-defined]
            if t.is_neg() or t._is_zerotensor() or cow:
                return "a tensor whose sign or elements are not, or not yet, in its own memory"
    return _apart(key, value) or _stream_missing()


def _stream_missing() -> str | None:
    return stream.available()


# What `torch.compiler.assume_constant_result` sets, without its import of the whole compiler.
_stream_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Impl(NamedTuple):
    """One implementation: its kernel, and why it cannot serve a call that `why_torch` leaves us."""

    kernel: Callable[..., Tensor]
    cannot: Callable[[Tensor, Tensor, Tensor, Tensor | None], str | None]


IMPLS = {
    "packed": Impl(lambda *args: packed.attend(*args)[0], _packed_cannot),
    "grouped": Impl(lambda *args: grouped.attend(*args)[0], _grouped_cannot),
    "stream": Impl(stream.attend, _stream_cannot),
}
