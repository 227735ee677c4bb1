"""Presses of NVIDIA kvpress over a transformers cache: what a press drops, its memory comes back.

    cache = vattn.hf.PressCache(model.config)           the model's attention is "vattn"
    with press(model):                                  any press, unchanged
        model(ids, past_key_values=cache)

A press is a hook behind every attention module. It reads ``layer.keys`` and ``layer.values``, then

    assigns both         the rows that the layer holds from now on, as many in every head
    or names rows        ``module.masked_key_indices``, (sequence, head, row) each: kvpress hides
                         them behind keys that no query of a step sees, and frees nothing

Here every KV head has rows of its own (`HeadCache`). Assigned rows are written over the old ones
in place; rows that were named are dropped from their heads, and the attribute is None again: there
is nothing left to hide. Both happen behind the hook of the press, layer by layer, so a prompt holds
one whole layer beside what the layers before it have kept. A press that names rows after the pass
(KVzip) is heard at the next look at the cache, or the next step.

Rows are counted as kvpress counts them: after an assignment those that it has brought, after names
all, dropped or not. So masks and positions are those of a DynamicCache under the same press.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vattn.evictor import Evictor, Kept
from vattn.hf_attention import UnsupportedError
from vattn.hf_heads import HeadStore
from vattn.hf_kept import Keeper, KeptLayer
from vattn.hf_sparse import left_padding
from vattn.hf_store import Options, Store, check_rows
from vattn.hf_watch import Watch, remove
from vattn.kernels.columns import padded
from vattn.kernels.compact import as_rows
from vattn.layout import LayoutError

MASKED = "masked_key_indices"  # of a module: what kvpress calls the rows that a head shall not see


class PressStore(HeadStore):
    """The rows of one cache under presses; no evictor of ours drops any."""

    def __init__(self, options: Options, policy: Evictor) -> None:
        super().__init__(options, policy)
        self._halves: dict[int, dict[str, Tensor]] = {}
        self._watches: dict[int, Watch] = {}
        self._cut: dict[int, int] = {}  # tokens of the text that assignments have left out
        self._loose = False  # pages without a row are still ours
        weakref.finalize(self, remove, self._watches)

    # ---- what a press reads and writes ---------------------------------------------------------
    def rows(self, layer: int, side: int) -> Tensor:
        """K (0) or V (1) of a layer, [B, Hkv, tokens, D]: a view; where heads have dropped rows, a
        copy with 0 in their places."""
        heads, tokens = self.heads, self.seen[layer]
        if not self._ragged(layer):
            return heads.ranges.view(layer, side, heads.longest(layer))
        shape = (heads.batch, heads.kv_heads)
        counts, positions, kv = heads.counts(layer), heads.positions(layer), heads.kv(layer)
        at = torch.arange(positions.shape[2], device=heads.device)
        # Behind a range's rows positions mean nothing: these go to a place that is cut off.
        places = positions.where(at < counts[..., None], tokens)[..., None]
        held = padded((kv.key, kv.value)[side], kv, counts.flatten().tolist())
        held = held[:, 0].unflatten(0, shape)
        out = held.new_zeros(*shape, tokens + 1, held.shape[3])
        return out.scatter_(2, places.expand_as(held), held)[:, :, :tokens]

    def both(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V."""
        return self.rows(layer, 0), self.rows(layer, 1)

    def assign(self, layer: int, name: str, rows: Tensor) -> None:
        """Hold ``rows`` as the ``"keys"`` or ``"values"`` of a layer, as soon as both are there."""
        half = self._halves.setdefault(layer, {})
        half[name] = rows
        if len(half) == 2:
            self._take(layer)

    def half(self, layer: int, name: str) -> Tensor | None:
        """What was assigned and waits for the other."""
        return self._halves.get(layer, {}).get(name)

    def attend(
        self,
        layer: int,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See `HeadStore.attend`.

        Raises:
            UnsupportedError: padding: presses take it for text.
        """
        reason = f"layer {layer} is under a press"
        try:
            if mask is not None and left_padding(mask, query, reason).any():
                raise UnsupportedError(
                    f"{reason}, and the prompts are padded, which a press takes for text: read "
                    "prompts of one length, or one by one"
                )
        except UnsupportedError:
            self.take_back(layer)
            raise
        # Without the mask: it is that of layer 0 for all, while layers may differ in length.
        return super().attend(layer, query, None, scale, hidden)

    # ---- taking over ---------------------------------------------------------------------------
    def settle(self, layer: int | None = None) -> None:
        """Do what presses have asked of a layer, or of all, and give pages without a row back.

        Raises:
            LayoutError: one of keys and values was assigned, in another length than the other has.
            UnsupportedError: rows that this cache does not know. OutOfPages, MapLimitError,
            DriverError: a page that a fork shares cannot be copied. The layer is as before.
        """
        for i in range(len(self.seen)) if layer is None else (layer,):
            if i in self._halves:
                self._take(i)
            self._hide(i)
        if self._loose and self.opened:
            self.heads.release()
            self._loose = False

    def meet(self, layer: int, module: nn.Module) -> None:
        """A module has attended to a layer; what it names from now on are rows of this layer."""
        watch = self._watches.get(layer)
        if watch is not None and watch.module() is not module:
            watch.remove()
            watch = None
        if watch is None:
            watch = self._watches[layer] = Watch(self, layer, module)
        module.__dict__[MASKED] = None  # as kvpress does at every prompt
        watch.wait_for_presses(module)

    def owns(self, cache: Any) -> bool:
        """Whether these are the rows of a cache."""
        return getattr(getattr(cache, "store", None), "kept", None) is self

    def leave(self, layer: int) -> None:
        """The module of a layer is about to attend for another cache."""
        try:
            self._hide(layer)
        finally:
            self._watches.pop(layer).remove()

    def _take(self, layer: int) -> None:
        """Hold the assigned rows; an assignment of one half keeps the other as it is."""
        half = self._halves.pop(layer)
        key, value = half.get("keys"), half.get("values")
        if key is None or value is None:
            if self.seen[layer]:
                old = self.both(layer)
                key, value = (
                    x if x is not None else y for x, y in zip((key, value), old, strict=True)
                )
            if key is None or value is None or key.shape != value.shape:
                name, rows = next(iter(half.items()))
                raise LayoutError(
                    f"layer {layer}: only `{name}` was assigned, with {rows.shape[-2]} tokens; "
                    "assign keys and values of the same length"
                )
        check_rows(layer, key, value)
        if any(self.seen):
            self._check(layer, key)
        if self.seen[layer] and self._ragged(layer):
            self._retake(layer, key, value)
        else:
            self._overwrite(layer, key, value)

    def _retake(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Rows of heads that differ: the first of those that `rows` shows, or all."""
        tokens, held = key.shape[2], self.both(layer)
        if tokens > self.seen[layer] or not all(
            torch.equal(new, old[:, :, :tokens])
            for new, old in zip((key, value), held, strict=True)
        ):
            raise UnsupportedError(
                f"layer {layer}: its KV heads hold different tokens, and keys and values were "
                "assigned that are not the first of its own. A press that keeps as many rows in "
                "every head does not work behind one that chooses by head (kvpress would hide the "
                "wrong rows): use one of them"
            )
        self._cut_back(layer, tokens)

    def _overwrite(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Rows in place of those that all heads hold; the first of them as views change nothing
        but the length."""
        before, tokens = self.seen[layer], key.shape[2]
        if before:
            held = self.both(layer)
            same = all(
                new.data_ptr() == old.data_ptr() and new.stride() == old.stride()
                for new, old in zip((key, value), held, strict=True)
            )
            if same and tokens <= before:
                self._cut_back(layer, tokens)
                return
            del held
        # They may be views of the rows they replace.
        key, value = key.detach().clone(), value.detach().clone()
        # First what may fail. Taking nothing back copies what a fork shares.
        if before:
            assert self.eviction is not None
            self.eviction.crop(layer, 0)
        if tokens > before:
            self._ready(key).append(layer, key[:, :, before:], value[:, :, before:])
            self.seen[layer] = tokens
        elif tokens < before:
            self._cut_back(layer, tokens)
            self._cut[layer] = self._cut.get(layer, 0) + before - tokens
        if tokens:
            for new, old in zip((key, value), self.both(layer), strict=True):
                old.copy_(new)

    def _cut_back(self, layer: int, tokens: int) -> None:
        """Hold the first ``tokens`` rows."""
        if not tokens:
            super().clear(layer)
        elif tokens < self.seen[layer]:
            assert self.eviction is not None
            self.eviction.crop(layer, self.seen[layer] - tokens)
            self.seen[layer] = tokens
        self._loose = True

    def _hide(self, layer: int) -> None:
        """Drop the rows that were named, from their heads."""
        watch = self._watches.get(layer)
        module = None if watch is None else watch.module()
        if module is None:
            return
        masked = module.__dict__.get(MASKED)
        if masked is not None and self.seen[layer]:
            heads = self.heads
            keep = self._kept_of(layer, [torch.as_tensor(x, device=heads.device) for x in masked])
            rows, counts = as_rows(keep)
            if bool((counts < heads.counts(layer)).any()):
                heads.keep(layer, rows, counts)
                self._loose = True
        module.__dict__[MASKED] = None

    def _kept_of(self, layer: int, named: list[Tensor]) -> Tensor:
        """What stays where (sequence, head, row) each are named, as a mask of the rows held."""
        heads = self.heads
        shape = (heads.batch, heads.kv_heads, self.seen[layer])
        fits = len(named) == 3 and len({x.shape for x in named}) == 1
        if not fits or any(
            bool(((x < 0) | (x >= n)).any()) for x, n in zip(named, shape, strict=True)
        ):
            raise UnsupportedError(
                f"layer {layer}: a press names rows that it does not hold: {MASKED} must be "
                f"(sequence, head, row) within {shape}"
            )
        drop = torch.zeros(shape, dtype=torch.bool, device=heads.device)
        drop[named[0], named[1], named[2]] = True
        positions = heads.positions(layer)
        at = torch.arange(positions.shape[2], device=heads.device)
        valid = at < heads.counts(layer)[..., None]
        return valid & ~drop.gather(2, positions.masked_fill(~valid, 0))

    def _ragged(self, layer: int) -> bool:
        """Whether heads have dropped rows."""
        return bool((self.heads.lengths(layer) != self.seen[layer]).any())

    # ---- the cache as a whole ------------------------------------------------------------------
    def clear(self, layer: int) -> None:
        """Forget a layer's rows, and what presses have asked of it."""
        self._halves.pop(layer, None)
        self._cut.pop(layer, None)
        super().clear(layer)

    def crop(self, layer: int, tokens: int) -> None:
        """Take the last tokens back; what a press has dropped stays dropped."""
        self.settle(layer)
        super().crop(layer, tokens)

    def reorder(self, layer: int, order: list[int]) -> None:
        """See `HeadStore.reorder`."""
        self.settle(layer)
        super().reorder(layer, order)

    def kept(self) -> Iterator[Kept]:
        """What each layer has kept of the text."""
        for layer, tokens in enumerate(self.seen):
            lengths, given = self.heads.lengths(layer), tokens + self._cut.get(layer, 0)
            many, rows = self.heads.batch * given, int(lengths.sum())
            gone = many * self.heads.kv_heads - rows
            yield Kept(many, rows / self.heads.kv_heads, gone, 0, tuple(lengths.flatten().tolist()))

    def __deepcopy__(self, memo: dict[int, Any]) -> PressStore:
        self.settle()
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, PressStore)
        twin._cut = dict(self._cut)
        return twin


class PressKeeper(Keeper):
    """What new keys carry to the attention; it shows the store the module."""

    module: weakref.ref[nn.Module]

    def __init__(self, kept: PressStore, layer: int) -> None:
        super().__init__(kept, layer)
        self._press = kept

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, refused: dict[str, object]
    ) -> Tensor:
        """See `PressStore.attend`."""
        out = super().attend(query, mask, scale, refused)
        module = self.module()
        if module is not None:
            self._press.meet(self._layer, module)
        return out


