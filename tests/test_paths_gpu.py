"""The rule for a GPU, one case a line of it. It asks about sizes, dtypes and strides alone, so that
plain and meta tensors describe what no device is needed to decide.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vattn import device, explain, paths, paths_gpu, ragged_gpu, registry, rows, sdpa, sdpa_gpu
from vattn.paths import NATIVE, TRITON

ROOT = Path(__file__).resolve().parent.parent
BF16, FP32 = torch.bfloat16, torch.float32
AS_IT_IS = (0.0, False, None, True)  # dropout_p, is_causal, scale, enable_gqa


def tensors(
    heads: int = 4,
    kv_heads: int = 2,
    length: int = 3,
    tokens: int = 9,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
) -> list[Any]:
    """Query, K, V and no mask."""
    sizes = ((heads, length, dim), (kv_heads, tokens, dim), (kv_heads, tokens, value_dim or dim))
    return [torch.empty((2, *size), dtype=dtype, device=device).zero_() for size in sizes] + [None]


# ---- the table -----------------------------------------------------------------------------------
FULL = {"kv_heads": 4, "length": 1}  # of 2 sequences: as many programs as processors
ROWS: dict[str, tuple[dict[str, Any], str | None, bool, str, str | None]] = {
    # what, mask, causal, torch's kernel, reason of the row that takes it
    "dense prefill": ({"heads": 8, "kv_heads": 8, "length": 512}, None, False, "flash", None),
    "dense, grouped": ({"heads": 8, "length": 512}, None, False, "flash", None),
    "square causal": ({"length": 512}, None, True, "flash", None),
    "width 256": ({"length": 512, "dim": 256}, None, False, "flash", None),
    "decode of few keys": ({"length": 1, "tokens": 1023}, None, False, "flash", None),
    "17 queries": ({"length": 17, "tokens": 1 << 15}, None, False, "flash", None),
    "decode": ({"length": 1, "tokens": 1024}, None, False, "flash", paths_gpu.SPLIT),
    "16 queries": ({"length": 16, "tokens": 1 << 15}, None, False, "flash", paths_gpu.SPLIT),
    "masked, grouped": ({"length": 512}, "bool", False, "math", paths_gpu.MATH),
    "float mask, grouped": ({"length": 512}, "float", False, "math", paths_gpu.MATH),
    "masked decode, grouped": ({**FULL, "heads": 8}, "bool", False, "math", paths_gpu.MATH),
    "masked decode": ({**FULL, "length": 16}, "float", False, "efficient", paths_gpu.EFFICIENT),
    "masked decode, idle": ({"length": 1}, "bool", False, "math", None),
    "16 masked, idle": ({"heads": 2, "length": 16}, "float", False, "efficient", None),
    "17 masked": ({"heads": 2, "length": 17}, "float", False, "efficient", paths_gpu.EFFICIENT),
    "masked": ({"heads": 2, "length": 512}, "bool", False, "efficient", paths_gpu.EFFICIENT),
    "causal, L < S": ({"heads": 2, "length": 4}, None, True, "efficient", paths_gpu.EFFICIENT),
    "causal, L > S": ({"heads": 2, "length": 600}, None, True, "efficient", paths_gpu.EFFICIENT),
    "causal decode, grouped": ({"length": 1}, None, True, "math", paths_gpu.MATH),
    "V is narrower": ({"heads": 2, "value_dim": 16}, None, False, "efficient", paths_gpu.EFFICIENT),
    "an odd width, masked": ({**FULL, "dim": 13}, "bool", False, "math", paths_gpu.MATH),
    "an odd width": ({"heads": 2, "dim": 13, "length": 600}, None, False, "flash", None),
    "float32": ({"heads": 2, "length": 512, "dtype": FP32}, None, False, "efficient", None),
    "float32, masked": ({"heads": 2, "dtype": FP32}, "bool", False, "efficient", None),
    "float32, grouped": ({"length": 512, "dtype": FP32}, None, False, "math", paths_gpu.MATH),
    "float32, 6 wide": ({"heads": 2, "dim": 6, "dtype": FP32}, None, False, "math", paths_gpu.MATH),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_each_row_takes_its_calls(name: str) -> None:
    sizes, kind, causal, over, why = ROWS[name]
    given = tensors(**{"tokens": 512, "dim": 64, "dtype": BF16, "device": "meta", **sizes})
    query, key = given[0], given[1]
    if kind is not None:
        shape = (2, 1, query.shape[2], key.shape[2])
        dtype = torch.bool if kind == "bool" else query.dtype
        given[3] = torch.empty(shape, dtype=dtype, device="meta")
    call = paths_gpu.Call.of(*given, causal)
    row = paths_gpu.chosen(call)
    assert call.over == over
    assert (row and row.why) == why
    if row is None:
        assert "measured" in paths_gpu.unlike(call)


def test_every_row_is_taken_by_some_call() -> None:
    assert {row.why for row in paths_gpu.TABLE} == {why for *_, why in ROWS.values() if why}
    assert all(set(row.dtypes) <= set(paths_gpu.DTYPES) for row in paths_gpu.TABLE)


def test_the_constants_are_the_kernels_own() -> None:
    from vattn.kernels import decode, gpu, kv, prefill_tiles

    tiles = [
        tile
        for kind in prefill_tiles.TILES.values()
        for each in kind.values()
        for tile in each.values()
    ]
    tiles += prefill_tiles.FLOAT.values()
    assert max(tile.rows for tile in tiles) == paths_gpu.MOST_ROWS
    assert kv.MOST_DIM == paths_gpu.MOST_DIM == rows.MOST_DIM
    assert decode.MOST_TOKENS == paths_gpu.FEW_QUERIES == sdpa_gpu.MOST_QUERIES
    assert gpu.INTERPRETER.processors == paths_gpu.INTERPRETED_PROCESSORS
    assert (kv.HALF, kv.FP8) == (ragged_gpu.HALF, ragged_gpu.FP8)
    assert set(kv.DTYPES) == set(paths_gpu.DTYPES) == set(ragged_gpu.DTYPES)


def test_few_masked_queries_are_tritons_where_they_fill_the_device() -> None:
    """Programs are sequences x KV heads x tiles of 128 query rows of a KV head."""
    for batch, kv_heads, groups, length, idle in [
        (8, 1, 1, 1, False),
        (7, 1, 1, 16, True),
        (1, 8, 4, 1, False),
        (1, 7, 4, 1, True),
        (4, 1, 16, 16, False),  # two tiles each
        (4, 1, 8, 16, True),
    ]:
        query = torch.empty(batch, kv_heads * groups, length, 64, dtype=BF16, device="meta")
        key = torch.empty(batch, kv_heads, 4096, 64, dtype=BF16, device="meta")
        keys = torch.empty(batch, 1, 1, 4096, dtype=torch.bool, device="meta")
        call = paths_gpu.Call.of(query, key, key, keys, False)
        assert call.idle is idle
        assert (paths_gpu.chosen(call) is None) is idle
        assert ("fewer programs" in paths_gpu.unlike(call)) is idle


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
def test_torch_chooses_the_kernel_that_the_rule_names(name: str) -> None:
    sizes, kind, causal, over, _ = ROWS[name]
    given = tensors(**{"tokens": 512, "dim": 64, "dtype": BF16, "device": "cuda", **sizes})
    if kind is not None:
        shape = (2, 1, given[0].shape[2], given[1].shape[2])
        dtype = torch.bool if kind == "bool" else given[0].dtype
        given[3] = torch.ones(shape, dtype=dtype, device="cuda")
    grouped = given[0].shape[1] != given[1].shape[1]
    choice = torch._fused_sdp_choice(*given, 0.0, causal, scale=None, enable_gqa=grouped)
    # cuDNN stands where flash does: a release may prefer it.
    names = {0: "math", 1: "flash", 2: "efficient", 3: "flash"}
    assert names[choice] == over


# ---- what is torch's alone -----------------------------------------------------------------------
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    pass


Change = Callable[[list[Any], list[Any]], None]


def argument(place: int, change: Callable[[Any], Any]) -> Change:
    def apply(given: list[Any], _: list[Any]) -> None:
        given[place] = change(given[place])

    return apply


def option(place: int, value: Any) -> Change:
    def apply(_: list[Any], options: list[Any]) -> None:
        options[place] = value

    return apply


def mask(shape: tuple[int, ...], dtype: torch.dtype = torch.bool, **more: Any) -> Change:
    return argument(3, lambda _: torch.ones(shape, dtype=dtype, **more))


def every(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(given: list[Any], _: list[Any]) -> None:
        given[:3] = [change(t) for t in given[:3]]

    return apply


def nothing(given: list[Any], options: list[Any]) -> None:
    """The call as it is."""


def jagged(t: Tensor) -> Tensor:
    parts = [t[0].transpose(0, 1), t[1].transpose(0, 1)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


TORCHS: dict[str, tuple[Change, str]] = {
    "causal is an int": (option(1, 1), "is_causal is no bool"),
    "dropout": (option(0, 0.5), "dropout"),
    "dropout is text": (option(0, "0"), "dropout"),
    "gqa is an int": (option(3, 1), "enable_gqa is no bool"),
    "scale is infinite": (option(2, float("inf")), "scale is no finite number"),
    "scale is a tensor": (option(2, torch.tensor(0.5)), "scale is no finite number"),
    "a subclass": (argument(0, lambda t: t.as_subclass(Named)), "a Named is no plain tensor"),
    "a list": (argument(2, lambda t: t.tolist()), "a list is no plain tensor"),
    "nested": (every(jagged), "plain tensor"),
    "sparse": (argument(1, lambda t: t.to_sparse()), "a nested or sparse tensor"),
    "two devices": (argument(1, lambda t: t.to("meta")), "tensors on cpu and meta"),
    "a negated view": (argument(2, torch._neg_view), "in its own memory"),
    "a lazy clone": (argument(0, torch._lazy_clone), "in its own memory"),
    "two dtypes": (argument(1, lambda t: t.bfloat16()), "dtypes differ"),
    "float64": (every(lambda t: t.double()), "dtypes differ"),
    "fp8": (every(lambda t: t.to(torch.float8_e4m3fn)), "dtypes differ"),
    "mask of another dtype": (mask((3, 9), torch.bfloat16), "a mask of torch.bfloat16"),
    "mask of int": (mask((3, 9), torch.int32), "a mask of torch.int32"),
    "gradient of a mask": (mask((3, 9), FP32, requires_grad=True), "the mask wants a gradient"),
    "3-D": (every(lambda t: t[0]), "not all 4-D"),
    "5-D": (every(lambda t: t[None]), "not all 4-D"),
    "batch broadcast": (argument(0, lambda t: t[:1]), "differ in batch"),
    "V of other heads": (argument(2, lambda t: t[:, :1]), "differ in batch, KV heads"),
    "no queries": (argument(0, lambda t: t[:, :, :0]), "an empty dimension"),
    "heads without gqa": (option(3, False), "4 query heads over 2 KV heads"),
    "mask of other keys": (mask((3, 8)), "does not broadcast"),
    "mask 1-D": (mask((9,)), "not 2-D, 3-D or 4-D"),
    "wider than 256": (every(lambda t: t.repeat(1, 1, 1, 33)), "head_dim above 256"),
    "gaps in rows": (argument(1, lambda t: t.repeat(1, 1, 1, 2)[..., ::2]), "not adjacent"),
}
EXACT: dict[str, Change] = {
    "as it is": nothing,
    "causal": option(1, True),
    "a scale": option(2, -3),
    "mask [L, S]": mask((3, 9)),
    "mask [1, 1]": mask((1, 1)),
    "mask [Hq, L, S]": mask((4, 3, 9)),
    "mask [B, 1, 1, S]": mask((2, 1, 1, 9), FP32),
    "mask, stride 0": argument(3, lambda _: torch.ones(1, 1, 1, 9).expand(2, 4, 3, 9)),
    "bfloat16": every(lambda t: t.bfloat16()),
    "float mask of the type": mask((3, 9), FP32),
    "Parameters": argument(1, torch.nn.Parameter),
    "a gradient": argument(0, lambda t: t.requires_grad_()),
    "V of another width": argument(2, lambda t: t[..., :5]),
    "token-major": every(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "expanded": argument(1, lambda t: t[:1].expand(2, -1, -1, -1)),
    "256 wide": every(lambda t: t.repeat(1, 1, 1, 32)),
}  # fmt: skip


def asked(change: Change, context: AbstractContextManager[Any] | None = None) -> str | None:
    given, options = tensors(), list(AS_IT_IS)
    change(given, options)
    with context or nullcontext():
        return paths_gpu.why_torch(*given, tuple(options))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", TORCHS)
def test_a_call_that_is_torchs_says_why(name: str) -> None:
    change, words = TORCHS[name]
    assert words in str(asked(change))


@pytest.mark.parametrize("name", EXACT)
def test_a_call_that_the_kernels_are_exact_for(name: str) -> None:
    assert asked(EXACT[name]) is None


FOUR = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
FOUR.append(SDPBackend.CUDNN_ATTENTION)
CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str | None]] = {
    "sdpa_kernel(MATH)": (lambda: sdpa_kernel(SDPBackend.MATH), "sdpa_kernel"),
    "without cuDNN": (lambda: sdpa_kernel(FOUR[:3]), "sdpa_kernel"),
    "all of them": (lambda: sdpa_kernel(FOUR), None),
    "autocast that casts": (lambda: torch.autocast("cpu", BF16), "autocast"),
    "dual level": (forward_ad.dual_level, "forward-mode"),
    "a dispatch mode": (Watch, "dispatch mode"),
    "no_grad": (torch.no_grad, None),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_surrounds_a_call(name: str) -> None:
    context, words = CONTEXTS[name]
    why = asked(nothing, context())
    assert why is None if words is None else words in str(why)


def test_autocast_that_has_nothing_to_cast_is_no_reason() -> None:
    half = every(lambda t: t.bfloat16())
    assert asked(half, torch.autocast("cpu", BF16)) is None
    assert "autocast" in str(asked(half, torch.autocast("cpu", torch.float16)))
    assert asked(argument(3, lambda _: torch.ones(3, 9)), torch.autocast("cpu", BF16))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vmap of grad", "vmap with a leaf"])
def test_transforms(transform: str) -> None:
    query, key, value, _ = tensors()
    found: list[str | None] = []

    def call(q: Tensor) -> Tensor:
        found.append(paths_gpu.why_torch(q, key, value, None, AS_IT_IS))
        return q.sum()

    if transform == "vmap":
        torch.vmap(call)(query[None])
    elif transform == "grad":
        torch.func.grad(call)(query)
    elif transform == "jvp":
        torch.func.jvp(call, (query,), (query,))
    elif transform == "vmap of grad":
        torch.vmap(torch.func.grad(call))(query[None])
    else:
        key.requires_grad_()
        torch.vmap(call)(query[None])
    assert (found == [None]) is (transform == "vmap")


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_rule_is_traced(dynamic: bool) -> None:
    """Numbers of processors and reasons of drivers are constants of a graph."""

    def call(*given: Any) -> Tensor:
        return given[0] + (1 if paths_gpu.path(*given, AS_IT_IS) == TRITON else -1)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    for kv_heads, added in ((4, 1), (2, -1)):
        given = tensors(heads=8, kv_heads=kv_heads, length=1, tokens=64, dtype=BF16)
        given[3] = torch.ones(2, 1, 1, 64, dtype=torch.bool)
        assert compiled(*given).unique().item() == added


# ---- the device, and what users see --------------------------------------------------------------
def test_a_device_without_triton_says_so() -> None:
    assert "Triton kernels need a CUDA device" in str(
        paths_gpu.why_not_launched(torch.empty(1, device="meta"))
    )


def test_auto_and_explain_agree_with_the_table() -> None:
    """On the CPU where Triton is interpreted, as on a GPU."""
    for name, (sizes, _, causal, _, why) in ROWS.items():
        given = tensors(**{"tokens": 512, "dim": 64, "dtype": BF16, **sizes})
        if ROWS[name][1] is not None:
            given[3] = torch.ones(given[0].shape[2], given[1].shape[2], dtype=torch.bool)
        options = (0.0, causal, None, True)
        choice = paths_gpu.explained(*given, options)
        assert choice.impl == paths_gpu.path(*given, options) == (TRITON if why else NATIVE)
        assert {choice.impl, *(n for n, _ in choice.others)} == {NATIVE, TRITON, *paths.IMPLS}
        assert all(reason for _, reason in choice.others)


class Broken:
    """What stands where triton's driver cannot start: whoever asks, compiles, and fails."""

    asked = 0

    def fail(self, _: Tensor) -> str | None:
        self.asked += 1
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nand more")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    from vattn.kernels import gpu

    driver = Broken()
    monkeypatch.setattr(gpu, "cannot_launch", driver.fail)
    monkeypatch.setattr(device, "_failed", {})
    return driver


