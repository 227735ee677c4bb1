"""Skewing keeps every product, partial channels choose what they should, hints warm pages and no
more."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench import speculate as bench
from vattn import KVCache, Layout, attend, hf, speculate
from vattn.calibrate import Cosines, Heads, calibrate, heads_of, recorded
from vattn.kernels.index import Index
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection
from vattn.policies.infinigen import InfiniGen, skew
from vattn.selector import Look, SelectorError
from vattn.sparse import SparseAttention
from vattn.speculate import Hooks, Speculator, warming

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 16, 4
GROUP = HEADS // KV_HEADS
FREE = {"sink_tokens": 0, "recent_tokens": 0}  # only the newest token is read in any case
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def draws(tokens: int, seed: int, layers: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries and keys of layers, with channels of different strength, as models have them."""
    draw = torch.Generator().manual_seed(seed)
    strength = torch.logspace(0.6, -0.6, DIM)
    queries = [torch.randn(HEADS, tokens, DIM, generator=draw) * strength for _ in range(layers)]
    keys = [torch.randn(KV_HEADS, tokens, DIM, generator=draw) for _ in range(layers)]
    return queries, keys


def look_at(selector: InfiniGen, key: torch.Tensor, layer: int = 0, tokens: int | None = None):
    """A look at one sequence's first ``tokens`` keys [Hkv, T, D]."""
    tokens = key.shape[1] if tokens is None else tokens
    lengths = np.array([tokens])
    kv = KV(key[None], key[None], torch.from_numpy(lengths))
    parts = tuple(part[None] for part in selector.summarise(layer, key[:, :, None]))
    index = Index(parts, torch.from_numpy(lengths))
    return Look(layer, kv, index, lengths, key.shape[-1] ** -0.5)


def sets(selection: Selection, b: int = 0) -> list[set[int]]:
    return [
        set(ids[:n].tolist())
        for ids, n in zip(selection.ids[b], selection.count[b].tolist(), strict=True)
    ]


