"""A selector in transformers' generate: dense below its budget, never silently idle."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.models import model
from vattn import hf
from vattn.policies import Exact, Quest, Random
from vattn.selector import SelectorError
from vattn.tiers import TierError

NEW = 12
BUDGET = {"budget_tokens": 48, "page_tokens": 8, "recent_tokens": 8}


def generate(net, ids, cache, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode():
        return net.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def ids_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, 90, (batch, length), generator=draw)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_at_the_budget_tokens_and_logits_are_those_without_a_selector(family):
    net, ids = model(family), ids_of(2, 60)
    want = generate(net, ids, hf.VattnCache(net.config, 512))
    cache = hf.VattnCache(net.config, 512, selector=Quest(budget_tokens=128))
    assert torch.equal(generate(net, ids, cache), want)
    assert all(seen.share == 1.0 and seen.steps == NEW - 1 for seen in cache.activity())


def test_above_the_budget_few_tokens_are_read_and_the_choice_matters():
    net, ids = model("llama"), ids_of(1, 300)
    outs = {}
    for kind in (Exact, Random):
        cache = hf.VattnCache(net.config, 512, selector=kind(**BUDGET))
        generate(net, ids, cache)
        for seen in cache.activity():
            assert seen.steps == NEW - 1
            assert seen.dense_steps == 0
            assert 0.1 < seen.share < 0.2
        with torch.inference_mode():
            step = net(ids[:, :1], past_key_values=cache)
        outs[kind] = step.logits[0, -1]
    dense = hf.VattnCache(net.config, 512)
    generate(net, ids, dense)
    with torch.inference_mode():
        want = net(ids[:, :1], past_key_values=dense).logits[0, -1]
    error = {kind: (out - want).norm() / want.norm() for kind, out in outs.items()}
    assert error[Exact] < error[Random]


def test_a_batch_padded_on_the_left_reads_as_its_rows_alone():
    net = model("llama")
    short, long = ids_of(1, 90, seed=1), ids_of(1, 140, seed=2)
    ids = torch.zeros(2, 140, dtype=torch.long)
    ids[0, 50:], ids[1] = short[0], long[0]
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    selector = Exact(budget_tokens=64, recent_tokens=8)
    both = generate(net, ids, hf.VattnCache(net.config, 512, selector=selector), mask)
    for row, one in ((0, short), (1, long)):
        alone = generate(net, one, hf.VattnCache(net.config, 512, selector=selector))
        assert torch.equal(both[row, 140:], alone[0, one.shape[1] :])


def test_beams_forks_and_crops_keep_their_records():
    net, ids = model("llama"), ids_of(1, 200)
    wide = Quest(budget_tokens=512)
    narrow = Quest(**BUDGET)
    want = generate(net, ids, DynamicCache(config=net.config), num_beams=3)
    got = generate(net, ids, hf.VattnCache(net.config, 512, selector=wide), num_beams=3)
    assert torch.equal(got, want)
    cache = hf.VattnCache(net.config, 512, selector=narrow)
    first = generate(net, ids, cache, num_beams=3)
    assert first.shape[1] == 200 + NEW
    cache.store.sparse.records.check()

    cache = hf.VattnCache(net.config, 512, selector=narrow)
    with torch.inference_mode():
        net(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        a = net(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        b = net(ids[:, :1], past_key_values=cache).logits
        c = net(ids[:, :1], past_key_values=twin).logits
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    cache.store.sparse.records.check()


def test_sliding_layers_stay_as_they_are():
    net, ids = model("gemma3"), ids_of(1, 200)
    selector = Quest(**BUDGET)
    cache = hf.VattnCache(net.config, 512, selector=selector)
    generate(net, ids, cache)
    steps = [seen.steps for seen in cache.activity()]
    kinds = net.config.layer_types
    assert steps == [0 if kind == "sliding_attention" else NEW - 1 for kind in kinds]


def test_another_attention_is_an_error_not_a_dense_run():
    net, ids = model("llama", attention="sdpa"), ids_of(1, 100)
    cache = hf.VattnCache(net.config, 512, selector=Quest(**BUDGET))
    with pytest.raises(hf.UnsupportedError, match=r"set_attn_implementation\(\"vattn\"\)"):
        generate(net, ids, cache)


def test_the_remedy_that_the_error_names_works():
    ids = ids_of(1, 100)
    wrong, right = model("llama", attention="sdpa"), model("llama")
    cache = hf.VattnCache(right.config, 512, selector=Quest(**BUDGET))
    with torch.inference_mode():
        wrong(ids, past_key_values=cache)
        with pytest.raises(hf.UnsupportedError):
            wrong(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 100
        right(ids[:, :1], past_key_values=cache)
        right(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 102


def test_tiers_that_cannot_be_made_leave_nothing_behind():
    net = model("llama")
    cache = hf.VattnCache(net.config, 512, selector=Quest(**BUDGET), tiers={"victims": "oldest"})
    for _ in range(2):
        with pytest.raises(TierError, match="oldest"), torch.inference_mode():
            net(ids_of(1, 20), past_key_values=cache)
        assert cache.kv is None


def test_what_a_selection_cannot_honour_is_an_error():
    net, ids = model("gpt_oss"), ids_of(1, 100)  # sinks with a logit of their own
    cache = hf.VattnCache(net.config, 512, selector=Quest(**BUDGET))
    with pytest.raises(hf.UnsupportedError, match="s_aux"):
        generate(net, ids, cache)
    net = model("llama")
    cache = hf.VattnCache(net.config, 512, selector=Quest(**BUDGET))
    mask = torch.ones(1, 101, dtype=torch.long)
    mask[0, 50] = 0  # a hole
    with torch.inference_mode():
        net(ids, past_key_values=cache)
        with pytest.raises(hf.UnsupportedError, match="padding on the left"):
            net(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_tiers_give_the_same_tokens_and_hold_their_budget():
    net, ids = model("llama"), ids_of(1, 260)
    for selector in (None, Quest(**BUDGET)):
        chunks = {"prefill_chunk_size": 32}
        want = generate(net, ids, hf.VattnCache(net.config, 512, selector=selector), **chunks)
        rows = 2 * 2 * 2 * 32 * 4 * 272
        cache = hf.VattnCache(
            net.config, 512, selector=selector, page_bytes=4096, tiers={"fast_bytes": rows // 2}
        )
        got = generate(net, ids, cache, **chunks)
        assert torch.equal(got, want)
        stats = cache.store.tiers.stats()
        assert stats.slow_bytes > 0
        assert stats.fast_bytes <= stats.fast_budget_bytes


def test_enable_takes_a_selector():
    net, ids = model("llama"), ids_of(1, 200)
    with hf.enable(512, selector=Quest(**BUDGET)):
        cache = DynamicCache(config=net.config)
    generate(net, ids, cache)
    assert 0 < cache.store.sparse.activity()[0].share < 0.4


def test_a_budget_that_is_all_forced_is_refused():
    with pytest.raises(SelectorError, match="budget_tokens"):
        Quest(budget_tokens=32)
