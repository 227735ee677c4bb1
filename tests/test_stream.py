"""The compiled decode kernel: the contract of the folder; threads, forks and interrupts."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.attention import MASKS, ROWS, Case, assert_exact, fresh_seed
from vattn.kernels import stream as module
from vattn.kernels.contract import reference
from vattn.kernels.pool import Pool
from vattn.kernels.stream import Rows, available, stream, stream_lse, stream_ragged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).resolve().parent.parent
numba = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=["whole", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a sequence in one chunk; and in many, on two threads."""
    if request.param == "chunks":
        torch.set_num_threads(2)
        monkeypatch.setattr(module, "CHUNK", 11)
        monkeypatch.setattr(module, "SPAN_CHUNK", 5)
        monkeypatch.setattr(module, "THREAD_BYTES", 1)


@numba
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 16])
def test_exact(length: int, dtype: torch.dtype, rows: str, cut: None) -> None:
    assert_exact(Case(length=length, dtype=dtype, rows=rows), stream_lse)


@numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "value_dim", "keys"),
    [(1, 1, 1), (7, 16, 64), (16, 7, 65), (24, 40, 129), (80, 80, 200), (128, 300, 63)],
)
def test_any_sizes(dim: int, value_dim: int, keys: int, dtype: torch.dtype, cut: None) -> None:
    case = Case(dim=dim, value_dim=value_dim, keys=keys, dtype=dtype, length=2)
    assert_exact(case, stream_lse)


@numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("length", [1, 5])
def test_masks(length: int, mask: str, kind: str, dtype: torch.dtype, cut: None) -> None:
    assert_exact(Case(length=length, mask=mask, kind=kind, dtype=dtype), stream_lse)


@numba
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "groups"), [(1, 1, 1), (3, 1, 7), (1, 5, 2), (2, 2, 12)]
)
def test_head_counts_and_scales(
    batch: int, kv_heads: int, groups: int, scale: float, cut: None
) -> None:
    case = Case(batch=batch, kv_heads=kv_heads, groups=groups, scale=scale, keys=41)
    assert_exact(case, stream_lse)
    assert_exact(dataclasses.replace(case, rows="token_major"), stream_lse)


@numba
@pytest.mark.parametrize("lost", ["batch", "kv_heads", "length", "keys", "value_dim"])
def test_nothing_in_is_nothing_out(lost: str) -> None:
    assert_exact(dataclasses.replace(Case(), **{lost: 0}), stream_lse)


@numba
@pytest.mark.parametrize("kind", ["bool", "same"])
def test_row_that_attends_to_nothing_is_zero(kind: str, cut: None) -> None:
    query, key, value, _ = Case(length=2).inputs()
    mask = torch.ones(2, 1, 2, 37, dtype=torch.bool)
    mask[1, 0, 1] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    out, lse = stream_lse(query, key, value, given)
    assert out[1, :, 1].eq(0).all()
    assert lse[1, :, 1].eq(float("-inf")).all()
    assert lse[0].isfinite().all()
    exact, _ = reference(query, key, value, mask)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


@numba
def test_row_of_least_numbers_is_the_mean() -> None:
    query, key, value, _ = Case().inputs()
    mask = torch.full((2, 1, 1, 37), torch.finfo(torch.float32).min)
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(4, dim=1)
    torch.testing.assert_close(stream(query, key, value, mask), mean)


@numba
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_is_seen_in_its_row_only(poison: float, cut: None) -> None:
    query, key, value, _ = Case(length=2).inputs()
    mask = torch.zeros(1, 1, 2, 37)
    mask[0, 0, 1, 20] = poison
    out, _ = stream_lse(query, key, value, mask)
    assert out[:, :, 1].isnan().all()
    exact, _ = reference(query, key, value)
    torch.testing.assert_close(out[:, :, 0].double(), exact[:, :, 0], atol=1e-5, rtol=0)


@numba
def test_nan_in_k_reaches_its_head_only() -> None:
    query, key, value, _ = Case().inputs()
    key[1, 2, 5, 3] = float("nan")
    out = stream(query, key, value)
    assert out[1, 8:].isnan().all()
    assert not out[0].isnan().any()
    assert not out[1, :8].isnan().any()


@numba
def test_queries_and_results_of_any_stride() -> None:
    query, key, value, _ = Case(length=3).inputs()
    plain = stream(query, key, value)
    for order in ((0, 2, 1, 3), (2, 0, 1, 3)):
        given = query.permute(order).contiguous().permute(*(order.index(i) for i in range(4)))
        out = stream(given, key, value)
        assert out.stride() == given.stride()
        assert torch.equal(out, plain)
    turned = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(stream(turned, key, value), plain)