def test_a_driver_that_does_not_start_is_a_reason(broken: Broken) -> None:
    """On the CPU where Triton is interpreted, as on a GPU; found out once."""
    given, options = tensors(heads=16, kv_heads=4, length=1, tokens=2048, dtype=BF16), AS_IT_IS
    words = "driver does not start .RuntimeError: Failed to find C compiler. Please specify via CC."
    for _ in range(2):
        assert paths_gpu.path(*given, options) == NATIVE
        choice = paths_gpu.explained(*given, options)
        assert choice.impl == NATIVE
        assert re.search(words, str(choice))
        with pytest.raises(paths.ImplError, match=words):
            sdpa.scaled_dot_product_attention(*given, enable_gqa=True, impl=TRITON)
    assert broken.asked == 1


def test_a_call_that_the_table_leaves_to_torch_asks_no_driver(broken: Broken) -> None:
    given = tensors(heads=8, kv_heads=8, length=512, tokens=512, dtype=BF16)
    assert paths_gpu.path(*given, AS_IT_IS) == NATIVE
    assert "measured" in paths_gpu.explained(*given, AS_IT_IS).reason
    assert not registry.serves(*given[:3], AS_IT_IS)
    assert not broken.asked
    few = tensors(length=1, tokens=2048, dtype=BF16)
    assert not registry.serves(*few[:3], AS_IT_IS)
    assert broken.asked == 1


