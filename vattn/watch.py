"""A streamer for transformers: times the steps, passes the text on, samples the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vattn.keeps import KeepLog
    from vattn.reads import ReadLog

# A character has at most this many byte tokens: what is no character by then is shown as it is.
_MOST_HELD = 4


@dataclass
class Watch:
    """A streamer: times the steps, passes the first sequence's text on, samples the memory.

    The clock stops while text is printed and memory is sampled, so that neither counts.
    """

    on_text: Callable[[str], None]
    on_step: Callable[[int], None]
    decode: Callable[[Sequence[int]], str]
    cache: Any
    curve_every: int | None
    peak_bytes: int = 0
    times: list[float] = field(default_factory=list)
    curve: list[tuple[int, int, int]] = field(default_factory=list)
    reads: ReadLog | None = None
    keeps: KeepLog | None = None
    _line: list[int] = field(default_factory=list)
    _shown: int = 0
    _held: int = 0
    _prompt: int = 0
    _started: float = 0.0

    def put(self, tokens: Any) -> None:
        """Called by ``generate``: first with the prompt, then with the tokens of each step."""
        now = time.perf_counter()
        if not self._prompt:
            self._prompt = tokens.shape[-1]
        else:
            self._log()
            self.times.append(now - self._started)
            self._line.append(int(tokens.reshape(-1)[0]))
            self._emit()
            step = len(self.times)
            self.peak_bytes = max(self.peak_bytes, footprint(self.cache))
            if self.curve_every and step % self.curve_every == 0:
                self.curve.append((self._prompt + step - 1, *held(self.cache)))
            self.on_step(step)
        self._started = time.perf_counter()

    def _log(self) -> None:
        """Log what the middle layer reads of the first sequence, or what all layers keep of it,
        once there is a cache."""
        store: Any = getattr(self.cache, "store", None)
        sparse = getattr(store, "sparse", None)
        if self.curve_every and self.reads is None and sparse is not None:
            from vattn.reads import ReadLog

            layer = sparse.cache.layout.layers // 2
            self.reads = ReadLog(sparse, layer, store.sequences[0].slot)
        eviction = getattr(getattr(store, "kept", None), "eviction", None)
        if self.curve_every and eviction is not None:
            from vattn.keeps import KeepLog

            self.keeps = self.keeps or KeepLog(eviction)
            self.keeps.note()

    def end(self) -> None:
        """Called by ``generate`` after the last token."""
        self._emit(last=True)

    def _emit(self, *, last: bool = False) -> None:
        """Pass on what is new in this line; some tokenizers need a line's start to decode it."""
        text = self.decode(self._line)
        self._held = self._held + 1 if text.endswith("\ufffd") and not last else 0
        if 0 < self._held < _MOST_HELD:
            return  # the middle of a character: wait for its other bytes
        self.on_text(text[self._shown :])
        self._shown, self._held = len(text), 0
        if text.endswith("\n"):
            self._line.clear()
            self._shown = 0


def footprint(cache: Any) -> int:
    """Bytes of pages that exist now, quarantined and warm ones included; 0 for other caches."""
    kv = getattr(cache, "kv", None)
    return 0 if kv is None else kv.pool.created * kv.layout.page


def held(cache: Any) -> tuple[int, int]:
    """Bytes that a transformers cache holds now: ``(mapped, used)``."""
    if getattr(cache, "kv", None) is not None:
        stats = cache.stats()
        return stats.mapped_bytes, stats.used_bytes
    nbytes = sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer.keys, layer.values)
    )
    return nbytes, nbytes
