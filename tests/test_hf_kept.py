"""A policy in transformers' generate: what is evicted is gone, its memory comes back, and nothing
else changes."""

from __future__ import annotations

import copy
import math
import secrets
from dataclasses import dataclass

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.models import PAGE, VOCAB, dynamic_cache, model, prompts, run, step
from vattn import hf
from vattn.allocator.errors import OutOfPages
from vattn.evictor import EvictorError
from vattn.evictors import H2O, SlidingWindow, SnapKV, Streaming
from vattn.generate import Generator
from vattn.layout import LayoutError
from vattn.policies import Quest
from vattn.request import Request

SMALL = [
    H2O(budget=0.25),
    SnapKV(budget=24, recent_tokens=8, window_tokens=8),
    Streaming(budget=0.4, recent_tokens=8),
    SlidingWindow(budget=20),
]
WHOLE = [H2O(budget=512), SnapKV(budget=1.0), Streaming(budget=512)]


def named(policy) -> str:
    return type(policy).__name__


def kept_cache(lm, policy, **options) -> hf.VattnCache:
    return hf.VattnCache(lm.config, 512, **{"page_bytes": PAGE, "policy": policy, **options})


def held(cache) -> list[list[list[set[int]]]]:
    """Which tokens of the text each head holds: [layer][sequence][head]."""
    heads = cache.store.kept.heads
    return [
        [
            [set(row[:n].tolist()) for row, n in zip(rows, counts, strict=True)]
            for rows, counts in zip(heads.positions(layer), heads.lengths(layer), strict=True)
        ]
        for layer in range(heads.layers)
    ]


class Replay:
    """An attention in float64 that is told what each head may see; a stock cache holds it all."""

    def __init__(self) -> None:
        self.held: list[list[list[set[int]]]] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        length, tokens = query.shape[2], key.shape[2]
        seen = torch.ones(query.shape[0], key.shape[1], length, tokens, dtype=torch.bool)
        seen = seen.tril(tokens - length)
        if self.held is not None:
            old = torch.zeros(query.shape[0], key.shape[1], tokens, dtype=torch.bool)
            for b, heads in enumerate(self.held[module.layer_idx]):
                for h, positions in enumerate(heads):
                    old[b, h, sorted(positions)] = True
            old[..., tokens - length :] = True
            seen &= old[:, :, None]
        groups = query.shape[1] // key.shape[1]
        key, value, seen = (x.repeat_interleave(groups, 1) for x in (key, value, seen))
        scores = (query.double() @ key.double().mT) * scaling
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (weights @ value.double()).to(query.dtype).transpose(1, 2), None


REPLAY = Replay()


@pytest.fixture
def replay():
    """The reference model, and what it sees."""
    AttentionInterface.register("replay", REPLAY)
    AttentionMaskInterface.register("replay", sdpa_mask)
    REPLAY.held = None
    yield model("llama", torch.float64, attention="replay"), REPLAY
    REPLAY.held = None


# ---- what is computed ----------------------------------------------------------------------------
@pytest.mark.parametrize("policy", WHOLE, ids=named)
def test_with_room_for_all_tokens_are_those_of_a_dynamic_cache(policy):
    for family in ("llama", "qwen3", "gemma3"):
        lm, ids = model(family), prompts(2, 71)
        if family == "gemma3":  # one layer slides, and is none of the policy's business
            ids = ids[:, :60]
        want = run(lm, ids, dynamic_cache(lm))
        cache = kept_cache(lm, policy)
        assert run(lm, ids, cache).sequences.tolist() == want.sequences.tolist()
        assert [layer.evicted for layer in cache.kept()] == [0] * (1 if family == "gemma3" else 2)


def test_the_shipped_model_writes_the_same_with_room_for_all():
    generator = Generator(Request(context=300, new_tokens=40, policy="snapkv", budget="100%"))
    ours, stock = generator.run("vattn"), generator.run("dynamic")
    assert torch.equal(ours.tokens, stock.tokens)
    ours.cache.kv.check()


