"""The transformers cache beyond tokens: memory, the Cache interface, refusals."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig
from transformers import cache_utils as theirs

from tests.models import (
    FAMILIES,
    PAGE,
    PROMPT,
    VOCAB,
    WINDOWED,
    dynamic_cache,
    model,
    prompts,
    run,
    step,
    vattn_cache,
)
from vattn import hf
from vattn.allocator.errors import ClosedError, OutOfPages, OutOfRange
from vattn.hf_layers import CROP_TAKES_LENGTHS
from vattn.layout import LayoutError

FLOAT32 = torch.float32
pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("family", FAMILIES)


# ---- memory ----------------------------------------------------------------------------------


def maps_and_files() -> tuple[int, int]:
    with open("/proc/self/maps") as maps:
        ours = sum("memfd:vattn" in line for line in maps)
    return ours, len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing is left to collect at the start, and nothing is collected until the end."""
    torch._dynamo.reset()  # compiled code of earlier tests holds their caches
    for _ in range(3):
        gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_dropped_cache_leaves_nothing(family: str) -> None:
    lm, ids = model(family), prompts(2, PROMPT)
    before = maps_and_files()
    for make in (vattn_cache, lambda lm: hf.VattnStaticCache(lm.config, 128, page_bytes=PAGE)):
        cache = make(lm)
        run(lm, ids, cache)
        assert maps_and_files() > before
        del cache
        assert maps_and_files() == before
    with hf.enable(max_tokens=256, page_bytes=PAGE):
        lm.generate(ids, max_new_tokens=3)
        assert maps_and_files() == before
        fork = copy.deepcopy(run(lm, ids, new=3).past_key_values)
    assert maps_and_files() > before
    del fork
    assert maps_and_files() == before


def test_a_view_outlives_its_cache() -> None:
    lm, ids = model("llama"), prompts(1, PROMPT)
    cache = vattn_cache(lm)
    step(lm, ids, cache)
    keys = cache.layers[0].keys
    values = keys.clone()
    del cache
    gc.collect()
    assert torch.equal(keys, values)


