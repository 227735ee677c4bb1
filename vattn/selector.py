"""Which tokens a layer reads at a step: the protocol of selection policies.

A *selector* is a frozen dataclass. It says what it keeps of the keys (an index of records, one for
each full page of tokens, written once: `kernels.index`), scores the records for a query, and picks
within a budget. It owns no memory and touches none: `vattn.sparse` keeps the index, calls the
selector, and runs the kernels.

    append ──► keys of full pages ──► summarise ──► records            once for each page
    query  ──► scores(records) ──► joined over a group's heads ──► forced ──► best ──► Selection

At or below its budget, and in its dense layers, a selector answers None: the dense kernel reads
everything, and the result is bit-identical to a run without a selector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .allocator.errors import VattnError
from .kernels import choose, score
from .kernels.contract import EMPTY
from .kernels.index import Index, Part
from .kernels.kv import KV
from .kernels.selection import Selection

Evidence = Literal["position", "keys", "values", "query", "hidden", "mass", "offline", "random"]


class SelectorError(VattnError, ValueError):
    """A selector's parameter that is out of range, or a model that it does not suit."""


@dataclass(frozen=True)
class Caps:
    """What a selector declares: what it looks at, what it chooses, and for whom.

    Args:
        evidence: what decides.
        grain: "token" or "page".
        scope: "head": every KV head chooses for itself; "layer": one choice for all heads of it;
            "shared": one for several layers.
    """

    evidence: frozenset[Evidence]
    grain: Literal["token", "page"]
    scope: Literal["head", "layer", "shared"] = "head"


