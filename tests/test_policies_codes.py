"""Codes of single tokens: maps keep products, and codes of all channels order as keys do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.looks import (
    DIM,
    GROUPS,
    HEADS,
    KV_HEADS,
    LAYERS,
    PLAIN,
    TOKENS,
    every,
    inputs,
    look_at,
    recorded,
)
from vattn.kernels import sparse
from vattn.kernels.contract import EMPTY
from vattn.kernels.selection import Selection, reference
from vattn.policies import (
    DoubleSparsity,
    Exact,
    Graded,
    Loki,
    Map,
    Nibbles,
    Signs,
    SparQ,
)
from vattn.policies.maps import channels, principal
from vattn.policies.members import tokens_chosen, tokens_there
from vattn.policies.sparq import largest
from vattn.selector import Selector, SelectorError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def test_maps_keep_products() -> None:
    keys, queries = recorded()
    turned = principal(keys).spread(4)
    look = look_at(Exact(), *inputs(2)[1:], layer=1)
    query = inputs(2)[0]
    x = turned.keys(1, look.kv.key[0, :, :TOKENS, None].float())[:, :, 0]
    y = turned.queries(1, query, KV_HEADS)
    found = torch.einsum("hgd,hnd->hgn", y[0, :, 0].unflatten(0, (KV_HEADS, GROUPS)), x)
    rows = query[0, :, 0].unflatten(0, (KV_HEADS, GROUPS))
    exact = torch.einsum(
        "hgd,hnd->hgn", rows, look.kv.key[0, :, :TOKENS] - turned.centre[1][:, None]
    )
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    few = channels(keys, queries, 3)
    assert few.rank == 3
    assert torch.equal(few.key_map.sum(2), torch.ones(LAYERS, KV_HEADS, 3))


def test_a_map_of_other_shapes_is_refused() -> None:
    with pytest.raises(SelectorError, match=r"centre, key_map, query_map are \[\(1, 1, 4\)"):
        Map(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 3))


def test_principal_axes_hold_the_most_variance_first() -> None:
    keys, _ = recorded(500)
    turned = principal(keys, 5)
    for layer in range(LAYERS):
        x = turned.keys(layer, keys[layer][:, :, None])[:, :, 0]
        spread = x.var(1)
        assert bool((spread[:, :-1] >= spread[:, 1:] * 0.999).all())
        assert float(x.mean(1).abs().max()) <= 1e-4
        assert float(spread[0, 0]) >= float(keys[layer, 0].var(0).max()) * 0.999


def test_loki_of_all_components_orders_as_the_keys() -> None:
    query, key = inputs()
    selector = Loki.calibrate(recorded()[0], rank=DIM, dtype=torch.float32, **PLAIN)
    assert_chooses_as_exact(selector, query, key)


def test_sparq_of_all_channels_orders_as_the_keys() -> None:
    query, key = inputs()
    assert_chooses_as_exact(SparQ(rank=DIM, **PLAIN), query, key)


def assert_chooses_as_exact(selector: Selector, query: Tensor, key: Tensor) -> None:
    """The same scores but for a constant of each row, and the same tokens where none is close."""
    look = look_at(selector, key, layer=1)
    found = selector.scores(query, look, TOKENS).log_softmax(-1)
    exact = Exact().scores(query, look, TOKENS).log_softmax(-1)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    a, b = (s.select(query, look) for s in (selector, Exact(**PLAIN)))
    masses = [float(reference(query, look.kv, s)[1].exp().sum()) for s in (a, b)]
    assert masses[0] == pytest.approx(masses[1], rel=1e-3)


def test_double_sparsity_of_all_channels_is_four_bit_keys() -> None:
    query, key = inputs()
    keys, queries = recorded()
    labels = DoubleSparsity.calibrate(keys, queries, rank=DIM, **PLAIN)
    plain = Nibbles(**PLAIN)
    found, exact = (s.scores(query, look_at(s, key), TOKENS) for s in (labels, plain))
    torch.testing.assert_close(found, exact)


def test_double_sparsity_takes_the_loudest_channels() -> None:
    keys, queries = recorded()
    keys[:, :, :, [3, 9]] *= 30.0
    picked = channels(keys, queries, 2).key_map.amax(-1)[..., :].nonzero()[:, -1]
    assert picked.unique().tolist() == [3, 9]


def test_graded_codes_of_few_directions_lose_almost_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    strength = torch.tensor([8.0] * 4 + [0.05] * (DIM - 4))
    keys = (torch.randn(LAYERS, KV_HEADS, 300, DIM) * strength) @ basis.T
    key = ((torch.randn(1, KV_HEADS, TOKENS, DIM) * strength) @ basis.T).contiguous()
    query = torch.randn(1, HEADS, 1, DIM)
    selector = Graded.calibrate(keys, fine=4, coarse=DIM, **PLAIN)
    look = look_at(selector, key)
    found = selector.scores(query, look, TOKENS)
    exact = Exact().scores(query, look, TOKENS)
    error = (found - exact) - (found - exact).mean(-1, keepdim=True)
    signs = Signs.calibrate(keys, **PLAIN)
    rough = signs.scores(query, look_at(signs, key), TOKENS) - exact
    assert float(error.std()) <= 0.1 * float(exact.std())
    assert float(error.std()) <= 0.3 * float((rough - rough.mean(-1, keepdim=True)).std())


def test_sparq_keeps_the_largest_channels_and_their_temperature() -> None:
    query = inputs(2)[0]
    cut = largest(query, KV_HEADS, 4).unflatten(1, (KV_HEADS, GROUPS))
    rows = query.unflatten(1, (KV_HEADS, GROUPS))
    kept = cut != 0
    assert kept.sum(-1).unique().tolist() == [4]
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    loud = rows.abs().sum(2)
    for b in range(2):
        for h in range(KV_HEADS):
            best = loud[b, h, 0].topk(4).indices.sort().values
            assert torch.equal(kept[b, h, 0, 0].nonzero()[:, 0], best)
    share = (rows.abs() * kept).sum(-1) / rows.abs().sum(-1)
    torch.testing.assert_close(cut, rows * kept * share.rsqrt()[..., None])
    assert torch.equal(largest(query, KV_HEADS, DIM), query)


def test_sparq_counts_the_rest_with_the_mean_value() -> None:
    query, key = inputs(2)
    value = torch.randn_like(key)
    lengths = [TOKENS, 130]
    selector = SparQ(rank=4, **PLAIN)
    look = look_at(selector, key, value, lengths)
    selection = selector.select(query, look)
    mean, _ = selection.tail
    out, _, _ = sparse.attend(query, look.kv, selection)
    near, _, _ = reference(query, look.kv, dataclasses.replace(selection, tail=None))
    # The share of the chosen is what the estimated scores say.
    scores = selector.scores(query, look, TOKENS)
    there = tokens_there(look, TOKENS)[:, None, None]
    chosen = tokens_chosen(selection, look, TOKENS, KV_HEADS)[:, :, None]
    weight = scores.masked_fill(~there, EMPTY).softmax(-1)
    alpha = (weight * chosen).sum(-1).reshape(2, HEADS, 1).double()
    assert bool(((alpha > 0) & (alpha < 1)).all())
    for b, count in enumerate(lengths):
        exact = value[b, :, :count].mean(1).repeat_interleave(GROUPS, 0)[:, None]
        torch.testing.assert_close(mean[b], exact)
    mixed = alpha[..., None] * near + (1 - alpha[..., None]) * mean
    torch.testing.assert_close(out.double(), mixed, rtol=1e-4, atol=1e-5)
    # With all channels the rest has its true mass, and the sum is that of dense attention.
    whole = SparQ(rank=DIM, **PLAIN)
    _, total, _ = sparse.attend(query, look.kv, whole.select(query, look))
    dense = Selection(*every(2, TOKENS, 1))
    torch.testing.assert_close(total.double(), reference(query, look.kv, dense)[1])
