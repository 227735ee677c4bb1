"""The public-domain texts: which bytes train, which are held out, and training batches."""

from __future__ import annotations

import lzma
import random
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bench.model import tasks

TEXTS = Path(__file__).resolve().parent.parent / "texts"
# Byte offsets of the six novels in austen.txt; the fourth, "Persuasion", is held out.
NOVELS = (0, 883_029, 1_766_310, 2_199_722, 2_666_577, 3_351_346)
HELD_OUT = 3
SEPARATOR = b"\0"


@lru_cache(maxsize=4)
def _unpack(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def novels(folder: Path | None = None) -> list[bytes]:
    """The six novels of austen.txt, in file order."""
    text = _unpack((folder or TEXTS) / "austen.txt.xz")
    ends = (*NOVELS[1:], len(text))
    return [text[a:b] for a, b in zip(NOVELS, ends, strict=True)]


def held_out(folder: Path | None = None) -> bytes:
    """The whole of "Persuasion", never trained on."""
    return novels(folder)[HELD_OUT]


def training_texts(folder: Path | None = None) -> tuple[bytes, bytes]:
    """The five training novels and the King James Bible, each one document per separator."""
    kept = [n for i, n in enumerate(novels(folder)) if i != HELD_OUT]
    return SEPARATOR.join(kept), _unpack((folder or TEXTS) / "kjv.txt.xz")


class Batches:
    """Draws training batches; each depends only on the seed, the worker and the step."""

    def __init__(self, folder: Path | None, seed: int, novel_share: float = 0.8) -> None:
        self.novels, self.bible = training_texts(folder)
        self.novel_share, self.seed = novel_share, seed
        self.rng = random.Random(seed)

    def at(self, worker: int, step: int) -> Batches:
        """The same texts, positioned at one worker's draw for one step."""
        self.rng.seed(f"{self.seed}/{worker}/{step}")
        return self

    def _excerpt(self, length: int) -> bytes:
        text = self.novels if self.rng.random() < self.novel_share else self.bible
        start = self.rng.randrange(len(text) - length)
        return text[start : start + length]

    def _sequence(self, length: int, recall: float, copying: float) -> tuple[bytes, list[float]]:
        """One sequence of ``length`` bytes with the loss weight of each byte."""
        draw, text = self.rng.random(), self._excerpt(length)
        if draw < recall:
            data, weights = tasks.recall_sequence(text, length, self.rng)
        elif draw < recall + copying:
            data, weights = tasks.copy_sequence(text, length, self.rng)
        else:
            data, weights = text, [1.0] * length
        # Half of the sequences open with the separator: both starts occur at inference.
        if self.rng.random() < 0.5:
            data, weights = SEPARATOR + data[:-1], [0.0, *weights[:-1]]
        return data, weights

    def draw(
        self, batch: int, length: int, recall: float, copying: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights, each [batch, length]."""
        rows = [self._sequence(length + 1, recall, copying) for _ in range(batch)]
        ids = torch.tensor([list(data) for data, _ in rows], dtype=torch.long)
        weights = torch.tensor([w for _, w in rows], dtype=torch.float32)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()
