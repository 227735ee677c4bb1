"""vattn in Hugging Face transformers (5.16 to 5.23).

    vattn.hf.register()                                 the attention named "vattn" and its mask
    model.set_attn_implementation("vattn")

    cache = vattn.hf.VattnCache(model.config)           a Cache whose layers are views
    model.generate(**inputs, past_key_values=cache)     into one KVCache

    with vattn.hf.enable(max_tokens=8192):              every DynamicCache(config=...) made in
        model.generate(**inputs)                        here is ours; no other change

    VattnCache(model.config, policy=vattn.evictors.SnapKV(budget=0.25))
                                                        keeps a quarter of a prompt, and its memory
    VattnCache(model.config, latents=vattn.hf.compress(model, keep=0.5))
                                                        keeps every token, in half of the memory
    PressCache(model.config)                            for presses of NVIDIA kvpress: the memory of
                                                        what they drop comes back

Importing this module registers and replaces nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedConfig

from vattn.cache import CopyRefused, KVCache
from vattn.evictor import Evictor, Kept
from vattn.hf_attention import UnsupportedError, attention, register
from vattn.hf_heads import added
from vattn.hf_kept import KeptLayer, of_layers, outputs_of, with_hidden
from vattn.hf_latent import LatentLayer
from vattn.hf_layers import VattnLayer, VattnSlidingLayer
from vattn.hf_lorc import Compressed, compress
from vattn.hf_press import PressLayer, PressStore
from vattn.hf_static import VattnStaticLayer
from vattn.hf_store import Options, Store
from vattn.hf_versions import LAYER_TYPES, WINDOWED, kinds_of
from vattn.selector import Selector
from vattn.sparse import Activity
from vattn.usage import Usage

__all__ = [
    "Compressed",
    "CopyRefused",
    "KeptLayer",
    "LatentLayer",
    "PressCache",
    "PressLayer",
    "UnsupportedError",
    "VattnCache",
    "VattnLayer",
    "VattnSlidingLayer",
    "VattnStaticCache",
    "VattnStaticLayer",
    "attention",
    "compress",
    "enable",
    "outputs_of",
    "register",
    "with_hidden",
]

SERVED = ("full_attention", *WINDOWED)


class VattnCache(DynamicCache):
    """A transformers cache whose layers are views into one KVCache: no concatenation, no copy.

    Tokens, masks and batch operations are those of `DynamicCache(config=config)`. Tensors handed
    out are ordinary strided tensors; take them anew after an update, crop or reorder.
    `copy.deepcopy(cache)` forks it (pages of a common prefix are shared), `del cache` gives all
    pages back.

    Args:
        config: of the model; says which layers slide, and how many tokens there can be.
        max_tokens: most tokens of a sequence; address space only. `config.max_position_embeddings`
            by default.
        rows: "head_major" or "token_major", see `vattn.Layout`.
        group_layers, page_bytes: see `vattn.Layout`.
        budget_bytes: most bytes of pages; 80% of the available memory by default.
        slots: most sequences, deepcopies included; address space only. 64 or more by default.
        trace: record every map and unmap.
        selector: what decode steps of full-attention layers read, see `vattn.policies`; None:
            everything. The model's attention must be "vattn" then.
        tiers: arguments of `vattn.tiers.Tiers` (``{"fast_bytes": 4 << 30}``): pages beyond go to a
            slower tier. A prompt that is larger than the fast tier must be read in chunks
            (``generate(prefill_chunk_size=...)``).
        policy: what full-attention layers keep, see `vattn.evictors`; None: everything. The model's
            attention must be "vattn" then, and prompts are padded on the left.
        outputs: the weights behind attention, for a policy that asks for them: see `outputs_of`.
            For one that asks for hidden states, see `with_hidden`.
        latents: what `compress` made of the model; None: K and V are held. Every token stays, in
            latents of fewer numbers, of which K and V are made anew at each step.

    Raises:
        UnsupportedError: the model has layers that this cache does not hold, or none that a policy
            could serve; or arguments that do not go together.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int | None = None,
        *,
        rows: str = "head_major",
        group_layers: int = 1,
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        slots: int | None = None,
        trace: bool = False,
        selector: Selector | None = None,
        tiers: Mapping[str, Any] | None = None,
        policy: Evictor | None = None,
        outputs: Sequence[torch.Tensor] | None = None,
        latents: Compressed | None = None,
    ) -> None:
        kinds = kinds_of(config)
        if policy is not None and not any(kind == "full_attention" for kind, _ in kinds):
            raise UnsupportedError(
                f"{type(config).__name__} has no full-attention layer for a policy to serve, its "
                "windows drop tokens by themselves: make the cache without a policy"
            )
        weights = None if outputs is None else of_layers(outputs, [kind for kind, _ in kinds])
        self.store = Store(
            Options(
                _max_tokens(config, max_tokens),
                rows=rows,
                group_layers=group_layers,
                page_bytes=page_bytes,
                budget_bytes=budget_bytes,
                slots=slots,
                trace=trace,
                selector=selector,
                tiers=tiers,
                policy=policy,
                outputs=weights,
                latents=latents,
            )
        )
        layers = [_layer(self.store, kind, more) for kind, more in kinds]
        # Not DynamicCache's: it makes its own layers.
        Cache.__init__(self, layers=layers)

    @property
    def kv(self) -> KVCache | None:
        """The KVCache behind the layers; None before the first tokens. Under a policy that of the
        full-attention layers, in which every KV head is a sequence. With latents that of the
        first layer, whose pool is that of all: `cache.store.latents.caches`."""
        kept, latents = self.store.kept, self.store.latents
        if latents is not None:
            return latents.caches[0] if latents.opened else None
        if kept is None:
            return self.store.kv
        return kept.heads.cache if kept.opened else None

    def stats(self) -> Usage:
        """Bytes reserved, mapped, used and wasted. Raises ClosedError before the first tokens."""
        if self.store.latents is not None:
            return self.store.latents.stats()
        if self.store.kept is None:
            return self.store.cache.stats()
        heads = self.store.kept.heads.stats()
        return heads if self.store.kv is None else added(heads, self.store.kv.stats())

    def kept(self) -> list[Kept]:
        """What each full-attention layer has kept under the policy; [] without one, or before the
        first tokens."""
        kept = self.store.kept
        return [] if kept is None or kept.eviction is None else kept.eviction.kept()

    def activity(self) -> list[Activity]:
        """What each layer read under the selector; [] without one, or before the first tokens."""
        return [] if self.store.sparse is None else self.store.sparse.activity()


