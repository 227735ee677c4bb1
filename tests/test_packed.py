"""torch's CPU flash kernel with packed heads: the contract of the folder, and its own limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.attention import MASKS, ROWS, Case, assert_exact, fresh_seed
from vattn.kernels import packed as module
from vattn.kernels.contract import reference
from vattn.kernels.packed import pack_mask, pack_rows, packed, packed_lse

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run once with one chunk, once with four and a remainder."""
    if request.param:
        monkeypatch.setattr(module, "chunks", lambda tasks, keys: min(4, keys))
    return request.param


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 17])
def test_exact(length: int, dtype: torch.dtype, rows: str, split: bool) -> None:
    assert_exact(Case(length=length, dtype=dtype, rows=rows), packed_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("length", [1, 5])
def test_masks(length: int, mask: str, kind: str, dtype: torch.dtype, split: bool) -> None:
    assert_exact(Case(length=length, mask=mask, kind=kind, dtype=dtype), packed_lse)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize(("batch", "kv_heads", "groups"), [(1, 1, 1), (3, 1, 7), (1, 5, 2)])
def test_head_counts_and_scales(
    batch: int, kv_heads: int, groups: int, scale: float, split: bool
) -> None:
    case = Case(batch=batch, kv_heads=kv_heads, groups=groups, scale=scale, keys=41)
    assert_exact(case, packed_lse)


@pytest.mark.parametrize("lost", ["batch", "kv_heads", "length", "keys"])
def test_nothing_in_is_nothing_out(lost: str) -> None:
    assert_exact(dataclasses.replace(Case(), **{lost: 0}), packed_lse)


@pytest.mark.parametrize("kind", ["bool", "same"])
def test_row_that_attends_to_nothing_is_zero(kind: str, split: bool) -> None:
    query, key, value, _ = Case(batch=2, length=2).inputs()
    mask = torch.ones(2, 1, 2, 37, dtype=torch.bool)
    mask[1, 0, 1] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    out, lse = packed_lse(query, key, value, given)
    assert out[1, :, 1].eq(0).all()
    assert lse[1, :, 1].eq(float("-inf")).all()
    assert lse[0].isfinite().all()
    torch.testing.assert_close(
        out.double(), reference(query, key, value, mask)[0], atol=1e-5, rtol=0
    )


def test_queries_of_any_stride() -> None:
    query, key, value, _ = Case(length=3).inputs()
    turned = query.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(packed(turned, key, value), packed(query, key, value))


def test_refused_with_the_reason() -> None:
    query, key, value, _ = Case().inputs()
    with pytest.raises(ValueError, match="stride 37 in its last dimension"):
        packed(query, key.contiguous().mT.contiguous().mT, value)
    with pytest.raises(ValueError, match="head_dim 16 and value 8"):
        packed(query, key, value[..., :8])
    with pytest.raises(ValueError, match="takes one dtype of float32, bfloat16"):
        packed(query, key.half(), value)
    with pytest.raises(ValueError, match="must agree"):
        packed(query, key, value[:, :, 1:])
    with pytest.raises(ValueError, match="11 query heads are no multiple of 3"):
        packed(query[:, :11], key, value)
    with pytest.raises(ValueError, match="must be 2-D or 4-D and broadcast"):
        packed(query, key, value, torch.zeros(2, 1, 1, 36))
    with pytest.raises(ValueError, match=r"must be bool, float32 or torch\.float32"):
        packed(query, key, value, torch.zeros(1, 37, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be 4-D, got"):
        packed(query[0], key, value)


@pytest.mark.parametrize("split", [True], indirect=True)
def test_chunks_are_views(split: bool) -> None:
    query, key, value, _ = Case(batch=1, kv_heads=1, keys=8191, dim=64, value_dim=64).inputs()
    with torch.profiler.profile(profile_memory=True) as profile:
        packed(query, key, value)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert taken < key.numel() * key.element_size() / 8


def test_idle_threads_get_chunks() -> None:
    torch.set_num_threads(2)
    assert module.chunks(1, 1 << 20) == 2
    assert module.chunks(2, 1 << 20) == 1
    assert module.chunks(1, module.CHUNK_TOKENS) == 1


def test_packing_is_one_frame_for_rows_and_masks() -> None:
    query = torch.arange(2 * 6 * 3 * 4.0).view(2, 6, 3, 4)
    rows = pack_rows(query, 3)
    mask = torch.rand(2, 6, 3, 5) < 0.5
    packed_mask = pack_mask(mask, 3, 3)
    assert packed_mask is not None
    for head in range(6):
        for position in range(3):
            row = (head % 3) * 3 + position
            assert torch.equal(rows[:, head // 3, row], query[:, head, position])
            assert torch.equal(packed_mask[:, head // 3, row], mask[:, head, position])


def test_scores_that_overflow_in_a_whole_chunk_have_no_weight() -> None:
    # Two chunks of 2,048 tokens; every score of the first is -inf, without a mask.
    query = torch.rand(1, 8, 1, 16, dtype=torch.float64) + 0.5
    key, value = torch.randn(2, 1, 1, 4096, 16, dtype=torch.float64)
    key[:, :, :2048] = -1e308
    out = packed(query, key, value)
    exact = reference(query, key[:, :, 2048:], value[:, :, 2048:])[0]
    assert (out - exact).abs().max().item() <= 1e-12
