"""Every policy in a table: evictors, which keep, selectors, which choose what to read, and
compressors, which hold every token in less."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vattn.report import plain_table

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = {"evictor": "--policy", "selector": "--select", "compressor": "--lorc"}


@dataclass(frozen=True)
class Row:
    """One policy.

    Args:
        name: as the command line has it.
        kind: "evictor", "selector" or "compressor".
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
    """Evictors, then selectors, each by name, then compressors."""
    return [*_evictors(), *_selectors(), *_compressors()]


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
    from vattn.policies.names import kinds, named

    usable = named()
    return [
        Row(
            name,
            "selector",
            _first_line(kind.__doc__ or ""),
            tuple(sorted(kind.caps.evidence)),
            kind.caps.grain,
            kind.caps.scope,
            True,
            False,
            _paper(kind.__doc__ or ""),
            OPTIONS["selector"] if name in usable else None,
        )
        for name, kind in sorted(kinds().items())
    ]


def _compressors() -> list[Row]:
    from vattn import lorc

    scores = "low-rank K and V projections: their SVD, or what a sample of text shows"
    row = (scores, ("offline",), "token", "layer", True, True, _paper(lorc.__doc__ or ""))
    return [Row("lorc", "compressor", *row, OPTIONS["compressor"])]


def tables(listed: list[Row]) -> list[Table]:
    """The rows for people, a table of each kind; a star: more is needed than an option."""
    drawn = []
    for kind, title in (
        ("evictor", "Evictors (--policy NAME): what they drop is gone, and its memory with it"),
        ("selector", "Selectors (--select NAME): all stays, little is read"),
        ("compressor", "Compressors (--lorc SHARE): all stays, in fewer bytes"),
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