@dataclass(frozen=True, eq=False)
class Look:
    """What a selector sees of one layer at one step.

    Args:
        layer: which.
        kv: K and V; ``kv.lengths`` includes the query's own tokens.
        index: this layer's records; None for a selector without parts.
        lengths: [B] on the host, the same numbers as ``kv.lengths``.
        starts: [B] on the host, first readable token (padding on the left); None: 0.
        scale: of the scores.
        earlier: what layers before this one chose in this step.
        step: steps of this layer so far; seeds what is drawn.
    """

    layer: int
    kv: KV
    index: Index | None
    lengths: NDArray[np.int64]
    scale: float
    starts: NDArray[np.int64] | None = None
    earlier: Mapping[int, Selection] = field(default_factory=dict)
    step: int = 0

    def pages(self, page_tokens: int) -> int:
        """Pages of the longest sequence, the growing one included."""
        return -(-int(self.lengths.max()) // page_tokens)

    def counts(self, page_tokens: int) -> Tensor:
        """Pages of each sequence, the growing one included: [B] int64 on the device."""
        return torch.from_numpy(-(-self.lengths // page_tokens)).to(self.kv.key.device)

    def first_pages(self, tokens: int, page_tokens: int) -> int:
        """Pages from each sequence's first readable one on that hold its first ``tokens``."""
        within = 0 if self.starts is None else int((self.starts % page_tokens).max())
        return -(-(within + tokens) // page_tokens) if tokens else 0

    def readable(self, scores: Tensor, page_tokens: int) -> Tensor:
        """Scores [B, Hkv, R, pages] without those of pages of padding: they must not weigh in what
        a row shares out. In place."""
        starts = self.firsts(page_tokens)
        if starts is None:
            return scores
        page = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill_((page < starts[:, None])[:, None, None], EMPTY)

    def firsts(self, page_tokens: int) -> Tensor | None:
        """The first page of each sequence that has a readable token; None: 0."""
        if self.starts is None:
            return None
        return torch.from_numpy(self.starts // page_tokens).to(self.kv.key.device)


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Take the best pages within a budget; what most selectors are.

    Args:
        budget_tokens: most tokens of a sequence that a KV head reads at a step, all that is forced
            included. Sequences no longer than that are read whole, and all are at a step whose
            queries force more.
        page_tokens: tokens of a record; 1 for an index of single tokens.
        sink_tokens, recent_tokens: the first and last tokens are always read, in whole pages; the
            page that is still growing is, too.
        dense_layers: layers that are read whole; they count as read in `Activity`.
        join: how the query heads of a KV head agree, see `kernels.choose`.

    Raises:
        SelectorError: a parameter is out of range; the message names it.
    """

    budget_tokens: int = 2048
    page_tokens: int = 16
    sink_tokens: int = 4
    recent_tokens: int = 32
    dense_layers: tuple[int, ...] = ()
    join: choose.Join = "sum"

    caps: ClassVar[Caps]
    form: ClassVar[score.Form | None] = None  # of the records, where they are scored as they are

    def __post_init__(self) -> None:
        for name, least in (("page_tokens", 1), ("sink_tokens", 0), ("recent_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise SelectorError(f"{name} must be an int >= {least}, got {value!r}")
        size = self.page_tokens
        first, last = self.forced_pages(1)
        need = (first + last + 1) * size
        if not isinstance(self.budget_tokens, int) or self.budget_tokens < need:
            raise SelectorError(
                f"budget_tokens must be an int >= {need} (sink_tokens {self.sink_tokens} and "
                f"recent_tokens {self.recent_tokens} in pages of {size}, and one page to choose), "
                f"got {self.budget_tokens!r}"
            )
        if self.join not in ("sum", "max"):
            raise SelectorError(f'join must be "sum" or "max", got {self.join!r}')

    # ---- the index -----------------------------------------------------------------------------
    def parts(self, head_dim: int) -> tuple[Part, ...]:
        """What a record consists of; () where nothing is kept of the keys."""
        return ()

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of the index for each token and KV head."""
        return sum(part.nbytes for part in self.parts(head_dim)) / self.page_tokens

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        """The records of full pages: keys [Hkv, n, page_tokens, D], after the rotary embedding, in
        the cache's dtype -> one tensor [Hkv, n, width] for each part."""
        return ()

    def summarise_values(self, layer: int, values: Tensor) -> tuple[Tensor, ...]:
        """What records say of V [Hkv, n, page_tokens, Dv]: the parts behind `summarise`'s."""
        return ()

    def record(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """All parts of the records of full pages of K and V."""
        return *self.summarise(layer, keys), *self.summarise_values(layer, values)

    # ---- choosing ------------------------------------------------------------------------------
    def asked(self, query: Tensor, look: Look) -> Tensor:
        """The query [B, Hq, L, D] in the space of the records."""
        return query

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        """Scores of the first ``pages`` pages, estimates of their logits: query [B, Hq, L, D] ->
        [B, Hkv, Hq / Hkv * L, pages] float32; -inf (or anything, where forced) without a record."""
        form, index = self._records(look)
        return score.scores(form, self.asked(query, look), index, pages, scale=look.scale)

    def joined(self, scores: Tensor) -> Tensor:
        """One score a page from those of a KV head's rows: [B, Hkv, R, n] -> [B, Hkv, n]."""
        return choose.joined(scores, self.join)

    def pick(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and counts from joined scores [B, Hkv, pages], see `kernels.choose`."""
        return choose.top_k(joined, self.budget_tokens // self.page_tokens)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        """What this layer reads for ``query`` [B, Hq, L, D]; None: everything."""
        if self.reads_all(look):
            return None
        return Selection(*self._best(query, look), self.page_tokens)

    def _best(self, query: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        """The pages of `select`, by one kernel where a selector changes nothing on the way."""
        size, kind = self.page_tokens, type(self)
        pages, (first, last) = look.pages(size), self.forced_pages(query.shape[2])
        counts, starts = look.counts(size), look.firsts(size)
        first = max(first, look.first_pages(self.sink_tokens, size))
        if kind.joined is not Selector.joined or kind.pick is not Selector.pick:
            joined = self.joined(look.readable(self.scores(query, look, pages), size))
            return self.pick(choose.force(joined, counts, first, last, starts))
        k = self.budget_tokens // size
        how: dict[str, Any] = {"join": self.join, "first": first, "last": last}
        how |= {"pages": counts, "starts": starts}
        if kind.scores is not Selector.scores or starts is not None:
            found = look.readable(self.scores(query, look, pages), size)
            return score.best(found, k, **how)
        form, index = self._records(look)
        asked = self.asked(query, look)
        return score.best_records(form, asked, index, pages, k, scale=look.scale, **how)

    def _records(self, look: Look) -> tuple[score.Form, Index]:
        if self.form is None or look.index is None:
            raise SelectorError(f"{type(self).__name__} has no records to score")
        return self.form, look.index

    def fits(self, query_tokens: int) -> bool:
        """Whether the budget holds what so many query tokens force; else all is read."""
        return sum(self.forced_pages(query_tokens)) * self.page_tokens <= self.budget_tokens

    def reads_all(self, look: Look) -> bool:
        """Whether this layer is read whole at this step."""
        return look.layer in self.dense_layers or int(look.lengths.max()) <= self.budget_tokens

    def forced_pages(self, query_tokens: int) -> tuple[int, int]:
        """First and last pages that are read in any case; the last hold the recent tokens of each
        of ``query_tokens`` queries, and the page that is still growing."""
        size = self.page_tokens
        last = -(-(self.recent_tokens + query_tokens - 1) // size) + (1 if size > 1 else 0)
        return -(-self.sink_tokens // size), max(1, last)
