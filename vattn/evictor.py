"""What is kept of a prompt, and what goes at each step: the protocol of eviction policies.

An *evictor* is a frozen dataclass. It scores the tokens that a KV head holds and keeps the best
within a budget; what it does not keep is gone, and its memory with it. It owns no memory and
touches none: `vattn.eviction` records what it wants to know (`Seen`, `Step`), calls it at safe
points, moves the rows, and gives the pages back.

    prompt   attend ──► score(seen) ──► choose within budgets ──► compacted, pages given back
    step     attend ──► observe(score, step) ──► over the budget: the least goes

The score of each token is recorded beside its row and moves with it; so what is kept is a pure
function of what was recorded, and a few lines of torch can replay it (tests/test_evictors.py). At
or above as many tokens as there are, nothing is evicted and results are those of a dense cache,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .allocator.errors import VattnError
from .batch import Ints
from .kernels import evict
from .kernels.columns import Columns, columns, logits, padded
from .kernels.contract import EMPTY
from .kernels.evict import Rule
from .kernels.kv import KV
from .selector import Caps

ALL_ROWS = 1 << 62  # every query of the prompt
BEST = float("inf")
AHEAD = 256  # tokens to come whose fixed scores are found at once
SCORES = ("score", "rescore")
CHOICES = ("rescore", "forced", "choose", "worst")


class EvictorError(VattnError, ValueError):
    """An evictor's parameter that is out of range, or a model that it does not suit."""


@dataclass(eq=False)
class Seen:
    """What an evictor sees of one layer after a prompt, or when it has to drop something.

    Shapes: B sequences, H KV heads, n rows of the longest range; what lies behind a range's
    ``counts`` means nothing (`valid`). Rows are in the order of the text after a prompt; after
    steps that dropped one token each, any order: ``positions`` says.

    Args:
        layer, layers: which of how many.
        positions: [B, H, n] int64, where each row's token stood in the text.
        counts: [B, H] int64, rows held.
        tokens: [B] int64, tokens of the text so far, kept or not.
        target: [B] int64, tokens that a head is to keep on average (`Evictor.target`).
        score: [B, H, n] float32, what the evictor recorded; 0 for new rows.
        scale: of the scores of attention.
        source: makes `kv`.
        query: [B, Hq, R, D], the last R queries, as many as the evictor asked for (`rows`); None
            between prompts.
        fresh: tokens that this call brought.
        draft: of these, tokens that may yet be taken back: all but the first of a step of several
            (speculative decoding). They are held beyond the budget meanwhile.
        output: [model width, Hq * D], the weight behind attention, for evictors that ask for it.
        hidden: [B, n', width], the input of this layer's attention for the prompt, likewise.
        sequence: place in the batch of the first of the B sequences, see `alone`.
        log_weight: [B, H, n] float32, log of how many tokens each row stands for; None: one each.
        narrow: [B, H] int64, narrow rows of each head, which are not among these (`narrowed`).
    """

    layer: int
    layers: int
    positions: Tensor
    counts: Tensor
    tokens: Tensor
    target: Tensor
    score: Tensor
    scale: float
    source: Callable[[], KV]
    query: Tensor | None = None
    fresh: int = 0
    draft: int = 0
    output: Tensor | None = None
    hidden: Tensor | None = None
    sequence: int = 0
    log_weight: Tensor | None = None
    narrow: Tensor | None = None

    @cached_property
    def valid(self) -> Tensor:
        """[B, H, n] bool: rows that there are."""
        return _within(self.positions, self.counts)

    @cached_property
    def kv(self) -> KV:
        """The ranges as kernels see them, B * H sequences of one KV head."""
        return self.source()

    @cached_property
    def keys(self) -> Tensor:
        """K [B, H, n, D]; 0 behind the counts."""
        return self._gathered(self.kv.key)

    @cached_property
    def values(self) -> Tensor:
        """V [B, H, n, D]; 0 behind the counts."""
        return self._gathered(self.kv.value)

    @cached_property
    def age(self) -> Tensor:
        """[B, H, n] int64: tokens of the text since each row's; 0 for the newest that will not be
        taken back, negative behind it."""
        return self.tokens[:, None, None] - 1 - self.draft - self.positions

    def alone(self, b: int, fresh: int) -> Seen:
        """One sequence of the batch, as a run of it alone would see it, with the tokens that it got
        of this call; ``query`` is left out."""
        heads, kv = self.counts.shape[1], self.kv
        ranges, one = slice(b * heads, (b + 1) * heads), slice(b, b + 1)
        longest, logs = int(self.counts[b].max()), self.log_weight
        assert kv.lengths is not None
        assert kv.slots is not None
        alone = replace(kv, lengths=kv.lengths[ranges], slots=kv.slots[ranges])
        return replace(
            self,
            positions=self.positions[one, :, :longest],
            counts=self.counts[one],
            tokens=self.tokens[one],
            target=self.target[one],
            score=self.score[one, :, :longest],
            source=lambda: alone,
            query=None,
            fresh=fresh,
            sequence=self.sequence + b,
            hidden=None if self.hidden is None else self.hidden[one, -fresh:],
            log_weight=None if logs is None else logs[one, :, :longest],
            narrow=None if self.narrow is None else self.narrow[one],
        )

    def columns(self, rows: int = ALL_ROWS) -> Columns:
        """Sums of attention over the last ``rows`` queries: total, square [B, H, G, n], entropy
        [B, H, G], with G query heads of a KV head. See `kernels.columns`."""
        found = columns(self._rows(rows), self.kv, scale=self.scale, bias=self._bias)
        shape = self.counts.shape
        total, square = (x.unflatten(0, shape) for x in (found.total, found.square))
        return Columns(total, square, found.entropy.unflatten(0, shape), found.rows)

    def logits(self, rows: int = ALL_ROWS) -> Iterator[tuple[Tensor, Tensor]]:
        """The last ``rows`` queries a block at a time: their positions [B, r], and scale * q k^T
        [B, H, G, r, n] float32, -inf where a query sees nothing."""
        query = self._rows(rows)
        first = self.tokens - query.shape[2]
        for start, block in logits(query, self.kv, scale=self.scale, bias=self._bias):
            at = torch.arange(start, start + block.shape[2], device=block.device)
            yield first[:, None] + at, block.unflatten(0, self.counts.shape)

    def places(self, first: int, many: int) -> Seen:
        """In place of the rows ``many`` tokens from ``first`` behind the end of the text on, by
        their positions [B, H, many] alone: for evictors whose scores are `fixed`."""
        at = self.tokens[:, None] + torch.arange(first, first + many, device=self.tokens.device)
        return replace(self, positions=at[:, None].expand(*self.counts.shape, many))

    @property
    def _bias(self) -> Tensor | None:
        """The weights' logs as `logits` takes them, [B * H, 1, n]."""
        return None if self.log_weight is None else self.log_weight.flatten(0, 1)[:, None]

    def _gathered(self, side: Tensor) -> Tensor:
        assert self.kv.lengths is not None
        rows = padded(side, self.kv, self.kv.lengths.tolist())
        return rows[:, 0].unflatten(0, self.counts.shape)

    def _rows(self, rows: int) -> Tensor:
        if self.query is None:
            raise EvictorError("there are no queries between prompts: keep what you need in score")
        query = self.query[:, :, -min(rows, self.query.shape[2]) :]
        return query.unflatten(1, (self.counts.shape[1], -1)).flatten(0, 1)


