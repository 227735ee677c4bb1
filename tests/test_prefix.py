"""Laws of shared_prefixes: what it says lies on the same pages does, and no grouping saves more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.caches import LAYERS, LAYOUTS, fill, layout_of
from vattn.allocator.errors import ClosedError, VattnError
from vattn.cache import KVCache
from vattn.prefix import Prefix, shared_prefixes
from vattn.sequence import Sequence

PAGE_TOKENS = 64  # of the head-major layout with pages of 4 KiB


@pytest.fixture
def cache() -> Iterator[KVCache]:
    with KVCache(layout_of("per_layer"), slots=12) as cache:
        yield cache


def opened(cache: KVCache, tokens: int) -> Sequence:
    sequence = cache.open()
    more(cache, sequence, tokens)
    return sequence


def more(cache: KVCache, sequence: Sequence, tokens: int) -> None:
    fill(cache, [sequence], tokens, torch.Generator().manual_seed(tokens))


def test_forks_share_whole_pages_with_their_donor(cache):
    donor = opened(cache, 200)
    others = [donor.fork(), opened(cache, 200), donor.fork()]
    assert shared_prefixes(cache, [donor, *others], least_tokens=1) == [
        Prefix((0, 1, 3), 0, 3 * PAGE_TOKENS)
    ]


def test_shares_end_where_they_were_cut(cache):
    donor = opened(cache, 300)
    shares = [donor.share(130), donor.share(191)]
    for sequence in shares:
        more(cache, sequence, 150)
    found = shared_prefixes(cache, [donor, *shares], least_tokens=1)
    assert found == [Prefix((0, 1, 2), 0, 2 * PAGE_TOKENS)]


def test_what_is_left_when_the_donor_closes(cache):
    donor = opened(cache, 256)
    forks = [donor.fork(), donor.fork()]
    donor.close()
    adopted = opened(cache, 256)
    found = shared_prefixes(cache, [adopted, *forks], least_tokens=1)
    assert found == [Prefix((1, 2), 0, 4 * PAGE_TOKENS)]


def test_a_truncated_sequence_leaves_what_it_cut(cache):
    donor = opened(cache, 256)
    forks = [donor.fork(), donor.fork()]
    forks[0].truncate(100)
    found = shared_prefixes(cache, [donor, *forks], least_tokens=1)
    assert found == [Prefix((0, 2), 0, 4 * PAGE_TOKENS)]
    more(cache, forks[0], 156)  # the pages behind 64 are its own now
    nested = shared_prefixes(cache, [donor, *forks], least_tokens=1, nested=True)
    assert nested == [Prefix((0, 1, 2), 0, PAGE_TOKENS), Prefix((0, 2), PAGE_TOKENS, 256)]
    forks[0].truncate(63)
    assert shared_prefixes(cache, forks, least_tokens=1) == []


def test_forks_of_forks_nest(cache):
    """A system prompt of one page, two documents of three pages, three questions on each."""
    system = opened(cache, 64)
    documents = [system.fork(), system.fork()]
    for document in documents:
        more(cache, document, 192)
    questions = [document.fork() for document in documents for _ in range(3)]
    for question in questions:
        more(cache, question, 20)
    assert shared_prefixes(cache, questions, least_tokens=1) == [
        Prefix((0, 1, 2), 0, 256),
        Prefix((3, 4, 5), 0, 256),
    ]
    nested = shared_prefixes(cache, questions, least_tokens=64, nested=True)
    assert nested == [
        Prefix((0, 1, 2, 3, 4, 5), 0, 64),
        Prefix((0, 1, 2), 64, 256),
        Prefix((3, 4, 5), 64, 256),
    ]
    assert shared_prefixes(cache, questions, least_tokens=65, nested=True) == [
        Prefix((0, 1, 2), 0, 256),
        Prefix((3, 4, 5), 0, 256),
    ]


def test_a_reorder_moves_the_groups(cache):
    donor = opened(cache, 128)
    sequences = [donor, opened(cache, 128), opened(cache, 128)]
    assert shared_prefixes(cache, sequences, least_tokens=1) == []
    cache.reorder(sequences, [0, 2, 0])
    assert shared_prefixes(cache, sequences, least_tokens=1) == [Prefix((0, 2), 0, 128)]


def test_short_prefixes_make_no_group(cache):
    donor = opened(cache, 130)
    pair = [donor, donor.fork()]
    assert shared_prefixes(cache, pair, least_tokens=129) == []
    assert shared_prefixes(cache, pair, least_tokens=128) == [Prefix((0, 1), 0, 128)]
    assert shared_prefixes(cache, [donor], least_tokens=1) == []


def test_closed_sequences_are_refused(cache):
    donor = opened(cache, 64)
    fork = donor.fork()
    fork.close()
    with pytest.raises(ClosedError, match="is closed"):
        shared_prefixes(cache, [donor, fork])


def test_who_is_left_makes_a_group_of_its_own(cache):
    """Two on a document behind a prompt that all five have: the others read the prompt together."""
    prompt = opened(cache, 64)
    document = prompt.fork()
    more(cache, document, 256)
    sequences = [prompt.fork(), document, prompt.fork(), document.fork(), prompt.fork()]
    found = shared_prefixes(cache, sequences, least_tokens=1)
    assert found == [Prefix((0, 2, 4), 0, 64), Prefix((1, 3), 0, 320)]


def test_what_a_group_saves():
    assert Prefix((1, 4, 5), 100, 350).saved == 500


# ---- against page ids compared one by one ------------------------------------------------------
class Pages:
    """The ids of the whole pages that each sequence fills, one by one."""

    def __init__(self, cache: KVCache, sequences: list[Sequence]) -> None:
        arena, self.layout = cache.arena, cache.layout
        self.ids = []
        for sequence in sequences:
            full = self.layout.split(sequence.length)[0]
            first = sequence.slot * arena.slot_pages
            lanes = [first + lane * arena.lane_pages for lane in range(arena.lanes)]
            self.ids.append(
                [tuple(arena.entry[lane + page] for lane in lanes) for page in range(full)]
            )

    def common(self, members: tuple[int, ...]) -> int:
        """First pages that all members have in common."""
        pages = 0
        for column in zip(*(self.ids[member] for member in members), strict=False):
            if len(set(column)) > 1:
                break
            pages += 1
        return pages

    def tokens(self, members: tuple[int, ...]) -> int:
        return self.layout.room(self.common(members))

    def most_saved(self, least_tokens: int) -> int:
        """Of all partitions of the sequences, what the best one saves."""

        def best(left: tuple[int, ...]) -> int:
            if len(left) < 2:
                return 0
            options = []
            for mask in range(1 << (len(left) - 1)):
                picked = [left[0], *(m for i, m in enumerate(left[1:]) if mask >> i & 1)]
                rest = tuple(m for m in left if m not in picked)
                tokens = self.tokens(tuple(picked)) if len(picked) > 1 else 0
                tokens = tokens if tokens >= least_tokens else 0
                options.append((len(picked) - 1) * tokens + best(rest))
            return max(options)

        return best(tuple(range(len(self.ids))))

    def nested(self, least_tokens: int) -> set[Prefix]:
        """Every class of sequences with equal first pages, outer ones first."""
        classes: set[tuple[int, tuple[int, ...]]] = set()
        for pages in range(1, max(map(len, self.ids)) + 1):
            for one in self.ids:
                alike = [i for i, other in enumerate(self.ids) if other[:pages] == one[:pages]]
                members = tuple(i for i in alike if len(self.ids[i]) >= pages)
                if len(one) >= pages and len(members) > 1:
                    classes.add((self.common(members), members))
        chosen: set[Prefix] = set()
        for pages, members in sorted(classes):
            around = [p.tokens for p in chosen if set(members) <= set(p.members)]
            begin, tokens = max(around, default=0), self.layout.room(pages)
            if tokens - begin >= least_tokens:
                chosen.add(Prefix(members, begin, tokens))
        return chosen


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["open", "append", "append", "fork", "share", "truncate", "close", "reorder", "window"]
        ),
        st.integers(0, 5),
        st.integers(0, 400),
    ),
    min_size=4,
    max_size=16,
)


def step(cache: KVCache, sequences: list[Sequence], name: str, which: int, n: int) -> None:
    """One event in the life of a cache of at most six sequences."""
    one = sequences[which % len(sequences)]
    if name in ("open", "fork", "share") and len(sequences) < 6:
        made = {"open": cache.open, "fork": one.fork, "share": lambda: one.share(n % 300)}[name]()
        sequences.append(made)
    elif name == "append":
        more(cache, one, n % 150)
    elif name == "truncate":
        one.truncate(n)
    elif name == "close" and len(sequences) > 1:
        sequences.remove(one)
        one.close()
    elif name == "reorder":
        order = [(which * i + n) % len(sequences) for i in range(len(sequences))]
        cache.reorder(sequences, order)
    elif name == "window":
        one.release_before(which % LAYERS, min(n, int(one.lengths[which % LAYERS])))
        cache.advance()


@settings(max_examples=40, deadline=None)
@given(
    steps=STEPS,
    name=st.sampled_from(sorted(set(LAYOUTS) - {"shared_layers"})),
    least_tokens=st.sampled_from([1, 33, 100]),
)
def test_the_groups_are_those_of_the_page_ids(steps, name, least_tokens):
    with KVCache(layout_of(name), slots=7) as cache:
        sequences = [opened(cache, 150)]
        sequences += [sequences[0].fork(), sequences[0].share(100)]
        for what, which, n in steps:
            try:
                step(cache, sequences, what, which, n)
            except VattnError:  # more than there is, or than a window left
                continue
        pages = Pages(cache, sequences)
        found = shared_prefixes(cache, sequences, least_tokens=least_tokens)
        members = [member for prefix in found for member in prefix.members]
        assert len(members) == len(set(members))
        assert all(p.tokens == pages.tokens(p.members) >= least_tokens for p in found)
        assert sum(p.saved for p in found) == pages.most_saved(least_tokens)
        nested = shared_prefixes(cache, sequences, least_tokens=least_tokens, nested=True)
        assert set(nested) == pages.nested(least_tokens)
        assert len(nested) == len(set(nested))
        if least_tokens == 1:  # else an outer group may leave too little for one within it
            assert sum(p.saved for p in nested) >= sum(p.saved for p in found)
