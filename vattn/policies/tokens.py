"""Selectors of single tokens: one record a token."""

from __future__ import annotations

from dataclasses import dataclass

from vattn.selector import Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class TokenSelector(Selector):
    """A selector whose records and choices are single tokens: ``page_tokens`` is 1."""

    page_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_tokens != 1:
            raise SelectorError(
                f"page_tokens must be 1 for {type(self).__name__}, got {self.page_tokens}"
            )
