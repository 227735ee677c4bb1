"""The table of paths: what it explains is what runs, is exact, and is laid out as torch's."""

from __future__ import annotations

import re
import secrets

import pytest
import torch
from torch import Tensor

from tests.sdpa_calls import NATIVE, close, decode, layouts, refusal, spied, usable
from vattn import explain, paths
from vattn import scaled_dot_product_attention as ours

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed every run; pytest prints it with a failing test."""
    value = secrets.randbits(32)
    torch.manual_seed(value)
    print("seed", value)
    return value


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return spied(monkeypatch)


def test_every_row_of_the_table_is_reachable_and_names_a_kernel() -> None:
    for row in paths.TABLE:
        assert row.impl in paths.IMPLS
        assert row.rows in ("any", "head", "token")
        assert row.queries >= row.groups
        assert set(row.dtypes) <= set(paths.FLOATS)


def test_the_first_question_never_hides_a_row() -> None:
    """What the screening turns away, the table would have turned away too."""
    for row in paths.TABLE:
        assert row.queries // row.groups <= paths.MOST_QUERIES
        for dtype in row.dtypes:
            assert paths.LEAST_READS[dtype] * dtype.itemsize <= row.reads
            assert paths.LEAST_READS[dtype] >= paths.LEAST_READ


def shapes() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.randint
    calls = [decode()]
    for _ in range(40):
        kv_heads, groups = int(draw(1, 3, ())), int(draw(1, 9, ()))
        calls.append(
            decode(
                batch=int(draw(1, 3, ())),
                heads=kv_heads * groups,
                kv_heads=kv_heads,
                length=int(draw(1, 20, ())) if draw(2, ()) else 1,
                tokens=int(draw(1, 1 << int(draw(1, 13, ())), ())),
                dim=int(draw(1, 80, ())),
                dtype=paths.FLOATS[int(draw(4, ()))],
                token_major=bool(draw(2, ())),
            )
        )
    return calls


def test_explain_agrees_with_what_runs(ran: list[str]) -> None:
    taken = set()
    for query, key, value in shapes():
        ran.clear()
        choice = explain(query, key, value, enable_gqa=True)
        close(ours(query, key, value, enable_gqa=True), NATIVE(query, key, value, enable_gqa=True))
        assert (ran or ["native"]) == [choice.impl], str(choice)
        names = {choice.impl, *(name for name, _ in choice.others)}
        assert names == {"native", "triton", *paths.IMPLS}
        assert all(why for _, why in choice.others)
        taken.add(choice.impl)
    assert len(taken) > 1


def test_explain_reads_as_text() -> None:
    text = str(explain(*decode(), enable_gqa=True))
    first, *rest = text.split("\n")
    assert first.split(":")[0] in ("native", *paths.IMPLS)
    assert all(line.startswith("  not ") and ": " in line for line in rest)


def test_explain_computes_nothing(ran: list[str]) -> None:
    query, key, value = decode()
    with torch.profiler.profile() as profile:
        explain(query, key, value, enable_gqa=True)
    assert not ran
    assert not [e for e in profile.events() if "attention" in e.name or "bmm" in e.name]


def test_native_by_name_is_torchs(ran: list[str]) -> None:
    tensors = decode()
    out = ours(*tensors, enable_gqa=True, impl="native")
    assert not ran
    assert torch.equal(out, NATIVE(*tensors, enable_gqa=True))
    assert explain(*tensors, enable_gqa=True, impl="native").impl == "native"


@pytest.mark.parametrize("impl", sorted(paths.IMPLS))
@pytest.mark.parametrize("dtype", paths.FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_kernel_by_name_is_exact_or_says_why(
    impl: str, dtype: torch.dtype, length: int, token_major: bool, groups: int, ran: list[str]
) -> None:
    tensors = decode(
        kv_heads=8 // groups, length=length, tokens=70, dtype=dtype, token_major=token_major
    )
    mask = torch.rand(2, 1, length, 70) < 0.7
    for kept in (None, mask):
        if why := refusal(impl, (*tensors, kept)):
            assert f'impl="{impl}" cannot serve this call: ' in why
            with pytest.raises(paths.ImplError, match=re.escape(why)):
                ours(*tensors, kept, enable_gqa=True, impl=impl)
            assert not ran
        else:
            out = ours(*tensors, kept, enable_gqa=True, impl=impl)
            close(out, NATIVE(*tensors, kept, enable_gqa=True))
            assert ran.pop() == impl
            assert explain(*tensors, kept, enable_gqa=True, impl=impl).impl == impl


@pytest.mark.parametrize("impl", ["auto", *sorted(paths.IMPLS)])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", layouts(1))
def test_the_result_is_strided_as_torchs(name: str, length: int, impl: str) -> None:
    usable(impl)
    query = layouts(length)[name]
    _, key, value = decode(tokens=90)
    wide = torch.randn(2, 2, 90, 128)[..., ::2]
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = [
        (query, key, value, None),
        (query, key, value, torch.rand(length, 90) < 0.7),
        (query, key, value, torch.rand(1, length, 90) < 0.7),
        (query, wide, value, None),
        (query, key, value[..., :6], None),
    ]
    able = 0
    for call in calls:
        if impl == "auto" or not refusal(impl, call):
            close(ours(*call, enable_gqa=True, impl=impl), NATIVE(*call, enable_gqa=True))
            able += 1
    assert able >= 3
