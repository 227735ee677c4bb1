"""Speculation: what a layer is about to read, guessed a layer ahead, so that it is near in time.

    layer i-1    input ──► norm, attention ──► + ──► norm, MLP ──► + ──► input of layer i
                   │ early                     │ late                      norm_i, q_i, RoPE, select
                   └───────────┬───────────────┘                           read what was selected
                               ▼
                 hint of layer i: its own norm, q projection and RoPE at this position, applied to
                 a hidden state that is not its input yet, then the same selector ──► prefetch

A residual stream changes little from layer to layer, so most hints are right. How little is
measured once (`vattn.calibrate`), and a layer whose guess is none gets no hint. A hint only warms
pages: what a layer reads is chosen anew from its own query, and a wrong hint costs time alone.
Source: InfiniGen (OSDI 2024, arXiv 2406.19707), which hints early; its partial channels are
`policies.InfiniGen`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .calibrate import Cosines, Heads, Rotary, heads_of
from .kernels.kv import MOST_TOKENS
from .kernels.selection import Selection
from .selector import Look, Selector, SelectorError
from .sequence import Sequence as Open
from .sparse import SparseAttention, tokens_of
from .tiers import Tiers

Moment = Literal["early", "late"]
When = Literal["early", "late", "gated"]
Looks = Callable[[int], Look | None]
Prefetch = Callable[[int, Selection], object]

GATE = 0.8
# Hints that may wait for their turn: behind more than that they come too late to be of use.
MOST_WAITING = 8


class Speculator:
    """Hints for the layers of a model.

    Args:
        heads: of every layer, see `heads_of`.
        selector: the one that chooses what is read.
        cosines: from `calibrate`.
        when: "early": from the input of the layer before, whose attention and MLP then hide the
            copies; "late": from the residual stream after that layer's attention, which is a
            better guess and leaves the MLP to hide them; "gated": early where that passes the
            gate, else late where that does.
        gate: least cosine of a guess; layers below it get no hint. -1 lets all pass.

    Raises:
        SelectorError: a parameter is out of range, or cosines are not those of these layers.
    """

    def __init__(
        self,
        heads: Sequence[Heads],
        selector: Selector,
        cosines: Cosines,
        *,
        when: When = "gated",
        gate: float = GATE,
    ) -> None:
        if when not in ("early", "late", "gated"):
            raise SelectorError(f'when must be "early", "late" or "gated", got {when!r}')
        if not -1 <= gate <= 1:
            raise SelectorError(f"gate must be a cosine, -1 to 1, got {gate!r}")
        if not len(heads) == len(cosines.early) == len(cosines.late):
            raise SelectorError(
                f"{len(heads)} layers, and cosines of {len(cosines.early)} and "
                f"{len(cosines.late)}: calibrate this model"
            )
        self.heads, self.selector = tuple(heads), selector
        self._moments = [_moment(cosines, layer, when, gate) for layer in range(len(heads))]

    def moment(self, layer: int) -> Moment | None:
        """When the hint of a layer is made, in the layer before it; None: never."""
        return self._moments[layer]

    def hint(self, layer: int, hidden: Tensor, rotary: Rotary, look: Look) -> Selection | None:
        """What a layer is likely to select; None: no hint.

        Args:
            layer: whose hint.
            hidden: [B, L, width] of the layer before, at this layer's `moment`.
            rotary: cosine and sine for the new tokens.
            look: this layer before the step: its lengths do not count the new tokens yet.
        """
        if self.moment(layer) is None:
            return None
        return self.selector.select(self.heads[layer].query(hidden, rotary), look)


def _moment(cosines: Cosines, layer: int, when: When, gate: float) -> Moment | None:
    if layer == 0:
        return None
    if when != "late" and cosines.early[layer] >= gate:
        return "early"
    return "late" if when != "early" and cosines.late[layer] >= gate else None


class Hooks:
    """A model whose layers give hints while they run; undone by `detach`, or at the end of `with`.

    The model computes what it would compute without. Its thread makes a hint where it arises and
    begins the copies, which are in the background; or, with ``background``, another thread does (on
    a device, on another stream), and the model waits for nothing. Before the sequences are then
    truncated or closed, `settle`.

    Args:
        model: a Llama-class transformers model.
        speculator: of its layers.
        looks: what there is of a layer before this step; None: no hint now. Always called by the
            model's thread; in the background the tensors are read until `settle`.
        prefetch: called with a layer and its hint, in the background if that is where hints are
            made (`Tiers` takes calls of the model's thread alone).
        background: where hints are made. At most `MOST_WAITING` wait, others are dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        speculator: Speculator,
        looks: Looks,
        prefetch: Prefetch,
        *,
        background: bool = False,
    ) -> None:
        if list(speculator.heads) != heads_of(model):
            raise SelectorError("the speculator is of another model: make it from heads_of(model)")
        self.speculator, self._looks, self._prefetch = speculator, looks, prefetch
        self.hints = np.zeros(len(speculator.heads), np.int64)  # begun, of each layer
        self.dropped = 0  # not begun: too many were waiting
        self._rotary: Rotary | None = None
        self._waiting: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        self._stream: Any = None
        self._worker = ThreadPoolExecutor(1, "vattn-speculate") if background else None
        self._handles = [h for layer in range(1, len(speculator.heads)) for h in self._hook(layer)]

    def settle(self) -> None:
        """Wait for all hints that were begun. Raises what one of them raised."""
        while self._waiting:
            self._collect(self._waiting.popleft())
        error, self._error = self._error, None
        if error is not None:
            raise error

    def detach(self) -> None:
        """Take the hooks away and wait for the last hints. Idempotent. Raises as `settle`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        self.settle()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # ---- inside --------------------------------------------------------------------------------
    def _hook(self, layer: int) -> Iterator[Any]:
        """Hooks on the layer before ``layer``."""
        moment = self.speculator.moment(layer)
        if moment is None:
            return
        before = self.speculator.heads[layer - 1]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._rotary = kwargs["position_embeddings"]
            if moment == "early":
                self._begin(layer, args[0] if args else kwargs["hidden_states"])

        def between(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._begin(layer, args[0])

        yield before.layer.register_forward_pre_hook(enter, with_kwargs=True)
        if moment == "late":
            yield before.after_attention.register_forward_pre_hook(between)

    def _begin(self, layer: int, hidden: Tensor) -> None:
        while self._waiting and self._waiting[0].done():
            self._collect(self._waiting.popleft())
        rotary = self._rotary
        if hidden.shape[1] > MOST_TOKENS or self._error is not None or rotary is None:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        look = self._looks(layer)
        if look is None:
            return
        self.hints[layer] += 1
        if self._worker is None:
            self._give(layer, hidden, rotary, look, None)
            return
        ready = torch.cuda.current_stream().record_event() if hidden.is_cuda else None
        work = self._worker.submit(self._give, layer, hidden.detach(), rotary, look, ready)
        self._waiting.append(work)

    @torch.no_grad()
    def _give(self, layer: int, hidden: Tensor, rotary: Rotary, look: Look, ready: Any) -> None:
        with self._beside(ready):
            hint = self.speculator.hint(layer, hidden, rotary, look)
            if hint is not None:
                self._prefetch(layer, hint)

    def _beside(self, ready: Any) -> Any:
        """A stream of our own that waits for ``ready``; the model's stream waits for nothing."""
        if ready is None:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_event(ready)
        return torch.cuda.stream(self._stream)

    def _collect(self, done: Future[None]) -> None:
        self._error = self._error or done.exception()


def warming(
    sparse: SparseAttention, tiers: Tiers, sequences: Callable[[], Sequence[Open]]
) -> tuple[Looks, Prefetch]:
    """What `Hooks` asks and tells when pages of a cache are to be warm: ``looks`` and ``prefetch``.

    Args:
        sparse: chooses what is read.
        tiers: of the same cache.
        sequences: the batch that the model runs, when asked; empty: no hint.
    """

    def looks(layer: int) -> Look | None:
        batch = list(sequences())
        return sparse.look(sparse.cache.view(batch), layer) if batch else None

    def prefetch(layer: int, hint: Selection) -> None:
        for b, sequence in enumerate(sequences()):
            held = int(sequence.lengths.max())
            tiers.prefetch(sequence, layer, tokens_of(hint, b, sparse.cache.layout, held))

    return looks, prefetch