class PressCache(VattnCache):
    """A cache for presses of kvpress, or any with their protocol: what they drop, its memory comes
    back, those included that choose by head. See `vattn.hf_press`.

    The model's attention must be "vattn". Of full-attention layers every KV head has a range of its
    own. ``keys`` and ``values`` of its layers can be read and assigned.

    Args: as `VattnCache`.

    Raises:
        UnsupportedError: the model has layers that this cache does not hold, or none for a press.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int | None = None,
        *,
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        slots: int | None = None,
    ) -> None:
        kinds = kinds_of(config)
        pressed = sum(kind == "full_attention" for kind, _ in kinds)
        if not pressed:
            raise UnsupportedError(
                f"{type(config).__name__} has no full-attention layer for a press: make a "
                "VattnCache"
            )
        # No layer is this evictor's: presses alone drop tokens.
        nobody = Evictor(budget=1.0, dense_layers=tuple(range(pressed)))
        options = Options(
            _max_tokens(config, max_tokens),
            page_bytes=page_bytes,
            budget_bytes=budget_bytes,
            slots=slots,
            policy=nobody,
        )
        self.store = Store(options)
        self._press = self.store.kept = PressStore(options, nobody)
        Cache.__init__(self, layers=[_layer(self.store, kind, more) for kind, more in kinds])

    @property
    def kv(self) -> KVCache | None:
        """See `VattnCache.kv`."""
        self._press.settle()
        return super().kv

    def stats(self) -> Usage:
        """See `VattnCache.stats`."""
        self._press.settle()
        return super().stats()

    def kept(self) -> list[Kept]:
        """What each full-attention layer has kept of the text; [] before the first tokens."""
        self._press.settle()
        return list(self._press.kept()) if self._press.opened else []


class VattnStaticCache(Cache):
    """The compileable variant: static shapes [B, Hkv, max_tokens, D], one graph for any length.

    Rows without a page read as zeros (one shared zero page), so memory follows the tokens, not
    `max_tokens`. Attention costs what a `StaticCache` of `max_tokens` costs: choose it per request.

    Args: as `VattnCache`, but for ``policy``, which is refused: these shapes never shrink.

    Raises:
        UnsupportedError: the model has layers that this cache does not hold; or a policy.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int | None = None,
        *,
        rows: str = "head_major",
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        slots: int | None = None,
        trace: bool = False,
        policy: Evictor | None = None,
    ) -> None:
        self.store = Store(
            Options(
                _max_tokens(config, max_tokens),
                rows=rows,
                page_bytes=page_bytes,
                budget_bytes=budget_bytes,
                slots=slots,
                trace=trace,
                zero_backed=True,
                policy=policy,
            )
        )
        layers = [
            VattnStaticLayer(self.store) if kind in SERVED else _layer(self.store, kind, more)
            for kind, more in kinds_of(config)
        ]
        super().__init__(layers=layers)

    @property
    def kv(self) -> KVCache | None:
        """The KVCache behind the layers; None before the first tokens."""
        return self.store.kv

    def stats(self) -> Usage:
        """Bytes reserved, mapped, used and wasted. Raises ClosedError before the first tokens."""
        return self.store.cache.stats()


