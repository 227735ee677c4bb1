"""Evictors by name, for a command line: those that need nothing but a budget."""

from __future__ import annotations

import re

import vattn.evictors
from vattn.evictor import Evictor, EvictorError


def kinds() -> dict[str, type[Evictor]]:
    """All evictors by their names in lower case ("sliding-window")."""
    found = (getattr(vattn.evictors, name) for name in vattn.evictors.__all__)
    return {
        kebab(kind.__name__): kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, Evictor)
    }


def kebab(name: str) -> str:
    """SlidingWindow -> sliding-window, SnapKV -> snapkv."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", name).lower()


def named() -> dict[str, type[Evictor]]:
    """Evictors by name, but for those that ask for more than a budget: gates, other evictors."""
    return {name: kind for name, kind in kinds().items() if _made_of_budget(kind)}


def evictor(name: str, budget: float | int | None = None) -> Evictor:
    """The evictor of that name with a budget, a share or a number of tokens; None: its default.

    Raises:
        EvictorError: there is none, or the budget is too small for it.
    """
    found = named()
    if name not in found:
        raise EvictorError(f"no policy {name!r}: choose one of {', '.join(sorted(found))}")
    return found[name]() if budget is None else found[name](budget=budget)


def _made_of_budget(kind: type[Evictor]) -> bool:
    try:
        kind(budget=0.5)
    except (TypeError, EvictorError):
        return False
    return True
