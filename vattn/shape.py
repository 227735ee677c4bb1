"""The shape of a model's KV cache, read from its ``config.json``: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn.allocator.errors import VattnError
from vattn.layout import ITEM_BYTES

# The dtype to plan with when the config names none, or one that no cache row is stored in.
DEFAULT_DTYPE = "bfloat16"
_SLIDING = ("sliding_attention", "chunked_attention")


class ConfigError(VattnError, ValueError):
    """A model config is missing, unreadable, or describes a cache that vattn does not lay out."""


@dataclass(frozen=True)
class ModelShape:
    """What a token costs in each layer of a model.

    ``windows[layer]`` is the sliding window in tokens, or None where every token is kept. Layers
    without keys and values of their own (linear attention, shared caches) are left out.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: str = DEFAULT_DTYPE
    max_positions: int | None = None

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer's K (as many again in its V)."""
        return self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in K and V of all layers, windows ignored."""
        return 2 * self.layers * self.row_bytes

    def used_bytes(self, tokens: int) -> int:
        """Bytes of K and V that a sequence of ``tokens`` tokens has to keep, windows respected."""
        return 2 * self.row_bytes * sum(min(tokens, w or tokens) for w in self.windows)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, dtype: str | None = None) -> ModelShape:
        """Read a transformers config (its ``text_config`` where there is one).

        Raises:
            ConfigError: a field is missing, or the attention does not keep plain K and V rows.
        """
        text = config.get("text_config")
        if isinstance(text, Mapping):
            config = {**config, **text}
        name = str(config.get("model_type", "model"))
        _refuse_exotic(config, name)
        heads = _first(config, name, "num_attention_heads", "n_head", "n_heads")
        return cls(
            name=name,
            query_heads=heads,
            kv_heads=_optional(config, "num_key_value_heads", "num_kv_heads") or heads,
            head_dim=_optional(config, "head_dim")
            or _first(config, name, "hidden_size", "n_embd", "d_model") // heads,
            windows=_windows(config, name),
            dtype=dtype or _dtype(config),
            max_positions=_optional(config, "max_position_embeddings", "n_positions"),
        )

    @classmethod
    def from_file(cls, path: Path, *, dtype: str | None = None) -> ModelShape:
        """Read ``config.json``, or the directory that holds it."""
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"no such file: {path}. Pass a transformers config.json or the directory that "
                "holds one."
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds a {type(config).__name__}, not a config object")
        return cls.from_config(config, dtype=dtype)


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        if config.get(name) is None:
            continue
        try:
            value = int(config[name])
        except (TypeError, ValueError):
            value = -1
        if value < 0:
            raise ConfigError(f"{name} must be an int >= 0, got {config[name]!r}")
        return value
    return None


def _first(config: Mapping[str, Any], model: str, *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise ConfigError(f"the config of {model} has none of the fields {', '.join(names)}")
    if value == 0:
        raise ConfigError(f"the config of {model} has 0 for {' or '.join(names)}; 1 is the least")
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    name = str(named).removeprefix("torch.")
    return name if name in ITEM_BYTES else DEFAULT_DTYPE


def _refuse_exotic(config: Mapping[str, Any], name: str) -> None:
    if config.get("kv_lora_rank") is not None:
        raise ConfigError(
            f"{name} keeps a latent (kv_lora_rank {config['kv_lora_rank']}) instead of K and V "
            "rows; vattn lays out plain multi-head and grouped-query attention only"
        )
    other = config.get("global_head_dim")
    if other is not None and other != config.get("head_dim"):
        raise ConfigError(
            f"{name} mixes head sizes ({config.get('head_dim')} and {other}); vattn lays out one "
            "head size per cache"
        )


def _windows(config: Mapping[str, Any], name: str) -> tuple[int | None, ...]:
    """The window of every layer that has a cache of its own."""
    layers = _first(config, name, "num_hidden_layers", "n_layer", "n_layers")
    window = _optional(config, "sliding_window", "attention_chunk_size")
    if config.get("use_sliding_window") is False:
        window = None
    kinds = config.get("layer_types") or _layer_types(config, layers, window)
    own = list(kinds)[: len(kinds) - int(config.get("num_kv_shared_layers") or 0)]
    kept = [kind for kind in own if str(kind) == "full_attention" or str(kind) in _SLIDING]
    if not kept:
        raise ConfigError(f"{name} has no attention layer with a KV cache ({len(kinds)} layers)")
    return tuple(window if kind in _SLIDING else None for kind in kept)


def _layer_types(config: Mapping[str, Any], layers: int, window: int | None) -> list[str]:
    """Layer kinds of configs that predate ``layer_types``."""
    if window is None:
        return ["full_attention"] * layers
    every = _optional(config, "sliding_window_pattern", "_sliding_window_pattern")
    if every is None and config.get("model_type") == "gemma2":
        every = 2
    if every:
        return [_SLIDING[0] if (i + 1) % every else "full_attention" for i in range(layers)]
    first = _optional(config, "max_window_layers") or 0
    return [_SLIDING[0] if i >= first else "full_attention" for i in range(layers)]