# ---- skewing -------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["query", "both"])
def test_skewing_is_orthogonal_and_keeps_every_product(order):
    queries, keys = draws(90, seed=1, layers=2)
    whole = skew(queries, keys, 1.0, order=order).key_map
    identity = torch.eye(DIM).expand(2, KV_HEADS, DIM, DIM)
    assert (whole.mT @ whole - identity).abs().max() < 1e-5
    for layer in range(2):
        q = queries[layer].unflatten(0, (KV_HEADS, GROUP))
        before = q @ keys[layer][:, None].mT
        after = (q @ whole[layer][:, None]) @ (keys[layer] @ whole[layer])[:, None].mT
        assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_columns_come_in_the_order_of_what_they_carry():
    queries, keys = draws(90, seed=2)
    carried = (
        queries[0].unflatten(0, (KV_HEADS, GROUP)) @ skew(queries, keys, 1.0).key_map[0, :, None]
    )
    sums = carried.abs().sum((1, 2))
    assert (sums.diff() <= 1e-3).all()
    # Few channels carry most: that is what skewing is for.
    assert (sums[:, : DIM // 4].sum(-1) > 0.5 * sums.sum(-1)).all()
    partial = skew(queries, keys, 0.3).key_map
    assert torch.equal(partial, skew(queries, keys, 1.0).key_map[..., : int(0.3 * DIM)])


def test_both_orders_hold_the_best_columns_of_queries_and_of_keys():
    queries, keys = draws(90, seed=3)
    whole, both = (
        skew(queries, keys, 1.0).key_map[0],
        skew(queries, keys, 1.0, order="both").key_map[0],
    )
    strength = (keys[0] @ whole).abs().sum(1)
    for head in range(KV_HEADS):
        for n in (1, 2, 4):
            first = both[head, :, : 2 * n]
            wanted = {*range(n), *strength[head].topk(n).indices.tolist()}
            found = (whole[head].mT @ first).abs() > 0.99  # column of A by column of `first`
            assert wanted <= set(found.any(1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(SelectorError, match="ratio"):
        skew(*draws(20, seed=4), ratio)


def test_heads_that_are_no_multiple_are_refused():
    (queries,), (keys,) = draws(20, seed=4)
    with pytest.raises(SelectorError, match="multiple"):
        skew([queries[:5]], [keys])


# ---- choosing ------------------------------------------------------------------------------------
def exact_sets(query: torch.Tensor, key: torch.Tensor, alpha: float) -> list[tuple[set, set]]:
    """Per KV head: tokens that surely pass the threshold of some row, and those that may."""
    tokens = key.shape[1]
    found = []
    for head in range(KV_HEADS):
        rows = query[0, head * GROUP : (head + 1) * GROUP, 0].double()
        scores = rows @ key[head].double().T * DIM**-0.5
        over = scores - (scores[:, : tokens - 1].amax(-1, keepdim=True) - alpha)
        newest = {tokens - 1}
        found.append(
            tuple(
                set((over > slack).any(0).nonzero()[:, 0].tolist()) | newest
                for slack in (1e-4, -1e-4)
            )
        )
    return found


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_all_channels_choose_exactly_the_tokens_within_alpha_of_the_best(alpha):
    queries, keys = draws(200, seed=5)
    everything = skew(queries, keys, 1.0)
    policy = InfiniGen(map=everything, alpha=alpha, budget_tokens=199, dtype=torch.float32, **FREE)
    query = queries[0][None, :, -1:]
    chosen = sets(policy.select(query, look_at(policy, keys[0])))
    for found, (sure, maybe) in zip(chosen, exact_sets(query, keys[0], alpha), strict=True):
        assert sure <= found <= maybe


def test_partial_channels_find_what_all_would():
    queries, keys = draws(400, seed=6)
    policy = InfiniGen(map=skew(queries, keys, 0.3), alpha=2.0, budget_tokens=399, **FREE)
    query = queries[0][None, :, -1:]
    chosen = sets(policy.select(query, look_at(policy, keys[0])))
    for found, (sure, _) in zip(chosen, exact_sets(query, keys[0], 1.0), strict=True):
        assert len(found & sure) > 0.8 * len(sure)


def test_one_row_of_a_group_is_enough_for_a_token_to_be_read():
    queries, keys = draws(100, seed=7)
    key = keys[0].clone()
    query = queries[0][None, :, -1:].clone()
    query[0, 1] = 0.0
    query[0, 1, 0, 3] = 9.0  # the second row of the first KV head asks for one token alone
    key[0, 40] = 0.0
    key[0, 40, 3] = 60.0
    query[0, [0, 2], :, 3] = -1.0  # to the others it is the worst of all
    policy = InfiniGen(
        map=skew(queries, keys, 1.0), alpha=1.0, budget_tokens=90, dtype=torch.float32, **FREE
    )
    assert 40 in sets(policy.select(query, look_at(policy, key)))[0]


def test_heads_count_for_themselves_or_share_the_mean():
    queries, keys = draws(300, seed=8)
    key, query = keys[0].clone(), queries[0][None, :, -1:]
    key[0] *= 8.0  # one head peaked, the other flat
    key[1] *= 0.05
    policy = InfiniGen(map=skew(queries, keys, 1.0), alpha=3.0, budget_tokens=250, **FREE)
    look = look_at(policy, key)
    own = policy.select(query, look).count[0]
    assert own[0] < 40
    assert own[1] == 250
    shared = replace(policy, count="shared").select(query, look)
    assert shared.count[0].tolist() == [int(own.float().mean())] * 2
    # The peaked head reads its own tokens and more of its best.
    assert sets(policy.select(query, look))[0] <= sets(shared)[0]


def test_without_a_threshold_the_budget_alone_decides():
    queries, keys = draws(120, seed=9)
    query = queries[0][None, :, -1:]
    policy = InfiniGen(map=skew(queries, keys, 1.0), alpha=float("inf"), budget_tokens=50, **FREE)
    look = look_at(policy, keys[0])
    assert policy.select(query, look).count.tolist() == [[50, 50]]
    joined = torch.randn(1, KV_HEADS, 120)
    ids, count = replace(policy, budget_tokens=120).pick(joined)
    assert count.tolist() == [[120, 120]]
    assert (ids == torch.arange(120)).all()
    # As many as there are: everything is read by the dense kernel.
    assert replace(policy, budget_tokens=120).select(query, look) is None


@pytest.mark.parametrize(
    "wrong", [{"alpha": -1.0}, {"count": "all"}, {"dtype": torch.int8}, {"page_tokens": 4}]
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(SelectorError, match=next(iter(wrong))):
        InfiniGen(map=skew(*draws(20, seed=4)), **wrong)


# ---- a model -------------------------------------------------------------------------------------
def model(family: str = "llama"):
    """Four layers whose residual stream changes little, but for the first."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=61,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        initializer_range=0.08,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(3)
    made = model_class(config).eval()
    with torch.no_grad():
        made.model.layers[0].mlp.down_proj.weight.mul_(12)
    return made


def text(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 61, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_compute_the_queries_and_keys_of_the_model(family, monkeypatch):
    lm, seen = model(family), []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append((query[0], key[0, :KV_HEADS] if key.shape[1] == KV_HEADS else key[0, ::GROUP]))
        return inner(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found = calibrate(lm, text(30))
    assert len(seen) == LAYERS
    for layer, (query, key) in enumerate(seen):
        assert torch.equal(found.queries[layer], query)
        assert torch.equal(found.keys[layer], key)


def test_cosines_are_cosines_and_late_is_no_worse_a_guess():
    cosines = calibrate(model(), text(50)).cosines
    for row in (cosines.early, cosines.late):
        assert len(row) == LAYERS
        assert row[0] == 0
        assert all(-1 <= each <= 1 for each in row)
    assert cosines.early[1] < 0.6 < min(cosines.early[2:])


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(SelectorError, match="layers"):
        heads_of(torch.nn.Linear(2, 2))
    with pytest.raises(SelectorError, match="self_attn"):
        Heads(torch.nn.Linear(2, 2))
    with pytest.raises(SelectorError, match="2 or more"):
        calibrate(model(), text(1))


# ---- hints ---------------------------------------------------------------------------------------
COSINES = Cosines((0.0, 0.1, 0.9, 0.85), (0.0, 0.82, 0.95, 0.5))


@pytest.mark.parametrize(
    ("when", "gate", "moments"),
    [
        ("early", 0.8, [None, None, "early", "early"]),
        ("late", 0.8, [None, "late", "late", None]),
        ("gated", 0.8, [None, "late", "early", "early"]),
        ("gated", 0.87, [None, None, "early", None]),
        ("gated", -1.0, [None, "early", "early", "early"]),
        ("late", -1.0, [None, "late", "late", "late"]),
    ],
)
def test_layers_under_the_gate_give_no_hint(when, gate, moments):
    lm = model()
    policy = plain_policy(calibrate(lm, text(40)))
    speculator = Speculator(heads_of(lm), policy, COSINES, when=when, gate=gate)
    assert [speculator.moment(layer) for layer in range(LAYERS)] == moments
    hidden, rotary = torch.randn(1, 1, 96), (torch.ones(1, 1, DIM), torch.zeros(1, 1, DIM))
    look = look_at(policy, torch.randn(KV_HEADS, 80, DIM))
    for layer in range(1, LAYERS):
        hint = speculator.hint(layer, hidden, rotary, replace(look, layer=layer))
        assert (hint is None) == (moments[layer] is None)


@pytest.mark.parametrize(
    "wrong", [{"when": "soon"}, {"gate": 2.0}, {"cosines": Cosines((0.0,), ())}]
)
def test_a_speculator_checks_what_it_is_given(wrong):
    lm = model()
    options = {"cosines": COSINES, **wrong}
    with pytest.raises(SelectorError):
        Speculator(heads_of(lm), plain_policy(calibrate(lm, text(40))), **options)


def plain_policy(calibration) -> InfiniGen:
    everything = skew(calibration.queries, calibration.keys, 1.0)
    return InfiniGen(map=everything, alpha=2.0, budget_tokens=64, dtype=torch.float32, **FREE)


def test_from_the_layers_own_input_a_hint_is_the_selection():
    lm, ids = model(), text(100)
    calibration = calibrate(lm, ids)
    policy = plain_policy(calibration)
    heads = heads_of(lm)
    speculator = Speculator(heads, policy, COSINES, gate=-1.0)
    with torch.no_grad(), recorded(heads) as seen:
        lm(ids, use_cache=False)
    for layer in range(1, LAYERS):
        look = look_at(policy, calibration.keys[layer], layer)
        cos, sin = seen.rotary[layer]
        with torch.no_grad():
            hint = speculator.hint(
                layer, seen.inputs[layer][:, -1:], (cos[:, -1:], sin[:, -1:]), look
            )
        wanted = policy.select(calibration.queries[layer][None, :, -1:], look)
        assert sets(hint) == sets(wanted)


def steps(lm, ids: torch.Tensor, prompt: int, after=lambda: None) -> torch.Tensor:
    """Logits of single steps behind a prompt."""
    found = []
    with torch.no_grad():
        cache = lm(ids[:, :prompt], use_cache=True).past_key_values
        for t in range(prompt, ids.shape[1]):
            found.append(lm(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
            after()
    return torch.cat(found)


def hooked(lm, prefetch, *, when="gated", gate=0.8, tokens=90, background=False):
    """Hooks over keys that were recorded before."""
    calibration = calibrate(lm, text(tokens))
    policy = plain_policy(calibration)
    speculator = Speculator(heads_of(lm), policy, calibration.cosines, when=when, gate=gate)
    looks = [look_at(policy, key, layer) for layer, key in enumerate(calibration.keys)]
    return Hooks(lm, speculator, looks.__getitem__, prefetch, background=background), looks


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("when", ["early", "late"])
def test_hints_come_from_the_layer_before_and_change_nothing(when, background):
    lm, ids, given = model(), text(94), []
    plain = steps(lm, ids, 90)
    hooks, looks = hooked(
        lm, lambda *hint: given.append(hint), when=when, gate=-1.0, background=background
    )
    heads = heads_of(lm)
    with hooks, recorded(heads) as seen:
        speculated = steps(lm, ids, 90, hooks.settle)
    assert torch.equal(speculated, plain)
    assert [layer for layer, _ in given] == [1, 2, 3] * 4  # none for the prompt
    assert hooks.hints.tolist() == [0, 4, 4, 4]
    hiddens = seen.inputs if when == "early" else seen.between
    for turn, (layer, hint) in enumerate(given):
        at = LAYERS * (1 + turn // 3) + layer - 1  # the first pass is the prompt
        with torch.no_grad():
            wanted = hooks.speculator.hint(layer, hiddens[at], seen.rotary[at], looks[layer])
        assert sets(hint) == sets(wanted)
    assert torch.equal(steps(lm, ids, 90), plain)
    assert len(given) == 12  # and none after the hooks are gone


def test_the_model_waits_for_no_hint_and_late_ones_are_dropped():
    lm, gate, threads = model(), threading.Event(), set()

    def stuck(layer: int, hint: Selection) -> None:
        threads.add(threading.current_thread())
        gate.wait(30)

    hooks, _ = hooked(lm, stuck, gate=-1.0, background=True)
    with hooks:
        steps(lm, text(96), 90)  # 18 hints, and not one of them ends
        begun = int(hooks.hints.sum())
        assert begun == speculate.MOST_WAITING
        assert hooks.dropped == 18 - begun
        gate.set()
        hooks.settle()
    assert threading.main_thread() not in threads


def test_an_error_of_a_hint_is_told_at_the_end_and_stops_the_hints():
    lm = model()

    def broken(layer: int, hint: Selection) -> None:
        raise OSError("no such tier")

    plain = steps(lm, text(94), 90)
    hooks, _ = hooked(lm, broken, gate=-1.0, background=True)
    assert torch.equal(steps(lm, text(94), 90), plain)
    with pytest.raises(OSError, match="no such tier"):
        hooks.settle()
    hooks.detach()
    hooks.detach()


def test_a_speculator_of_another_model_is_refused():
    calibration = calibrate(model(), text(40))
    speculator = Speculator(heads_of(model()), plain_policy(calibration), calibration.cosines)
    with pytest.raises(SelectorError, match="another model"):
        Hooks(model(), speculator, lambda layer: None, lambda *hint: None)


# ---- at work on a cache --------------------------------------------------------------------------
def grown(policy: InfiniGen, tokens: int, seed: int):
    """A cache of one sequence, ``tokens`` random tokens in steps of their own after a prompt of
    half of them, and a selector at work on it."""
    cache = KVCache(Layout(1, KV_HEADS, DIM, 512, dtype="float32", page_bytes=4096), slots=2)
    sequences, draw = [cache.open()], torch.Generator().manual_seed(seed)
    sparse = SparseAttention(cache, policy)
    rows = torch.randn(2, 1, KV_HEADS, tokens, DIM, generator=draw)
    for at, end in [(0, tokens // 2), *((t, t + 1) for t in range(tokens // 2, tokens))]:
        cache.append(0, *rows[..., at:end, :], sequences)
        sparse.look(cache.view(sequences), 0)
    return cache, sequences, sparse


def test_generated_tokens_enter_the_partial_keys():
    queries, keys = draws(60, seed=10)
    policy = InfiniGen(map=skew(queries, keys, 1.0), alpha=2.0, budget_tokens=60, **FREE)
    cache, sequences, sparse = grown(policy, 200, seed=11)
    view = cache.view(sequences)
    for wanted in (20, 120, 190):  # of the prompt, and generated
        query = view.k[0][:, :, wanted : wanted + 1].repeat_interleave(GROUP, 1)
        found = sets(sparse.selection(query, view, 0))
        assert all(wanted in each for each in found)
    assert sparse.activity()[0].share < 0.35
    sparse.close()
    cache.close()


@pytest.mark.parametrize("tokens", [80, 150])
def test_a_budget_of_all_tokens_is_dense_to_the_last_bit(tokens):
    queries, keys = draws(60, seed=12)
    policy = InfiniGen(
        map=skew(queries, keys, 0.3), alpha=float("inf"), budget_tokens=tokens, **FREE
    )
    cache, sequences, sparse = grown(policy, tokens, seed=13)
    query = torch.randn(1, HEADS, 1, DIM, generator=torch.Generator().manual_seed(14))
    view = cache.view(sequences)
    assert torch.equal(sparse.attend(query, view, 0), attend(query, view, 0))
    assert sparse.activity()[0].share == 1
    sparse.close()
    cache.close()


def test_hints_bring_pages_into_the_fast_tier_and_change_no_result():
    lm, ids = model(), text(150)
    calibration = calibrate(lm, ids)
    policy = replace(plain_policy(calibration), alpha=float("inf"), budget_tokens=24)
    speculator = Speculator(heads_of(lm), policy, calibration.cosines, gate=-1.0)
    hf.register()
    lm.set_attn_implementation("vattn")
    found = []
    for speculated in (False, True):
        cache = hf.VattnCache(lm.config, page_bytes=4096, selector=policy, tiers={})
        with torch.no_grad():
            lm(ids[:, :140], past_key_values=cache, use_cache=True)
        store = cache.store
        for layer in range(1, LAYERS):
            store.tiers.demote(store.sequences[0], layer)
        looks, prefetch = warming(store.sparse, store.tiers, store.sequences.copy)
        hooks = Hooks(lm, speculator, looks, prefetch) if speculated else nullcontext()
        with hooks, torch.no_grad():
            logits = [
                lm(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                for t in range(140, 150)
            ]
        found.append(torch.cat(logits))
        assert store.tiers.stats().demoted_bytes > 0
        if speculated:
            assert hooks.hints.tolist() == [0, 10, 10, 10]
            assert store.tiers.stats().promoted_bytes > 0
    assert torch.equal(*found)


def test_a_run_that_differs_in_one_bit_or_recalls_nothing_is_seen():
    def made(bit: float = 0.0, wanted: int = 3) -> bench.Run:
        found = bench.Run(*(np.full(LAYERS, wanted) for _ in range(4)))
        found.logits += [torch.ones(4), torch.ones(4) + bit]
        return found

    assert bench.same(made(), made())()
    with pytest.raises(AssertionError, match="step 1 differs"):
        bench.same(made(bit=2**-23), made())()
    with pytest.raises(AssertionError, match="recalled nothing"):
        bench.same(made(wanted=0), made())()
