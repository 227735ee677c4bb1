"""Requests of real serving traces: when they came, how long they were, which prefix they shared.

    Azure 2023   CSV     TIMESTAMP (ISO, 7 decimals), ContextTokens, GeneratedTokens
    Mooncake     JSONL   timestamp (ms), input_length, output_length, hash_ids (512-token blocks)

Prefix sharing is what a trace says, never made up: Azure requests carry no block ids. Files may be
plain or xz-compressed; `bench/traces/README.md` names sources and licences.
"""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TextIO

SAMPLES = Path(__file__).resolve().parent / "traces"
MOONCAKE_BLOCK = 512

# name -> file name patterns: the sample in this repository, the whole file
TRACES = {
    "azure_conv": ("azure_conv_head*.csv", "AzureLLMInferenceTrace_conv.csv*"),
    "azure_code": ("azure_code_head*.csv", "AzureLLMInferenceTrace_code.csv*"),
    "mooncake_conversation": ("mooncake_conversation_head*.jsonl", "conversation_trace.jsonl*"),
    "mooncake_synthetic": ("mooncake_synthetic_head*.jsonl", "synthetic_trace.jsonl*"),
}


class TraceError(ValueError):
    """A trace file that is not there, or a row that is not what the format says."""


@dataclass(frozen=True)
class Request:
    """One request. ``at`` is in seconds after the first; ``blocks`` are prefix block ids in order,
    of ``block_tokens`` tokens each, empty where the trace gives none."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Length at the end."""
        return self.input_tokens + self.output_tokens


def load(name: str, folder: Path | None = None) -> list[Request]:
    """The requests of a trace in order of arrival: the sample, or the whole file under ``folder``.

    Raises:
        TraceError: no such trace or file, or a malformed row.
    """
    if name not in TRACES:
        raise TraceError(f"no trace {name!r}; there are {', '.join(TRACES)}")
    sample, whole = TRACES[name]
    pattern = sample if folder is None else whole
    found = sorted((SAMPLES if folder is None else folder).rglob(pattern))
    if not found:
        raise TraceError(f"no file {pattern} under {folder or SAMPLES}")
    with _open(found[0]) as text:
        rows = azure(text) if name.startswith("azure") else mooncake(text)
        requests = sorted(rows, key=lambda request: request.at)
    first = requests[0].at if requests else 0.0
    return [replace(request, at=request.at - first) for request in requests]


def azure(lines: Iterable[str]) -> Iterator[Request]:
    """Requests of an Azure LLM inference trace, 2023; ``at`` counts from the first row."""
    begin: tuple[datetime, int] | None = None
    for row in csv.DictReader(lines):
        try:
            moment, ticks = _azure_time(row["TIMESTAMP"])
            tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"not a row of an Azure trace: {row} ({error})") from error
        begin = begin or (moment, ticks)
        seconds = (moment - begin[0]) / timedelta(seconds=1) + (ticks - begin[1]) * 1e-7
        yield Request(seconds, *_checked(tokens))


def mooncake(lines: Iterable[str]) -> Iterator[Request]:
    """Requests of a Mooncake FAST'25 trace; ``at`` as the trace counts it."""
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at = row["timestamp"] / 1e3
            tokens = int(row["input_length"]), int(row["output_length"])
            blocks = tuple(int(block) for block in row["hash_ids"])
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"not a row of a Mooncake trace: {line[:80]!r} ({error})") from error
        if len(blocks) != -(-tokens[0] // MOONCAKE_BLOCK):
            raise TraceError(
                f"{tokens[0]} tokens need {-(-tokens[0] // MOONCAKE_BLOCK)} blocks of "
                f"{MOONCAKE_BLOCK}, the row has {len(blocks)}"
            )
        yield Request(at, *_checked(tokens), blocks, MOONCAKE_BLOCK)


def prefix_hits(requests: Iterable[Request]) -> list[int]:
    """Tokens at the front of each input that an earlier request began with, given a cache that
    forgets nothing. Ids form a chain: what follows the first unknown block is no hit."""
    known: set[int] = set()
    hits = []
    for request in requests:
        blocks = 0
        for block in request.blocks:
            if block not in known:
                break
            blocks += 1
        hits.append(min(blocks * request.block_tokens, request.input_tokens))
        known.update(request.blocks)
    return hits


def _azure_time(text: str) -> tuple[datetime, int]:
    """Whole seconds and ticks of 100 ns: datetime itself has only six decimals."""
    whole, _, decimals = text.strip().partition(".")
    return datetime.fromisoformat(whole), int(decimals.ljust(7, "0")[:7])


def _checked(tokens: tuple[int, int]) -> tuple[int, int]:
    if min(tokens) < 0:
        raise TraceError(f"negative token counts {tokens}")
    return tokens


def _open(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