def test_growth_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = model("llama"), prompts(2, PROMPT)
    cache = vattn_cache(lm)
    step(lm, ids, cache)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    joined: list[torch.Size] = []
    cat = torch.cat

    def watch(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        joined.append(tensors[0].shape)
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", watch)
    for seed in range(30):
        step(lm, prompts(2, 1, seed=seed), cache)
        stats = cache.stats()
        assert stats.mapped_bytes <= stats.used_bytes + 2 * cache.kv.layout.lanes * PAGE
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    assert not [shape for shape in joined if len(shape) == 4 and shape[2] >= PROMPT]
    step(lm, prompts(2, 1), dynamic_cache(lm))
    expected = dynamic_cache(lm)
    step(lm, ids, expected)
    step(lm, prompts(2, 1), expected)
    assert [shape for shape in joined if len(shape) == 4 and shape[2] >= PROMPT], "control"


@pytest.mark.parametrize("family", WINDOWED)
def test_pages_behind_the_window_return_one_step_later(family: str) -> None:
    lm = model(family)
    cache = vattn_cache(lm)
    step(lm, prompts(1, 300), cache)
    full = cache.stats().mapped_bytes
    step(lm, prompts(1, 1), cache)
    step(lm, prompts(1, 1), cache)
    per_layer = full // 2
    sliding = sum(cache.is_sliding)
    window_pages = 2 * 2 * 2 * PAGE  # K and V, 2 heads, a window may touch 2 pages
    assert cache.stats().mapped_bytes <= full - sliding * (per_layer - window_pages)
    cache.kv.check()


def test_a_budget_that_does_not_reach_changes_nothing() -> None:
    lm, ids = model("gemma3"), prompts(1, 60)
    cache = vattn_cache(lm, budget_bytes=2 * 8 * PAGE)
    expected = dynamic_cache(lm)
    assert torch.equal(step(lm, ids, cache), step(lm, ids, expected))
    with pytest.raises(OutOfPages, match="needed"):
        step(lm, prompts(1, 200), cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]
    more = prompts(1, 2)
    assert torch.equal(step(lm, more, cache), step(lm, more, expected))
    cache.kv.check()


def test_a_first_step_that_fails_binds_nothing() -> None:
    lm = model("mistral")
    cache = vattn_cache(lm, budget_bytes=2 * 8 * PAGE)
    with pytest.raises(OutOfPages):
        step(lm, prompts(2, 200), cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(step(lm, prompts(1, 9), cache), step(lm, prompts(1, 9), dynamic_cache(lm)))


def test_an_assignment_that_does_not_fit_changes_nothing() -> None:
    lm = model("llama")
    cache = vattn_cache(lm, budget_bytes=2 * 8 * PAGE)
    step(lm, prompts(1, 40), cache)
    layer = cache.layers[0]
    keys, values = layer.keys.clone(), layer.values.clone()
    layer.keys = keys.repeat(1, 1, 4, 1)
    with pytest.raises(OutOfPages):
        layer.values = values.repeat(1, 1, 4, 1)
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    cache.kv.check()


def test_more_tokens_than_reserved_are_refused() -> None:
    lm = model("llama")
    cache = vattn_cache(lm, max_tokens=80)
    step(lm, prompts(1, PROMPT), cache)
    with pytest.raises(OutOfRange, match="80"):
        step(lm, prompts(1, 10), cache)
    assert cache.get_seq_length() == PROMPT


# ---- the parts of the Cache interface --------------------------------------------------------


@every
def test_keys_values_and_iteration(family: str) -> None:
    lm, ids = model(family), prompts(2, PROMPT)
    ours, expected = vattn_cache(lm), dynamic_cache(lm)
    assert all(keys is None and values is None for keys, values, _ in ours)
    for cache in (ours, expected):
        step(lm, ids, cache)
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
        assert (mine[2] is None) == (other[2] is None)
    again = DynamicCache(ddp_cache_data=list(ours))
    for mine, other in zip(again, expected, strict=True):
        assert torch.equal(mine[0], other[0])
    assert ours.is_sliding == expected.is_sliding
    assert ours.get_mask_sizes(3, 0) == expected.get_mask_sizes(3, 0)


@every
def test_assigned_rows(family: str) -> None:
    lm, ids = model(family), prompts(2, PROMPT)
    ours, expected = vattn_cache(lm), dynamic_cache(lm)
    for cache in (ours, expected):
        step(lm, ids, cache)
        for layer in cache.layers:
            kept = torch.arange(layer.keys.shape[2] - 1, 0, -2).flip(0)
            if getattr(layer, "is_sliding", False):
                kept = torch.arange(layer.keys.shape[2])
            # In two halves, as kvpress does.
            layer.keys = layer.keys[:, :, kept]
            layer.values = layer.values[:, :, kept]
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    assert ours.get_seq_length() == expected.get_seq_length()
    for seed in range(3):
        more = prompts(2, 4, seed=seed)
        at = torch.arange(PROMPT + 4 * seed, PROMPT + 4 * seed + 4)[None].expand(2, -1)
        with torch.no_grad():
            mine = lm(more, past_key_values=ours, position_ids=at).logits
            other = lm(more, past_key_values=expected, position_ids=at).logits
        assert torch.equal(mine, other)


def test_assigning_a_slice_of_itself_moves_rows() -> None:
    lm = model("llama")
    cache = vattn_cache(lm)
    step(lm, prompts(1, PROMPT), cache)
    layer = cache.layers[0]
    keys, values = layer.keys[:, :, 5:].clone(), layer.values[:, :, 5:].clone()
    layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)


def test_half_an_assignment_is_refused_or_harmless() -> None:
    lm = model("llama")
    cache = vattn_cache(lm)
    step(lm, prompts(1, PROMPT), cache)
    layer = cache.layers[0]
    changed = layer.keys * 2
    layer.keys = changed  # same length: the other half stays
    assert layer.get_seq_length() == PROMPT
    assert torch.equal(layer.keys, changed)
    layer.keys = layer.keys[:, :, :9]
    with pytest.raises(LayoutError, match="only `keys` was assigned, with 9 tokens"):
        step(lm, prompts(1, 1), cache)
    layer.values = layer.values[:, :, :9]
    assert layer.get_seq_length() == 9


@every
def test_crop_takes_back_tokens(family: str) -> None:
    lm, ids = model(family), prompts(1, PROMPT)
    ours, expected = vattn_cache(lm), dynamic_cache(lm)
    for cache in (ours, expected):
        cache.activate_past_recording()
        step(lm, ids, cache)
        cache.crop(0)
        step(lm, prompts(1, 5), cache)
        cache.crop(-3)
    assert ours.get_seq_length() == expected.get_seq_length() == PROMPT + 2
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine[0], other[0])
    more = prompts(1, 4, seed=8)
    assert torch.equal(step(lm, more, ours), step(lm, more, expected))


