"""Latents in place of K and V: the algebra, the tokens, the memory, and what is refused.

At full rank a compressed model is the same model but for rounding, so its tokens are those of the
dense one. Below, a cache of latents must give what the compressed model gives without our cache.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import secrets
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from tests.models import (
    PAGE,
    PROMPT,
    VOCAB,
    assert_tokens,
    dynamic_cache,
    model,
    prompts,
    run,
    step,
)
from vattn import hf, lorc
from vattn.allocator.errors import ClosedError, OutOfPages
from vattn.cli import app
from vattn.evictors import H2O
from vattn.layout import LayoutError
from vattn.lorc import LorcError
from vattn.policies import Quest

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "qwen2", "qwen3")
every = pytest.mark.parametrize("family", FAMILIES)
ROUNDING = 2e-3  # of sharpened logits of about 8, in float32


def fresh(family: str, dtype: torch.dtype = torch.float32, attention: str = "vattn") -> Any:
    """A model of our own to change; "qwen2" has biases of K and V, far from zero."""
    if family != "qwen2":
        return model.__wrapped__(family, dtype, attention=attention)
    hf.register()
    like = model("llama", dtype, attention=attention).config.to_dict()
    named = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    named += ("num_attention_heads", "num_key_value_heads", "initializer_range")
    named += ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    torch.manual_seed(0)
    config = Qwen2Config(**{name: like[name] for name in named}, tie_word_embeddings=False)
    config._attn_implementation = attention
    made = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if weights.dim() > 1:
                weights.mul_(3.0)
            elif name.endswith(("k_proj.bias", "v_proj.bias")):
                weights.normal_()
    made.generation_config.pad_token_id = 0
    return made.to(dtype).eval()


def latent_cache(lm: Any, compressed: hf.Compressed, **options: Any) -> hf.VattnCache:
    options = {"page_bytes": PAGE, **options}
    return hf.VattnCache(lm.config, latents=compressed, **options)


def padded(batch: int, *pads: int) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, so many tokens of padding on the left of each."""
    ids, mask = prompts(batch, PROMPT), torch.ones(batch, PROMPT, dtype=torch.int64)
    for row, pad in enumerate(pads):
        ids[row, :pad] = mask[row, :pad] = 0
    return ids, mask


def assert_near(ours: Any, expected: Any, limit: float = ROUNDING) -> None:
    """Equal tokens, and logits that differ by rounding."""
    assert_tokens(ours, expected)
    apart = [(a - b).abs().max().item() for a, b in zip(ours.logits, expected.logits, strict=True)]
    assert max(apart) < limit, apart


