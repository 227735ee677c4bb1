"""What the full-attention layers of a transformers cache with a policy share: a HeadCache and an
Eviction over it.

    update ──► rows are handed out ──► "vattn" attention ──► appended, attended, evicted

transformers builds masks and positions from the length of the text, so that is what is counted
here (`seen`, padding included); how many rows are held is the policy's business. Which tokens are
padding is known from the mask alone, and that comes with the attention: so the rows wait for it.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vattn.allocator.errors import ClosedError, VattnError
from vattn.allocator.pool import Pool
from vattn.batch import Ints
from vattn.device import open_pool
from vattn.eviction import Eviction, dense_prompt
from vattn.evictor import Evictor
from vattn.heads import HeadCache
from vattn.heads_order import reorder, selected
from vattn.hf_attention import UnsupportedError
from vattn.hf_batch import Orders, check_fits
from vattn.hf_sparse import left_padding
from vattn.layout import Layout, LayoutError

if TYPE_CHECKING:
    from vattn.cache import KVCache
    from vattn.hf_store import Options
    from vattn.usage import Usage

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Owner:
    """Whoever holds this keeps a cache or a pool open; it closes at once when the last holder
    goes."""

    def __init__(self, owned: KVCache | Pool) -> None:
        weakref.finalize(self, owned.close)


def check_policy(options: Options) -> None:
    """Raise where the options of a cache do not go with its policy.

    Raises:
        LayoutError: the policy is none. UnsupportedError: another option excludes it.
    """
    policy = options.policy
    if policy is None:
        if options.outputs is not None:
            raise UnsupportedError("outputs are for a policy: pass one, or leave them out")
        return
    if not isinstance(policy, Evictor):
        raise LayoutError(
            f"policy must be one of vattn.evictors, such as H2O(budget=0.25), got {policy!r}; what "
            "only chooses what to read is selector="
        )
    for name, wrong, reason in (
        ("selector", options.selector is not None, "a selector wants what a policy forgets"),
        ("tiers", options.tiers is not None, "tiers put aside what a policy drops"),
        ("trace", options.trace, "pages of single heads are not traced"),
        ("group_layers", options.group_layers != 1, "every head has rows of its own"),
        ("VattnStaticCache", options.zero_backed, "its shapes stay, whatever is evicted"),
    ):
        if wrong:
            raise UnsupportedError(
                f"policy and {name} do not go together, {reason}: leave one of them out"
            )


class HeadStore:
    """The kept rows of one transformers cache.

    `copy.deepcopy` makes another with rows of its own in the same pool. When the last reference
    goes, the rows go; with the last copy the pool closes, too.
    """

    def __init__(self, options: Options, policy: Evictor) -> None:
        self.options, self.policy = options, policy
        self.eviction: Eviction | None = None
        self.seen: list[int] = []  # tokens of each layer, kept or not, padding included
        self._pool: Pool | None = None
        self._owner: Owner | None = None
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}
        self._orders = Orders()
        self._held: list[HeadCache] = []
        weakref.finalize(self, _close, self._held)

    # ---- life --------------------------------------------------------------------------------
    def add_layer(self) -> int:
        """Count one more layer in; returns its index. Only before the first tokens."""
        if self._held:
            raise UnsupportedError("layers cannot be added to a cache that already holds tokens")
        self.seen.append(0)
        return len(self.seen) - 1

    @property
    def heads(self) -> HeadCache:
        """The HeadCache; raises ClosedError before the first tokens."""
        if not self._held:
            raise ClosedError("this cache holds no tokens yet; run the model once")
        return self._held[0]

    @property
    def opened(self) -> bool:
        """Whether there is a HeadCache."""
        return bool(self._held)

    def pool(self, like: Tensor) -> Pool:
        """The pool of all rows of this cache, sliding layers' included; ``like`` [B, Hkv, n, D]."""
        options = self.options
        layout = Layout(
            1,
            1,
            like.shape[3],
            options.max_tokens,
            dtype=DTYPES[like.dtype],
            page_bytes=options.page_bytes,
        )
        if self._pool is None or self._pool.page_bytes != layout.page:
            self._pool = open_pool(layout, like.device, budget_bytes=options.budget_bytes)
            self._owner = Owner(self._pool)
        return self._pool

    def clear(self, layer: int) -> None:
        """Forget a layer's rows; the HeadCache closes with the last layer."""
        self._orders.pop(layer)
        self._handed.pop(layer, None)
        self.seen[layer] = 0
        if self._held and self.eviction is not None:
            self.heads.clear(layer)
            self.eviction.clear(layer)
            if not any(self.seen):
                self._hold(None)

    # ---- one layer ---------------------------------------------------------------------------
    def hand_out(self, layer: int, key: Tensor, value: Tensor) -> None:
        """New rows [B, Hkv, n, D], which the attention will bring back.

        Raises:
            UnsupportedError: it has not brought back the last ones; a later step may do better.
            LayoutError: a batch of another size than there is.
        """
        if layer in self._handed:
            self._handed.clear()
            raise UnsupportedError(
                f"layer {layer} has a policy, but its last step was read by another attention, "
                'which saw the new tokens only: call model.set_attn_implementation("vattn") (after '
                "vattn.hf.register()), or make the cache without a policy"
            )
        if layer in self._orders:
            raise UnsupportedError(
                f"layer {layer} was reordered on its own; call the method of the whole cache"
            )
        if any(self.seen):
            self._check(layer, key)
        self._handed[layer] = (key, value)

    def take_back(self, layer: int) -> None:
        """The attention refuses what was handed out: the step has not been."""
        self._handed.pop(layer, None)

    def attend(
        self,
        layer: int,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Append the rows handed out, attend to what is held, [B, Hq, L, D], and evict.

        Raises:
            UnsupportedError: no rows were handed out, gradients are wanted, or a mask that is not
                padding on the left; nothing has changed.
            OutOfPages, OutOfRange, MapLimitError, DriverError: as `HeadCache.append`; nothing has
                changed in this layer.
            EvictorError: the policy asks for what it is not given; likewise.
        """
        rows = self._handed.pop(layer, None)
        if rows is None or rows[0].shape[2] != query.shape[2]:
            raise UnsupportedError(
                f"layer {layer} has a policy, and its keys are read twice, or by other queries "
                "than their tokens': make the cache without a policy for this model"
            )
        if query.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                "a cache with a policy has no gradients: run the model under torch.no_grad()"
            )
        key, value = rows
        seen, length = self.seen[layer], key.shape[2]
        counts = self._real(layer, query, mask)
        attended = None if seen else dense_prompt(query, key, value, mask, scale)
        eviction = self._ready(key)
        eviction.append(layer, key, value, counts)
        try:
            out = eviction.attend(query, layer, scale=scale, hidden=hidden, attended=attended)
        except VattnError:
            if seen:
                eviction.crop(layer, length)
            else:
                self.clear(layer)
            raise
        self.seen[layer] += length
        return out

    def crop(self, layer: int, tokens: int) -> None:
        """Take the last tokens of the text back; what was evicted stays evicted.

        Raises:
            UnsupportedError: a padded prompt would lose all its tokens, and others not all.
            KeepError: a layer holds some of the tokens as narrow rows; nothing has changed.
        """
        tokens = min(tokens, self.seen[layer])
        if tokens == self.seen[layer]:
            self.clear(layer)
            return
        shortest = int(self.heads.tokens[layer].min())
        if tokens >= shortest:
            raise UnsupportedError(
                f"cannot take {tokens} tokens back: a padded sequence of the batch has {shortest}; "
                "reset() the cache, or crop less"
            )
        assert self.eviction is not None
        for other, seen in enumerate(self.seen):  # a layer that refuses does so before any is cut
            if seen == self.seen[layer]:
                self.heads.check_crop(other, tokens)
        self.eviction.crop(layer, tokens)
        self.seen[layer] -= tokens

    # ---- batch operations --------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Sequences."""
        return self.heads.batch

    def reorder(self, layer: int, order: list[int]) -> None:
        """Let batch row i of a layer hold what row `order[i]` holds; `order` may have any length.

        Applied as soon as every layer was asked the same.
        """
        if not self.seen[layer]:
            return
        whole = self._orders.ask(layer, order, sum(map(bool, self.seen)))
        if whole is not None:
            self._move(whole)

    def _move(self, order: list[int]) -> None:
        heads, eviction = self.heads, self.eviction
        assert eviction is not None
        if order == list(range(heads.batch)):
            return
        if len(order) == heads.batch:
            reorder(heads, order)
            self.eviction = eviction.picked(heads, order)
        else:
            self._hold(eviction.picked(selected(heads, order), order))

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadStore:
        twin = type(self)(self.options, self.policy)
        memo[id(self)] = twin
        twin.seen, twin._orders = list(self.seen), copy.deepcopy(self._orders, memo)
        twin._pool, twin._owner = self._pool, self._owner
        if self.eviction is not None:
            order = list(range(self.heads.batch))
            twin._hold(self.eviction.picked(selected(self.heads, order), order))
            assert twin.eviction is not None
            twin.eviction.watchers = []  # whoever watches this one does not watch the twin
        return twin

    # ---- inside --------------------------------------------------------------------------------
    def _real(self, layer: int, query: Tensor, mask: Tensor | None) -> Ints | None:
        """How many of the new tokens of each sequence are no padding; None: all."""
        seen, length = self.seen[layer], query.shape[2]
        total = np.full(query.shape[0], seen + length, np.int64)
        if mask is not None:
            if mask.shape[-1] != seen + length:
                raise UnsupportedError(
                    f"layer {layer} has a policy, and a mask over {mask.shape[-1]} tokens where "
                    f"the text has {seen + length}: make the cache without a policy"
                )
            total -= left_padding(mask, query, f"layer {layer} has a policy")
        if not seen:
            if total.min() < 1:
                raise UnsupportedError(
                    "a prompt is all padding so far: read padded prompts in one piece, or with a "
                    "prefill_chunk_size beyond their padding"
                )
            return None if total.min() == length else total
        new = total - self.heads.tokens[layer]
        if (new != length).any():
            raise UnsupportedError(
                f"layer {layer} has a policy, and its first mask said otherwise which tokens are "
                "padding: pass the attention_mask at every step"
            )
        return None

    def _ready(self, key: Tensor) -> Eviction:
        """The eviction for rows like ``key``."""
        if self.eviction is None:
            options = self.options
            heads = HeadCache(
                len(self.seen),
                key.shape[1],
                key.shape[3],
                options.max_tokens,
                batch=key.shape[0],
                dtype=DTYPES[key.dtype],
                page_bytes=options.page_bytes,
                pool=self.pool(key),
            )
            outputs = None if options.outputs is None else list(options.outputs)
            try:
                if outputs is not None and len(outputs) != len(self.seen):
                    raise UnsupportedError(
                        f"outputs has {len(outputs)} weights for {len(self.seen)} layers with a "
                        "policy: pass one for each"
                    )
                self._hold(Eviction(heads, self.policy, outputs))
            except BaseException:
                heads.close()
                raise
        assert self.eviction is not None
        return self.eviction

    def _check(self, layer: int, key: Tensor) -> None:
        heads = self.heads
        check_fits(layer, key, heads.batch, heads.kv_heads, heads.layout)

    def _hold(self, eviction: Eviction | None) -> None:
        # In place: the finalizer holds this very list.
        before = list(self._held)
        self._held[:] = [] if eviction is None else [eviction.heads]
        self.eviction = eviction
        _close(before)


def added(a: Usage, b: Usage) -> Usage:
    """What two caches over one pool hold together."""
    sums = ["reserved_bytes", "mapped_bytes", "used_bytes", "wasted_bytes", "retained_bytes"]
    sums += ["shared_bytes", "pages", "maps", "sequences", "tokens"]
    return replace(a, **{name: getattr(a, name) + getattr(b, name) for name in sums})


def _close(held: list[HeadCache]) -> None:
    for heads in held:
        heads.close()
    held.clear()