def test_a_fake_cuda_call_is_torchs_and_is_looked_at_by_the_rule_of_gpus() -> None:
    with FakeTensorMode():
        given = tensors(length=1, tokens=4096, device="cuda")
        assert "FakeTensor is no plain tensor" in explain(*given, enable_gqa=True).reason
        out = sdpa.scaled_dot_product_attention(*given, enable_gqa=True)
    assert out.device.type == "cuda"
    assert out.shape == given[0].shape


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(length=1, tokens=4096, dim=64, dtype=BF16, device="cuda")
    for t in given[:3]:
        t.normal_()
    assert explain(*given, enable_gqa=True).impl == TRITON
    out = sdpa.scaled_dot_product_attention(*given, enable_gqa=True)
    native = torch._C._nn.scaled_dot_product_attention(*given, enable_gqa=True)
    torch.testing.assert_close(out, native, atol=2e-2, rtol=0)


def test_a_call_on_the_cpu_loads_no_triton() -> None:
    code = """
import sys, torch, vattn
query, key = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 9000, 64)
for leaf in (False, True):
    vattn.scaled_dot_product_attention(query.requires_grad_(leaf), key, key, enable_gqa=True)
vattn.explain(query, key, key, enable_gqa=True)
from vattn import attend, sdpa_gpu_op
print("triton" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
