"""What a Llama-class model's layers compute from any hidden state, and what one text says of them.

A guess of a layer's query needs that layer's own norm, projection and rotary embedding, applied to
a hidden state that is not its input. Whether it is a guess at all is measured: the cosine between
what it is made from and the layer's true input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .selector import SelectorError

Rotary = tuple[Tensor, Tensor]  # cosine and sine of the tokens' positions, as the model has them


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one decoder layer of a Llama-class model, from any hidden state.

    The layer's own modules compute them, so weights are shared and nothing is copied.

    Raises:
        SelectorError: the layer lacks what such a layer has; the message names it.
    """

    layer: nn.Module

    def __post_init__(self) -> None:
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.head_dim"):
            _part(self.layer, path)
        _part(self.layer, "input_layernorm")
        self._rotate()

    def query(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Hidden [B, L, width] -> query [B, Hq, L, D], after the rotary embedding."""
        return self._project("q", hidden, rotary)

    def key(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Hidden [B, L, width] -> key [B, Hkv, L, D], after the rotary embedding."""
        return self._project("k", hidden, rotary)

    @property
    def after_attention(self) -> nn.Module:
        """The module whose input is the residual stream between attention and MLP."""
        name = "pre_feedforward_layernorm"  # Gemma's; there the other name is of a branch
        found = getattr(self.layer, name, None)
        return found if found is not None else _part(self.layer, "post_attention_layernorm")

    def _project(self, which: str, hidden: Tensor, rotary: Rotary) -> Tensor:
        attention: Any = self.layer.self_attn
        rows = getattr(attention, f"{which}_proj")(_part(self.layer, "input_layernorm")(hidden))
        rows = rows.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{which}_norm", None)
        rows = (rows if norm is None else norm(rows)).transpose(1, 2)
        return self._rotate()(rows, rows, *rotary)[0]

    def _rotate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The model's own rotary embedding: models differ in how they pair channels."""
        home = type(self.layer.self_attn).__module__
        found = getattr(sys.modules[home], "apply_rotary_pos_emb", None)
        if found is None:
            raise SelectorError(
                f"{home} has no apply_rotary_pos_emb: speculation serves Llama-class models"
            )
        return found


@dataclass(frozen=True)
class Cosines:
    """How like a layer's input the hidden state is that its hint comes from: the mean over a text
    of their cosine, for each layer. Of layer 0, which has none before it, 0."""

    early: tuple[float, ...]
    late: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one text says of a model, a tensor for each layer.

    ``queries`` [Hq, T, D] and ``keys`` [Hkv, T, D] after the rotary embedding, for
    `policies.infinigen.skew`; ``cosines`` for the gate.
    """

    cosines: Cosines
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]


def heads_of(model: nn.Module) -> list[Heads]:
    """The layers of a Llama-class transformers model (Llama, Mistral, Qwen2, Qwen3).

    Raises:
        SelectorError: it is none.
    """
    return [Heads(layer) for layer in _part(getattr(model, "model", model), "layers")]


@torch.no_grad()
def calibrate(model: nn.Module, ids: Tensor) -> Calibration:
    """Run a model over a text, ids [1, T], and record what speculation rests on.

    Raises:
        SelectorError: no Llama-class model, or fewer than 2 tokens.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise SelectorError(f"ids is {tuple(ids.shape)}: must be [1, 2 or more]")
    heads = heads_of(model)
    with recorded(heads) as seen:
        model(ids, use_cache=False)
    inputs, between = seen.inputs, seen.between
    pairs = range(1, len(heads))
    early = (0.0, *(_cosine(inputs[i - 1], inputs[i]) for i in pairs))
    late = (0.0, *(_cosine(between[i - 1], inputs[i]) for i in pairs))
    rotary = seen.rotary
    queries = tuple(h.query(x, r)[0] for h, x, r in zip(heads, inputs, rotary, strict=True))
    keys = tuple(h.key(x, r)[0] for h, x, r in zip(heads, inputs, rotary, strict=True))
    return Calibration(Cosines(early, late), queries, keys)


@dataclass(frozen=True, eq=False)
class Seen:
    """Hidden states of a pass, [B, L, width] for each layer: its input, and the residual stream
    between its attention and its MLP; and the rotary embedding it was given."""

    inputs: list[Tensor]
    between: list[Tensor]
    rotary: list[Rotary]


@contextmanager
def recorded(heads: Sequence[Heads]) -> Iterator[Seen]:
    """Record the hidden states of what the model computes inside."""
    seen = Seen([], [], [])

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs.append(args[0] if args else kwargs["hidden_states"])
        seen.rotary.append(kwargs["position_embeddings"])

    def between(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.between.append(args[0])

    hooks = [h.layer.register_forward_pre_hook(enter, with_kwargs=True) for h in heads]
    hooks += [h.after_attention.register_forward_pre_hook(between) for h in heads]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def _part(module: Any, path: str) -> Any:
    """An attribute of an attribute. Raises SelectorError where there is none."""
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise SelectorError(
                f"{type(module).__name__} has no {path}: speculation serves Llama-class models"
            )
    return found
