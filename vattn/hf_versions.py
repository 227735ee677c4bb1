"""What differs between transformers 5.16 to 5.23 and 5.2, the last that kvpress runs on.

On 5.2 there are `VattnCache` and `PressCache`; `enable` and `VattnStaticCache` need 5.16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, cache_utils

# Layer classes by kind, from which a `DynamicCache` makes its layers. 5.2 has no such table.
LAYER_TYPES: dict[str, Any] = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
# What these layers keep is the same: chunked attention differs in its mask only.
WINDOWED = ("sliding_attention", "chunked_attention")


def kinds_of(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """The kind of every layer, and the arguments of its cache."""
    config = config.get_text_config(decoder=True)
    read = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if read is None:
        return _kinds_until_5_2(config)
    kinds, kwargs = read(config)
    if isinstance(kwargs, dict):  # one for all layers, until 5.18
        kwargs = [kwargs] * len(kinds)
    return list(zip(kinds, kwargs, strict=True))


def _kinds_until_5_2(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    window = getattr(config, "sliding_window", None)
    window = window or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention" if window is None else "sliding_attention"
        kinds = [kind] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:  # the last ones hold nothing
        kinds = kinds[:-shared]
    return [(kind, {"sliding_window": window} if kind in WINDOWED else {}) for kind in kinds]


def queries_of(asked: int | Tensor) -> int:
    """For how many queries a mask is wanted. 5.2 passes their positions."""
    return asked if isinstance(asked, int) else int(asked.shape[0])
