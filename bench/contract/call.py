"""One call of attention, its float64 truth, and torch's own answer.

    Call        the arguments as data: rebuilt, mapped, and passed to any implementation
    exact       the definition in float64, one score matrix per query head
    native      torch's function, taken once: it stays torch's when its name is patched
    torchs      the same, but for the one accepted call that makes it read out of bounds

Rows that may attend to nothing are 0. `is_causal` is aligned top-left. Bool masks: True attends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Attend = Callable[..., Tensor]

native: Attend = torch._C._nn.scaled_dot_product_attention

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def torchs(*tensors: Tensor, **options: Any) -> Tensor:
    """torch's answer where it is safe to ask for it.

    Given a float32 mask and float64 tensors, torch's CPU kernel reads the mask as float64: wrong
    values, from memory behind the mask. The same mask in float64 is what the call means.
    """
    kinds = [getattr(each, "dtype", None) for each in (*tensors[:1], options.get("attn_mask"))]
    if kinds == [torch.float64, torch.float32]:
        options["attn_mask"] = options["attn_mask"].double()
    return native(*tensors, **options)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of scaled_dot_product_attention, under torch's names where they are short."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: Any = None
    gqa: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments by their field names; a missing mask is left out."""
        found = {"query": self.query, "key": self.key, "value": self.value}
        return found if self.mask is None else {**found, "mask": self.mask}

    def options(self) -> dict[str, Any]:
        """Every argument but query, key and value, as keywords."""
        return {
            "attn_mask": self.mask,
            "dropout_p": self.dropout,
            "is_causal": self.causal,
            "scale": self.scale,
            "enable_gqa": self.gqa,
        }

    def run(self, attend: Attend) -> Tensor:
        return attend(self.query, self.key, self.value, **self.options())

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor argument changed."""
        return self.having({name: change(each) for name, each in self.tensors().items()})

    def having(self, tensors: Mapping[str, Tensor]) -> Call:
        """The same call with some tensor arguments replaced."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    @property
    def fused(self) -> bool:
        """Whether torch's own chooser sends this call to a fused kernel, not to plain maths."""
        choice = torch._fused_sdp_choice(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout,
            self.causal,
            scale=self.scale,
            enable_gqa=self.gqa,
        )
        return bool(choice != 0)


def scores(call: Call) -> Tensor:
    """Scaled and masked logits in float64, [..., L, S]."""
    query, key = call.query.double(), call.key.double()
    if call.gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    width = query.shape[-1]
    scale = float(call.scale) if call.scale is not None else max(width, 1) ** -0.5
    logits = query @ key.transpose(-2, -1) * scale
    if call.causal:
        keep = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~keep, float("-inf"))
    if call.mask is None:
        return logits
    if call.mask.dtype == torch.bool:
        return logits.masked_fill(~call.mask, float("-inf"))
    return logits + call.mask.double()


def exact(call: Call) -> Tensor:
    """The result in float64, [..., L, Ev]; differentiable. Dropout is left out."""
    logits = scores(call)
    value = call.value.double()
    if call.gqa:
        value = value.repeat_interleave(call.query.shape[-3] // value.shape[-3], dim=-3)
    if not logits.shape[-1]:
        return logits @ value
    dead = (logits == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
    return weights @ value


def magnitude(call: Call) -> float:
    """The largest logit that float32 has to hold, at least 1.

    Mask entries that swallow any score (finfo.min) leave no score to round, and do not count.
    """
    bare = replace(call, mask=None, causal=False)
    sizes = [scores(bare).nan_to_num(0.0, 0.0, 0.0).abs()]
    if call.mask is not None and call.mask.dtype != torch.bool:
        added = call.mask.double().abs().nan_to_num(0.0, 0.0, 0.0)
        sizes.append(added.masked_fill(added > 2**24, 0.0))
    return max([1.0, *(float(each.max()) for each in sizes if each.numel())])


def gradient_sizes(call: Call, cotangent: Tensor) -> dict[str, Tensor]:
    """What the absolute terms of every gradient element add up to, in float64.

    A gradient is a difference of such sums: its rounding errors scale with them, and an element
    all of whose terms are 0 (a row that attends to nothing, a key nobody sees) is exactly 0.
    """
    query, key, value = (each.double().abs() for each in (call.query, call.key, call.value))
    flowing = cotangent.double().abs()
    logits = scores(call)
    heads = logits.shape[-3] if logits.dim() > 2 else 1
    if call.gqa:
        key, value = (t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (key, value))
    if not logits.shape[-1]:
        return {name: torch.zeros_like(each) for name, each in call.tensors().items()}
    dead = (logits == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
    through = flowing @ value.transpose(-2, -1)
    terms = weights * (through + (weights * through).sum(dim=-1, keepdim=True))
    scale = abs(float(call.scale)) if call.scale is not None else max(query.shape[-1], 1) ** -0.5
    sizes = {
        "query": terms @ key * scale,
        "key": terms.transpose(-2, -1) @ query * scale,
        "value": weights.transpose(-2, -1) @ flowing,
        "mask": terms,
    }
    return {name: _summed(sizes[name], each, call.gqa) for name, each in call.tensors().items()}


def _summed(full: Tensor, leaf: Tensor, gqa: bool) -> Tensor:
    """Add up what broadcasting and shared heads spread out, to the shape of the leaf."""
    if gqa and leaf.dim() > 2 and leaf.shape[-3] not in (1, full.shape[-3]):
        groups = full.shape[-3] // leaf.shape[-3]
        full = full.unflatten(-3, (leaf.shape[-3], groups)).sum(dim=-3)
    return full.sum_to_size(leaf.shape)
