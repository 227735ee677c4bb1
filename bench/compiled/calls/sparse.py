"""Configurations of sparse attention."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import BATCH, CONTEXT, KV_HEADS, NAMES, counts, rows, served, view
from bench.compiled.need import ROWS, Need
from vattn.kernels import index_scores, index_select, top_pages
from vattn.kernels.choose import Join
from vattn.kernels.index import Index
from vattn.kernels.index_append import Form, append_indexed
from vattn.kernels.selection import Selection
from vattn.kernels.sparse_decode import attend, workspace_for

# K and V in loads of 16 bytes at addresses that ids gave: at most 16 in a tile. The others, narrow,
# are ids and weights of a tile's pages.
CHOSEN = {"sparse_decode": Need(matrix=ROWS, narrow=13, dependent_loads=16)}
# Tiles of 64 rows, whose products have an instruction of their own, and float32, which has none.
LARGE = {"sparse_decode": Need(narrow=13, dependent_loads=16)}
# Rows of 8 bits come in smaller loads.
BYTES = {"sparse_decode": Need(matrix=ROWS, dependent_loads=16)}
LARGE_BYTES = {"sparse_decode": Need(dependent_loads=16)}
SCORED = {"score_records": Need(matrix=ROWS)}
WIDE = {"append_pages": Need(narrow=0)}


def chosen(heads: int, pages: int, page_tokens: int, *, weighted: bool = False) -> Selection:
    """``pages`` pages for each of ``heads`` KV heads."""
    ids = torch.empty(BATCH, heads, pages, dtype=torch.int32)
    weights = torch.empty(ids.shape) if weighted else None
    return Selection(ids, torch.empty(ids.shape[:2], dtype=torch.int32), page_tokens, weights)


def one(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    stored: str | None = None,
    *,
    page_tokens: int = 16,
    heads: tuple[int, int] = (32, 8),
    tokens: int = 1,
    token_major: bool = False,
    mass: bool = False,
    weighted: bool = False,
    slots: bool = False,
    one_launch: bool = False,
) -> None:
    """2,048 tokens of each of four sequences."""
    query = rows(heads[0], tokens, dim, NAMES[dtype])
    kv = view(
        dim, value_dim, NAMES[stored or dtype], heads=heads[1], token_major=token_major,
        scaled=stored is not None,
    )  # fmt: skip
    selection = chosen(heads[1], 2048 // page_tokens, page_tokens, weighted=weighted)
    kv = served(kv) if slots else kv
    workspace = workspace_for(query, kv, selection, one_launch=one_launch)
    attend(query, kv, selection, want_mass=mass, workspace=workspace)


def indexed(widths: tuple[tuple[int, torch.dtype], ...], heads: int, records: int) -> Index:
    """Records of ``widths`` (elements, dtype), as a cache lays them out."""
    parts = tuple(rows(heads, records, w, dtype, token_major=True) for w, dtype in widths)
    return Index(parts, counts(BATCH), counts(BATCH))


def scores(
    kind: index_scores.Kind,
    dim: int = 128,
    dtype: str = "bf16",
    stored: str = "bf16",
    *,
    heads: tuple[int, int] = (32, 8),
    parts: int = 2,
    tokens: int = 1,
    records: int = 2048,
    join: Join | None = None,
) -> None:
    """Scores of records, and the 128 best of them with a ``join``."""
    widths = {
        "summaries": ((dim, NAMES[stored]),) * parts,
        "signs": ((dim // 8, torch.uint8), (1, torch.float16)),
        "nibbles": ((dim // 2, torch.uint8), (2, torch.float16)),
    }
    index = indexed(widths[kind], heads[1], records)
    query = rows(heads[0], tokens, dim, NAMES[dtype])
    if join is None:
        getattr(index_scores, kind)(query, index, records)
    else:
        index_select.top_k(
            kind, query, index, records, 128, join=join, pages=counts(BATCH), last=2,
            arrived=index_select.arrived_for(query, index),
        )  # fmt: skip


def grown(form: Form, dim: int = 128, dtype: str = "bf16", *, page_tokens: int = 16) -> None:
    """Append a row to each sequence, with the record of what it fills."""
    half = (dim, torch.float16)
    widths = {
        "mean": (half,),
        "signs": ((dim // 8, torch.uint8), (1, torch.float16)),
        "nibbles": ((dim // 2, torch.uint8), (2, torch.float16)),
    }
    index = indexed(widths.get(form, (half, half)), KV_HEADS, CONTEXT // page_tokens)
    fresh = rows(KV_HEADS, 1, dim, NAMES[dtype])
    kv = view(dim, dtype=NAMES[dtype], token_major=True)
    append_indexed(fresh, fresh, kv, index, form, page_tokens=page_tokens, advance=True)


def top(rule: str, pages: int, join: Join | None = "sum") -> None:
    """The best of ``pages`` pages for the four rows of each of eight KV heads."""
    found = torch.empty(BATCH, 8, 4 if join else 1, pages)
    numbers = {"top_k": (128,), "top_p": (0.9, 4, 128), "threshold": (4.0, 4, 128)}[rule]
    getattr(top_pages, rule)(found, *numbers, join=join, pages=counts(BATCH), first=1, last=2)


everything = partial(one, mass=True, weighted=True, slots=True, one_launch=True)
SPARSE = [
    Call("sparse/bf16/d128/page16", partial(one), CHOSEN, quick=True),
    Call("sparse/bf16/d128/page16/one_launch", partial(one, one_launch=True), CHOSEN, quick=True),
    Call("sparse/bf16/d128/page1", partial(one, page_tokens=1), CHOSEN, quick=True),
    Call(
        "sparse/bf16/d64/page1/one_launch", partial(one, 64, page_tokens=1, one_launch=True), CHOSEN
    ),
    Call(
        "sparse/bf16/d256/page1",
        partial(one, 256, page_tokens=1, heads=(16, 2), one_launch=True),
        CHOSEN,
    ),
    Call("sparse/bf16/d128/page64", partial(one, page_tokens=64, token_major=True), CHOSEN),
    Call("sparse/bf16/d128/page256", partial(one, page_tokens=256, slots=True), CHOSEN),
    Call("sparse/bf16/d128/page16/mass", partial(one, mass=True), CHOSEN, quick=True),
    Call("sparse/bf16/d128/page1/mass", partial(one, page_tokens=1, mass=True), CHOSEN),
    Call("sparse/bf16/d128/page1/weighted", partial(one, page_tokens=1, weighted=True), CHOSEN),
    Call("sparse/fp32/d128/page16", partial(one, dtype="fp32"), LARGE),
    Call("sparse/bf16/d128/page16/e4m3", partial(one, stored="e4m3"), BYTES),
    Call("sparse/fp16/d128/page16/e5m2", partial(one, dtype="fp16", stored="e5m2"), BYTES),
    Call("sparse/bf16/d64/page16", partial(one, 64), CHOSEN),
    Call("sparse/bf16/d80/page16", partial(one, 80), CHOSEN),
    Call("sparse/bf16/d192_128/page16", partial(one, 192, 128), CHOSEN),
    Call("sparse/bf16/d256/page16", partial(one, 256, heads=(16, 2)), CHOSEN),
    Call("sparse/bf16/d128/page16/mha", partial(one, heads=(32, 32)), CHOSEN),
    Call("sparse/bf16/d128/page16/verify4", partial(one, tokens=4), CHOSEN),
    Call("sparse/bf16/d128/verify16", partial(one, tokens=16), LARGE),
    Call("sparse/bf16/d128/verify16/mass", partial(one, tokens=16, mass=True), LARGE),
    Call("sparse/bf16/d256/verify16", partial(one, 256, heads=(16, 2), tokens=16), LARGE),
    Call("sparse/fp32/d128/verify16", partial(one, dtype="fp32", tokens=16), LARGE),
    Call("sparse/bf16/d128/page1/all", partial(everything, page_tokens=1), CHOSEN),
    Call("sparse/fp32/d128/page16/all", partial(everything, dtype="fp32"), LARGE),
    Call("sparse/bf16/d128/e4m3/one_launch", partial(one, stored="e4m3", one_launch=True), BYTES),
    Call("sparse/bf16/d128/e4m3/verify16", partial(one, stored="e4m3", tokens=16), LARGE_BYTES),
    Call("index/bf16/d128/bounds", partial(scores, "summaries"), SCORED, quick=True),
    Call(
        "index/fp16/d128/bounds", partial(scores, "summaries", dtype="fp16", stored="fp16"), SCORED
    ),
    Call("index/fp32/d128/bounds", partial(scores, "summaries", dtype="fp32", stored="fp32")),
    Call("index/bf16/d128/means", partial(scores, "summaries", parts=1), SCORED),
    Call("index/bf16/d64/bounds", partial(scores, "summaries", 64), SCORED),
    Call("index/bf16/d256/bounds", partial(scores, "summaries", 256, heads=(16, 2)), SCORED),
    Call("index/bf16/d128/bounds/verify16", partial(scores, "summaries", tokens=16)),
    Call("index/bf16/d128/signs", partial(scores, "signs"), SCORED, quick=True),
    Call("index/fp32/d128/signs", partial(scores, "signs", dtype="fp32")),
    Call("index/bf16/d64/signs", partial(scores, "signs", 64), SCORED),
    Call("index/bf16/d256/signs", partial(scores, "signs", 256, heads=(16, 2)), SCORED),
    Call("index/bf16/d80/bounds", partial(scores, "summaries", 80), SCORED),
    Call("index/bf16/d128/nibbles", partial(scores, "nibbles"), SCORED, quick=True),
    Call("index/bf16/d64/nibbles", partial(scores, "nibbles", 64), SCORED),
    Call("index/bf16/d256/nibbles", partial(scores, "nibbles", 256, heads=(16, 2)), SCORED),
    Call("select/bf16/d128/bounds", partial(scores, "summaries", join="sum"), quick=True),
    Call("select/bf16/d128/bounds/max", partial(scores, "summaries", join="max")),
    Call("select/bf16/d128/bounds/8192", partial(scores, "summaries", join="sum", records=8192)),
    Call("select/bf16/d256/bounds", partial(scores, "summaries", 256, heads=(16, 2), join="sum")),
    Call("select/bf16/d128/bounds/verify16", partial(scores, "summaries", tokens=16, join="sum")),
    Call(
        "select/fp32/d128/bounds",
        partial(scores, "summaries", dtype="fp32", stored="fp32", join="sum"),
    ),
    Call("select/bf16/d128/signs", partial(scores, "signs", join="sum", records=32768)),
    Call("select/bf16/d128/nibbles", partial(scores, "nibbles", join="sum", records=32768)),
    Call("top_k/sum/2048", partial(top, "top_k", 2048), quick=True),
    Call("top_k/max/2048", partial(top, "top_k", 2048, "max")),
    Call("top_k/one/2048", partial(top, "top_k", 2048, None)),
    Call("top_k/sum/32768", partial(top, "top_k", 32768)),
    Call("top_p/sum/2048", partial(top, "top_p", 2048)),
    Call("top_p/sum/32768", partial(top, "top_p", 32768)),
    Call("threshold/sum/2048", partial(top, "threshold", 2048)),
    Call("threshold/max/32768", partial(top, "threshold", 32768, "max")),
    Call("append_indexed/bf16/d128/bounds", partial(grown, "bounds"), WIDE, quick=True),
    Call("append_indexed/bf16/d128/cuboid", partial(grown, "cuboid", page_tokens=32), WIDE),
    Call("append_indexed/bf16/d128/mean", partial(grown, "mean", page_tokens=64), WIDE),
    Call("append_indexed/fp32/d128/bounds", partial(grown, "bounds", dtype="fp32")),
    Call("append_indexed/bf16/d256/deviation", partial(grown, "deviation", 256, page_tokens=128)),
    Call("append_indexed/bf16/d80/bounds", partial(grown, "bounds", 80, page_tokens=24)),
    Call("append_indexed/bf16/d128/signs", partial(grown, "signs", page_tokens=1), quick=True),
    Call("append_indexed/bf16/d128/nibbles", partial(grown, "nibbles", page_tokens=1)),
    Call("append_indexed/fp32/d256/nibbles", partial(grown, "nibbles", 256, "fp32", page_tokens=1)),
]