@dataclass(eq=False)
class Step:
    """What an evictor sees of one layer after a decode step: attention of L new tokens to all rows.

    Args:
        logits: [B, H, G * L, n] float32, scale * q k; -inf where a query sees nothing. Row
            g * L + l is query head g of the group.
        lse: [B, H, G * L] float32, log of the sum of their exponentials.
        positions, counts, tokens: as in `Seen`.
        fresh: L.
        number: decode steps of this layer before this one.
        layer: which.
    """

    logits: Tensor
    lse: Tensor
    positions: Tensor
    counts: Tensor
    tokens: Tensor
    fresh: int
    number: int
    layer: int = 0

    @cached_property
    def valid(self) -> Tensor:
        """[B, H, n] bool: rows that there are."""
        return _within(self.positions, self.counts)

    @cached_property
    def weights(self) -> Tensor:
        """[B, H, G * L, n] float32: attention, each row sums to 1."""
        return (self.logits - self.lse[..., None]).exp_()

    def block(self) -> tuple[Tensor, Tensor]:
        """New queries as `Seen.logits` yields them: positions [B, L], logits [B, H, G, L, n]."""
        at = self.tokens[:, None] + torch.arange(-self.fresh, 0, device=self.tokens.device)
        return at, self.logits.unflatten(2, (-1, self.fresh))

    def mass(self, shares: Sequence[float] | None = None) -> Tensor:
        """[B, H, n] float32: attention that each row got, summed over query heads and new tokens;
        the l-th new token counts ``shares[l]`` times (once by default)."""
        each = (1.0,) * self.fresh if shares is None else tuple(shares)
        groups = self.logits.shape[2] // self.fresh
        return evict.mass(self.logits, self.lse, _line(each * groups, self.logits.device))


