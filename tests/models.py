"""Small models of six families, random but sharpened, for the transformers tests.

Stock initialisation hides faults: its logits are so flat that a dropped mask or a 2% wrong scale
leaves the greedy tokens as they are. Weights three times as large bring them out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vattn import hf

PAGE = 4096
NEW = 14
PROMPT = 71  # 3 pages of float32 rows, 2 of bfloat16, 7 windows
VOCAB = 97
WINDOW = 9
SHARPER = 3.0

_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"query_pre_attn_scalar": 32, **_MIXED}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"query_pre_attn_scalar": 32, **_MIXED}),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {"num_local_experts": 2, "num_experts_per_tok": 1, **_MIXED},
    ),
}
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")


@cache
def model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "vattn"
) -> PreTrainedModel:
    """A model of two layers, 4 query and 2 KV heads of 32, sharpened; the same for a seed."""
    hf.register()
    config_class, model_class, more = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=attention,
        **more,
    )
    torch.manual_seed(seed)
    made = model_class(config)
    with torch.no_grad():
        for weights in made.parameters():
            if weights.dim() > 1:
                weights.mul_(SHARPER)
    made.generation_config.pad_token_id = 0
    return made.to(dtype).eval()


def prompts(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random prompts [batch, tokens] without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, tokens), generator=generator)


def vattn_cache(lm: Any, **options: Any) -> hf.VattnCache:
    return hf.VattnCache(lm.config, **{"page_bytes": PAGE, **options})


def dynamic_cache(lm: Any) -> DynamicCache:
    return DynamicCache(config=lm.config)


def run(lm: Any, ids: Tensor, cache: Any = None, new: int = NEW, **options: Any) -> Any:
    """Greedy generation; the result has `sequences` and, per step, `logits`."""
    # With no mask, generate() takes padding tokens among the generated ones for padding.
    return lm.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        **{"attention_mask": torch.ones_like(ids), **options},
        output_logits=True,
        return_dict_in_generate=True,
    )


def assert_tokens(ours: Any, expected: Any) -> None:
    assert ours.sequences.tolist() == expected.sequences.tolist()


def assert_same(ours: Any, expected: Any) -> None:
    """Equal tokens and, to the last bit, equal logits."""
    assert_tokens(ours, expected)
    apart = [(a - b).abs().max().item() for a, b in zip(ours.logits, expected.logits, strict=True)]
    assert apart == [0.0] * len(apart)


def step(lm: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of one forward pass through a cache, [batch, tokens, vocabulary]."""
    with torch.no_grad():
        return lm(ids, past_key_values=cache, use_cache=True).logits