class PressLayer(KeptLayer):
    """A layer that presses shrink; ``keys`` and ``values`` can be read and assigned."""

    kept: PressStore

    def __init__(self, store: Store, **kwargs: Any) -> None:
        super().__init__(store)
        if not isinstance(self.kept, PressStore):
            raise UnsupportedError("a PressLayer needs the store of a PressCache")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand out rows [B, Hkv, n, D] for the attention to bring back."""
        self.kept.settle(self.index)
        key, value = super().update(key_states, value_states)
        key.vattn_reader = PressKeeper(self.kept, self.index)  # type: ignore[attr-defined]
        return key, value

    def get_seq_length(self) -> int:
        """Rows of the layer as a press counts them."""
        self.kept.settle(self.index)
        return super().get_seq_length()

    @property  # type: ignore[override]
    def keys(self) -> Tensor | None:
        """K of the rows, [B, Hkv, tokens, D]; 0 where a head has dropped a row."""
        return self._rows("keys", 0)

    @keys.setter
    def keys(self, rows: Tensor) -> None:
        self.kept.assign(self.index, "keys", rows)

    @property  # type: ignore[override]
    def values(self) -> Tensor | None:
        """V of the rows, likewise."""
        return self._rows("values", 1)

    @values.setter
    def values(self, rows: Tensor) -> None:
        self.kept.assign(self.index, "values", rows)

    def _rows(self, name: str, side: int) -> Tensor | None:
        half = self.kept.half(self.index, name)
        if half is not None or not self.kept.seen[self.index]:
            return half
        return self.kept.rows(self.index, side)
