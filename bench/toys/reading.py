"""Questions answered by a model that reads what a selector chooses.

The context is read whole, once. Each token of a question, and of its answer, is a step of decoding:
in every layer a selector chooses for this token's query among all tokens up to it, and our kernels
read what it chose. The answer is fed as it should be and every token's arg-max compared: greedy
decoding gives the answer exactly when all agree. So all steps of a layer can run side by side, each
as a sequence of its own length over the same keys.

    row        question 0, token 0    question 0, token 1    ...    question 1, token 0    ...
    slot       0                      0                             1
    length     context + 1            context + 2                   context + 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.toys.net import Reader
from vattn.kernels import sparse
from vattn.kernels.index import Index
from vattn.kernels.kv import KV
from vattn.selector import Look, Selector


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions to contexts.

    Args:
        context: [C, n] token ids.
        of: [Q], which context a question is about.
        tokens: [Q, L] token ids: a question, its answer, padding.
        first, end: [Q]; tokens first .. end are the answer.
    """

    context: Tensor
    of: Tensor
    tokens: Tensor
    first: Tensor
    end: Tensor


@dataclass(frozen=True, eq=False)
class Prefill:
    """What contexts leave behind, a tensor for each layer: queries [C, Hq, n, D], keys and values
    [C, Hkv, n, D], and the input of the last token [C, 1, width]."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    last: list[Tensor]


@dataclass(frozen=True, eq=False)
class Answers:
    """``right`` [Q] bool; tokens read of those there, over all layers and KV heads; and the
    logits [Q, L, vocabulary]."""

    right: Tensor
    read: int
    there: int
    logits: Tensor


@torch.no_grad()
def prefill(net: Reader, context: Tensor) -> Prefill:
    """Read contexts [C, n] whole."""
    found, hidden = Prefill([], [], [], []), net.embed(context)
    for layer in range(net.layers):
        q, k, v = net.project(layer, hidden, 0, None)
        found.queries.append(q)
        found.keys.append(k)
        found.values.append(v)
        found.last.append(hidden[:, -1:])
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = net.finish(layer, hidden, attended)
    return found


@torch.no_grad()
def answer(net: Reader, known: Prefill, asked: Asked, selector: Selector | None) -> Answers:
    """Answer the questions; without a selector everything is read."""
    hidden = net.embed(asked.tokens)
    size, read, there = asked.context.shape[1], 0, 0
    for layer in range(net.layers):
        q, k, v = net.project(layer, hidden, size, known.last[layer][asked.of])
        key = torch.cat([known.keys[layer][asked.of], k], 2)
        value = torch.cat([known.values[layer][asked.of], v], 2)
        attended, share = _attend(q, key, value, layer, selector)
        read, there = read + share[0], there + share[1]
        hidden = net.finish(layer, hidden, attended)
    logits = net.logits(hidden)
    agree = logits[:, :-1].argmax(-1) == asked.tokens[:, 1:]
    place = torch.arange(1, asked.tokens.shape[1])
    outside = (place < asked.first[:, None]) | (place >= asked.end[:, None])
    return Answers((agree | outside).all(1), read, there, logits)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: int, selector: Selector | None
) -> tuple[Tensor, tuple[int, int]]:
    """Attention of the last L tokens, and tokens read of those there."""
    batch, heads, length, dim = query.shape
    tokens, kv_heads = key.shape[2], key.shape[1]
    lengths = torch.arange(tokens - length + 1, tokens + 1).repeat(batch)
    there = int(lengths.sum()) * kv_heads
    slots = torch.arange(batch).repeat_interleave(length)
    rows = query.transpose(1, 2).reshape(batch * length, heads, 1, dim)
    kv = KV(key, value, lengths, slots=slots)
    if selector is not None:
        index = index_of(selector, layer, (key, value), lengths, slots)
        look = Look(layer, kv, index, lengths.numpy(), dim**-0.5)
        selection = selector.select(rows, look)
        if selection is not None:
            out = sparse.attend(rows, kv, selection)[0]
            count = selection.count * selection.page_tokens
            read = int(count.minimum(lengths[:, None]).sum())
            return out.reshape(batch, length, heads, dim).transpose(1, 2), (read, there)
    seen = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length)
    out = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    return out, (there, there)


def index_of(
    selector: Selector, layer: int, kv: tuple[Tensor, Tensor], lengths: Tensor, slots: Tensor
) -> Index | None:
    """Records of all full pages of K and V [N, Hkv, T, D], those of a row up to its own length."""
    size = selector.page_tokens
    full = kv[0].shape[2] // size * size
    if not selector.parts(kv[0].shape[3]):
        return None
    pages = (side[:, :, :full].unflatten(2, (-1, size)) for side in kv)
    made = [selector.record(layer, k, v) for k, v in zip(*pages, strict=True)]
    parts = tuple(torch.stack(each) for each in zip(*made, strict=True))
    return Index(parts, lengths // size, slots)
