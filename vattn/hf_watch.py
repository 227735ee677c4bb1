"""Hooks on an attention module for a cache under presses: when to look at what the module names.

before each pass   is it for another cache? Then what was named so far is ours, and no more
behind a pass      once the hooks of presses have run: take over what they have named
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from vattn.hf_press import PressStore


class Watch:
    """Watches a module as long as what it names are rows of one layer of a store: until it attends
    for another cache. It keeps neither of them alive."""

    def __init__(self, store: PressStore, layer: int, module: nn.Module) -> None:
        self._store, self._layer = weakref.ref(store), layer
        self.module = weakref.ref(module)
        self._before = module.register_forward_pre_hook(self, with_kwargs=True)
        self._behind: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a pass."""
        store = self._store()
        # A shallow copy of a module has its hooks.
        if store is None or module is not self.module():
            return
        if not store.owns(kwargs.get("past_key_values")):
            store.leave(self._layer)

    def wait_for_presses(self, module: nn.Module) -> None:
        """While the module runs: look at it behind this pass. A hook of now comes last."""
        if self._behind is not None:  # of a pass that failed
            self._behind.remove()
            self._behind = None
        if module._forward_hooks:
            self._behind = module.register_forward_hook(_Behind(self))

    def settle(self) -> None:
        """Behind a pass."""
        if self._behind is not None:
            self._behind.remove()
            self._behind = None
        store = self._store()
        if store is not None:
            store.settle(self._layer)

    def remove(self) -> None:
        """Watch no more."""
        for handle in (self._before, self._behind):
            if handle is not None:
                handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nobody, ()  # in a pickled or copied model


class _Behind:
    """A hook for once."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._watch.module():
            self._watch.settle()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nobody, ()


class _Nobody:
    """A hook that does nothing."""

    def __call__(self, *args: Any) -> None:
        pass


def remove(watches: dict[int, Watch]) -> None:
    """Watch none of these any more."""
    for watch in watches.values():
        watch.remove()
    watches.clear()