def test_crop_refuses_what_it_cannot_undo() -> None:
    lm = model("mistral")
    cache = vattn_cache(lm)
    step(lm, prompts(1, PROMPT), cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_crop_by_length_as_the_installed_version_means() -> None:
    lm = model("llama")
    ours, expected = vattn_cache(lm), dynamic_cache(lm)
    for cache in (ours, expected):
        step(lm, prompts(1, PROMPT), cache)
        if CROP_TAKES_LENGTHS:
            cache.crop(40)
        else:
            with pytest.raises(ValueError, match="not supported"):
                cache.crop(40)
    assert ours.get_seq_length() == expected.get_seq_length()


def test_one_layer_alone_can_be_reordered() -> None:
    lm, ids = model("llama"), prompts(3, PROMPT)
    ours, expected = vattn_cache(lm), dynamic_cache(lm)
    for cache in (ours, expected):
        step(lm, ids, cache)
        cache.layers[1].reorder_cache(torch.tensor([2, 0, 0]))
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine[0], other[0])
    more = prompts(3, 2)
    assert torch.equal(step(lm, more, ours), step(lm, more, expected))
    ours.layers[1].batch_repeat_interleave(2)
    with pytest.raises(hf.UnsupportedError, match="on the cache"):
        step(lm, more, ours)


def test_pickling_is_refused() -> None:
    lm = model("llama")
    cache = vattn_cache(lm)
    with pytest.raises(hf.CopyRefused, match="deepcopy"):
        pickle.dumps(cache)
    with pytest.raises(TypeError):
        pickle.dumps(cache.layers[0])


def test_before_the_first_tokens() -> None:
    cache = vattn_cache(model("gemma3"))
    assert cache.kv is None
    assert cache.get_seq_length() == 0
    cache.crop(0)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    assert copy.deepcopy(cache).kv is None
    with pytest.raises(ClosedError, match="no tokens yet"):
        cache.stats()


def test_early_initialization() -> None:
    lm, ids = model("llama"), prompts(2, PROMPT)
    for cache in (vattn_cache(lm), hf.VattnStaticCache(lm.config, 128, page_bytes=PAGE)):
        cache.early_initialization(2, 2, 32, FLOAT32, torch.device("cpu"))
        assert cache.is_initialized
        assert_tokens = run(lm, ids, cache).sequences.tolist()
        assert assert_tokens == run(lm, ids).sequences.tolist()


def test_another_batch_needs_a_reset() -> None:
    lm = model("llama")
    cache = vattn_cache(lm)
    step(lm, prompts(2, 8), cache)
    with pytest.raises(LayoutError, match=r"shape|batch"):
        step(lm, prompts(3, 8), cache)
    cache.reset()
    step(lm, prompts(3, 8), cache)
    assert len(cache.store.sequences) == 3


def test_encoder_decoder_caches_take_ours() -> None:
    lm, ids = model("llama"), prompts(2, 8)
    pair = EncoderDecoderCache(vattn_cache(lm), vattn_cache(lm))
    step(lm, ids, pair.self_attention_cache)
    pair.crop(-2)
    assert pair.get_seq_length() == 6


# ---- refusals --------------------------------------------------------------------------------


def test_layers_that_hold_no_rows_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, vocab_size=VOCAB)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(hf.UnsupportedError, match=r"'linear_attention'.*DynamicCache"):
        hf.VattnCache(config)
    with hf.enable(max_tokens=64):
        layers = DynamicCache(config=config).layers
    assert isinstance(layers[0], hf.VattnLayer)
    assert isinstance(layers[1], theirs.LinearAttentionLayer)


def test_k_and_v_of_different_sizes_are_refused() -> None:
    cache = vattn_cache(model("llama"))
    with pytest.raises(hf.UnsupportedError, match=r"latent.*DynamicCache"):
        cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(LayoutError, match="float64"):
        cache.update(*(torch.zeros(1, 2, 3, 32, dtype=torch.float64) for _ in "kv"), 0)
    cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
    with pytest.raises(hf.UnsupportedError, match="different shapes"):
        cache.update(torch.zeros(1, 1, 3, 64), torch.zeros(1, 1, 3, 64), 1)


def test_max_tokens_comes_from_the_config() -> None:
    config = model("llama").config
    assert hf.VattnCache(config).store.options.max_tokens == 512
    assert hf.VattnCache(config, 77).store.options.max_tokens == 77
    with pytest.raises(LayoutError, match="max_tokens"):
        hf.VattnCache(config, 0)
