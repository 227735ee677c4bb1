"""The attention function under transformers' interface, against eager and a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import (
    FAMILIES,
    WINDOW,
    model,
    prompts,
)
from vattn import hf

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("family", FAMILIES)


@every
def test_attention_agrees_with_eager(family: str) -> None:
    ids = prompts(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with torch.no_grad():
        ours = model(family)(ids, attention_mask=mask).logits
        eager = model(family, attention="eager")(ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], eager[seen], atol=2e-3, rtol=1e-3)


def attend(**options: Any) -> tuple[Tensor, None]:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = torch.nn.Module()
    return hf.attention(module, query, key, value, **{"attention_mask": None, **options})


def test_what_changes_the_result_is_refused() -> None:
    for name in ("position_bias", "alibi", "score_mod"):
        with pytest.raises(hf.UnsupportedError, match=name):
            attend(**{name: torch.zeros(1)})
        attend(**{name: None})
    with pytest.raises(hf.UnsupportedError, match="continuous batching"):
        attend(cache=object())
    out, weights = attend(position_ids=torch.arange(3), use_cache=True, output_attentions=True)
    assert weights is None
    assert out.shape == (2, 3, 4, 8)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "heads", "causal"])
def test_explicit_math(
    kind: str, softcap: float | None, sinks: bool, dtype: torch.dtype, monkeypatch: Any
) -> None:
    from vattn import hf_attention

    monkeypatch.setattr(hf_attention, "SCORES", 64)  # many blocks of queries
    monkeypatch.setattr(hf_attention, "BLOCK_TOKENS", 4)
    tokens = 6 if kind == "causal" else 11
    query = torch.randn(2, 4, 6, 8).to(dtype)
    key, value = (torch.randn(2, 2, tokens, 8).to(dtype) for _ in "kv")
    mask = {
        "bool": torch.rand(2, 1, 6, tokens) < 0.5,
        "float": torch.randn(2, 1, 6, tokens),
        "heads": torch.rand(2, 4, 6, tokens) < 0.5,
    }.get(kind)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
        mask[1, :, 2] = False  # a row that attends to nothing
    logits = torch.randn(4) if sinks else None
    out = hf_attention.explicit(query, key, value, mask, kind == "causal", 0.4, softcap, logits)

    q, k, v = (t.double() for t in (query, key, value))
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * 0.4
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if kind == "causal":
        mask = torch.ones(6, tokens, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if logits is not None:
        scores = torch.cat([scores, logits.double().view(1, 4, 1, 1).expand(2, 4, 6, 1)], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :tokens]
    tolerance = 1e-5 if dtype == FLOAT32 else 2e-2
    torch.testing.assert_close(out.double(), weights @ v, atol=tolerance, rtol=tolerance)


def test_a_window_without_a_mask_is_applied() -> None:
    query = torch.randn(1, 4, 20, 8)
    key, value = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    module = torch.nn.Module()
    i = torch.arange(20)
    mask = ((i[None] <= i[:, None]) & (i[None] > i[:, None] - WINDOW))[None, None]
    out, _ = hf.attention(module, query, key, value, None, sliding_window=WINDOW)
    expected, _ = hf.attention(module, query, key, value, mask, sliding_window=WINDOW)
    torch.testing.assert_close(out, expected)
    last, _ = hf.attention(module, query[:, :, -1:], key, value, None, sliding_window=WINDOW)
    torch.testing.assert_close(last, expected[:, -1:])
    with pytest.raises(hf.UnsupportedError, match="mask"):
        hf.attention(module, query, key, value, None, sliding_window=WINDOW, is_causal=False)
