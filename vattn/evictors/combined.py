"""Evictors made of evictors: what a `Wrapper` does not change, its base decides."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from vattn.batch import Ints
from vattn.evictor import BEST, Evictor, EvictorError, Seen, Step
from vattn.selector import Caps

TRAITS = ("decodes", "watches", "cascades", "joint", "adaptive", "merges", "narrows")
FIELDS = tuple(each.name for each in fields(Evictor))


@dataclass(frozen=True, kw_only=True)
class Wrapper(Evictor):
    """Does as its base does, in every hook; has its base's budget, and drops tokens when it does.

    Args:
        base: an evictor.
    """

    base: Evictor = field(kw_only=False)
    budget: float | int = field(init=False, repr=False)
    sink_tokens: int = field(init=False, repr=False)
    recent_tokens: int = field(init=False, repr=False)
    every: int = field(init=False, repr=False)
    dense_layers: tuple[int, ...] = field(init=False, repr=False)

    caps: ClassVar[Caps] = Caps(frozenset(), "token")  # an instance has those of its base

    def __post_init__(self) -> None:
        if not isinstance(self.base, Evictor):
            raise EvictorError(f"base must be an evictor, got {self.base!r}")
        for name in (*FIELDS, *TRAITS, "caps"):
            # What is a class's own elsewhere is an instance's here: the base's.
            object.__setattr__(self, name, getattr(self.base, name))
        super().__post_init__()

    def target(self, tokens: Tensor) -> Tensor:
        return self.base.target(tokens)

    def budgets(self, seen: Seen) -> Tensor:
        return self.base.budgets(seen)

    def rows(self, tokens: int) -> int:
        return self.base.rows(tokens)

    def score(self, seen: Seen) -> Tensor:
        return self.base.score(seen)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        return self.base.observe(score, step)

    def rescore(self, seen: Seen) -> Tensor:
        return self.base.rescore(seen)

    def forced(self, seen: Seen) -> Tensor:
        return self.base.forced(seen)

    def recent(self, seen: Seen) -> int | Tensor:
        return self.base.recent(seen)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return self.base.choose(score, seen, budgets)

    def worst(self, seen: Seen, score: Tensor | None = None) -> Tensor:
        return self.base.worst(seen, score)

    def rule(self, seen: Seen, limits: Ints) -> None:
        return None  # it is not known what of the base a wrapper changes

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        return self.base.merged(seen, keep)

    def narrowed(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.base.narrowed(seen, keep)

    def preference(self, seen: Seen) -> Tensor:
        return self.base.preference(seen)

    def shares(self, preferences: Tensor, layers: int, target: Tensor, tokens: Tensor) -> Tensor:
        return self.base.shares(preferences, layers, target, tokens)

    def choose_jointly(
        self, scores: list[Tensor], seen: list[Seen], target: Tensor
    ) -> list[Tensor]:
        return self.base.choose_jointly(scores, seen, target)


@dataclass(frozen=True, kw_only=True)
class Protected(Wrapper):
    """Reserve a share of the budget for each end of the text; the base chooses the rest.

    Their scores are made the best that there is, so the base has to be one that goes by scores.

    Args:
        share: of the target, at each end; less where the base's own first and last tokens leave
            less.

    Source: arXiv 2605.18053 (10%): it matters more than the score.
    """

    share: float = 0.1

    source: ClassVar[str] = "arXiv 2605.18053"
    summary: ClassVar[str] = "another evictor, with a share of the budget for both ends of the text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 0.5:
            raise EvictorError(f"share must be in [0, 0.5], got {self.share!r}")
        caps = self.base.caps
        caps = Caps(caps.evidence | {"position"}, caps.grain, caps.scope)
        object.__setattr__(self, "caps", caps)

    def forced(self, seen: Seen) -> Tensor:
        return self.base.forced(seen) | self.ends(seen)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return self.base.choose(self._raised(score, seen), seen, budgets)

    def worst(self, seen: Seen, score: Tensor | None = None) -> Tensor:
        score = self.rescore(seen) if score is None else score
        return self.base.worst(seen, self._raised(score, seen))

    def choose_jointly(
        self, scores: list[Tensor], seen: list[Seen], target: Tensor
    ) -> list[Tensor]:
        raised = [self._raised(*each) for each in zip(scores, seen, strict=True)]
        return self.base.choose_jointly(raised, seen, target)

    def ends(self, seen: Seen) -> Tensor:
        """[B, H, n] bool: rows within the reserve."""
        left = seen.target - self.sink_tokens - self.recent_tokens
        many = (seen.target * self.share).long().minimum(left // 2).clamp_min(0)[:, None, None]
        return (seen.positions < many) | (seen.age < many)

    def _raised(self, score: Tensor, seen: Seen) -> Tensor:
        return score.masked_fill(self.ends(seen), BEST)


@dataclass(frozen=True, kw_only=True)
class PerLayer(Evictor):
    """An evictor for each layer. All have one budget and drop tokens at the same steps.

    Args:
        evictors: as many as the model has layers; none that decides for several layers at once.
    """

    evictors: tuple[Evictor, ...] = field(kw_only=False)
    budget: float | int = field(init=False, repr=False)
    sink_tokens: int = field(init=False, repr=False)
    recent_tokens: int = field(init=False, repr=False)
    every: int = field(init=False, repr=False)
    dense_layers: tuple[int, ...] = field(init=False, repr=False)

    caps: ClassVar[Caps] = Caps(frozenset(), "token")  # an instance has those of all of them
    source: ClassVar[str] = "any"
    summary: ClassVar[str] = "an evictor for each layer"

    def __post_init__(self) -> None:
        all_of = self.evictors
        if not isinstance(all_of, tuple) or not all(isinstance(each, Evictor) for each in all_of):
            raise EvictorError(f"evictors must be a tuple of evictors, got {all_of!r}")
        if not all_of:
            raise EvictorError("evictors must have one for each layer, got ()")
        for name in ("budget", "every"):
            values = {getattr(each, name) for each in all_of}
            if len(values) > 1:
                raise EvictorError(f"evictors must agree on {name}, got {sorted(values)}")
        for each in all_of:
            if each.cascades or each.joint:
                raise EvictorError(
                    f"{type(each).__name__} decides for all layers: use it by itself"
                )
        dense = tuple(i for i, each in enumerate(all_of) if i in each.dense_layers)
        caps = [each.caps for each in all_of]
        evidence = frozenset().union(*(each.evidence for each in caps))
        scopes = {each.scope for each in caps}
        scope = scopes.pop() if len(scopes) == 1 else "head"
        common = {
            "budget": all_of[0].budget,
            "sink_tokens": min(each.sink_tokens for each in all_of),
            "recent_tokens": min(each.recent_tokens for each in all_of),
            "every": all_of[0].every,
            "dense_layers": dense,
            "caps": Caps(evidence, "token", scope),
        }
        common |= {name: any(getattr(each, name) for each in all_of) for name in TRAITS}
        for name, value in common.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    def of(self, layer: int) -> Evictor:
        """The evictor of a layer."""
        if layer >= len(self.evictors):
            raise EvictorError(f"evictors are {len(self.evictors)}: the model has layer {layer}")
        return self.evictors[layer]

    def target(self, tokens: Tensor) -> Tensor:
        """The largest: they differ where a share of a short prompt is less than some evictor keeps
        in any case."""
        return torch.stack([each.target(tokens) for each in self.evictors]).amax(0)

    def budgets(self, seen: Seen) -> Tensor:
        return self.of(seen.layer).budgets(seen)

    def rows(self, tokens: int) -> int:
        # At least one: that there is a query tells a prompt from a step.
        return max(1, *(each.rows(tokens) for each in self.evictors))

    def score(self, seen: Seen) -> Tensor:
        one = self.of(seen.layer)
        wanted, query = one.rows(seen.fresh), seen.query
        if query is not None:
            query = query[:, :, -wanted:] if wanted else None
        return one.score(replace(seen, query=query))

    def observe(self, score: Tensor, step: Step) -> Tensor:
        return self.of(step.layer).observe(score, step)

    def rescore(self, seen: Seen) -> Tensor:
        return seen.score if self._rests(seen) else self.of(seen.layer).rescore(seen)

    def forced(self, seen: Seen) -> Tensor:
        return self.of(seen.layer).forced(seen)

    def recent(self, seen: Seen) -> int | Tensor:
        return self.of(seen.layer).recent(seen)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        one = self.of(seen.layer)
        return seen.valid if self._rests(seen) else one.choose(score, seen, budgets)

    def worst(self, seen: Seen, score: Tensor | None = None) -> Tensor:
        return self.of(seen.layer).worst(seen, score)

    def rule(self, seen: Seen, limits: Ints) -> None:
        return None  # a layer may rest

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        return self.of(seen.layer).merged(seen, keep)

    def narrowed(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.of(seen.layer).narrowed(seen, keep)

    def _rests(self, seen: Seen) -> bool:
        """Whether this is a step, and the layer's evictor drops tokens after prompts alone."""
        return seen.query is None and not self.of(seen.layer).decodes
