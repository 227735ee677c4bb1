"""Selectors by name, for a command line: those that need a budget, and keys to be made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import signature
from typing import Any

from torch import Tensor

import vattn.policies
from vattn.names import offered
from vattn.policies import Estimated, Graded, Landmark, Nibbles, Quest, Sampled, TwoStage
from vattn.selector import Selector, SelectorError


def kinds() -> dict[str, type[Selector]]:
    """All selectors by their names in lower case ("two-stage")."""
    return offered(vattn.policies, Selector)


def named() -> dict[str, type[Selector]]:
    """Selectors by name, but for those that ask for more than keys: recorded queries."""
    return {name: kind for name, kind in kinds().items() if _needs_keys_at_most(kind)}


def selector(name: str, budget_tokens: int, keys: Callable[[], Tensor]) -> Selector:
    """The selector of that name with a budget; ``keys`` records some, [layers, Hkv, n, D], where it
    is to be calibrated.

    Raises:
        SelectorError: there is none, or the budget is too small for it.
    """
    found = named()
    if name not in found:
        raise SelectorError(f"no selector {name!r}: choose one of {', '.join(sorted(found))}")
    kind = found[name]
    options: dict[str, Any] = {"budget_tokens": budget_tokens}
    if not hasattr(kind, "calibrate"):
        return kind(**options, **_parts_of(kind, budget_tokens))
    recorded = keys()
    if kind is Graded:  # of small heads fewer components are worth four bits
        options["fine"] = max(2, min(8, recorded.shape[-1] // 8 * 2))
    calibrated: Selector = kind.calibrate(recorded, **options)
    return calibrated


def _parts_of(kind: type[Selector], budget_tokens: int) -> dict[str, Any]:
    """How a selector made of others shares its budget with them."""
    if kind is Sampled:
        return {"base": Nibbles(budget_tokens=budget_tokens // 2)}
    if issubclass(kind, TwoStage):
        return {"base": Quest(budget_tokens=4 * budget_tokens)}
    if kind is Estimated:  # pages that leave most of the budget to choose
        return {"page_tokens": min(64, 1 << max(0, (budget_tokens // 8).bit_length() - 1))}
    if kind is Landmark:
        return {"outliers": min(48, budget_tokens // 32)}
    return {}


def _needs_keys_at_most(kind: type[Selector]) -> bool:
    if hasattr(kind, "calibrate"):
        return "queries" not in signature(kind.calibrate).parameters
    return all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
