"""The split rule: equal shares, small partials, and the device deals as Python says."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.attention import fresh_seed
from tests.decoding import Case, shapes
from vattn.kernels.deals import deal_for, workspace_for
from vattn.kernels.decode import decode
from vattn.kernels.gpu import A100, B200, H100, Device, device_of, pretend
from vattn.kernels.scores import Scores, reference
from vattn.kernels.splits import find, splits, tiles_of

RAGGED = [1 << 10, 16 << 10] * 16


def test_programs_write_the_parts_that_the_rule_names() -> None:
    case = Case([200, 17, 130], None, 4, 2, 2, 64, 64)
    case.scores = {"causal": "bottom_right", "window": 140}
    fresh_seed()
    query, kv, scores, _ = case.make()
    with pretend(Device(80, 3, 163 << 10)):
        workspace = workspace_for(query, kv, scores, one_launch=False)
        workspace.tops.fill_(float("nan"))
        decode(query, kv, scores, workspace=workspace)
        dealt = deal_for(device_of(query), query, kv, scores)
    tiles = [tiles_of(length, 0, 2, scores, dealt.block) for length in case.lengths]
    named = splits(tiles, dealt)
    parts = {split.partial: split for split in named if split.partial is not None}
    written = workspace.tops[:, 0].isnan().logical_not().all(1).nonzero().flatten().tolist()
    assert sorted(parts) == written
    assert len(written) > 3
    for slot, split in parts.items():
        b, length = split.sequence, case.lengths[split.sequence]
        low = max(0, length - 2 - 140 + 1)
        first, end = (low + dealt.block * t for t in (split.first, split.end))
        mask = torch.zeros(2, length, dtype=torch.bool)
        mask[:, first:end] = True
        heads = slice(2 * split.job, 2 * split.job + 2)
        _, lse = reference(
            query[b, heads], kv.key[b, split.job, None], kv.value[b, split.job, None], scores,
            length=length, mask=mask,
        )  # fmt: skip
        m, total = workspace.tops[slot].double()
        found = (m + total.log2()) / 1.4426950408889634  # rows are token by token, head by head
        assert torch.allclose(found.view(2, 2).T, lse, atol=1e-5)


@pytest.mark.parametrize("lengths", [RAGGED, [4096], [131072], [2048] * 256, [0, 100_000, 1]])
@pytest.mark.parametrize("device", [A100, H100, B200])
def test_programs_get_equal_shares(lengths: list[int], device: Device) -> None:
    query, kv = shapes(len(lengths), 32, 8, 128, 131072)
    dealt = deal_for(device, query, kv, Scores())
    tiles = [tiles_of(length, 0, 1, Scores(), dealt.block) for length in lengths]
    found = splits(tiles, dealt)
    shares: dict[int, int] = {}
    for split in found:
        shares[split.program] = shares.get(split.program, 0) + split.end - split.first
    assert max(shares.values()) - min(shares.values()) <= 1
    assert sum(shares.values()) == 8 * sum(tiles)
    assert set(shares) == set(range(len(shares)))
    for job in range(0, 8 * len(lengths), 7):
        runs = [s for s in found if 8 * s.sequence + s.job == job]
        assert [s.first for s in runs] == [0, *(s.end for s in runs[:-1])]
        assert runs[-1].end == tiles[job // 8]
    partials = [s.partial for s in found if s.partial is not None]
    assert len(set(partials)) == len(partials) <= 2 * dealt.programs
    assert max(partials, default=0) < 2 * dealt.programs


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("lengths", [[4096], [4096] * 64, [131072], [4096, 65536] * 4])
@pytest.mark.parametrize("device", [A100, H100, B200])
def test_partials_are_less_than_3_percent_of_k_and_v(
    device: Device, lengths: list[int], groups: int
) -> None:
    query, kv = shapes(len(lengths), 8 * groups, 8, 128, 131072)
    dealt = deal_for(device, query, kv, Scores())
    tiles = [tiles_of(length, 0, 1, Scores(), dealt.block) for length in lengths]
    partials = sum(split.partial is not None for split in splits(tiles, dealt))
    assert partials * groups * (128 + 2) * 4 < 0.03 * sum(lengths) * 8 * 2 * 128 * 2


def test_grid_and_workspace_follow_from_heads_batch_and_device_alone() -> None:
    for reserved in (32768, 1 << 20):
        for batch in (1, 64, 10_000):
            query, kv = shapes(batch, 64, 8, 128, reserved)
            with pretend(H100):
                dealt = deal_for(H100, query, kv, Scores())
                space = workspace_for(query, kv)
            assert dealt.programs == 264
            assert space.partials.shape == (528, 8, 128)
            assert space.tops.shape == (528, 2, 8)
            assert space.arrived is not None
    with pretend(H100):
        assert workspace_for(*shapes(1, 64, 8, 128, 32768, tokens=4)).arrived is None


def test_more_than_65535_jobs_are_found() -> None:
    """No part of the grid is batch times heads; programs find their jobs by number."""
    found = torch.zeros(2, dtype=torch.int32)
    _find_one[(1,)](found, 8 * 70_000 * 3 - 1, 70_000, 192)
    assert found.tolist() == [69_999, 69_999 * 24]


@triton.jit
def _find_one(found, at, batch, reserved):
    at += tl.program_id(0)
    sequences = (batch, 8, None, None, reserved, 1, 0, 0)
    sequence, base = find(at, sequences, (0, False, 64, 0, 131072))
    tl.store(found, sequence)
    tl.store(found + 1, base)