# ---- the algebra -----------------------------------------------------------------------------
def drawn(rows: int, columns: int, seed: int) -> Tensor:
    """A float64 matrix with falling singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    least = min(rows, columns)
    values = 3.0 * 0.9 ** torch.arange(least, dtype=torch.float64)
    return left[:, :least] @ (values[:, None] * right[:least])


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (32, 32), (40, 24)])
def test_error_of_a_token_is_below_the_first_value_left_out(rows: int, columns: int) -> None:
    seed = secrets.randbits(32)
    weight = drawn(rows, columns, seed)
    values = torch.linalg.svdvals(weight)
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(seed)).double()
    bias = torch.arange(rows, dtype=torch.float64)
    split, errors = lorc.factors(weight), []
    for rank in range(1, len(values) + 1):
        low = lorc.LowRank(*split.cut(rank), bias)
        error = (low(x) - (x @ weight.T + bias)).norm(dim=1)
        bound = float(values[rank]) if rank < len(values) else 0.0
        assert bool((error <= bound * x.norm(dim=1) + 1e-12).all()), f"seed {seed}, rank {rank}"
        # The product left out is the tail of the decomposition: Eckart and Young.
        product = (low.up @ low.down - weight).norm()
        assert math.isclose(product, float(values[rank:].norm()), abs_tol=1e-11), f"seed {seed}"
        errors.append(float(product))
        assert low.latent is not None
        assert low.latent.shape == (200, rank)
        # What is rounded in the latent is rounded in K, and no more.
        assert torch.allclose(low.up.T @ low.up, torch.eye(rank).double(), atol=1e-12)
    assert all(a > b for a, b in pairwise(errors)), f"seed {seed}: {errors}"


def test_with_a_sample_the_error_on_it_is_the_least() -> None:
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    weight, scales = drawn(24, 40, seed), torch.logspace(0, -2, 40, dtype=torch.float64)
    x = torch.randn(500, 40, generator=generator).double() * scales[torch.randperm(40)]
    y = x @ weight.T
    moment = y.T @ y / len(y)
    sampled, plain = lorc.factors(weight, moment), lorc.factors(weight)
    least = torch.linalg.eigvalsh(moment).flip(0)

    def lost(split: lorc.Factors, rank: int) -> float:
        down, up = split.cut(rank)
        return float((x @ down.T @ up.T - y).square().sum(1).mean())

    for rank in (1, 4, 12, 20):
        best = float(least[rank:].sum())
        assert math.isclose(lost(sampled, rank), best, rel_tol=1e-3, abs_tol=1e-12), f"seed {seed}"
        assert lost(sampled, rank) < lost(plain, rank), f"seed {seed}: control"
    assert lost(sampled, 24) < 1e-20


def test_a_sample_that_misses_directions_loses_none_at_full_rank() -> None:
    seed = secrets.randbits(32)
    weight = drawn(40, 24, seed)  # more rows than columns: not every U spans it
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed)).double()
    y = x @ weight.T
    down, up = lorc.factors(weight, y.T @ y / 3).cut(24)
    assert torch.allclose(up @ down, weight, atol=1e-6), f"seed {seed}"


def test_shallow_layers_keep_more_by_the_cumulative_condition_number() -> None:
    conditions = [2.0, 1.0, 4.0, 0.5]
    behind = [7.5, 5.5, 4.5, 0.5]  # of a layer and of all above it
    expected = [1 - 0.5 * (7.5 - each) / 7.0 for each in behind]
    assert lorc.weights(conditions, 0.5) == pytest.approx(expected)
    assert lorc.weights(conditions, 1.0) == [1.0] * 4
    assert lorc.weights([0.0, 0.0]) == [1.0, 1.0]
    values = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    assert lorc.factors(torch.diag(values)).log_condition() == pytest.approx(math.log(16))
    singular = lorc.factors(torch.diag(values) * torch.tensor([1.0, 1.0, 0.0])).log_condition()
    assert singular == pytest.approx(-math.log(torch.finfo(torch.float64).eps))
    assert lorc.factors(0 * eye).log_condition() == 0.0


def test_ranks_fall_with_depth_and_stay_within_the_budget() -> None:
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        layers, width = (int(torch.randint(1, 40, (), generator=generator)) for _ in "lw")
        conditions = torch.rand(layers, generator=generator).tolist()
        keep = max(1 / width, float(torch.rand((), generator=generator)))
        share = lorc.weights(conditions, 0.5)
        found = lorc.ranks([width] * layers, [width] * layers, share, keep)
        told = f"seed {seed}: {found} of {width} for {keep}"
        budget = math.floor(keep * width * layers + 1e-9)
        assert sum(found) == budget, told  # nothing is left over
        assert found == sorted(found, reverse=True), told
        assert min(found) >= 1, told
        assert max(found) <= width, told
    narrow = lorc.ranks([10, 10, 10], [10, 4, 10], [1.0, 1.0, 1.0], 0.7)
    assert narrow == [9, 4, 8], "what a layer cannot use goes to the others"
    assert lorc.ranks([8, 8], [8, 8], [1.0, 0.5], 1.0) == [8, 8]


# ---- the same tokens -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "vattn"), ("llama", "eager"), ("qwen2", "vattn"), ("qwen3", "sdpa")],
)
def test_full_rank_is_the_dense_model(family: str, attention: str) -> None:
    lm = fresh(family, attention=attention)
    ids, mask = padded(3, 0, 5, 40)
    expected = run(lm, ids, dynamic_cache(lm), attention_mask=mask)
    with hf.compress(lm, 1.0) as compressed:
        assert compressed.ranks == compressed.widths
        cache = latent_cache(lm, compressed)
        assert_near(run(lm, ids, cache, attention_mask=mask), expected)
        cache.store.latents.check()
        for mine, other in zip(cache, expected.past_key_values, strict=True):
            for a, b in zip(mine[:2], other[:2], strict=True):
                for row, pad in enumerate((0, 5, 40)):
                    assert torch.allclose(a[row, :, pad:], b[row, :, pad:], atol=2e-3)


@every
def test_full_rank_is_the_dense_model_in_float64(family: str) -> None:
    lm, ids = fresh(family).double(), prompts(2, 30)
    expected = step(lm, ids, None)
    with hf.compress(lm, 1.0, sample=prompts(1, 50)):
        assert (step(lm, ids, None) - expected).abs().max() < 1e-9
    with hf.compress(lm, 0.9):
        assert (step(lm, ids, None) - expected).abs().max() > 1e-3, "control"


@every
def test_latents_give_what_the_compressed_model_gives(family: str) -> None:
    lm = fresh(family)
    ids, mask = padded(3, 0, 5, 40)
    with hf.compress(lm, 0.5, sample=prompts(1, 64)) as compressed:
        assert compressed.share == 0.5
        expected = run(lm, ids, dynamic_cache(lm), attention_mask=mask)
        assert_near(run(lm, ids, latent_cache(lm, compressed), attention_mask=mask), expected)


def test_bfloat16_rounds_what_it_rounds_anyway() -> None:
    lm, ids = fresh("llama", torch.bfloat16), prompts(3, PROMPT)
    with hf.compress(lm, 0.5) as compressed:
        plain, cache = dynamic_cache(lm), latent_cache(lm, compressed)
        both = [step(lm, ids, each) for each in (cache, plain)]
        assert torch.equal(*both)
        more = prompts(3, 4)
        both = [step(lm, more, each).float() for each in (cache, plain)]
        assert (both[0] - both[1]).norm() < 0.05 * both[1].norm()


def test_under_autocast_latents_are_of_its_type() -> None:
    lm = fresh("llama")
    with hf.compress(lm, keep=1.0) as compressed, torch.no_grad():
        cache, (ids, _) = latent_cache(lm, compressed), padded(1, 0)
        with torch.autocast("cpu", torch.bfloat16):
            found = [lm(x, past_key_values=cache).logits for x in (ids[:, :-1], ids[:, -1:])]
            whole = lm(ids, use_cache=False).logits
        assert cache.layers[0].dtype == torch.bfloat16
        error = torch.cat(found, 1).float() - whole.float()
        assert error.norm() < 0.05 * whole.float().norm()


def test_positions_are_those_of_the_model() -> None:
    lm, ids = fresh("llama"), prompts(2, 16)
    at = torch.stack([torch.arange(16) * 3, 100 - torch.arange(16)])
    swap = torch.tensor([1, 0])
    with hf.compress(lm, 0.6) as compressed, torch.no_grad():
        caches = latent_cache(lm, compressed), dynamic_cache(lm)
        for part in (slice(0, 5), slice(5, 6), slice(6, 12), slice(12, 16)):
            more = {"position_ids": at[:, part], "attention_mask": torch.ones(2, part.stop)}
            a, b = (lm(ids[:, part], past_key_values=cache, **more).logits for cache in caches)
            assert torch.allclose(a, b, atol=ROUNDING)
            if part.stop == 12:  # from here on the rows have changed places, positions and all
                at, ids, caches = at[swap], ids[swap], copy.deepcopy(caches)
                for cache in caches:
                    cache.reorder_cache(swap)
        for layer in range(2):
            assert torch.equal(caches[0].store.latents.rows(layer)[2], at)


@every
def test_a_sample_makes_k_as_near_as_that_rank_can(family: str) -> None:
    lm, ids = fresh(family), prompts(3, 40)
    attention, seen = lm.model.layers[0].self_attn, list[Tensor]()
    hook = attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step(lm, ids, None)
    hook.remove()
    x, weight = seen[0].flatten(0, 1).double(), attention.k_proj.weight.detach().double()
    y = x @ weight.T
    for keep in (0.25, 0.75):
        with hf.compress(lm, keep, sample=ids) as compressed:
            low, rank = copy.deepcopy(compressed.sites[0].key).double(), compressed.ranks[0]
        bias = 0.0 if low.bias is None else low.bias
        lost = float((low(x) - bias - y).square().sum(1).mean())
        least = float(torch.linalg.eigvalsh(y.T @ y / len(y))[:-rank].sum())
        assert least * (1 - 1e-4) <= lost <= least * 1.001 + 1e-9


def test_beams_lookup_chunks_and_inference_mode() -> None:
    lm, ids = fresh("qwen3"), prompts(2, PROMPT)
    repeats = prompts(1, 12).repeat(1, 6)  # so that guesses are made and some are right
    with hf.compress(lm, 0.5) as compressed, torch.inference_mode():
        for given, options in (
            (ids, {"num_beams": 3}),
            (ids, {"prefill_chunk_size": 16}),
            (repeats, {"prompt_lookup_num_tokens": 4}),
        ):
            cache = latent_cache(lm, compressed)
            expected = run(lm, given, dynamic_cache(lm), **options)
            assert_tokens(run(lm, given, cache, **options), expected)
            cache.store.latents.check()
    with hf.compress(lm, 0.5) as compressed, hf.enable(512, page_bytes=PAGE, latents=compressed):
        found = run(lm, ids)
        assert all(isinstance(layer, hf.LatentLayer) for layer in found.past_key_values.layers)
    assert not torch.equal(found.logits[0], run(lm, ids).logits[0]), "control"


def test_crop_repeat_select_reorder_and_fork() -> None:
    lm, ids = fresh("qwen2"), prompts(2, PROMPT)
    with hf.compress(lm, 0.5) as compressed:
        caches = latent_cache(lm, compressed), dynamic_cache(lm)

        def both(more: Tensor) -> None:
            a, b = (step(lm, more, cache) for cache in caches)
            assert torch.allclose(a, b, atol=ROUNDING)
            caches[0].store.latents.check()

        both(ids)
        for cache in caches:
            cache.crop(-9)
        assert caches[0].get_seq_length() == PROMPT - 9
        both(prompts(2, 4))
        twin, plain = copy.deepcopy(caches)
        for cache in caches:
            cache.batch_repeat_interleave(3)
        both(prompts(6, 2))
        for cache in caches:
            cache.batch_select_indices(torch.tensor([4, 0, 1]))
            cache.reorder_cache(torch.tensor([1, 2, 2]))
        both(prompts(3, 2))
        for cache in caches:
            cache.layers[1].reorder_cache(torch.tensor([2, 0, 0]))
        both(prompts(3, 2))
        caches = twin, plain  # as they were
        assert len(twin.store.latents.rows(0)[0]) == 2
        both(prompts(2, 3))
        twin.reset()
        assert twin.get_seq_length() == 0
        caches = twin, dynamic_cache(lm)
        both(prompts(3, 5))


# ---- memory ----------------------------------------------------------------------------------
def test_bytes_shrink_with_the_ranks() -> None:
    lm, ids = fresh("llama"), prompts(2, 4 * PROMPT)
    dense = hf.VattnCache(lm.config, page_bytes=PAGE)
    step(lm, ids, dense)
    mapped = []
    for keep in (1.0, 0.5, 0.25):
        with hf.compress(lm, keep) as compressed:
            cache = latent_cache(lm, compressed)
            step(lm, ids, cache)
            stats = cache.stats()
            assert compressed.share == keep
            assert stats.used_bytes == keep * dense.stats().used_bytes
            assert stats.used_bytes == 2 * 4 * ids.numel() * sum(compressed.ranks)
            assert stats.wasted_bytes <= 2 * 2 * 2 * PAGE  # a page of each lane
            assert (stats.sequences, stats.tokens) == (2, ids.numel())
            assert cache.kv is not None
            assert cache.kv.pool.created * PAGE == stats.mapped_bytes
            mapped.append(stats.mapped_bytes)
    assert mapped[2] < 0.3 * mapped[0]
    assert mapped[1] < 0.55 * mapped[0]


def test_a_budget_that_does_not_reach_changes_nothing() -> None:
    lm = fresh("llama")
    with hf.compress(lm, 0.5) as compressed:
        cache = latent_cache(lm, compressed, budget_bytes=20 * PAGE)
        step(lm, prompts(1, 40), cache)
        with pytest.raises(OutOfPages):
            step(lm, prompts(1, 140), cache)  # the pages of layer 0 alone are there
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
        before = cache.stats().sequences
        with pytest.raises(OutOfPages):  # the tails of all layers are not there
            [copy.deepcopy(cache) for _ in range(9)]
        assert cache.stats().sequences == before
        again = latent_cache(lm, compressed)
        step(lm, prompts(1, 40), again)
        more = prompts(1, 3)
        assert torch.equal(step(lm, more, cache), step(lm, more, again))


def test_a_dropped_cache_gives_its_pages_back() -> None:
    lm = fresh("llama")
    with hf.compress(lm, 0.5) as compressed:
        cache = latent_cache(lm, compressed)
        step(lm, prompts(2, PROMPT), cache)
        fork = copy.deepcopy(cache)
        pool = cache.kv.pool
        del cache
        gc.collect()
        step(lm, prompts(2, 3), fork)
        assert not pool.closing
        del fork
        gc.collect()
        assert pool.closing


# ---- the model -------------------------------------------------------------------------------
def test_restored_the_model_is_as_it_was() -> None:
    lm, ids = fresh("qwen3"), prompts(1, 9)
    before = {name: id(module) for name, module in lm.named_modules()}
    expected = step(lm, ids, None)
    with hf.compress(lm) as compressed:
        assert not torch.equal(step(lm, ids, None), expected)
        assert all(site.key.latent is None for site in compressed.sites), "nothing is left behind"
    compressed.restore()  # again: nothing more
    assert {name: id(module) for name, module in lm.named_modules()} == before
    assert not any(module._forward_hooks for module in lm.modules())
    assert not any(module._forward_pre_hooks for module in lm.modules())
    assert torch.equal(step(lm, ids, None), expected)


def test_restored_the_model_is_where_it_is_now() -> None:
    lm, ids = fresh("llama"), prompts(1, 9)
    expected = step(fresh("llama").to(torch.bfloat16), ids, None)
    with hf.compress(lm):
        lm.to(torch.bfloat16)
    assert torch.equal(step(lm, ids, None), expected)


def test_restored_twice_leaves_another_compression_alone() -> None:
    lm, ids = fresh("llama"), prompts(1, 9)
    first = hf.compress(lm)
    first.restore()
    with hf.compress(lm) as second:
        first.restore()
        assert lm.model.layers[0].self_attn.k_proj is second.sites[0].key
        step(lm, ids, latent_cache(lm, second))


def test_compressed_under_inference_mode_the_model_still_has_gradients() -> None:
    lm, ids = fresh("llama"), prompts(1, 9)
    with torch.inference_mode():
        compressed = hf.compress(lm, sample=ids)
    with compressed:
        embedded = lm.get_input_embeddings()(ids).detach().requires_grad_()
        lm(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad is not None


def test_progressive_keeps_more_in_front() -> None:
    lm = fresh("llama")
    with hf.compress(lm, 0.6) as compressed:
        assert compressed.ranks[0] > compressed.ranks[1]
    with hf.compress(lm, 0.6, progressive=False) as alike:
        assert alike.ranks == (38, 38)
    assert sum(compressed.ranks) == 76


# ---- refusals --------------------------------------------------------------------------------
def test_bad_values_are_refused() -> None:
    lm = fresh("llama")
    for keep in (0.0, -0.5, 1.01, math.nan, True, "half"):
        with pytest.raises(LorcError, match=r"over 0 and at most 1.*pass 0.5"):
            hf.compress(lm, keep)
    with pytest.raises(LorcError, match=r"leaves 1 of 128 numbers to 2 layers.*0\.0157"):
        hf.compress(lm, 0.01)
    ids = torch.zeros(1, 3, dtype=torch.long)
    for sample in (ids[0], ids[:, :0], ids.float(), ids.bool(), ids - 1, ids + 1000):
        with pytest.raises(LorcError, match="token ids"):
            hf.compress(lm, sample=sample)
    with pytest.raises(LorcError, match="from 1 to 3"):
        lorc.factors(torch.eye(3)).cut(4)
    with pytest.raises(LorcError, match="finite"):
        lorc.factors(torch.full((2, 2), math.nan))
    with pytest.raises(LorcError, match="taper"):
        lorc.weights([1.0], 0.0)
    assert type(lm.model.layers[0].self_attn.k_proj) is torch.nn.Linear


def phi3() -> Any:
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config)


def odd(change: str) -> Any:
    """A llama with something about its K that no latents can honour."""
    lm = fresh("llama")
    attention, rotary = lm.model.layers[1].self_attn, lm.model.rotary_emb
    if change == "quantised":
        attention.v_proj = type("Linear4", (torch.nn.Linear,), {})(64, 64)
    elif change == "dynamic":
        rotary.rope_type = "dynamic"
    elif change == "scaled":
        # A norm that this attention does not call: nobody rebuilds K as it makes it.
        attention.k_norm = torch.nn.RMSNorm(32)
    elif change == "no rotary":
        del lm.model.rotary_emb
    return lm


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fresh("gemma3"), r"layer 0 .*'sliding_attention'"),
        (lambda: fresh("mistral"), "'sliding_attention'"),
        (phi3, r"no k_proj \(fused"),
        (lambda: odd("quantised"), "layer 1 .* v_proj is a Linear4"),
        (lambda: odd("dynamic"), "rope_type 'dynamic'"),
        (lambda: odd("scaled"), "layer 1 .* does more"),
        (lambda: odd("no rotary"), "0 modules named rotary_emb"),
        (lambda: torch.nn.Linear(2, 2), "no decoder"),
    ],
)
def test_models_that_cannot_be_rebuilt_are_refused_unchanged(make: Any, said: str) -> None:
    lm = make()
    before = {name: id(module) for name, module in lm.named_modules()}
    with pytest.raises(hf.UnsupportedError, match=said):
        hf.compress(lm)
    assert {name: id(module) for name, module in lm.named_modules()} == before
    assert not any(module._forward_hooks for module in lm.modules())


def test_caches_and_models_that_do_not_belong_together_are_refused() -> None:
    lm, ids = fresh("llama"), prompts(1, 8)
    with hf.compress(lm) as compressed:
        with pytest.raises(hf.UnsupportedError, match="compressed already"):
            hf.compress(lm)
        cache = latent_cache(lm, compressed)
        with pytest.raises(ClosedError, match="no tokens yet"):
            cache.stats()
        assert cache.kv is None
        with pytest.raises(hf.UnsupportedError, match="run the model that was compressed"):
            step(fresh("llama"), ids, cache)
        step(lm, ids, cache)
        with pytest.raises(LayoutError, match="batch of 2"):
            step(lm, prompts(2, 3), cache)
        with pytest.raises(hf.UnsupportedError, match="cannot be assigned"):
            cache.layers[0].keys = cache.layers[0].keys
        with pytest.raises(hf.CopyRefused):
            pickle.dumps(cache)
        for options in (
            {"policy": H2O(budget=0.5)},
            {"selector": Quest(budget_tokens=128)},
            {"tiers": {"fast_bytes": 1 << 20}},
            {"group_layers": 2},
            {"rows": "token_major"},
            {"trace": True},
        ):
            with pytest.raises(hf.UnsupportedError, match="do not go together"):
                latent_cache(lm, compressed, **options)
        with pytest.raises(LayoutError, match="what vattn"):
            hf.VattnCache(lm.config, latents=lm)  # type: ignore[arg-type]
        deeper = copy.deepcopy(lm.config)
        deeper.num_hidden_layers = 3
        with pytest.raises(hf.UnsupportedError, match="has 2 layers"):
            latent_cache(type(lm)(deeper), compressed)
    with pytest.raises(hf.UnsupportedError, match="was restored"):
        step(lm, ids, cache)
    with pytest.raises(hf.UnsupportedError, match="compress it again"):
        latent_cache(lm, compressed)


# ---- the command line ------------------------------------------------------------------------
def test_generate_holds_half_and_compares_with_the_whole() -> None:
    def report(*more: str) -> Any:
        asked = ["generate", "--context", "96", "--max-new-tokens", "3", "--json", *more]
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    whole, half = report("--lorc", "100%", "--compare"), report("--lorc", "0.5")
    assert whole["compare"]["identical"]
    assert whole["latents"]["ranks"] == whole["latents"]["widths"] == [64] * 5
    assert half["latents"]["share"] == 0.5
    assert half["memory"]["used_bytes"] == whole["memory"]["used_bytes"] / 2
    assert half["memory"]["tokens"] == whole["memory"]["tokens"] == 98


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lorc much", "such as 50%, got 'much'"),
        ("--lorc 0%", "over 0 and at most 1"),
        ("--lorc 50% --policy h2o", "does not go with --policy"),
        ("--lorc 50% --select quest", "does not go with --select"),
        ("--lorc 50% --cache dynamic", "--lorc needs --cache vattn"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: str, said: str) -> None:
    asked = ["generate", "--context", "16", "--max-new-tokens", "1", *options.split()]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