@numba
def test_lazy_clones_stay_lazy() -> None:
    query, key, value, _ = Case(keys=50).inputs()
    clones = [torch._lazy_clone(t) for t in (query, key, value)]
    clones[1:] = [torch._lazy_clone(t.contiguous())[:, 1:] for t in (key, value)]
    out = stream(clones[0][:, 4:], *clones[1:])
    assert all(torch._C._is_cow_tensor(clone) for clone in clones)
    exact, _ = reference(query[:, 4:], key[:, 1:], value[:, 1:])
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


@numba
def test_bits_do_not_depend_on_threads_or_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREAD_BYTES", 1)
    query, key, value, _ = Case(batch=3, keys=5000, dtype=torch.bfloat16).inputs()
    torch.set_num_threads(2)
    two = stream(query, key, value)
    torch.set_num_threads(1)
    assert torch.equal(stream(query, key, value), two)
    assert torch.equal(stream(query[1:2], key[1:2], value[1:2]), two[1:2])


def ragged(
    lengths: list[int], query_length: int, dtype: torch.dtype, rows: str
) -> tuple[torch.Tensor, Rows, list[tuple[torch.Tensor, torch.Tensor]]]:
    cases = [Case(batch=1, keys=n, dtype=dtype, rows=rows, length=query_length) for n in lengths]
    inputs = [case.inputs() for case in cases]
    pairs = [(key, value) for _, key, value, _ in inputs]
    longest = max(pairs, key=lambda pair: pair[0].shape[2])[0]
    # The strides of the longest serve all: rows are laid out anew in one common base.
    heads, tokens, item = 3, longest.shape[2] + 2, dtype.itemsize
    base = torch.full((2, len(lengths), heads, tokens, 16), float("nan"), dtype=dtype)
    if rows == "token_major":
        base = base.view(2, len(lengths), tokens, heads, 16).transpose(2, 3)
    for i, pair in enumerate(pairs):
        for side in (0, 1):
            base[side, i, :, : lengths[i]] = pair[side][0]
    k, v = (
        np.array([base[side, i].data_ptr() for i in range(len(lengths))], np.int64)
        for side in (0, 1)
    )
    lie = (base.stride(2) * item, base.stride(3) * item)
    query = torch.cat([query for query, *_ in inputs])
    found = Rows(k, v, np.array(lengths, np.int64), heads, *lie)
    found.__dict__["base"] = base
    return query, found, pairs


@numba
@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize("rows", ["head_major", "token_major"])
@pytest.mark.parametrize("length", [1, 4])
def test_ragged_and_causal(length: int, rows: str, window: int, cut: None) -> None:
    lengths = [37, 4, 150, 11, 2]
    query, given, pairs = ragged(lengths, length, torch.float32, rows)
    groups = query.shape[1] // given.kv_heads
    logits = torch.full((len(lengths), given.kv_heads, groups * length, 153), float("nan"))
    out, lse = stream_ragged(query, given, window=window, logits=logits)
    for i, (key, value) in enumerate(pairs):
        positions = torch.arange(lengths[i] - length, lengths[i])[:, None]
        keys = torch.arange(lengths[i])[None]
        keep = keys <= positions
        if window:
            keep &= keys > positions - window
        exact, exact_lse = reference(query[i : i + 1], key, value, keep)
        torch.testing.assert_close(out[i : i + 1].double(), exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[i : i + 1].double(), exact_lse, atol=1e-5, rtol=0)
        rows_of = query[i].double().unflatten(0, (given.kv_heads, groups))
        wanted = torch.full(logits.shape[1:], -torch.inf, dtype=torch.float64)
        scores = torch.einsum("hgld,hsd->hgls", rows_of, key[0].double()) / 4
        wanted[..., : lengths[i]] = scores.masked_fill(~keep, -torch.inf).flatten(1, 2)
        torch.testing.assert_close(logits[i].double(), wanted, atol=1e-5, rtol=0)
    again = stream_ragged(query, given, window=window)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@numba
