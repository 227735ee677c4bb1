"""The paged decode that ours is compared with computes attention."""

from __future__ import annotations

import pytest
import torch

from bench.paged import BLOCK_TOKENS, paged_decode
from vattn.kernels.scores import Scores, reference

LENGTHS = [300, 33, 128, 0]
BLOCKS = 20


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_table_of_blocks_gives_attention(dtype: torch.dtype, constant: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (BLOCKS * len(LENGTHS), BLOCK_TOKENS, 2, 16)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(len(LENGTHS), 4, 16, generator=generator).to(dtype)
    blocks = torch.randperm(shape[0], generator=generator).int()
    table = blocks.view(len(LENGTHS), BLOCKS)
    for b, length in enumerate(LENGTHS):  # rows behind a length are anything
        last = table[b, length // BLOCK_TOKENS]
        key[last, length % BLOCK_TOKENS :] = torch.nan
        value[last, length % BLOCK_TOKENS :] = torch.nan
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    out = paged_decode(query, key, value, table, lengths, splits=2, constant=constant)
    assert out.shape == query.shape
    assert out.dtype == dtype
    for b, length in enumerate(LENGTHS):
        rows = [t[table[b].long()].flatten(0, 1).transpose(0, 1) for t in (key, value)]
        truth, _ = reference(query[b, :, None], *rows, Scores(), length=length)
        allowed = 4 * torch.finfo(dtype).eps * max(1.0, float(value.nan_to_num().abs().max()))
        assert (out[b, :, None].double() - truth).abs().max().item() <= allowed


def test_other_blocks_are_refused() -> None:
    rows = torch.zeros(4, 32, 2, 16)
    with pytest.raises(ValueError, match="blocks of 32 tokens"):
        paged_decode(
            torch.zeros(1, 4, 16), rows, rows, torch.zeros(1, 4, dtype=torch.int32),
            torch.ones(1, dtype=torch.int32),
        )  # fmt: skip
