"""A full-attention layer of a transformers cache of which a policy keeps some tokens.

    cache = vattn.hf.VattnCache(model.config, policy=vattn.evictors.SnapKV(budget=0.25))
    model.generate(**inputs, past_key_values=cache)     the model's attention is "vattn"
    cache.kept()                                        tokens seen, held and evicted, by layer

The keys that `KeptLayer.update` returns are the new ones alone, and carry a `Keeper`: the attention
function named "vattn" lets it append them, attend to all that is held, and evict. Any other
attention would see the new tokens only: the next update says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vattn.hf_attention import HIDDEN, UnsupportedError
from vattn.hf_heads import HeadStore
from vattn.hf_layers import HeldLayer, removed
from vattn.hf_store import Store, check_rows


class Keeper:
    """What new keys carry to the attention: the layer that will hold them."""

    def __init__(self, kept: HeadStore, layer: int) -> None:
        self._kept, self._layer = kept, layer
        self.hidden: Tensor | None = None  # the input of this layer's attention, see `with_hidden`

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, refused: dict[str, object]
    ) -> Tensor:
        """See `HeadStore.attend`.

        Raises:
            UnsupportedError: an argument that changes the result and is not honoured.
        """
        named = [name for name, value in refused.items() if value]
        if named:
            self._kept.take_back(self._layer)
            raise UnsupportedError(
                f"layer {self._layer} has a policy, and {', '.join(named)} cannot be honoured with "
                "it; make the cache without a policy for this model"
            )
        return self._kept.attend(self._layer, query, mask, scale, self.hidden)


class KeptLayer(HeldLayer):
    """A layer whose KV heads hold tokens of their own choice.

    Its length is that of the text, whatever is held. There are no `keys` and `values`: the heads
    differ in length; `cache.store.kept.heads` shows what each holds.
    """

    def __init__(self, store: Store, **kwargs: Any) -> None:
        # Not super().__init__(): it would assign None to the two properties.
        if store.kept is None:
            raise UnsupportedError("a KeptLayer needs a store with a policy")
        self.kept, self.index = store.kept, store.kept.add_layer()
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first rows [B, Hkv, n, D]."""
        check_rows(self.index, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand out rows [B, Hkv, n, D] for the attention to bring back; it attends to all that is
        held."""
        check_rows(self.index, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.kept.hand_out(self.index, key_states, value_states)
        key = key_states.view_as(key_states)
        key.vattn_reader = Keeper(self.kept, self.index)  # type: ignore[attr-defined]
        return key, value_states

    def get_seq_length(self) -> int:
        """Tokens of the text so far, held or not, padding included."""
        return self.kept.seen[self.index]

    def get_max_length(self) -> int:
        """Tokens that fit into the reservation."""
        return self.kept.options.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of the text (see `removed`); what was evicted
        before them stays evicted."""
        tokens = removed(tokens_to_remove, self.get_seq_length())
        if tokens and self.get_seq_length():
            self.kept.crop(self.index, tokens)

    def reset(self) -> None:
        """Forget all tokens; the next ones may come in another batch size."""
        self.kept.clear(self.index)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue from row `beam_idx[i]`."""
        self.kept.reorder(self.index, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, copies side by side."""
        if self.get_seq_length():
            rows = range(self.kept.heads.batch)
            self.kept.reorder(self.index, [row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that `indices` (integers or a bool mask) name, in that order."""
        if self.get_seq_length():
            rows = torch.arange(self.kept.heads.batch)
            self.kept.reorder(self.index, rows[torch.as_tensor(indices)].tolist())

    @property
    def keys(self) -> NoReturn:
        """There are none: the heads hold different tokens."""
        self._no_rows("keys")

    @property
    def values(self) -> NoReturn:
        """There are none: the heads hold different tokens."""
        self._no_rows("values")

    def _no_rows(self, name: str) -> NoReturn:
        raise UnsupportedError(
            f"layer {self.index} has a policy: its KV heads hold different tokens, so it has no "
            f"`{name}`; cache.store.kept.heads.kv({self.index}) shows the rows of each head"
        )


@contextmanager
def with_hidden(model: nn.Module) -> Iterator[None]:
    """While this is open, policies that ask for hidden states get the input of each attention.

    Raises:
        UnsupportedError: the model names its layers otherwise.
    """

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.__dict__[HIDDEN] = kwargs.get("hidden_states", args[0] if args else None)

    layers = [attention for attention, _ in _attentions(model)]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.__dict__.pop(HIDDEN, None)


def outputs_of(model: nn.Module) -> list[Tensor]:
    """The weights behind attention, [model width, Hq * D] of each layer, for policies that ask for
    them: ``VattnCache(config, policy=..., outputs=outputs_of(model))``.

    Raises:
        UnsupportedError: the model names its layers otherwise.
    """
    return [behind.weight.detach() for _, behind in _attentions(model)]


def _attentions(model: nn.Module) -> list[tuple[nn.Module, nn.Linear]]:
    """The attention of each layer, in order, and what stands behind it."""
    found: dict[int, tuple[nn.Module, nn.Linear]] = {}
    for module in model.modules():
        layer, behind = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
        if isinstance(behind, nn.Linear) and isinstance(layer, int):
            found[layer] = (module, behind)
    if not found or sorted(found) != list(range(len(found))):
        raise UnsupportedError(
            f"{type(model).__name__} has no attention with an o_proj in every layer: pass "
            "outputs=[weight, ...], [model width, query heads * head_dim] of each layer, and "
            "leave out policies that ask for hidden states"
        )
    return [found[i] for i in range(len(found))]


def of_layers(outputs: Iterable[Tensor], kinds: list[str]) -> tuple[Tensor, ...]:
    """Of the weights of all layers those of the layers that a policy serves.

    Raises:
        UnsupportedError: not one for each layer.
    """
    many = tuple(outputs)
    if len(many) != len(kinds):
        raise UnsupportedError(f"outputs has {len(many)} weights, the model {len(kinds)} layers")
    return tuple(o for o, kind in zip(many, kinds, strict=True) if kind == "full_attention")
