"""Flaws of values: masks, alignment, scales, heads, splits over the keys."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.contract.call import Call
from bench.contract.flaws import (
    Flaw,
    after,
    before,
    bool_mask,
    float_mask,
    instead,
    keep,
    scale_of,
    sees_nothing,
    with_mask,
)
from bench.contract.honest import answered, plain


# ---- masks ---------------------------------------------------------------------------------------
def no_causal(call: Call) -> Call:
    return replace(call, causal=False) if call.causal is True and call.mask is None else call


def bottom_right(call: Call) -> Call:
    return _aligned(call, call.key.shape[-2] - call.query.shape[-2])


def added_causal(call: Call) -> Call:
    """The causal mask as a bool mask: NaN behind it leaks out of K, where torch hides it."""
    return _aligned(call, 0)


def _aligned(call: Call, diagonal: int) -> Call:
    if call.causal is not True or call.mask is not None:
        return call
    sizes = (call.query.shape[-2], call.key.shape[-2])
    seen = torch.ones(sizes, dtype=torch.bool, device=call.query.device)
    return with_mask(call, seen.tril(diagonal))


def inverted(call: Call) -> Call:
    mask = bool_mask(call)
    return call if mask is None else replace(call, mask=~mask)


def unmasked_decode(call: Call) -> Call:
    return replace(call, mask=None) if call.query.shape[-2] == 1 else call


def first_row(call: Call) -> Call:
    """Every query takes the first query's mask."""
    return call if call.mask is None else replace(call, mask=call.mask[..., :1, :])


def first_sequence(call: Call) -> Call:
    """Every sequence takes the first sequence's mask."""
    batched = call.mask is not None and call.mask.dim() == 4
    return replace(call, mask=call.mask[:1]) if call.mask is not None and batched else call


def mask_per_sequence(call: Call) -> Call:
    """A mask [H, L, S] is taken for one of [B, L, S] where the sizes allow it."""
    mask = call.mask
    if mask is None or mask.dim() != 3 or call.query.dim() != 4:
        return call
    fits = mask.shape[0] >= call.query.shape[0] > 1
    return replace(call, mask=mask[: call.query.shape[0], None]) if fits else call


def as_bool(call: Call) -> Call:
    """A float mask hides below -1 and adds nothing."""
    mask = float_mask(call)
    return call if mask is None else replace(call, mask=mask > -1)


def coarse_mask(call: Call) -> Call:
    """A float mask is kept in eight bits."""
    mask = float_mask(call)
    if mask is None or mask.dtype == torch.float64:
        return call
    coarse = mask.clamp(-5e4, 5e4).to(torch.float8_e5m2).to(mask.dtype)
    return replace(call, mask=torch.where(torch.isfinite(mask), coarse, mask))


def nan_rows(call: Call, out: Tensor) -> Tensor:
    return out.masked_fill(sees_nothing(keep(call), out), torch.nan)