@dataclass(frozen=True, kw_only=True)
class Evictor:
    """Keep the tokens with the highest scores; what most policies are.

    Args:
        budget: tokens that a KV head keeps on average: a share of the prompt (a float in (0, 1]) or
            a number (an int).
        sink_tokens, recent_tokens: the first tokens of the text and the last ones are kept in any
            case; they count in the budget.
        every: decode steps from one eviction to the next; in between a head holds as many tokens
            more. 1: at its budget a head drops a token for each it gets.
        dense_layers: layers that keep everything.

    Raises:
        EvictorError: a parameter is out of range; the message names it.
    """

    budget: float | int = 0.5
    sink_tokens: int = 4
    recent_tokens: int = 32
    every: int = 1
    dense_layers: tuple[int, ...] = ()

    caps: ClassVar[Caps]
    source: ClassVar[str]  # paper, and where its defaults come from
    summary: ClassVar[str]  # what it scores, in a line
    decodes: ClassVar[bool] = False  # drops tokens at decode steps, too
    watches: ClassVar[bool] = False  # wants the attention of decode steps
    cascades: ClassVar[bool] = False  # a layer's budget follows from all layers so far
    joint: ClassVar[bool] = False  # decides for all layers after the last one
    adaptive: ClassVar[bool] = False  # has no budget: what it keeps follows from the scores
    merges: ClassVar[bool] = False  # what it drops goes into what it keeps: see `merged`
    narrows: ClassVar[bool] = False  # rows that it keeps give up channels of K: see `narrowed`
    fixed: ClassVar[bool] = False  # a score never changes: of a class and what keeps its `score`

    def __post_init__(self) -> None:
        share = isinstance(self.budget, float) and 0 < self.budget <= 1
        number = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not share and not (number and self.budget >= 1):
            raise EvictorError(
                "budget must be a share of the prompt, a float in (0, 1], or a number of tokens, "
                f"an int >= 1; got {self.budget!r}"
            )
        for name, least in (("sink_tokens", 0), ("recent_tokens", 0), ("every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise EvictorError(f"{name} must be an int >= {least}, got {value!r}")
        least = self.sink_tokens + self.recent_tokens
        if number and not self.adaptive and self.budget < least:
            raise EvictorError(
                f"budget must be >= {least} (sink_tokens "
                f"{self.sink_tokens} and recent_tokens {self.recent_tokens} count in it), got "
                f"{self.budget}"
            )

    # ---- how much ------------------------------------------------------------------------------
    def target(self, tokens: Tensor) -> Tensor:
        """Tokens that a KV head keeps on average of a prompt of ``tokens`` [B]: [B] int64, at least
        what is kept in any case."""
        if isinstance(self.budget, int):
            return torch.full_like(tokens, self.budget)
        least = self.sink_tokens + self.recent_tokens
        return (tokens * self.budget).round().long().clamp_min(max(1, least))

    def budgets(self, seen: Seen) -> Tensor:
        """Tokens for each head of this layer, [B, H] int64: ``seen.target`` each by default. Over
        all layers and heads they sum to the target times their number."""
        return seen.target[:, None].expand_as(seen.counts)

    # ---- what is wanted ------------------------------------------------------------------------
    def rows(self, tokens: int) -> int:
        """Queries of a prompt of ``tokens`` tokens that `score` looks at: the last so many."""
        return 0

    # ---- scores --------------------------------------------------------------------------------
    def score(self, seen: Seen) -> Tensor:
        """The worth of each row after a prompt, [B, H, n] float32; behind the counts anything."""
        raise NotImplementedError

    def observe(self, score: Tensor, step: Step) -> Tensor:
        """The scores after a decode step, for evictors that watch: [B, H, n] float32. New rows come
        with 0."""
        return score

    def rescore(self, seen: Seen) -> Tensor:
        """The scores when a step has to drop something: those recorded, by default. Not called
        where they are `fixed`: those of new rows are recorded as well."""
        return self.score(seen) if self.fixed else seen.score

    # ---- choosing ------------------------------------------------------------------------------
    def forced(self, seen: Seen) -> Tensor:
        """[B, H, n] bool: rows that are kept in any case."""
        old = (seen.tokens - seen.draft - self.recent(seen))[:, None, None]
        return (seen.positions < self.sink_tokens) | (seen.positions >= old)

    def recent(self, seen: Seen) -> int | Tensor:
        """How many of the last tokens are kept in any case; [B] where sequences differ. It follows
        from ``seen.target`` alone."""
        return self.recent_tokens

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        """Which rows are kept, [B, H, n] bool: those in any case, and of the others the best. Ties:
        the lowest row. Where more is to be kept in any case than the budget holds, the newest."""
        forced = self.forced(seen) & seen.valid
        if bool((forced.sum(-1) > budgets).any()):
            forced &= best(seen.positions.float().masked_fill(~forced, EMPTY), budgets)
        return best(ranked(score, forced, seen), budgets) & seen.valid

    def worst(self, seen: Seen, score: Tensor | None = None) -> Tensor:
        """The row that each head drops where it drops one, [B, H]: the least of the others, by
        ``score`` or else by `rescore`; of equals the last. Where all are to be kept in any case,
        the oldest."""
        score = self.rescore(seen) if score is None else score
        given = score, seen.counts, seen.positions
        if type(self).forced is not Evictor.forced:
            return evict.least(*given, 0, seen.tokens, self.forced(seen))
        # A matter of positions alone: no mask need be made.
        return evict.least(*given, self.sink_tokens, seen.tokens - seen.draft - self.recent(seen))

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """New K and V of the rows of ``keep`` [B, H, n], where what goes is merged into what stays:
        [B, H, n, D] each (other rows are ignored), and the log of how many tokens each row stands
        for, [B, H, n], or None where it does not count. None: nothing is merged."""
        return None

    def narrowed(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        """After a prompt, which rows of ``keep`` [B, H, n] become narrow, [B, H, n] bool, and the
        channels of K that they keep, [B, H, D'] int64 ascending; a layer that has narrow rows keeps
        the channels it has. None: no row."""
        return None

    def rule(self, seen: Seen, limits: Ints) -> Rule | None:
        """What `choose` and `worst` go by at the steps to come, where it is recorded scores, first
        tokens and last ones alone: such a step is one compiled call. ``limits`` [B, H]: rows that
        heads are to hold. None: they are to be asked, as they are in a class that overrides one of
        them but not this."""
        if self.merges:
            return None
        if not decides(type(self), "fixed", SCORES):
            return Rule(limits, self._recent(seen), self.sink_tokens)
        ahead = self.score(seen.places(0, AHEAD)).contiguous()
        first = seen.tokens.cpu().numpy()
        return Rule(limits, self._recent(seen), self.sink_tokens, ahead=ahead, ahead_from=first)

    def _ends_rule(self, seen: Seen, heads: Tensor) -> Rule:
        """The rule where ``heads`` [B, H] keep the first tokens and the last, and others all."""
        recent = self._recent(seen)
        ends = self.sink_tokens + recent[:, None]
        limits = np.ascontiguousarray(np.where(heads.cpu().numpy(), ends, ALL_ROWS))
        return Rule(limits, recent, self.sink_tokens, within=1)

    def _recent(self, seen: Seen) -> Ints:
        """`recent` of each sequence, on the host."""
        found = torch.as_tensor(self.recent(seen), dtype=torch.int64).cpu()
        return found.expand(len(seen.tokens)).contiguous().numpy()

    # ---- across layers -------------------------------------------------------------------------
    def preference(self, seen: Seen) -> Tensor:
        """How much of the budget this layer deserves, [B] float: for evictors that cascade."""
        raise NotImplementedError

    def shares(self, preferences: Tensor, layers: int, target: Tensor, tokens: Tensor) -> Tensor:
        """Budgets of the layers so far, [l, B] int64, from their preferences [l, B]: budgets only
        shrink as layers come, and those of all ``layers`` sum to target * layers. ``tokens`` [B]:
        of the text; no layer can keep more."""
        raise NotImplementedError

    def choose_jointly(
        self, scores: list[Tensor], seen: list[Seen], target: Tensor
    ) -> list[Tensor]:
        """What all layers keep, for evictors that decide once all have been scored."""
        raise NotImplementedError


def decides(kind: type[Evictor], what: str, hooks: tuple[str, ...]) -> bool:
    """Whether an evictor has ``what``, and no class below the one that says so overrides a hook."""
    if not getattr(kind, what):
        return False
    order = [next(c for c in kind.__mro__ if name in vars(c)) for name in (what, *hooks)]
    return all(issubclass(order[0], each) for each in order[1:])


def ranked(score: Tensor, forced: Tensor, seen: Seen) -> Tensor:
    """Scores [B, H, n] to choose by: rows of ``forced`` first, those that there are not last."""
    return score.masked_fill(forced, BEST).masked_fill(~seen.valid, EMPTY)


def best(ranked: Tensor, budgets: Tensor) -> Tensor:
    """The ``budgets`` [...] highest of ``ranked`` [..., n] as a mask; of equals the lowest."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    within = _within(ranked, budgets)
    return torch.zeros_like(within).scatter_(-1, order, within)


@lru_cache(maxsize=64)
def _line(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as float32: the same at every step."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _within(rows: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts`` [...] of rows [..., n] as a mask."""
    return torch.arange(rows.shape[-1], device=rows.device) < counts[..., None]


@dataclass(frozen=True)
class Kept:
    """What a layer has kept: tokens seen, rows held by its heads on average, and evicted so far."""

    seen: int
    held: float
    evicted: int
    steps: int = 0
    budgets: tuple[int, ...] = field(default=())

    @property
    def share(self) -> float:
        """Rows held of tokens seen; 1.0 where none were seen."""
        return self.held / self.seen if self.seen else 1.0
