"""Evictors by name, for a command line: those that need nothing but a budget."""

from __future__ import annotations

import vattn.evictors
from vattn.evictor import Evictor, EvictorError
from vattn.names import offered


def kinds() -> dict[str, type[Evictor]]:
    """All evictors by their names in lower case ("sliding-window")."""
    return offered(vattn.evictors, Evictor)


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