def mean_rows(call: Call, out: Tensor) -> Tensor:
    """Rows that attend to nothing give the mean of V, as with a mask of large negative numbers."""
    value = call.value
    if call.gqa:
        value = value.repeat_interleave(call.query.shape[-3] // value.shape[-3], dim=-3)
    mean = value.mean(dim=-2, keepdim=True).to(out.dtype)
    return torch.where(sees_nothing(keep(call), out), mean, out)


def split_nan(call: Call, out: Tensor) -> Tensor:
    """Keys in two halves, merged with -inf - -inf: rows that see nothing of the first are NaN."""
    half = keep(call)[..., : call.key.shape[-2] // 2]
    return out.masked_fill(sees_nothing(half, out), torch.nan) if half.shape[-1] else out


# ---- scores --------------------------------------------------------------------------------------
def off_scale(call: Call) -> Call:
    return replace(call, scale=scale_of(call) * 1.02)


def scaled_twice(call: Call) -> Call:
    return replace(call, scale=scale_of(call) * scale_of(call))


def ignored_scale(call: Call) -> Call:
    return replace(call, scale=None)


def zero_is_default(call: Call) -> Call:
    """`scale or default`."""
    return replace(call, scale=call.scale or None)


def positive_scale(call: Call) -> Call:
    return replace(call, scale=abs(scale_of(call)))


def scale_of_values(call: Call) -> Call:
    """The default scale is taken from V's width."""
    if call.scale is None and call.value.shape[-1]:
        return replace(call, scale=call.value.shape[-1] ** -0.5)
    return call


def half_scores(call: Call) -> Tensor:
    """Scores are rounded to float16 before the softmax."""
    if call.query.dtype == torch.float64 or not call.query.shape[-1]:
        return answered(call)
    key = call.key
    if call.gqa:
        key = key.repeat_interleave(call.query.shape[-3] // key.shape[-3], dim=-3)
    scores = call.query.float() @ key.float().transpose(-2, -1) * scale_of(call)
    lost = scores.half().float() - scores
    mask = float_mask(call)
    lost = lost.masked_fill(~keep(call), -torch.inf) if mask is None else lost + mask.float()
    return plain(with_mask(call, lost))


def lost_tail(call: Call) -> Call:
    """The last key is lost unless the keys fill whole tiles of 8."""
    keys = call.key.shape[-2]
    if keys % 8 < 2 or call.mask is not None or call.value.shape[-2] != keys:
        return call
    short = [each.narrow(-2, 0, keys - 1) for each in (call.key, call.value)]
    return replace(call, key=short[0], value=short[1])


def merged_halves(call: Call) -> Tensor:
    """One query's keys in two halves, merged by their plain mean."""
    keys = call.key.shape[-2]
    if call.query.shape[-2] != 1 or call.mask is not None or call.causal or keys < 2:
        return answered(call)
    parts = [
        answered(replace(call, key=call.key[..., at, :], value=call.value[..., at, :]))
        for at in (slice(0, keys // 2), slice(keys // 2, keys))
    ]
    return (parts[0] + parts[1]) / 2


def tiled_heads(call: Call) -> Call:
    """Query head h is served by KV head h modulo their number."""
    if call.gqa is not True or call.key.dim() < 3 or call.query.dim() < 3:
        return call
    heads = call.query.shape[-3]
    counts = [t.shape[-3] for t in (call.key, call.value)]
    if any(not count or heads % count for count in counts):
        return call
    order = torch.arange(heads, device=call.query.device)
    tiled = [t.index_select(-3, order % t.shape[-3]) for t in (call.key, call.value)]
    return replace(call, key=tiled[0], value=tiled[1], gqa=False)


VALUES = (
    Flaw("no causal mask", before(no_causal), "causal=True"),
    Flaw("causal mask aligned bottom-right", before(bottom_right), "grid/lengths"),
    Flaw("causal mask leaks NaN", before(added_causal), "grid/hidden"),
    Flaw("bool mask inverted", before(inverted), "grid/masks"),
    Flaw("mask dropped for one query", before(unmasked_decode), "grid/masks"),
    Flaw("mask of the first query for all", before(first_row), "grid/masks"),
    Flaw("mask of the first sequence for all", before(first_sequence), "grid/masks"),
    Flaw("mask [H, L, S] taken for [B, L, S]", before(mask_per_sequence), "shape=HLS"),
    Flaw("float mask taken for bool", before(as_bool), "kind=same"),
    Flaw("float mask in eight bits", before(coarse_mask), "kind=float32"),
    Flaw("NaN rows where nothing is attended", after(nan_rows), "pattern=dead"),
    Flaw("mean of V where nothing is attended", after(mean_rows), "pattern=dead"),
    Flaw("NaN where the first half is masked", after(split_nan), "pattern=left"),
    Flaw("scale off by 2%", before(off_scale), "grid/lengths"),
    Flaw("scale applied twice", before(scaled_twice), "grid/lengths"),
    Flaw("scale ignored", before(ignored_scale), "grid/scale"),
    Flaw("scale 0 taken for the default", before(zero_is_default), "scale=zero"),
    Flaw("scale without its sign", before(positive_scale), "scale=negative"),
    Flaw("scale from the width of V", before(scale_of_values), "grid/widths"),
    Flaw("float16 scores", instead(half_scores), "grid/loud"),
    Flaw("last key of a partial tile lost", before(lost_tail), "grid/lengths"),
    Flaw("splits merged without weights", instead(merged_halves), "L=1,"),
    Flaw("KV heads tiled, not repeated", before(tiled_heads), "grid/grouped"),
)
