"""vattn: the KV cache of a language model in contiguous virtual memory, paged on demand.

Public names load on first use (PEP 562), so importing the package, or any module of
``vattn.allocator``, does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vattn.cache import KVCache as KVCache
    from vattn.dropin import SDPAMode as SDPAMode
    from vattn.dropin import patch as patch
    from vattn.dropin import patched as patched
    from vattn.eviction import Eviction as Eviction
    from vattn.heads import HeadCache as HeadCache
    from vattn.layout import Layout as Layout
    from vattn.prefix import shared_prefixes as shared_prefixes
    from vattn.ragged import attend as attend
    from vattn.ragged import attend_lse as attend_lse
    from vattn.sdpa import explain as explain
    from vattn.sdpa import scaled_dot_product_attention as scaled_dot_product_attention
    from vattn.sdpa_gpu import batch_invariant as batch_invariant
    from vattn.sparse import SparseAttention as SparseAttention
    from vattn.tiers import Tiers as Tiers

__version__ = "0.1.0"

# Where each public name lives; None marks a module that is a public name itself.
_HOME: dict[str, str | None] = {
    "Eviction": "eviction",
    "HeadCache": "heads",
    "KVCache": "cache",
    "Layout": "layout",
    "SDPAMode": "dropin",
    "SparseAttention": "sparse",
    "Tiers": "tiers",
    "attend": "ragged",
    "attend_lse": "ragged",
    "batch_invariant": "sdpa_gpu",
    "explain": "sdpa",
    "evictors": None,
    "hf": None,
    "patch": "dropin",
    "patched": "dropin",
    "policies": None,
    "registry": None,
    "scaled_dot_product_attention": "sdpa",
    "shared_prefixes": "prefix",
}
__all__ = ["__version__", *_HOME]

# A checkout that lost its links (a plain zip, core.symlinks=false) keeps the two sub-packages
# one folder up: search there as well.
_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    __path__.append(os.path.dirname(_here))


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use and remember the name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(f"{__name__}.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
