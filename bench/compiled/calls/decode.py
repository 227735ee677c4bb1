"""Configurations of `decode`."""

from __future__ import annotations

from functools import partial

import torch

from bench.compiled.call import Call
from bench.compiled.calls.tensors import NAMES, rows, scores_by_name, served, view
from bench.compiled.need import ROWS, Need
from vattn.kernels.deals import workspace_for
from vattn.kernels.decode import decode_lse

# The loop over whole tiles: K and V in loads of 16 bytes, no table, no address that was loaded.
NEEDS = {"_decode": Need(matrix=ROWS, narrow=0)}
NO_PRODUCTS = {"_decode": Need(narrow=0)}


def one(
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    stored: str | None = None,
    scores: str = "append",
    *,
    heads: tuple[int, int] = (32, 8),
    tokens: int = 1,
    tree: bool = False,
    split_tokens: int | None = None,
    slots: bool = False,
    token_major: bool = False,
    one_launch: bool = True,
    told: bool = False,
) -> None:
    """``tokens`` query tokens of each of four sequences, lengths on the device."""
    query = rows(heads[0], tokens, dim, NAMES[dtype])
    kv = view(
        dim,
        value_dim,
        NAMES[stored or dtype],
        heads=heads[1],
        token_major=token_major,
        scaled=stored is not None,
    )
    kv = served(kv) if slots else kv
    chosen = scores_by_name(scores, heads[0])
    workspace = workspace_for(query, kv, chosen, split_tokens=split_tokens, one_launch=one_launch)
    seen = torch.empty(tokens, tokens, dtype=torch.bool) if tree else None
    logits = None
    if told:
        lines = (kv.batch, heads[1], heads[0] // heads[1] * tokens, kv.key.shape[2])
        logits = torch.empty(lines, dtype=torch.float32, device=query.device)
    decode_lse(
        query,
        kv,
        chosen,
        tree=seen,
        split_tokens=split_tokens,
        logits=logits,
        workspace=workspace,
    )


DECODE = [
    Call("decode/bf16/d128", partial(one), NEEDS, quick=True),
    Call("decode/bf16/d128/two_launches", partial(one, one_launch=False), NEEDS, quick=True),
    Call("decode/bf16/d128/token_major", partial(one, token_major=True), NEEDS),
    Call("decode/bf16/d128/slots", partial(one, slots=True, scores="plain"), NEEDS),
    Call("decode/fp16/d128", partial(one, dtype="fp16"), NEEDS),
    Call("decode/fp32/d128", partial(one, dtype="fp32", one_launch=False), NO_PRODUCTS),
    Call("decode/bf16/d128/e4m3", partial(one, stored="e4m3"), NEEDS, quick=True),
    Call("decode/fp16/d128/e5m2", partial(one, dtype="fp16", stored="e5m2"), NEEDS),
    Call("decode/bf16/d64", partial(one, 64, one_launch=False), NEEDS),
    Call("decode/bf16/d80", partial(one, 80), NEEDS),
    Call("decode/bf16/d96", partial(one, 96), NEEDS),
    Call("decode/bf16/d192_128", partial(one, 192, 128), NEEDS),
    Call("decode/bf16/d256", partial(one, 256, heads=(16, 2), one_launch=False), NEEDS),
    Call("decode/bf16/d128/mha", partial(one, heads=(32, 32)), NEEDS),
    Call("decode/bf16/d128/64_8", partial(one, heads=(64, 8)), NEEDS),
    Call("decode/bf16/d128/verify4", partial(one, tokens=4, one_launch=False), NEEDS),
    Call("decode/bf16/d128/verify16", partial(one, tokens=16), {"_decode": Need(narrow=0)}),
    Call("decode/bf16/d128/tree", partial(one, tokens=8, tree=True), NEEDS),
    Call("decode/bf16/d128/fixed", partial(one, split_tokens=512), NEEDS),
    Call("decode/bf16/d128/sinks", partial(one, scores="sinks"), NEEDS),
    Call("decode/bf16/d256/softcap", partial(one, 256, heads=(16, 8), scores="softcap"), NEEDS),
    Call("decode/bf16/d128/logits", partial(one, told=True, one_launch=False), NEEDS),
    Call(
        "decode/bf16/d128/logits/verify4",
        partial(one, tokens=4, told=True, one_launch=False),
        NEEDS,
    ),
    Call(
        "decode/fp32/d128/logits",
        partial(one, dtype="fp32", told=True, one_launch=False),
        NO_PRODUCTS,
    ),
    Call("decode/bf16/d128/alibi", partial(one, scores="alibi"), NEEDS),
    Call("decode/bf16/d64/sink_logits", partial(one, 64, scores="sink_logits"), NEEDS),
]