@contextmanager
def enable(max_tokens: int, **options: Any) -> Iterator[None]:
    """Make every `DynamicCache(config=...)` created inside ours; `generate` needs no change.

    Works through transformers' own table of layer classes: full, sliding-window and chunked layers
    are replaced, every other kind stays transformers'. The layers of one cache share one KVCache.
    Leaving restores the table; caches made inside live on. Can be nested: the inner options hold.

    Args:
        max_tokens: most tokens of a sequence; address space only.
        **options: rows, group_layers, page_bytes, budget_bytes, slots, trace, selector, tiers,
            policy, latents, as `VattnCache`; outputs, of each full-attention layer.
    """
    chosen = Options(max_tokens, **options)
    if not LAYER_TYPES:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no table of layer classes: install 5.16 "
            "or newer, or pass past_key_values=VattnCache(model.config)"
        )
    before = {kind: LAYER_TYPES[kind] for kind in SERVED}
    for kind in SERVED:
        LAYER_TYPES[kind] = _maker(kind, chosen)
    try:
        yield
    finally:
        LAYER_TYPES.update(before)


def _maker(kind: str, options: Options) -> Callable[..., VattnLayer]:
    """A stand-in for a layer class in transformers' table."""

    def make(**kwargs: Any) -> VattnLayer:
        layer: VattnLayer = _layer(_store_of_caller(options), kind, kwargs)
        return layer

    return make


def _store_of_caller(options: Options) -> Store:
    """The store of the cache under construction, so that its layers share one KVCache.

    The table's entries are called with the layer's arguments only, from `DynamicCache.__init__`
    (from a comprehension in it): the cache is that frame's `self`. A layer made by anything else
    gets a store of its own: the same results, with a range of its own.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name == "<listcomp>" and frame.f_back is not None:
        frame = frame.f_back
    cache = frame.f_locals.get("self")
    if not isinstance(cache, Cache):
        return Store(options)
    store: Store | None = cache.__dict__.get("store")
    if store is None:
        store = cache.store = Store(options)
    return store


def _max_tokens(config: PreTrainedConfig, max_tokens: int | None) -> int:
    if max_tokens is not None:
        return max_tokens
    known = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if known is None:
        raise UnsupportedError(
            f"{type(config).__name__} has no max_position_embeddings: pass max_tokens"
        )
    return int(known)


def _layer(store: Store, kind: str, kwargs: dict[str, Any]) -> Any:
    if kind == "full_attention":
        if store.latents is not None:
            return LatentLayer(store)
        if isinstance(store.kept, PressStore):
            return PressLayer(store)
        return VattnLayer(store) if store.kept is None else KeptLayer(store)
    if kind in WINDOWED:
        return VattnSlidingLayer(store, sliding_window=kwargs["sliding_window"])
    if kind == "dummy":  # holds nothing: a layer that reuses another's K and V, or has no attention
        return LAYER_TYPES[kind](**kwargs)
    raise UnsupportedError(
        f"layer type {kind!r} is not served by this cache (it holds {', '.join(SERVED)}); use "
        "transformers' own DynamicCache for this model, or vattn.hf.enable(), which replaces the "
        "attention layers only"
    )
