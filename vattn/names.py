"""What a package of policies offers, by name."""

from __future__ import annotations

import re
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def offered(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """The public classes of a package that derive from ``base``, by their names in lower case."""
    found = (getattr(package, name) for name in package.__all__)
    return {
        kebab(kind.__name__): kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, base)
    }


def kebab(name: str) -> str:
    """SlidingWindow -> sliding-window, SnapKV -> snapkv."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", name).lower()
