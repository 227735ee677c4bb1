"""Presses of kvpress by head: bytes that a prompt holds, where kvpress itself frees nothing.

A random Llama of two layers (16 query heads, 4 KV heads of 64, float32) reads a prompt under a
press. `held` is what stays mapped of the bytes of its K and V (`PressCache`, by its `stats`); the
peer is what the tensors of a `DynamicCache` under the same press hold.

The gate: the next token's logits, after a step each, are those of kvpress over the DynamicCache, to
1e-3 of their norm. It needs kvpress, which needs an environment of its own: after `make kvpress`,
`.venv-kvpress/bin/python -m bench kvpress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from bench.harness import Bench

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 2, 16, 4, 64, 512
CLOSE = 1e-3


def run(bench: Bench, tokens: int = 2048) -> None:
    kvpress = bench.peer("kvpress")
    if kvpress is None or too_new():
        bench.skip(
            "no kvpress, which needs an older transformers (< 5.3) than vattn's extra `hf`: "
            "run `make kvpress`, then `.venv-kvpress/bin/python -m bench kvpress`"
        )
        return
    torch.set_num_threads(1)
    tokens = bench.pick(tokens, min(tokens, 512))
    model, ids = llama(bench.seed, tokens), drawn(bench.seed, tokens)
    for name, press in presses(kvpress).items():
        held(bench, name, cache(partial(pressed, model, ids, press)))


def too_new() -> bool:
    """Whether transformers no longer tells hooks what kvpress asks of them."""
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 3)


def held(bench: Bench, name: str, made: Callable[[], Pressed]) -> None:
    """One figure; the peer is kvpress over a DynamicCache."""
    bench.figure(
        f"kvpress/held/{name}",
        lambda: made().held,
        "% of bytes",
        gate=lambda: made().apart <= CLOSE,
        target="ratio >= 3" if name in BY_HEAD else None,
        peer="kvpress",
        peer_value=made().peer_held,
        error=made().apart,
    )


BY_HEAD = ("AdaKV(SnapKV)", "CriticalAdaKV(Expected)", "DMS(Knorm)")


def presses(kvpress: Any) -> dict[str, Any]:
    """Those by rows, and those by head, that keep a quarter."""
    return {
        "Knorm": kvpress.KnormPress(0.75),
        "SnapKV": kvpress.SnapKVPress(0.75),
        "AdaKV(SnapKV)": kvpress.AdaKVPress(kvpress.SnapKVPress(0.75)),
        "CriticalAdaKV(Expected)": kvpress.CriticalAdaKVPress(
            kvpress.ExpectedAttentionPress(0.75, use_vnorm=False)
        ),
        "DMS(Knorm)": kvpress.DMSPress(kvpress.KnormPress(), threshold=float("inf")),
    }


@dataclass(frozen=True)
class Pressed:
    """What is held, percent of the bytes of the prompt, here and over a DynamicCache."""

    held: float
    peer_held: float
    apart: float


def pressed(model: Any, ids: torch.Tensor, press: Any) -> Pressed:
    """A prompt under a press and a step without, over both caches."""
    from transformers import DynamicCache

    from vattn import hf

    whole = ids[:, :-1].numel() * LAYERS * KV_HEADS * DIM * 2 * 4
    stock = DynamicCache(config=model.config)
    want, _ = after(model, ids, stock, press, "sdpa")
    theirs = sum(layer.keys[:, :, :-1].numel() * 2 * 4 for layer in stock.layers)
    ours = hf.PressCache(model.config)
    got, mapped = after(model, ids, ours, press, "vattn")
    apart = float((got - want).norm() / want.norm())
    return Pressed(100 * mapped / whole, 100 * theirs / whole, apart)


def after(
    model: Any, ids: torch.Tensor, cache: Any, press: Any, attention: str
) -> tuple[torch.Tensor, int]:
    """The logits of the last token, and the bytes mapped before it."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        with press(model):
            model(ids[:, :-1], past_key_values=cache)
        mapped = cache.stats().mapped_bytes if hasattr(cache, "stats") else 0
        at = torch.tensor([[ids.shape[1] - 1]])
        return model(ids[:, -1:], past_key_values=cache, position_ids=at).logits, mapped


def llama(seed: int, tokens: int) -> Any:
    """Random weights, sharpened: those of a stock initialisation attend to everything alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vattn import hf

    hf.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        initializer_range=0.1,
        max_position_embeddings=tokens + 8,
    )
    return LlamaForCausalLM(config).eval()


def drawn(seed: int, tokens: int) -> torch.Tensor:
    """A prompt and one token more."""
    return torch.randint(1, VOCAB, (1, tokens + 1), generator=torch.Generator().manual_seed(seed))