@pytest.mark.parametrize("chunks", [(64,), (30, 20, 17)], ids=["whole", "chunks"])
@pytest.mark.parametrize("policy", SMALL, ids=named)
def test_outputs_are_those_of_a_reference_that_hides_what_was_evicted(policy, chunks, replay):
    reference, hidden = replay
    lm, seed = model("llama"), secrets.randbits(31)
    text = prompts(2, sum(chunks) + 12, seed)
    cache, stock = kept_cache(lm, policy), DynamicCache(config=reference.config)
    dense = DynamicCache(config=reference.config)
    at, apart, unlike = 0, [], []
    for length in (*chunks, *[1] * 9, 3):
        ids = text[:, at : at + length]
        hidden.held = held(cache) if at else None
        got = step(lm, ids, cache)
        want = step(reference, ids, stock)
        hidden.held = None
        apart.append((got - want).abs().max().item())
        unlike.append((step(reference, ids, dense) - want).abs().max().item())
        at += length
        assert cache.get_seq_length() == at
    assert max(apart) < 1e-3, (seed, apart)
    # Hiding matters: a cache that evicted nothing would be far from the reference.
    assert max(unlike) > 100 * max(apart), (seed, apart, unlike)
    assert all(layer.evicted > 0 for layer in cache.kept())


@pytest.mark.parametrize("policy", SMALL, ids=named)
def test_a_batch_padded_on_the_left_is_its_rows_alone(policy):
    lm, lengths = model("llama"), (40, 96, 71)
    alone = [prompts(1, n, seed=n) for n in lengths]
    ids = torch.zeros(3, 96, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, marks, one in zip(ids, mask, alone, strict=True):
        row[96 - one.shape[1] :] = one[0]
        marks[96 - one.shape[1] :] = 1
    cache = kept_cache(lm, policy)
    many = run(lm, ids, cache, attention_mask=mask)
    rows = held(cache)
    for b, one in enumerate(alone):
        single = kept_cache(lm, policy)
        want = run(lm, one, single)
        assert many.sequences[b, 96:].tolist() == want.sequences[0, one.shape[1] :].tolist()
        apart = [(x[b] - y[0]).abs().max() for x, y in zip(many.logits, want.logits, strict=True)]
        assert max(apart) < 1e-3
        assert [layer[b] for layer in rows] == [layer[0] for layer in held(single)]


def test_a_budget_in_tokens_holds_at_every_step():
    lm, ids = model("llama"), prompts(1, 90)
    cache = kept_cache(lm, H2O(budget=30))
    step(lm, ids, cache)
    for _ in range(5):
        step(lm, ids[:, :1], cache)
        assert cache.store.kept.heads.lengths(1).tolist() == [[30, 30]]
    assert cache.get_seq_length() == 95
    assert cache.kept()[0].seen == 95
    assert cache.kept()[0].share == 30 / 95


# ---- memory --------------------------------------------------------------------------------------
def deep(layers: int) -> LlamaForCausalLM:
    hf.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        attn_implementation="vattn",
    )
    return LlamaForCausalLM(config).eval()


