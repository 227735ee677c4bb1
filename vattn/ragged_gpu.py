"""`attend` by the Triton kernels: a cache on a GPU, or one on the host where Triton is interpreted.

The kernels take a layer's lanes as they are reserved, [slots, kv_heads, max_tokens, head_dim], and
int32 lengths, starts and slots on the device: nothing is padded, gathered or copied, and rows that
are not mapped are not touched. These tensors are made once for a view, in one copy from the host,
and serve all of its layers.

A CUDA graph records addresses. A `FixedView` keeps its own, and `refresh` changes what is there:

    fixed = FixedView(cache, batch=len(sequences))
    fixed.refresh(cache.view(sequences))
    with torch.cuda.graph(graph):
        out = attend(query, fixed, layer)                 # of a query that stays where it is
    cache.extend(sequences); ...; fixed.refresh(cache.view(sequences)); graph.replay()

Grids and workspaces depend on shapes alone, so one graph serves all lengths up to ``max_tokens``,
and any sequences of the cache: its addresses never move.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from vattn import paths, paths_gpu, sdpa_gpu
from vattn.cache import KVCache
from vattn.kernels.contract import plain_rows
from vattn.layout import LayoutError
from vattn.sequence import View

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # kernels.kv.FP8: numbers as stored, no scales
ALIGNED = 4  # counts of a row start at 16 bytes: Triton compiles one kernel for all layers


class FixedView:
    """Lengths, starts and slots of ``batch`` sequences at addresses that stay.

    counts [2 * physical_layers + 1, batch] int32 on the cache's device: lengths by physical layer,
    starts by physical layer, slots. Nothing is kept mapped, and nobody checks that the sequences of
    the last `refresh` are still open when a graph is replayed.

    For one stream: refreshes, replays and other calls that take the view are ordered by it alone.
    """

    def __init__(self, cache: KVCache, batch: int) -> None:
        self.cache, self.batch = cache, batch
        shape = (2 * cache.layout.physical_layers + 1, -(-batch // ALIGNED) * ALIGNED)
        # Ordinary tensors even where inference_mode is on: later refreshes write to them.
        with torch.inference_mode(False):
            on_gpu = cache.device.type == "cuda"
            self._staged = torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
            self._copied = torch.cuda.Event() if on_gpu else None
            self._counts = torch.zeros(shape, dtype=torch.int32, device=cache.device)
        self.counts = self._counts[:, :batch]
        self.released = True  # whether the kernels look at starts

    def refresh(self, view: View) -> None:
        """Take the lengths and slots of ``view``, in one copy by the current stream, for which the
        host does not wait: only until the copy of the refresh before is done.

        Raises:
            LayoutError: another cache's view, or of another number of sequences.
            ClosedError: a sequence was closed, truncated or reordered since the view was made.
        """
        view.check_current()
        if view.cache is not self.cache or len(view.slots) != self.batch:
            raise LayoutError(
                f"the view is of {len(view.slots)} sequences"
                f"{'' if view.cache is self.cache else ' of another cache'}: "
                f"this one was made for {self.batch}"
            )
        held = np.concatenate([view.lengths.T, view.starts.T, [view.slots]])
        if self._copied is not None:
            self._copied.synchronize()  # what is staged may still be read
        self._staged[:, : self.batch] = torch.from_numpy(held)
        self._counts.copy_(self._staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._counts.device))

    def lanes(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """(key, value, lengths, starts, slots) of a layer, as `vattn.kernels.kv.KV` takes them;
        for use within one call."""
        key, value = self.cache.reserved(layer)
        layout = self.cache.layout
        physical = layout.physical(layer)
        starts = self.counts[layout.physical_layers + physical] if self.released else None
        return key, value, self.counts[physical], starts, self.counts[-1]


_views: weakref.WeakKeyDictionary[View, FixedView] = weakref.WeakKeyDictionary()


def fixed(view: View) -> FixedView:
    """The tensors of a view, made at its first use.

    Raises ClosedError if a sequence was closed, truncated or reordered since the view was made.
    """
    found = _views.get(view)
    if found is None:
        found = FixedView(view.cache, len(view.slots))
        found.refresh(view)
        found.released = bool(view.starts.any())
        _views[view] = found
    else:
        view.check_current()
    return found


def attend_lse(
    query: Tensor,
    view: View | FixedView,
    layer: int,
    scale: float | None = None,
    window_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`vattn.attend_lse` by the Triton kernels; raises the same, and ImplError with the reason
    where they cannot run."""
    paths.refuse(paths.TRITON, paths_gpu.why_not_launched(query), _remedy(view))
    source = view if isinstance(view, FixedView) else fixed(view)
    check(query, view, layer, window_tokens, fp8=True)
    key, value, lengths, starts, slots = source.lanes(layer)
    query = plain_rows(query.resolve_neg())
    return sdpa_gpu.over_lanes(query, key, value, lengths, starts, slots, scale, window_tokens)


def _remedy(view: View | FixedView) -> str:
    """What to do where the Triton kernels cannot run."""
    if view.cache.device.type != "cpu":
        return 'no other kernel reads a cache on a GPU: KVCache(..., device="cpu") needs none'
    return "pass cache.view(sequences)" if isinstance(view, FixedView) else 'use impl="auto"'


def check(
    query: Tensor,
    view: View | FixedView,
    layer: int,
    window_tokens: int | None,
    *,
    fp8: bool = False,
) -> None:
    """Raise LayoutError for a query that does not suit a view, with the values and the remedy;
    ``fp8`` where a cache of 8-bit floats, with a bfloat16 or float16 query, can be read."""
    cache = view.cache
    layout = cache.layout
    batch = view.batch if isinstance(view, FixedView) else len(view.slots)
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != layout.head_dim:
        raise LayoutError(
            f"query is {tuple(query.shape)} and must be [{batch} sequences, heads, tokens, "
            f"{layout.head_dim}]"
        )
    _check_dtype(query, cache, fp8)
    if query.shape[1] % layout.kv_heads:
        raise LayoutError(
            f"{query.shape[1]} query heads are no multiple of {layout.kv_heads} KV heads"
        )
    if isinstance(view, View):
        physical = layout.physical(layer)
        shortest = (view.lengths[:, physical] - view.starts[:, physical]).min()
        if shortest < query.shape[2]:
            raise LayoutError(
                f"{query.shape[2]} query tokens in a sequence that holds {shortest}: append their "
                "K and V before attending"
            )
    if window_tokens is not None and window_tokens < 1:
        raise LayoutError(f"window_tokens must be at least 1 or None, got {window_tokens}")
    if query.requires_grad and torch.is_grad_enabled():
        raise LayoutError("attend has no gradient: call it under torch.no_grad()")


def _check_dtype(query: Tensor, cache: KVCache, fp8: bool) -> None:
    wide = fp8 and cache.dtype in FP8
    if query.device != cache.device or (query.dtype != cache.dtype and not wide):
        raise LayoutError(
            f"query is {query.dtype} on {query.device}, the cache {cache.dtype} on "
            f"{cache.device}: convert the query"
        )
    if wide and query.dtype not in HALF:
        raise LayoutError(
            f"query is {query.dtype} and must be bfloat16 or float16 over a cache of {cache.dtype}"
        )
    if not wide and query.dtype not in DTYPES:
        raise LayoutError(
            f"attend serves float32, bfloat16 and float16, the cache holds {query.dtype}: convert "
            "its rows and use scaled_dot_product_attention"
        )
