"""An evictor at work: what attention needs is recorded, what is not worth keeping goes.

    eviction = Eviction(heads, evictors.H2O(budget=0.25))
    eviction.append(layer, k, v)                        new rows of every sequence
    out = eviction.attend(query, layer)                 attends, observes, and evicts

One call of `attend` for each layer and step, layers in order. Calls with more than `MOST_TOKENS`
queries, and a layer's first, are prompts: after each, the layer keeps what the budget allows (a
share is a share of the text up to there) and its other pages go back to the pool. So a prompt holds
no more than one whole layer beside what the layers before it have kept; an evictor that decides for
all layers jointly, and dense layers, hold more. Others are decode steps: read a prompt in pieces of
more than `MOST_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .batch import Ints
from .evictor import CHOICES, SCORES, Evictor, EvictorError, Kept, Seen, Step, decides
from .heads import HeadCache
from .kernels import stream
from .kernels.compact import as_rows
from .kernels.evict import Rule
from .kernels.kv import MOST_TOKENS
from .layout import LayoutError
from .sdpa import scaled_dot_product_attention

SCORE = "score"
# Told of each eviction: layer, what was seen, and the mask of what stayed.
Watcher = Callable[[int, Seen, Tensor], None]


@dataclass
class State:
    """What is recorded of one layer beside its rows."""

    prompt: Ints  # [B] tokens of the text when the last prompt ended
    fresh: Ints  # [B] tokens of the last `append`
    scored: Ints  # [B] tokens of the text whose scores are recorded, where scores are fixed
    given: int = 0  # its rows, padding among them
    steps: int = 0
    evicted: int = 0
    target: Tensor | None = None  # [B] of that prompt
    budgets: Tensor | None = None  # [B, H] after the last prompt, once they are known
    limits: Ints | None = None  # `budgets` on the host
    rule: Rule | None = None  # the same as compiled steps take it
    seen: Seen | None = None  # of a prompt that waits for the other layers
    scores: Tensor | None = None

    def hold(self, budgets: Tensor | None) -> None:
        """Set the budgets."""
        self.budgets, self.rule = budgets, None
        self.limits = None
        if budgets is not None:
            self.limits = np.ascontiguousarray(budgets.cpu().numpy(), np.int64)

    def picked(self, order: list[int]) -> State:
        """The same of sequences ``order``."""
        target = None if self.target is None else self.target[order]
        prompt, fresh = self.prompt[order], self.fresh[order]
        scored = np.zeros_like(fresh)  # a score may be that of a place in the batch
        twin = replace(self, prompt=prompt, fresh=fresh, scored=scored, target=target)
        twin.hold(None if self.budgets is None else self.budgets[order])
        return twin


class Eviction:
    """An evictor over a `HeadCache`.

    Args:
        heads: what is kept; this object appends to it and shrinks it.
        evictor: what to keep, see `vattn.evictors`.
        outputs: the weight behind attention of each layer, [model width, Hq * D], for evictors that
            ask for it (CriticalKV).

    Raises:
        EvictorError: the evictor does not suit the cache.
    """

    def __init__(
        self, heads: HeadCache, evictor: Evictor, outputs: list[Tensor] | None = None
    ) -> None:
        self.heads, self.outputs = heads, outputs
        self.watchers: list[Watcher] = []
        self._serve(evictor)
        self._states = [self._fresh() for _ in range(heads.layers)]
        self._preferences: list[Tensor] = []

    def clear(self, layer: int | None = None) -> None:
        """Forget what was recorded of a layer, or of all: the next call of it is a prompt."""
        for i in range(self.heads.layers) if layer is None else (layer,):
            self._states[i] = self._fresh()

    def crop(self, layer: int, tokens: int) -> None:
        """Forget the last tokens of the text, see `HeadCache.crop`. What they have added to scores
        stays."""
        self.heads.crop(layer, tokens)
        state = self._states[layer]
        budgets = state.budgets if self.evictor.cascades else None
        left = self.heads.tokens[layer]
        self._begin(layer, np.minimum(state.prompt, left))
        state.scored = np.minimum(state.scored, left)
        state.hold(budgets)

    def follow(self, evictor: Evictor) -> None:
        """Another evictor from now on, with its own budget for the prompts there were. Scores
        stay.

        Raises:
            EvictorError: it does not suit the cache; the one before goes on.
        """
        self._serve(evictor)
        for layer, state in enumerate(self._states):
            self._begin(layer, state.prompt)
            state.scored = np.zeros_like(state.scored)  # those of another evictor

    def picked(self, heads: HeadCache, order: list[int]) -> Eviction:
        """The same over ``heads``, whose sequence i holds what sequence ``order[i]`` held here."""
        twin = Eviction(heads, self.evictor, self.outputs)
        index = torch.tensor(order, device=heads.device)
        twin.watchers = self.watchers
        twin._preferences = [each[index] for each in self._preferences]
        twin._states = [state.picked(order) for state in self._states]
        return twin

    def append(self, layer: int, k: Tensor, v: Tensor, counts: Ints | None = None) -> None:
        """New rows [B, Hkv, n, D] of a layer, see `HeadCache.append`; ``counts`` for a prompt that
        is padded on the left.

        Raises:
            LayoutError: a sequence gets no token, or a decode step is padded. Otherwise as
            `HeadCache.append`; nothing has changed.
        """
        new = k.shape[2] if k.dim() == 4 else 0
        added = np.full(self.heads.batch, new) if counts is None else np.asarray(counts)
        padded = counts is not None and added.size and int(added.min()) < new
        if padded and (int(added.min()) < 1 or not self._is_prompt(layer, new)):
            raise LayoutError(
                f"counts are {added.tolist()} of {new} tokens: every sequence needs at least one, "
                "and a decode step all of them"
            )
        self.heads.append(layer, k, v, counts)
        self._states[layer].given = new
        self._states[layer].fresh = added

    def attend(
        self,
        query: Tensor,
        layer: int,
        *,
        scale: float | None = None,
        hidden: Tensor | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Attend to what the layer holds, [B, Hq, L, D], the queries being the last L tokens; then
        evict. ``hidden`` [B, L, width] is the input of this layer's attention, for evictors that
        ask for it. ``attended`` is the result where the caller has computed it.

        Raises:
            LayoutError: the query does not suit the cache.
            EvictorError: the evictor asks for what it was not given.
        """
        heads, state, evictor = self.heads, self._states[layer], self.evictor
        length = query.shape[2]
        factor = query.shape[3] ** -0.5 if scale is None else float(scale)
        prompt = self._is_prompt(layer, length)
        if state.given < length:
            raise LayoutError(
                f"layer {layer} got {state.given} rows and {length} queries: append first, through "
                "this Eviction"
            )
        lse = logits = None
        if attended is None:
            if length > int(heads.tokens[layer].min()):
                raise LayoutError(
                    f"layer {layer} holds fewer tokens than the {length} queries: append first; "
                    "where they are padded, pass attended"
                )
            if evictor.watches and not prompt and layer not in evictor.dense_layers:
                attended, lse, logits = heads.attend_logits(query, layer, scale=factor)
            else:
                attended, lse = heads.attend_lse(query, layer, scale=factor)
        if layer in evictor.dense_layers:
            state.prompt = heads.tokens[layer].copy()
            return attended
        if prompt:
            before = replace(state)
            try:
                self._prompt(query, layer, factor, length, hidden)
            except BaseException:
                self._states[layer] = before  # budgets are still those of the prompt before
                raise
        else:
            if evictor.watches and logits is None:
                logits = heads.logits(query, layer, factor)
            self._step(layer, length, factor, lse, logits)
        return attended

    def kept(self) -> list[Kept]:
        """What each layer has kept so far."""
        found = []
        for layer, state in enumerate(self._states):
            lengths = self.heads.held(layer)
            found.append(
                Kept(
                    int(self.heads.tokens[layer].sum()),
                    float(lengths.mean(1).sum()),
                    state.evicted,
                    state.steps,
                    tuple(lengths.flatten().tolist()),
                )
            )
        return found

    # ---- prompts -------------------------------------------------------------------------------
    def _prompt(
        self, query: Tensor, layer: int, scale: float, length: int, hidden: Tensor | None
    ) -> None:
        state, evictor = self._states[layer], self.evictor
        if layer == self._every[0]:
            self._preferences.clear()
        self._begin(layer, self.heads.tokens[layer].copy())
        seen = self._seen(layer, scale)
        seen.fresh, seen.hidden = length, hidden
        # Padded prompts are of different lengths: each has queries of its own.
        fresh = state.fresh.tolist()
        padded = min(fresh) < length
        parts = [seen.alone(b, n) for b, n in enumerate(fresh)] if padded else [seen]
        for b, part in enumerate(parts):
            wanted = min(evictor.rows(part.fresh), part.fresh, int(part.counts.min()))
            if wanted:
                rows = query[b : b + 1] if padded else query
                part.query = rows[:, :, length - wanted :]
        found = [evictor.score(part) for part in parts]
        scores = _side_by_side(found)
        seen.score.copy_(scores.masked_fill(~seen.valid, 0.0))
        state.scored = state.prompt
        if evictor.joint:
            state.seen, state.scores, seen.query = seen, scores, None
            if layer == self._every[-1]:
                self._jointly(seen.target)
            return
        if evictor.cascades:
            self._preferences.append(torch.cat([evictor.preference(part) for part in parts]))
            self._cascade(layer, seen)
            return
        chosen = [
            evictor.choose(score, part, evictor.budgets(part))
            for score, part in zip(found, parts, strict=True)
        ]
        if not (evictor.narrows and self._narrow(layer, seen, parts, chosen)):
            self._keep(layer, seen, _side_by_side(chosen))

    def _narrow(self, layer: int, seen: Seen, parts: list[Seen], chosen: list[Tensor]) -> bool:
        """Keep the rows of the masks, of which some become narrow; False where none does."""
        found = [
            self.evictor.narrowed(part, mask & part.valid)
            for part, mask in zip(parts, chosen, strict=True)
        ]
        some = [each for each in found if each is not None]
        if len(some) < len(found):
            return False
        mask = _side_by_side(chosen) & seen.valid
        gone = int(seen.counts.sum()) - int(mask.sum())
        for watch in self.watchers if gone else ():
            watch(layer, seen, mask)
        old = _side_by_side([rows for rows, _ in some]) & mask
        self.heads.narrow(layer, mask, old, torch.cat([channels for _, channels in some]))
        self._states[layer].evicted += gone
        self.heads.release()
        return True

    def _cascade(self, layer: int, seen: Seen) -> None:
        """Budgets of all layers so far follow from what they prefer; they only shrink."""
        count = len(self._every)
        preferences = torch.stack(self._preferences)
        shares = self.evictor.shares(preferences, count, seen.target, seen.tokens)
        for i, share in zip(self._every, shares, strict=False):
            now = seen if i == layer else self._seen(i, seen.scale)
            budgets = share[:, None].expand(now.counts.shape)
            self._states[i].hold(budgets)
            self._keep(i, now, self.evictor.choose(now.score, now, budgets))

    def _jointly(self, target: Tensor) -> None:
        layers = [i for i, state in enumerate(self._states) if state.seen is not None]
        seen = [self._states[i].seen for i in layers]
        scores = [self._states[i].scores for i in layers]
        masks = self.evictor.choose_jointly(scores, seen, target)  # type: ignore[arg-type]
        for i, some, mask in zip(layers, seen, masks, strict=True):
            assert some is not None
            self._keep(i, some, mask)
            self._states[i].seen = self._states[i].scores = None

    def _serve(self, evictor: Evictor) -> None:
        """Take an evictor that suits the cache."""
        layers = self.heads.layers
        for layer in evictor.dense_layers:
            if not 0 <= layer < layers:
                raise EvictorError(
                    f"dense_layers has {layer}: the cache has layers 0 to {layers - 1}"
                )
        if evictor.narrows and (evictor.cascades or evictor.joint or evictor.merges):
            raise EvictorError(
                f"{type(evictor).__name__} narrows rows, and decides for several layers or merges "
                "tokens as well: it can be one of these"
            )
        self.evictor = evictor
        self._every = [i for i in range(layers) if i not in evictor.dense_layers]
        kind, compiled = type(evictor), stream.serves(self.heads.ranges.key)
        self._scores_stay = decides(kind, "fixed", SCORES)
        self._rules = compiled and evictor.every == 1 and decides(kind, "rule", CHOICES)

    def _begin(self, layer: int, tokens: Ints) -> None:
        """A prompt of so many tokens is what budgets are for from now on."""
        state = self._states[layer]
        state.prompt = tokens
        state.target = self.evictor.target(torch.from_numpy(tokens).to(self.heads.device))
        state.hold(None)

    def _tokens(self, layer: int) -> Tensor:
        return torch.from_numpy(self.heads.tokens[layer].copy()).to(self.heads.device)

    def _fresh(self) -> State:
        zeros = np.zeros(self.heads.batch, np.int64)
        return State(zeros, zeros, zeros)

    def _is_prompt(self, layer: int, length: int) -> bool:
        return length > MOST_TOKENS or not self._states[layer].prompt.any()

    # ---- steps ---------------------------------------------------------------------------------
    def _step(
        self, layer: int, length: int, scale: float, lse: Tensor | None, logits: Tensor | None
    ) -> None:
        state, evictor = self._states[layer], self.evictor
        state.steps += 1
        if logits is not None:
            self._observe(layer, length, logits, lse)
        if not evictor.decodes or not self._is_due(layer, length):
            return
        if state.rule is not None and self._drop_least(layer, state.rule, length):
            return
        if state.budgets is None:
            state.hold(evictor.budgets(self._seen(layer, scale)))
        assert state.limits is not None
        draft = length - 1
        # On the host, where lengths are known: a device need not be waited for.
        excess = self.heads.lengths(layer) - state.limits - draft
        if not evictor.adaptive and not (excess > 0).any():
            return
        seen = self._seen(layer, scale)
        seen.fresh, seen.draft = length, draft
        scores = self._fixed(layer, seen) if self._scores_stay else None
        if self._rules:
            state.rule = evictor.rule(seen, state.limits)
        if type(evictor).choose is Evictor.choose and (excess == 1).all():
            self._drop_one(layer, seen, evictor.worst(seen, scores))
            return
        if scores is None:
            scores = evictor.rescore(seen)
        assert state.budgets is not None
        mask = evictor.choose(scores, seen, state.budgets + draft)
        if evictor.merges:
            self._keep(layer, seen, mask)
        else:
            self._drop(layer, seen, seen.valid & ~mask)

    def _is_due(self, layer: int, length: int) -> bool:
        """Whether a step of so many tokens is one at which something may go."""
        every = self.evictor.every
        if every == 1:
            return True
        # By tokens, not steps: a step that failed and is taken back leaves no trace.
        behind = int((self.heads.tokens[layer] - self._states[layer].prompt).max())
        return behind // every != (behind - length) // every

    def _drop_least(self, layer: int, rule: Rule, length: int) -> bool:
        """Drop a row of each head by one compiled call, or none; False where it takes more."""
        state, fixed = self._states[layer], rule.ahead is not None
        tokens = self.heads.tokens[layer]
        if self.watchers or (fixed and (length > 1 or (tokens - state.scored).max() > 1)):
            return False
        gone = self.heads.forget_least(layer, rule, SCORE, length - 1)
        if gone is None:
            return False
        if gone:
            state.scored = tokens.copy()
            state.evicted += gone
        return True

    def _fixed(self, layer: int, seen: Seen) -> Tensor:
        """Scores that never change: those of new rows are recorded. They lie behind all others, as
        nothing has gone since the last time."""
        state, tokens = self._states[layer], self.heads.tokens[layer]
        new = int((tokens - state.scored).max())
        if new < int(self.heads.lengths(layer).min()):
            rows = seen.counts[..., None] + torch.arange(-new, 0, device=seen.counts.device)
            seen.score.scatter_(2, rows, self.evictor.score(seen.places(-new, new)))
        else:
            seen.score.copy_(self.evictor.score(seen))
        state.scored = tokens.copy()
        return seen.score

    def _observe(self, layer: int, length: int, logits: Tensor, lse: Tensor | None) -> None:
        """Let the evictor see the attention of a decode step."""
        heads, state = self.heads, self._states[layer]
        if lse is None:
            lse = logits.logsumexp(-1)
        step = Step(
            logits,
            lse.view(logits.shape[:3]),
            heads.positions(layer),
            heads.counts(layer),
            self._tokens(layer),
            length,
            state.steps - 1,
            layer,
        )
        track = heads.track(layer, SCORE)
        track.copy_(self.evictor.observe(track, step))

    # ---- inside --------------------------------------------------------------------------------
    def _seen(self, layer: int, scale: float) -> Seen:
        heads, state, narrow = self.heads, self._states[layer], None
        assert state.target is not None
        if heads.narrowed is not None:
            narrow = torch.from_numpy(heads.narrowed.counts(layer)).to(heads.device)
        return Seen(
            layer,
            heads.layers,
            heads.positions(layer),
            heads.counts(layer),
            self._tokens(layer),
            state.target,
            heads.track(layer, SCORE),
            scale,
            partial(heads.kv, layer),
            output=None if self.outputs is None else self.outputs[layer],
            log_weight=heads.log_weights(layer),
            narrow=narrow,
        )

    def _drop_one(self, layer: int, seen: Seen, rows: Tensor) -> None:
        """Drop one row of every head."""
        if self.watchers:
            keep = seen.valid.scatter(2, rows[..., None], False)
            for watch in self.watchers:
                watch(layer, seen, keep)
        # An evictor that finds them by itself may err; on the host a look costs nothing.
        ours = rows.is_cuda and type(self.evictor).worst is Evictor.worst
        self.heads.forget_one(layer, rows, trusted=ours)
        self._states[layer].evicted += rows.numel()

    def _drop(self, layer: int, seen: Seen, drop: Tensor) -> None:
        """Drop the rows of a mask at a step: as many rows move, and no page does."""
        each = drop.sum(-1)
        gone = int(each.sum())
        if not gone:
            return
        for watch in self.watchers:
            watch(layer, seen, seen.valid & ~drop)
        if int(each.max()) == 1:
            rows = drop.to(torch.uint8).argmax(-1)
            self.heads.forget_one(layer, rows.masked_fill(each == 0, -1))
        else:
            self.heads.forget(layer, drop)
        self._states[layer].evicted += gone

    def _keep(self, layer: int, seen: Seen, mask: Tensor) -> None:
        """Keep the rows of a mask and give the pages of the others back."""
        mask = mask & seen.valid
        gone = int(seen.counts.sum()) - int(mask.sum())
        if not gone:
            return
        merged = self.evictor.merged(seen, mask) if self.evictor.merges else None
        if merged is not None:  # it may be views of rows that are about to move
            merged = (merged[0].clone(), merged[1].clone(), merged[2])
        for watch in self.watchers:
            watch(layer, seen, mask)
        rows, counts = as_rows(mask)
        self.heads.keep(layer, rows, counts)
        if merged is not None:
            self.heads.replace(layer, rows, counts, *merged)
        self._states[layer].evicted += gone
        self.heads.release()


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """[1, H, n] of each sequence as one [B, H, n]; 0 behind the shorter ones."""
    longest = max(part.shape[2] for part in parts)
    if all(part.shape[2] == longest for part in parts):
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    out = parts[0].new_zeros(len(parts), parts[0].shape[1], longest)
    for row, part in zip(out, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    return out


def dense_prompt(
    query: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of a prompt that is all there is: no row need be read back."""
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        query, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )
