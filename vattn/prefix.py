"""Which sequences begin with the same physical pages: read off the page map, nothing is kept.

`KVCache.fork` and `share` alias whole pages, so equal page ids at equal places are equal K and V in
every layer. Sorted by their page ids, sequences with a common prefix are neighbours, and the pages
that neighbours have in common make a tree (the LCP intervals of a suffix array: Abouelhoda, Kurtz
and Ohlebusch, https://doi.org/10.1016/S1570-8667(03)00065-0):

    pages of a lane                      common      tree
    a   7 8 9 3                                      ┌ {a, b, c}  2 pages
    b   7 8 9 4 5                        3           └── {a, b}   3 pages
    c   7 8 1                            2
    d   2 6                              0

A kernel that reads a group's prefix once (`kernels.cascade`) saves (members - 1) times its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .batch import Batch, Ints
from .cache import KVCache
from .sequence import Sequence

# Reading so few rows costs what it costs to join one more partial result.
LEAST_TOKENS = 256


class Prefix(NamedTuple):
    """Tokens ``begin .. tokens`` that lie on the same physical pages in several sequences.

    ``members`` are positions in the list that was asked about, ascending, two or more. ``begin`` is
    0, or the end of the prefix of an outer group that holds all of them.
    """

    members: tuple[int, ...]
    begin: int
    tokens: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read if the group's are read once."""
        return (len(self.members) - 1) * (self.tokens - self.begin)


@dataclass
class Node:
    """Sequences ``first .. last`` of the sorted order have ``pages`` pages in common, ``tokens``
    tokens, and some of them, the ``inner`` nodes, more."""

    first: int
    last: int
    pages: int
    tokens: int = 0
    inner: list[Node] = field(default_factory=list)


def shared_prefixes(
    cache: KVCache,
    sequences: Seq[Sequence] | Batch,
    *,
    least_tokens: int = LEAST_TOKENS,
    nested: bool = False,
) -> list[Prefix]:
    """Groups of sequences whose first tokens lie on the same physical pages, whole pages only.

    Args:
        sequences: open sequences of the cache, or a batch of them.
        least_tokens: shorter prefixes are not worth a group.
        nested: False puts a sequence into one group at most, such that as few tokens as possible
            are read. True gives all groups, outer before inner ones: a sequence may be in several,
            each of which holds ``least_tokens`` tokens or more behind the one around it.

    A prefix ends where the shortest layer of its members ends, whatever is mapped behind. It costs
    one sort of the ids of those pages that may have several holders, and holds until a member is
    truncated, reordered or closed, or releases tokens; appending rows never changes it.

    Raises:
        ClosedError, LayoutError: as `KVCache.batch`.
    """
    ids = _page_ids(cache, cache.batch(sequences).slots)
    if not ids.shape[1]:
        return []
    order = np.argsort(_as_bytes(ids), kind="stable")
    nodes = _tree(_common(ids[order]), len(order))
    for node in nodes:
        node.tokens = cache.layout.room(node.pages)
    choose = _nested if nested else _apart
    groups = [
        Prefix(tuple(sorted(order[members].tolist())), begin, tokens)
        for members, begin, tokens in choose(nodes, least_tokens)
    ]
    return sorted(groups, key=lambda group: (group.begin, group.members))


def _page_ids(cache: KVCache, slots: Ints) -> Ints:
    """What is mapped in the pages that each sequence fills and may share, [B, pages, lanes]; behind
    them numbers that no other sequence has."""
    arena, layout = cache.arena, cache.layout
    tokens = cache.lengths[slots].min(axis=1)
    full = np.minimum(tokens * layout.row_bytes // layout.page, arena.shared_to[slots])
    pages = int(full.max())
    entry = arena.entry.reshape(arena.slots, arena.lanes, arena.lane_pages)
    ids = np.ascontiguousarray(entry[slots, :, :pages].transpose(0, 2, 1))
    behind = np.arange(pages) >= full[:, None]
    ids[behind] = -1 - behind.nonzero()[0][:, None]
    return ids


def _as_bytes(ids: Ints) -> np.ndarray:
    """Each sequence's ids as one value whose order is that of its bytes: equal beginnings are
    neighbours once sorted."""
    flat = ids.reshape(len(ids), -1)
    return flat.view(f"V{flat.shape[1] * flat.itemsize}").ravel()


def _common(ids: Ints) -> list[int]:
    """How many first pages each sequence has in common with the next."""
    differ = (ids[1:] != ids[:-1]).any(axis=2)
    return np.where(differ.any(axis=1), differ.argmax(axis=1), ids.shape[1]).tolist()


def _tree(common: list[int], sequences: int) -> list[Node]:
    """All nodes, inner before outer ones; the last is the root, of all sequences and no page."""
    stack, done = [Node(0, sequences, 0)], []
    for i, pages in enumerate([*common, 0]):
        first, inner = i, []
        while stack[-1].pages > pages:
            node = stack.pop()
            node.last, first = i + 1, node.first
            done.append(node)
            if stack[-1].pages >= pages:
                stack[-1].inner.append(node)
            else:
                inner = [node]
        if stack[-1].pages < pages:
            stack.append(Node(first, 0, pages, inner=inner))
    return [*done, stack[0]]


def _nested(nodes: list[Node], least_tokens: int) -> Iterator[tuple[Ints, int, int]]:
    """(members, begin, tokens) of nodes with enough tokens behind the chosen one around them."""
    begins = {id(nodes[-1]): 0}
    for node in reversed(nodes):
        begin = begins[id(node)]
        if node.tokens - begin >= max(1, least_tokens):
            yield np.arange(node.first, node.last), begin, node.tokens
            begin = node.tokens
        begins |= {id(inner): begin for inner in node.inner}


def _apart(nodes: list[Node], least_tokens: int) -> Iterator[tuple[Ints, int, int]]:
    """(members, 0, tokens) of groups that save most, each sequence in one.

    A group costs the reading of its tokens, and earns them for each member. So a sequence is best
    in the innermost node around it that is a group, and ``most[node][a]`` is what can be had below
    a node whose sequences earn ``a`` outside of it, where they may be in a group or not (0):

        most[node][a] = max(below(a), below(tokens) - tokens)        the node is no group, or one
        below(a) = a for each sequence in no inner node + sum of most[inner][a]
    """
    least_tokens = max(1, least_tokens)
    around = {id(nodes[-1]): [0]}
    for node in reversed(nodes):
        own = [node.tokens] if node.tokens >= least_tokens else []
        around |= {id(inner): around[id(node)] + own for inner in node.inner}
    most: dict[tuple[int, int], int] = {}
    groups: set[tuple[int, int]] = set()
    for node in nodes:
        alone = node.last - node.first - sum(inner.last - inner.first for inner in node.inner)

        def below(a: int, node: Node = node, alone: int = alone) -> int:
            return alone * a + sum(most[id(inner), a] for inner in node.inner)

        closed = below(node.tokens) - node.tokens if node.tokens >= least_tokens else -1
        for a in around[id(node)]:
            most[id(node), a] = max(below(a), closed)
            if closed > below(a):
                groups.add((id(node), a))

    owner = np.full(nodes[-1].last, -1)
    earned = {id(nodes[-1]): 0}
    chosen: list[int] = []
    for node in reversed(nodes):
        a = earned[id(node)]
        if (id(node), a) in groups:
            owner[node.first : node.last] = len(chosen)
            chosen.append(a := node.tokens)
        earned |= {id(inner): a for inner in node.inner}
    for group, tokens in enumerate(chosen):
        yield (owner == group).nonzero()[0], 0, tokens
