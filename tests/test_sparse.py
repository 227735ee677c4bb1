"""Laws of sparse attention on a cache: exact over what was chosen, dense below the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import vattn
from vattn import KVCache, Layout
from vattn.allocator.errors import ClosedError, OutOfPages
from vattn.kernels.selection import reference
from vattn.layout import LayoutError
from vattn.policies import Clusters, Exact, Nibbles, Quest, Random, Sampled, Signs, TwoStage
from vattn.reads import ReadLog
from vattn.selector import Caps, Selector, SelectorError
from vattn.sparse import SparseAttention, tokens_of
from vattn.tiers import Tiers

LAYERS, HEADS, GROUPS, DIM = 3, 2, 2, 32
SELECTORS = [Quest, Signs, Nibbles, Exact, Random, Clusters, TwoStage]


def make(**options) -> KVCache:
    layout = Layout(LAYERS, HEADS, DIM, 2048, dtype="float32", page_bytes=4096)
    return KVCache(layout, slots=8, **{"budget_bytes": 1 << 25, **options})


def fill(cache: KVCache, sequences: list, tokens: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        rows = torch.randn(2, len(sequences), HEADS, tokens, DIM, generator=draw)
        cache.append(layer, rows[0], rows[1], sequences)


def ask(sequences: list, tokens: int = 1, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(sequences), HEADS * GROUPS, tokens, DIM, generator=draw)


def watched(sparse: SparseAttention) -> list:
    """What is read from now on, call by call."""
    read: list = []
    sparse.watchers.append(lambda layer, slots, selection: read.append(selection))
    return read


@pytest.mark.parametrize("kind", SELECTORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_chosen_is_attended_to_exactly(kind, tokens):
    with make() as cache:
        many = cache.open_batch(2)
        fill(cache, many, 700)
        fill(cache, many[:1], 85, seed=7)
        view, query = cache.view(many), ask(many, tokens)
        with SparseAttention(cache, kind(budget_tokens=192)) as sparse:
            read = watched(sparse)
            for layer in range(LAYERS):
                out, lse = sparse.attend_lse(query, view, layer)
                want = reference(query, sparse.look(view, layer).kv, read[-1])
                torch.testing.assert_close(out.double(), want[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
            for seen in sparse.activity():
                assert 0.05 < seen.share < 0.35
                assert seen.dense_steps == 0


@pytest.mark.parametrize("kind", SELECTORS, ids=lambda kind: kind.__name__)
def test_at_the_budget_the_answer_is_the_dense_one_bit_for_bit(kind):
    with make() as cache:
        many = cache.open_batch(2)
        fill(cache, many, 512)
        view, query = cache.view(many), ask(many)
        with SparseAttention(cache, kind(budget_tokens=512)) as sparse:
            for layer in range(LAYERS):
                assert sparse.selection(query, view, layer) is None
                assert torch.equal(
                    sparse.attend(query, view, layer), vattn.attend(query, view, layer)
                )
            assert [seen.dense_steps for seen in sparse.activity()] == [2] * LAYERS
            assert all(seen.read == seen.there for seen in sparse.activity())
        with SparseAttention(cache, kind(budget_tokens=511 // 16 * 16)) as sparse:
            assert sparse.selection(query, view, 0) is not None


def test_a_budget_that_leaves_one_page_out_reads_all_but_that():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 320)
        with SparseAttention(cache, Quest(budget_tokens=304)) as sparse:
            selection = sparse.selection(ask([a]), cache.view([a]), 0)
            assert selection.count.tolist() == [[19, 19]]
            assert sparse.activity()[0].read == 2 * 304


def test_dense_layers_read_everything():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 600)
        with SparseAttention(cache, Quest(budget_tokens=128, dense_layers=(0, 2))) as sparse:
            for layer in range(LAYERS):
                sparse.attend(ask([a]), cache.view([a]), layer)
            assert [seen.share == 1.0 for seen in sparse.activity()] == [True, False, True]


def test_a_prompt_reads_everything_and_counts_as_no_step():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 400)
        with SparseAttention(cache, Quest(budget_tokens=128)) as sparse:
            query = ask([a], 17)
            out = sparse.attend(query, cache.view([a]), 0)
            assert torch.equal(out, vattn.attend(query, cache.view([a]), 0))
            assert sparse.activity()[0].steps == 0


def test_generated_tokens_can_be_chosen():
    """The needle comes after the prompt: an index of the prompt alone would miss it."""
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 600)
        needle = torch.full((1, HEADS, 1, DIM), 3.0)
        for layer in range(LAYERS):
            cache.append(layer, needle, needle, [a])
        fill(cache, [a], 400, seed=4)
        query = torch.full((1, HEADS * GROUPS, 1, DIM), 3.0)
        for kind in (Quest, Signs, Nibbles):
            with SparseAttention(cache, kind(budget_tokens=128)) as sparse:
                out = sparse.attend(query, cache.view([a]), 1)
                assert torch.allclose(out, torch.full_like(out, 3.0), atol=0.05), kind.__name__


def test_padding_on_the_left_is_neither_chosen_nor_read():
    with make() as cache:
        many = cache.open_batch(2)
        fill(cache, many, 500)
        bait = 50 * ask(many).unflatten(1, (HEADS, GROUPS))[:, :, 0]
        many[1].k[0][:, :200] = bait[1]  # pads that would win every choice
        view, query, starts = cache.view(many), ask(many), np.array([0, 200])
        for kind in (Quest, Signs, Exact):
            with SparseAttention(cache, kind(budget_tokens=128)) as sparse:
                read = watched(sparse)
                out, _ = sparse.try_attend(query, view, 0, starts=starts)
                seen, size = sparse.activity()[0], sparse.selector.page_tokens
                assert seen.there == HEADS * (500 + 300)
                assert seen.read <= 2 * HEADS * 128
                assert int(read[0].ids[1].min()) >= 200 // size
                kv = replace(sparse.look(view, 0).kv, starts=torch.from_numpy(starts))
                want = reference(query, kv, read[0])[0]
                torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


def test_layers_that_share_an_index_read_the_same():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 700)
        with SparseAttention(cache, Clusters(budget_tokens=192, layers=3)) as sparse:
            read = watched(sparse)
            for _ in range(2):
                for layer in range(LAYERS):
                    sparse.attend(ask([a]), cache.view([a]), layer)
        assert read[0] is read[1] is read[2]
        assert read[3] is read[5]
        assert read[0] is not read[3]


@dataclass(frozen=True, kw_only=True)
class Idle(Selector):
    """A selector that never has anything to say."""

    caps: ClassVar[Caps] = Caps(frozenset({"position"}), "page")

    def select(self, query, look):
        return None


def test_a_selector_that_does_nothing_is_seen_to():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 700)
        with SparseAttention(cache, Idle(budget_tokens=128)) as sparse:
            sparse.attend(ask([a]), cache.view([a]), 0)
            seen = sparse.activity()[0]
            assert (seen.steps, seen.dense_steps, seen.share) == (1, 1, 1.0)


def test_a_selector_without_form_or_scores_says_so():
    @dataclass(frozen=True, kw_only=True)
    class Mute(Selector):
        caps: ClassVar[Caps] = Caps(frozenset({"keys"}), "page")

    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 700)
        with (
            SparseAttention(cache, Mute(budget_tokens=128)) as sparse,
            pytest.raises(SelectorError, match="Mute has no records"),
        ):
            sparse.attend(ask([a]), cache.view([a]), 0)


def test_misuse_is_named():
    with make() as cache, make() as other:
        (a,), (b,) = cache.open_batch(1), other.open_batch(1)
        fill(cache, [a], 700)
        fill(other, [b], 700)
        sparse = SparseAttention(cache, Quest(budget_tokens=128))
        with pytest.raises(LayoutError, match="another cache"):
            sparse.attend(ask([b]), other.view([b]), 0)
        view = cache.view([a])
        cache.release_before(a, 1, 100)
        with pytest.raises(ClosedError):
            sparse.attend(ask([a]), view, 0)
        with pytest.raises(LayoutError, match=r"first 100 tokens.*dense_layers"):
            sparse.attend(ask([a]), cache.view([a]), 1)
        with pytest.raises(ValueError, match="query is"):
            sparse.attend(ask([a])[..., :8], cache.view([a]), 0)


def test_a_budget_too_small_for_the_index_is_an_error_not_a_wrong_answer():
    pages = 2 * LAYERS * HEADS * 704 * DIM * 4 // 4096
    with make(budget_bytes=pages * 4096) as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 700)
        with SparseAttention(cache, Quest(budget_tokens=128)) as sparse, pytest.raises(OutOfPages):
            sparse.attend(ask([a]), cache.view([a]), 0)
        assert sparse.nbytes == 0
        out = vattn.attend(ask([a]), cache.view([a]), 0)
        assert out.isfinite().all()


def test_tiers_change_no_bit_and_learn_what_is_read():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 1200)
        view, query = cache.view([a]), ask([a])
        with SparseAttention(cache, Quest(budget_tokens=192)) as sparse:
            want = [sparse.attend(query, view, layer) for layer in range(LAYERS)]
        dense = [vattn.attend(query, view, layer) for layer in range(LAYERS)]
        tiers = Tiers(cache)
        tiers.demote(a)
        with SparseAttention(cache, Quest(budget_tokens=192), tiers) as sparse:
            for _ in range(3):
                for layer in range(LAYERS):
                    assert torch.equal(sparse.attend(query, view, layer), want[layer])
                    assert torch.equal(vattn.attend(query, view, layer), dense[layer])
                cache.advance()
        stats = tiers.stats()
        assert stats.misses > 0
        assert stats.hits > 0
        assert stats.promoted_bytes > 0
        tiers.close()


def test_a_log_shows_what_was_read_step_by_step():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 640)
        with SparseAttention(cache, Quest(budget_tokens=160)) as sparse:
            log = ReadLog(sparse, 1, a.slot)
            for step in range(3):
                for layer in range(LAYERS):
                    sparse.attend(ask([a], seed=step), cache.view([a]), layer)
            shares = log.shares(32, 640)
            assert log.steps == 3
            assert shares.shape == (3, 20)
            assert (shares[:, 0] > 0).all()
            assert (shares[:, -1] == 1).all()
            np.testing.assert_allclose(shares.mean(), 160 / 640, rtol=1e-6)
            log.close()
            sparse.attend(ask([a]), cache.view([a]), 1)
            assert log.steps == 3


def test_tokens_of_a_selection_name_every_page_of_memory():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 640)
        for size in (1, 16, 64):
            kind = Signs if size == 1 else Quest
            selector = kind(budget_tokens=256, page_tokens=size)
            with SparseAttention(cache, selector) as sparse:
                found = sparse.selection(ask([a]), cache.view([a]), 0)
                tokens = tokens_of(found, 0, cache.layout, 640)
                per_page = int(cache.layout.tokens_per_page)
                for head, some in enumerate(tokens):
                    ids = found.ids[0, head, : int(found.count[0, head])].long()
                    every = (ids[:, None] * size + torch.arange(size)).flatten().numpy()
                    assert set(some // per_page) == set(every // per_page)


def test_a_step_whose_queries_force_more_than_the_budget_reads_everything():
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 400)
        view = cache.view([a])
        with SparseAttention(cache, Signs(budget_tokens=40, recent_tokens=32)) as sparse:
            sparse.attend(ask([a], 4), view, 0)
            out = sparse.attend(ask([a], 6), view, 0)
            assert torch.equal(out, vattn.attend(ask([a], 6), view, 0))
            assert sparse.activity()[0].dense_steps == 1


def test_a_short_sequence_beside_a_long_one_is_read_whole():
    with make() as cache:
        many = cache.open_batch(2)
        fill(cache, many, 60)
        fill(cache, many[:1], 400, seed=2)
        view, query = cache.view(many), ask(many)
        want = vattn.attend(query, view, 0)[1]
        sampled = Sampled(budget_tokens=128, base=Exact(budget_tokens=64))
        for selector in (Quest(budget_tokens=100), Signs(budget_tokens=64), sampled):
            with SparseAttention(cache, selector) as sparse:
                got = sparse.attend(query, view, 0)[1]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_groups_that_take_turns_within_a_layer_share_no_index():
    with make() as cache:
        a, b = cache.open_batch(2)
        fill(cache, [a], 400, seed=1)
        fill(cache, [b], 400, seed=2)
        selector = Clusters(budget_tokens=128, page_tokens=16, layers=2)
        with SparseAttention(cache, selector) as sparse:
            alone = [sparse.attend(ask([a]), cache.view([a]), layer) for layer in (0, 1)]
            sparse.attend(ask([a]), cache.view([a]), 0)
            sparse.attend(ask([b], seed=9), cache.view([b]), 0)
            read = watched(sparse)
            sparse.attend(ask([a]), cache.view([a]), 1)
            assert int(read[0].ids.max()) <= 400
            assert alone[1].isfinite().all()


def test_padding_has_no_vote():
    """The same tokens behind whole pages of padding: the same pages are chosen."""
    with make() as cache:
        plain, padded = cache.open_batch(2)
        draw = torch.Generator().manual_seed(3)
        rows = torch.randn(2, 1, HEADS, 400, DIM, generator=draw)
        pads = 20 * torch.randn(2, 1, HEADS, 112, DIM, generator=draw)
        cache.append(0, rows[0], rows[1], [plain])
        cache.append(0, pads[0], pads[1], [padded])
        cache.append(0, rows[0], rows[1], [padded])
        for selector in (Quest(budget_tokens=128), Signs(budget_tokens=128)):
            with SparseAttention(cache, selector) as sparse:
                query = ask([plain])
                want = sparse.attend(query, cache.view([plain]), 0)
                view = cache.view([padded])
                got = sparse.try_attend(query, view, 0, starts=np.array([112]))[0]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_selectors_that_do_not_suit_the_cache_are_refused():
    with make() as cache, pytest.raises(SelectorError, match="layers 0 to 2"):
        SparseAttention(cache, Quest(dense_layers=(-1,)))
    shared = Layout(2, HEADS, DIM, 512, dtype="float32", layer_map=(0, 0))
    with KVCache(shared, budget_bytes=1 << 24) as cache:
        SparseAttention(cache, Quest())
        with pytest.raises(SelectorError, match="layer_map"):
            SparseAttention(cache, Signs())
    for layout in (shared.with_(sides=1), shared.with_(dtype="uint8")):
        with pytest.raises(LayoutError, match="for records"):
            KVCache(layout)


def test_a_base_of_other_pages_is_refused():
    base = Clusters(budget_tokens=256, page_tokens=32)
    with make() as cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 700)
        with (
            SparseAttention(
                cache, TwoStage(budget_tokens=128, page_tokens=32, base=base)
            ) as sparse,
            pytest.raises(SelectorError, match="pages of 16"),
        ):
            sparse.attend(ask([a]), cache.view([a]), 0)