@pytest.mark.parametrize("length", [1, 3])
def test_ragged_with_a_bias(length: int, cut: None) -> None:
    lengths = [37, 4, 150]
    query, given, pairs = ragged(lengths, length, torch.float32, "head_major")
    bias = torch.full((3, 170), float("nan"))[:, :160]  # rows apart
    groups = query.shape[1] // given.kv_heads
    logits = torch.full((3, given.kv_heads, groups * length, 150), float("nan"))
    for i, many in enumerate(lengths):
        bias[i, :many] = torch.randn(many)
    out, lse = stream_ragged(query, given, bias=bias, logits=logits)
    for i, (key, value) in enumerate(pairs):
        positions = torch.arange(lengths[i] - length, lengths[i])[:, None]
        mask = torch.zeros(length, lengths[i]).masked_fill(
            torch.arange(lengths[i]) > positions, -torch.inf
        )
        exact, exact_lse = reference(query[i : i + 1], key, value, mask + bias[i, : lengths[i]])
        torch.testing.assert_close(out[i : i + 1].double(), exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[i : i + 1].double(), exact_lse, atol=1e-5, rtol=0)
        sums = logits[i].double().logsumexp(-1).view(exact_lse.shape)
        torch.testing.assert_close(sums, exact_lse, atol=1e-5, rtol=0)
    for wrong in (bias[:, :149], bias[:2], bias.double(), bias[:, None]):
        with pytest.raises(ValueError, match=r"bias must be float32 \[3, 150\]"):
            stream_ragged(query, given, bias=wrong)


@numba
@pytest.mark.parametrize("shape", [(1, 3, 4, 36), (2, 3, 4, 37), (1, 3, 37)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    query, given, _ = ragged([37], 1, torch.float32, "head_major")
    with pytest.raises(ValueError, match=r"logits must be contiguous float32 \[1, 3, 4, 37\]"):
        stream_ragged(query, given, logits=torch.empty(shape))


@numba
def test_logits_of_one_head_may_have_any_stride_of_it() -> None:
    query, rows = torch.randn(3, 4, 1, 16), torch.randn(3, 20, 16)
    places = np.array([row.data_ptr() for row in rows], np.int64)
    given = Rows(places, places, np.full(3, 20, np.int64), 1, 0, 64, keep=rows)
    logits = torch.full((3, 4, 1, 20), float("nan")).transpose(1, 2)
    assert logits.is_contiguous()
    stream_ragged(query, given, logits=logits)
    torch.testing.assert_close(logits, query.transpose(1, 2) @ rows.mT[:, None] / 4)


def test_refused_with_the_reason() -> None:
    query, key, value, _ = Case().inputs()
    with pytest.raises(ValueError, match="takes one dtype of float32, bfloat16, float16"):
        stream(query.double(), key.double(), value.double())
    with pytest.raises(ValueError, match="last dimension"):
        stream(query, key.contiguous().mT.contiguous().mT, value)
    with pytest.raises(ValueError, match="head_dim 0"):
        stream(query[..., :0], key[..., :0], value)


def test_missing_numba_is_a_reason_not_an_error() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from vattn.kernels.stream import available, stream\n"
        "print(available())\n"
        "try: stream(*[torch.ones(1, 1, 1, 16)] * 3)\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("pip install 'vattn[cpu]'") == 2


def test_importing_it_does_not_load_numba() -> None:
    code = "import sys, vattn.kernels.stream; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@numba
def test_several_threads_at_once(cut: None) -> None:
    cases = [Case(batch=i % 3 + 1, keys=200 + i) for i in range(24)]
    inputs = [case.inputs() for case in cases]
    with ThreadPoolExecutor(6) as threads:
        outs = list(threads.map(lambda given: stream(*given), inputs * 8))
    for given, out in zip(inputs * 8, outs, strict=True):
        exact, _ = reference(*given)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


@numba
def test_works_in_a_forked_child(cut: None) -> None:
    query, key, value, _ = Case(keys=3000).inputs()
    before = stream(query, key, value)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if torch.equal(stream(query, key, value), before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(stream(query, key, value), before)


@numba
def test_interrupt_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREAD_BYTES", 1)
    torch.set_num_threads(2)
    query, key, value, _ = Case(batch=4, kv_heads=8, keys=20000, dim=64, value_dim=64).inputs()
    exact = stream(query, key, value)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    late = time.monotonic() + 60
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        timer.start()
        while time.monotonic() < late:
            stream(query, key, value)
    assert torch.equal(stream(query, key, value), exact)


def test_a_thread_that_failed_serves_on_and_a_missing_one_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool()

    def failing() -> None:
        raise MemoryError

    done = threading.Event()
    pool.post(failing, 1)
    pool.post(done.set, 1)
    assert done.wait(timeout=30)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    alone = Pool()
    monkeypatch.setattr(threading.Thread, "start", refused)
    alone.post(failing, 3)  # the caller does it all
    assert alone.threads == 0
    assert alone._queue.empty()
