"""Scores of an index's records, and the best of them, wherever they run.

    on the host, with numba     `index_stream`, `choose_stream`
    on a GPU                    `index_scores`, `top_pages` (Triton)
    elsewhere                   torch's operations: `summaries`, `signs`, `nibbles`, `choose`

The forms of a record, and what a score means, are said in `summaries`, `signs` and `nibbles`; what
is best in `choose`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vattn.kernels import choose, stream
from vattn.kernels import nibbles as nibble_codes
from vattn.kernels import signs as sign_codes
from vattn.kernels import summaries as page_summaries
from vattn.kernels.choose import Join
from vattn.kernels.index import Index

Form = Literal["summaries", "signs", "nibbles"]
TORCH = {
    "summaries": page_summaries.scores,
    "signs": sign_codes.scores,
    "nibbles": nibble_codes.scores,
}


def scores(
    form: Form, query: Tensor, index: Index, records: int, *, scale: float | None = None
) -> Tensor:
    """Score the first ``records`` records of a form: query [B, Hq, L, D] ->
    [B, Hkv, Hq / Hkv * L, records] float32, -inf where a sequence has no record.

    Raises:
        ValueError: the query or the parts do not suit the form.
    """
    if stream.serves(query):
        from vattn.kernels import index_stream

        return index_stream.scores(form, query, index, records, scale=scale)
    if query.is_cuda:
        from vattn.kernels import index_scores

        return getattr(index_scores, form)(query, index, records, scale=scale)
    plain = TORCH[form]
    return plain(query, index, records, scale=scale)


def summaries(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """`scores` of summaries."""
    return scores("summaries", query, index, records, scale=scale)


def signs(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """`scores` of sign codes."""
    return scores("signs", query, index, records, scale=scale)


def nibbles(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """`scores` of four-bit codes."""
    return scores("nibbles", query, index, records, scale=scale)


def best(
    found: Tensor,
    k: int,
    *,
    join: Join,
    pages: Tensor,
    first: int,
    last: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of scores [B, Hkv, R, n], joined and forced as `choose` says: ids
    [B, Hkv, min(k, n)] and count [B, Hkv], int32."""
    if stream.serves(found):
        from vattn.kernels import choose_stream

        return choose_stream.top_k(
            found, k, join=join, pages=pages, first=first, last=last, starts=starts
        )
    if found.is_cuda:
        from vattn.kernels import top_pages

        return top_pages.top_k(
            found, k, join=join, pages=pages, first=first, last=last, starts=starts
        )
    joined = choose.force(choose.joined(found, join), pages, first, last, starts)
    return choose.top_k(joined, k)


def best_records(
    form: Form,
    query: Tensor,
    index: Index,
    records: int,
    k: int,
    *,
    scale: float,
    join: Join,
    pages: Tensor,
    first: int,
    last: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`best` of `scores`, on the host without a table of all scores in memory."""
    if stream.serves(query):
        from vattn.kernels import choose_stream

        return choose_stream.top_k_index(
            form, query, index, records, k,
            scale=scale, join=join, pages=pages, first=first, last=last, starts=starts,
        )  # fmt: skip
    found = scores(form, query, index, records, scale=scale)
    return best(found, k, join=join, pages=pages, first=first, last=last, starts=starts)