def test_memory_comes_back_layer_by_layer():
    """A prompt never holds more than one whole layer: it fits where all layers do not."""
    layers, tokens, row = 6, 1024, 32 * 4
    lm, ids = deep(layers), prompts(1, tokens)
    whole = tokens * row * 2 * 2  # K and V of a layer
    small = {"page_bytes": PAGE, "budget_bytes": 2 * whole + layers * whole // 8}
    with pytest.raises(OutOfPages):
        step(lm, ids, hf.VattnCache(lm.config, 2048, **small))
    cache = hf.VattnCache(lm.config, 2048, policy=SnapKV(budget=0.125), **small)
    step(lm, ids, cache)
    stats = cache.stats()
    assert stats.used_bytes == layers * whole // 8
    assert stats.mapped_bytes <= stats.used_bytes * 1.1 + layers * 2 * 2 * PAGE
    cache.kv.check()


def test_the_memory_of_a_cache_goes_with_it():
    lm = model("llama")
    cache = kept_cache(lm, SnapKV(budget=0.5))
    step(lm, prompts(2, 60), cache)
    twin, kv = copy.deepcopy(cache), cache.kv
    pool = kv.pool
    del cache
    assert kv.closed
    step(lm, prompts(2, 1), twin)
    twin.kv.check()
    second = twin.kv
    del twin
    assert second.closed
    assert pool.created == 0 or pool.closing


def test_reset_takes_a_batch_of_another_size_and_gives_the_memory_back():
    lm = model("llama")
    cache = kept_cache(lm, H2O(budget=0.5))
    step(lm, prompts(2, 60), cache)
    with pytest.raises(LayoutError, match="reset"):
        step(lm, prompts(3, 1), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.kv is None
    got = step(lm, prompts(3, 50), cache)
    assert torch.equal(got, step(lm, prompts(3, 50), kept_cache(lm, H2O(budget=0.5))))


def test_windows_share_the_pool_and_the_budget():
    lm = model("gemma3")
    cache = kept_cache(lm, SnapKV(budget=0.25))
    step(lm, prompts(2, 80), cache)
    store = cache.store
    assert store.kv.pool is store.kept.heads.cache.pool
    total = cache.stats()
    assert total.mapped_bytes == store.kv.stats().mapped_bytes + cache.kv.stats().mapped_bytes
    assert len(cache.kept()) == 1


# ---- batch operations, forks, crops --------------------------------------------------------------
@pytest.mark.parametrize("policy", [H2O(budget=0.4), SnapKV(budget=0.5)], ids=named)
def test_rows_of_a_batch_move_repeat_and_part(policy):
    lm, ids = model("llama"), prompts(3, 60)
    more = prompts(4, 3, seed=9)

    def after(change, order):
        """Logits after a change of the batch, beside those of the rows' own caches."""
        cache = kept_cache(lm, policy)
        step(lm, ids, cache)
        step(lm, ids[:, :1], cache)
        change(cache)
        for i, row in enumerate(order):
            alone = kept_cache(lm, policy)
            step(lm, ids[row : row + 1], alone)
            step(lm, ids[row : row + 1, :1], alone)
            yield cache, i, alone

    changes = {
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
        (2, 1): lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
        (0, 2): lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    }
    for order, change in changes.items():
        tokens = torch.cat([more, more])[: len(order), :1]
        found = None
        for cache, i, alone in after(change, order):
            if found is None:
                found = step(lm, tokens, cache)
                cache.kv.check()
            want = step(lm, tokens[i : i + 1], alone)
            assert (found[i] - want[0]).abs().max() < 1e-3, (order, i)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_are_those_of_a_dynamic_cache_and_run_when_evicting(family):
    lm, ids = model(family), prompts(2, 60)
    want = run(lm, ids, dynamic_cache(lm), num_beams=3)
    got = run(lm, ids, kept_cache(lm, H2O(budget=512)), num_beams=3)
    assert got.sequences.tolist() == want.sequences.tolist()
    cache = kept_cache(lm, H2O(budget=0.3))
    run(lm, ids, cache, num_beams=3)
    assert all(layer.share < 0.3 for layer in cache.kept())
    cache.kv.check()


def test_tokens_looked_up_in_the_prompt_are_taken_back():
    lm, ids = model("llama"), prompts(1, 20).repeat(1, 3)
    want = run(lm, ids, kept_cache(lm, SnapKV(budget=1.0)))
    got = run(lm, ids, kept_cache(lm, SnapKV(budget=1.0)), prompt_lookup_num_tokens=4)
    assert got.sequences.tolist() == want.sequences.tolist()


def test_a_fork_and_a_crop_leave_the_other_as_it_was():
    lm, ids = model("llama"), prompts(2, 60)
    cache = kept_cache(lm, SnapKV(budget=0.5))
    step(lm, ids, cache)
    twin = copy.deepcopy(cache)
    before = held(cache)
    first = step(lm, ids[:, :4], cache)
    assert held(twin) == before
    assert torch.equal(step(lm, ids[:, :4], twin), first)
    cache.crop(-4)
    assert held(cache) == before
    assert cache.get_seq_length() == 60
    assert torch.equal(step(lm, ids[:, :4], cache), first)
    cache.crop(-64)
    assert cache.get_seq_length() == 0


def test_grad_modes_may_change_between_steps():
    lm, ids = model("llama"), prompts(2, 60)
    found = []
    for modes in ([torch.no_grad] * 4, [torch.inference_mode, torch.no_grad] * 2):
        cache = kept_cache(lm, H2O(budget=0.5))
        for mode, tokens in zip(modes, (ids, ids[:, :1], ids[:, :30], ids[:, :2]), strict=True):
            with mode():
                logits = lm(tokens, past_key_values=cache).logits
        found.append(logits.clone())
    assert torch.equal(*found)


def test_enable_takes_a_policy():
    lm, ids = model("llama"), prompts(1, 80)
    with hf.enable(512, policy=H2O(budget=0.25)):
        cache = DynamicCache(config=lm.config)
    run(lm, ids, cache)
    assert cache.get_seq_length() == 80 + 13
    assert [layer.held for layer in cache.store.kept.eviction.kept()] == [20.0, 20.0]


# ---- what is refused -----------------------------------------------------------------------------
def test_another_attention_is_an_error_and_its_remedy_works():
    ids = prompts(1, 60)
    wrong, right = model("llama", attention="sdpa"), model("llama")
    cache = kept_cache(right, SnapKV(budget=0.5))
    with pytest.raises(hf.UnsupportedError, match=r"set_attn_implementation\(\"vattn\"\)"):
        run(wrong, ids, cache)
    assert cache.get_seq_length() == 0
    step(right, ids, cache)
    assert cache.get_seq_length() == 60
    fresh = kept_cache(right, SnapKV(budget=0.5))
    step(right, ids, fresh)
    assert torch.equal(step(right, ids[:, :1], cache), step(right, ids[:, :1], fresh))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selector": Quest()}, "selector"),
        ({"tiers": {"fast_bytes": 1 << 20}}, "tiers"),
        ({"trace": True}, "trace"),
        ({"group_layers": 2}, "group_layers"),
        ({"outputs": [torch.zeros(1)]}, "1 weights, the model 2 layers"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(hf.UnsupportedError, match=words):
        kept_cache(model("llama"), SMALL[0], **options)


def test_caches_and_models_without_what_a_policy_serves():
    with pytest.raises(hf.UnsupportedError, match="shapes stay"):
        hf.VattnStaticCache(model("llama").config, 512, policy=SMALL[0])
    with pytest.raises(hf.UnsupportedError, match="no full-attention layer"):
        kept_cache(model("mistral"), SMALL[0])
    with pytest.raises(LayoutError, match=r"vattn\.evictors"):
        kept_cache(model("llama"), Quest())
    with pytest.raises(hf.UnsupportedError, match="outputs are for a policy"):
        hf.VattnCache(model("llama").config, 512, outputs=hf.outputs_of(model("llama")))


@pytest.mark.parametrize(("family", "named"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_arguments_that_cannot_be_honoured(family, named):
    lm = model(family)
    with pytest.raises(hf.UnsupportedError, match=named):
        step(lm, prompts(1, 40), kept_cache(lm, SMALL[0]))


def test_masks_that_are_not_padding_on_the_left():
    lm, ids = model("llama"), prompts(2, 40)
    cache = kept_cache(lm, SMALL[1])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 20] = 0
    with torch.no_grad():
        with pytest.raises(hf.UnsupportedError, match="padding on the left"):
            lm(ids, attention_mask=mask, past_key_values=cache)
        mask[0, :21] = 0
        lm(ids, attention_mask=mask, past_key_values=cache)
        assert [len(heads[0]) for heads in held(cache)[0]] == [19, 24]
        before = held(cache)
        with pytest.raises(hf.UnsupportedError, match="at every step"):
            lm(ids[:, :1], past_key_values=cache)  # no mask: the padding would be text
        with pytest.raises(hf.UnsupportedError, match="a padded sequence of the batch has 19"):
            cache.crop(-19)
        assert held(cache) == before
        wide = torch.cat([mask, mask.new_ones(2, 1)], 1)
        lm(ids[:, :1], attention_mask=wide, past_key_values=cache)
        assert [len(heads[0]) for heads in held(cache)[0]] == [20, 25]
        mask[0, :] = 0
        with pytest.raises(hf.UnsupportedError, match="prefill_chunk_size"):
            lm(ids, attention_mask=mask, past_key_values=kept_cache(lm, SMALL[1]))


def test_gradients_and_rows_are_refused():
    lm, ids = model("llama"), prompts(1, 40)
    cache = kept_cache(lm, SMALL[1])
    with pytest.raises(hf.UnsupportedError, match="no_grad"):
        lm(ids, past_key_values=cache)
    step(lm, ids, cache)
    with pytest.raises(hf.UnsupportedError, match="different tokens"):
        _ = cache.layers[0].keys
    assert cache.kept() == kept_again(lm, ids)


def test_a_step_that_was_refused_can_be_made_again():
    lm = model("llama")
    cache = kept_cache(lm, SMALL[1])
    rows = torch.randn(2, 1, lm.config.num_key_value_heads, 5, lm.config.head_dim)
    query = torch.randn(1, lm.config.num_attention_heads, 5, lm.config.head_dim)
    key, _ = cache.layers[0].update(*rows)
    with pytest.raises(hf.UnsupportedError, match="softcap cannot be honoured"):
        key.vattn_reader.attend(query, None, None, {"softcap": 30.0})
    key, _ = cache.layers[0].update(*rows)
    assert key.vattn_reader.attend(query, None, None, {}).isfinite().all()
    assert cache.get_seq_length() == 5


def kept_again(lm, ids):
    cache = kept_cache(lm, SMALL[1])
    step(lm, ids, cache)
    return cache.kept()


def test_a_budget_that_does_not_reach_changes_nothing_in_its_layer():
    lm, ids = model("llama"), prompts(1, 200)
    cache = kept_cache(lm, SnapKV(budget=0.5), budget_bytes=3 * PAGE)
    with pytest.raises(OutOfPages):
        step(lm, ids, cache)
    assert cache.get_seq_length() == 0
    assert cache.store.kept.heads.lengths(0).tolist() == [[0, 0]]


def test_outputs_are_the_weights_behind_attention():
    lm = model("gemma3")
    weights = hf.outputs_of(lm)
    assert [tuple(weight.shape) for weight in weights] == [(64, 128)] * 2
    assert torch.equal(weights[1], lm.model.layers[1].self_attn.o_proj.weight)
    cache = kept_cache(lm, SMALL[1], outputs=weights)
    assert len(cache.store.options.outputs) == 1
    assert torch.equal(cache.store.options.outputs[0], weights[1])
    with pytest.raises(hf.UnsupportedError, match="o_proj"):
        hf.outputs_of(torch.nn.Linear(2, 2))


def test_hidden_states_reach_a_policy_that_asks_for_them():
    lm, ids = model("llama"), prompts(2, 60)
    inputs = [None, None]

    @dataclass(frozen=True, kw_only=True)
    class FromHidden(SnapKV):
        """Keeps where a channel of the hidden state is largest."""

        def score(self, seen):
            if seen.hidden is None:
                raise EvictorError("no hidden states")
            inputs[seen.layer] = seen.hidden
            return seen.hidden[:, None, :, 0].expand_as(seen.score)

    policy = FromHidden(budget=20, recent_tokens=2)
    cache = kept_cache(lm, policy)
    with pytest.raises(EvictorError, match="no hidden"):
        step(lm, ids, cache)
    assert cache.get_seq_length() == 0
    assert cache.kv is None
    with torch.no_grad(), hf.with_hidden(lm):
        states = lm(ids, past_key_values=cache, output_hidden_states=True).hidden_states
    norm = lm.model.layers[0].input_layernorm
    assert torch.equal(inputs[0], norm(states[0]))
    best = inputs[0][:, :58, 0].topk(18).indices
    for rows, want in zip(held(cache)[0], best, strict=True):
        assert rows[0] == rows[1] == {*want.tolist(), 58, 59}
    assert not any("vattn_hidden" in vars(module) for module in lm.modules())


def test_dense_layers_keep_all_and_must_exist():
    lm, ids = model("llama"), prompts(1, 60)
    cache = kept_cache(lm, H2O(budget=0.25, dense_layers=(1,)))
    step(lm, ids, cache)
    assert [layer.held for layer in cache.kept()] == [15.0, 60.0]
    wrong = kept_cache(lm, H2O(dense_layers=(5,)))
    with pytest.raises(EvictorError, match="layers 0 to 1"):
        step(lm, ids, wrong)
    assert wrong.kv is None
