"""Every policy in a table: evictors, which keep, and selectors, which choose what to read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vattn.report import plain_table

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = {"evictor": "--policy", "selector": "--select"}


@dataclass(frozen=True)
class Row:
    """One policy.

    Args:
        name: as the command line has it.
        kind: "evictor" or "selector".
        scores: what it goes by, in a line.
        evidence: the same in the words of `Caps`.
        grain: "token" or "page".
        scope: "head", "layer" or "shared".
        decodes: whether it decides at decode steps.
        returns_memory: whether the pages of what it does not keep go back to the pool.
        source: a paper, or what else it comes from.
        option: of `vattn generate`; None where it needs more than a command line says.
    """

    name: str
    kind: str
    scores: str
    evidence: tuple[str, ...]
    grain: str
    scope: str
    decodes: bool
    returns_memory: bool
    source: str
    option: str | None


def rows() -> list[Row]:
    """Evictors, then selectors, each by name."""
    return [*_evictors(), *_selectors()]


def _evictors() -> list[Row]:
    from vattn.evictors.names import kinds, named
    from vattn.selector import Caps

    usable, none = named(), Caps(frozenset(), "token")
    listed = []
    for name, kind in sorted(kinds().items()):
        caps = getattr(kind, "caps", none)  # evictors made of others have theirs
        option = OPTIONS["evictor"] if name in usable else None
        evidence = tuple(sorted(caps.evidence)) or ("base",)
        row = (kind.summary, evidence, caps.grain, caps.scope, kind.decodes, True, kind.source)
        listed.append(Row(name, "evictor", *row, option))
    return listed


def _selectors() -> list[Row]:
    import vattn.policies
    from vattn.evictors.names import kebab
    from vattn.policies.names import named
    from vattn.selector import Selector

    usable = set(named().values())
    found = (getattr(vattn.policies, name) for name in vattn.policies.__all__)
    listed = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Selector)]
    made = [
        Row(
            kebab(kind.__name__),
            "selector",
            _first_line(kind.__doc__ or ""),
            tuple(sorted(kind.caps.evidence)),
            kind.caps.grain,
            kind.caps.scope,
            True,
            False,
            _paper(kind.__doc__ or ""),
            OPTIONS["selector"] if kind in usable else None,
        )
        for kind in listed
    ]
    return sorted(made, key=lambda row: row.name)


def tables(listed: list[Row]) -> list[Table]:
    """The rows for people, a table of each kind; a star: more is needed than an option."""
    drawn = []
    for kind, title in (
        ("evictor", "Evictors (--policy NAME): what they drop is gone, and its memory with it"),
        ("selector", "Selectors (--select NAME): all stays, little is read"),
    ):
        table = plain_table(title)
        for column in ("name", "goes by", "grain", "returns memory", "source"):
            table.add_column(column, no_wrap=column in ("name", "grain"))
        for row in (row for row in listed if row.kind == kind):
            name = row.name + ("" if row.option else " *")
            returns = "yes" if row.returns_memory else "no"
            table.add_row(name, row.scores, row.grain, returns, row.source)
        drawn.append(table)
    return drawn


def _first_line(text: str) -> str:
    """The first sentence, on a line, without its full stop."""
    sentence = re.split(r"(?<=[a-z)])\.\s|\n\n", " ".join(text.strip().split("\n\n")[:1]))[0]
    return " ".join(sentence.split()).rstrip(".")


def _paper(text: str) -> str:
    """The first paper that a docstring names; "-" where it names none."""
    found = re.search(r"arXiv:?\s*(\d{4}\.\d{4,5})", text)
    return f"arXiv {found.group(1)}" if found else "-"
