"""Closing gaps in place: every row where it belongs, none beyond touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.guard import allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels import compact_kernel
from vattn.kernels.compact import compact
from vattn.kernels.kv import KV

WAYS = {"torch": compact, "kernel": compact_kernel.compact}


def kept_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers and counts of masks [B, H, n]."""
    count = keep.sum(-1)
    kept = torch.zeros(*keep.shape[:2], int(count.max()), dtype=torch.int64)
    for b, h in torch.cartesian_prod(*map(torch.arange, keep.shape[:2])).tolist():
        kept[b, h, : count[b, h]] = keep[b, h].nonzero()[:, 0]
    return kept, count


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "dim", "share", "slots"),
    [
        (torch.float32, 16, 0.5, None),
        (torch.bfloat16, 40, 0.1, (3, 1)),
        (torch.float8_e4m3fn, 64, 0.9, (2, 0)),
        (torch.float16, 128, 0.0, None),
        (torch.float32, 8, 1.0, None),
    ],
)
def test_rows_kept_stand_side_by_side(way, place, dtype, dim, share, slots, monkeypatch):
    fresh_seed()
    monkeypatch.setattr("vattn.kernels.compact.CHUNK", 37)
    lengths = (150, 83)
    key = torch.randn(4, 2, 160, dim).to(dtype)
    value = torch.randn(4, 2, 160, 2 * dim).to(dtype)
    keep = torch.rand(2, 2, 150) < share
    keep[1, :, 83:] = False
    kept, count = kept_of(keep)
    at = range(2) if slots is None else slots
    wanted = [key.clone(), value.clone()]
    for side, old in zip(wanted, (key, value), strict=True):
        for b, slot in enumerate(at):
            for h in range(2):
                side[slot, h, : count[b, h]] = (
                    old[slot, h].view(torch.uint8)[keep[b, h].nonzero()[:, 0]].view(dtype)
                )
    there = [side.to(place) for side in (key, value)]
    of = None if slots is None else torch.tensor(slots, device=place)
    kv = KV(*(each[:2] if slots is None else each for each in there),
            torch.tensor(lengths, device=place), slots=of)  # fmt: skip
    if way == "torch" and place == "cuda":
        way = "kernel"
    WAYS[way](kv, kept.to(place), count.to(place))
    for found, right in zip(there, wanted, strict=True):
        assert torch.equal(found.cpu().view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "what"),
    [([3, 3], "repetition"), ([4, 2], "ascend"), ([0, 10], "below"), ([-1, 2], "ascend")],
)
def test_wrong_rows_are_refused(way, rows, what):
    key = torch.randn(1, 1, 12, 8)
    before = key.clone()
    kv = KV(key, key, torch.tensor([10]))
    with pytest.raises(ValueError, match=what):
        WAYS[way](kv, torch.tensor([[rows]]), torch.tensor([[2]]))
    assert torch.equal(key, before)
    with pytest.raises(ValueError, match="int64"):
        WAYS[way](kv, torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([[2]]))
    for count in (3, -1):
        with pytest.raises(ValueError, match=r"count must lie in 0\.\.2"):
            WAYS[way](kv, torch.tensor([[[0, 1]]]), torch.tensor([[count]]))


@pytest.mark.parametrize("way", WAYS)
def test_no_row_behind_the_length_is_touched(way: str):
    code, said = outcome(f"tests.test_compact:inside_{way}")
    assert code == 0, said


def inside(way: str) -> None:
    """Two heads of which the first page may be touched: 64 rows of 64 bytes."""
    key, value = (fenced((1, 2, 256, 16), torch.float32) for _ in range(2))
    for side in (key, value):
        for head in range(2):
            allow(side[0, head, :64]).normal_()
    kept = torch.stack([torch.arange(1, 64, 2), torch.arange(32, 64)])[None]
    old = key[0, 1, 32:64].clone()
    WAYS[way](KV(key, value, torch.tensor([64])), kept, torch.tensor([[32, 32]]))
    assert torch.equal(key[0, 1, :32], old)


def inside_torch() -> None:
    inside("torch")


def inside_kernel() -> None:
    inside("kernel")
