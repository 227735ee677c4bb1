"""Policies at work on a cache: what they choose of keys that came one by one is what they choose of
the same keys at once, and what is read is counted."""

from __future__ import annotations

import pytest
import torch

from tests.attention import fresh_seed, tolerance
from tests.looks import BUDGET, DIM, HEADS, KV_HEADS, TOKENS, look_at, tokens
from tests.test_policies import MAKE
from vattn import KVCache, Layout
from vattn.kernels import sparse
from vattn.kernels.selection import reference
from vattn.sparse import SparseAttention

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, PROMPT = 2, 40


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.mark.parametrize("name", sorted(MAKE))
def test_generated_tokens_are_chosen_like_those_of_a_prompt(name: str) -> None:
    key, value = torch.randn(2, LAYERS, 2, KV_HEADS, TOKENS, DIM)
    query = torch.randn(2, HEADS, 1, DIM)
    selector = MAKE[name]()
    layout = Layout(LAYERS, KV_HEADS, DIM, 256, dtype="float32")
    with KVCache(layout, slots=2, budget_bytes=1 << 30) as cache:
        attention = SparseAttention(cache, selector)
        sequences = cache.open_batch(2)
        earlier, steps = {}, 0
        for first, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))]:
            for layer in range(LAYERS):
                rows = (t[layer, :, :, first:end] for t in (key, value))
                cache.append(layer, *rows, sequences)
            view = cache.view(sequences)
            asked = end in (PROMPT, TOKENS) or end % 37 == 0
            for layer in range(LAYERS if asked else 0):
                found = attention.selection(query, view, layer)
                step = {"layer": layer, "step": steps, "earlier": earlier}
                keys, values = key[layer, :, :, :end], value[layer, :, :, :end]
                look = look_at(selector, keys, values, **step)
                exact = selector.select(query, look)
                assert (found is None) == (exact is None) == (end <= BUDGET)
                if exact is None:
                    continue
                earlier[layer] = exact
                for b in range(2):
                    for h in range(KV_HEADS):
                        assert tokens(found, b, h, end) == tokens(exact, b, h, end)
            if asked:
                earlier, steps = {}, steps + 1
        assert_attends(attention, view, query, key[1], value[1])
        activity = attention.activity()[0]
        assert activity.steps == steps
        assert 0 < activity.dense_steps < steps
        assert 0 < activity.share < 1


def assert_attends(attention, view, query, key, value) -> None:
    """The result is attention to what was chosen, whatever the kernel."""
    look = attention.look(view, 1)
    found = attention.attend(query, view, 1)
    chosen = attention.selector.select(query, look)
    out, _, _ = reference(query, look.kv, chosen)
    if chosen.tail is None:
        assert float((found - out).abs().max()) <= tolerance(out, torch.float32, TOKENS)
    else:
        joined, total, _ = sparse.gathered(query, look.kv, chosen)
        assert bool((attention.attend_lse(query, view, 1)[1] > total).all())  # the tail counts
        assert not torch.allclose(found, joined)


def test_layers_share_what_the_first_chose() -> None:
    key = torch.randn(LAYERS, 1, KV_HEADS, TOKENS, DIM)
    query = torch.randn(1, HEADS, 1, DIM)
    layout = Layout(LAYERS, KV_HEADS, DIM, 256, dtype="float32")
    with KVCache(layout, slots=1, budget_bytes=1 << 30) as cache:
        attention = SparseAttention(cache, MAKE["Clusters"]())
        sequences = cache.open_batch(1)
        for layer in range(LAYERS):
            cache.append(layer, key[layer], key[layer], sequences)
        view = cache.view(sequences)
        for _ in range(2):
            first, second = (attention.selection(query, view, layer) for layer in range(LAYERS))
            assert first is second
