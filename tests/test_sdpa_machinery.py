"""What looks at torch's own operation finds it: autograd, transforms, modes, compilers, export."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sdpa_calls import NATIVE, close, decode, layouts, spied, usable
from vattn import explain, paths, sdpa_op
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


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_one_call_and_the_kernel_still_runs(ran: list[str]) -> None:
    tensors = decode()
    for impl in ("auto", "packed"):
        with Seen() as mode:
            ours(*tensors, enable_gqa=True, impl=impl)
        assert mode.names == [ours]
    with torch.device("cpu"):
        ours(*tensors, enable_gqa=True)
    assert len(ran) == 3


def test_a_dispatch_mode_sees_what_it_sees_of_torch(ran: list[str]) -> None:
    tensors = decode()
    seen = []
    for function in (ours, NATIVE):
        with Dispatched() as mode:
            function(*tensors, enable_gqa=True)
        seen.append(mode.names)
    assert seen[0] == seen[1]
    assert not ran


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "sdpa_kernel(MATH)": lambda: sdpa_kernel(SDPBackend.MATH),
    "sdpa_kernel(FLASH)": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dual level": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_under_a_context_the_call_is_torchs(name: str, ran: list[str]) -> None:
    tensors = decode()
    with CONTEXTS[name]():
        choice = explain(*tensors, enable_gqa=True)
        out = ours(*tensors, enable_gqa=True)
        native = NATIVE(*tensors, enable_gqa=True)
    assert choice.impl == "native"
    assert not ran
    assert torch.equal(out, native)


def test_no_viable_backend_is_torchs_error() -> None:
    tensors = decode()
    nothing = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    with nothing, pytest.raises(RuntimeError, match="No viable backend"):
        ours(*tensors, enable_gqa=True)


def test_deterministic_mode_and_inference_mode_change_nothing(ran: list[str]) -> None:
    tensors = decode()
    expected = ours(*tensors, enable_gqa=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ours(*tensors, enable_gqa=True), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        assert torch.equal(ours(*tensors, enable_gqa=True), expected)
    assert len(ran) == 3


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("masked", [False, True])
def test_vmap_is_torchs(masked: bool) -> None:
    query, key, value = decode(batch=6)
    query, key, value = (t.unflatten(0, (3, 2)) for t in (query, key, value))
    mask = torch.rand(3, 2, 1, 1, 4200) < 0.6

    def mapped(function: Callable[..., Tensor]) -> Tensor:
        def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            return function(q, k, v, m if masked else None, enable_gqa=True)

        return torch.vmap(call)(query, key, value, mask)

    torch.testing.assert_close(mapped(ours), mapped(NATIVE))


@pytest.mark.parametrize("shape", [(1, 1), (3, 4)])
def test_gradients_of_first_and_second_order_are_torchs(shape: tuple[int, int]) -> None:
    length, groups = shape
    tensors = decode(1, groups, 1, length, 40, 4, torch.float64)
    inputs = tuple(t.requires_grad_() for t in tensors)
    mask = torch.randn(length, 40, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return ours(q, k, v, m, enable_gqa=True)

    torch.autograd.gradcheck(call, (*inputs, mask), fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.gradgradcheck(call, (*inputs, mask), fast_mode=True)
        torch.autograd.gradcheck(
            call, (*inputs, mask), check_forward_ad=True, check_backward_ad=False, fast_mode=True
        )


def test_without_a_gradient_wanted_parameters_take_the_kernel(ran: list[str]) -> None:
    query, key, value = (torch.nn.Parameter(t) for t in decode())
    assert ours(query, key, value, enable_gqa=True).requires_grad
    assert not ran
    with torch.no_grad():
        assert not ours(query, key, value, enable_gqa=True).requires_grad
    assert len(ran) == 1


def test_functional_gradients_are_torchs() -> None:
    tensors = decode(1, 4, 2, 2, 40, 4)

    def both(transform: Callable[..., Any]) -> tuple[Any, Any]:
        def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q: function(q, *tensors[1:], enable_gqa=True).square().sum()

        return transform(total(ours))(tensors[0]), transform(total(NATIVE))(tensors[0])

    torch.testing.assert_close(*both(torch.func.grad))
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(*both(torch.func.hessian))
        torch.testing.assert_close(*both(lambda f: lambda q: torch.func.jvp(f, (q,), (q,))[1]))


def test_fake_and_meta_tensors_have_torchs_shape_type_and_strides() -> None:
    for length in (1, 3):
        for name, query in layouts(length).items():
            _, key, value = decode()
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in (query, key, value)]
                out = ours(*fakes, enable_gqa=True)
                native = NATIVE(*fakes, enable_gqa=True)
            assert type(out) is type(native), name
            assert (out.shape, out.dtype, out.stride()) == (
                (native.shape, native.dtype, native.stride())
            )
            metas = [t.to("meta") for t in (query, key, value)]
            meta, theirs = ours(*metas, enable_gqa=True), NATIVE(*metas, enable_gqa=True)
            assert (meta.shape, meta.stride()) == (theirs.shape, theirs.stride())


def test_a_subclass_without_an_override_is_torchs(ran: list[str]) -> None:
    class Named(Tensor):
        pass

    query, key, value = decode()
    out = ours(query.as_subclass(Named), key, value, enable_gqa=True)
    assert type(out) is Named
    assert not ran


def test_an_override_is_called_with_torchs_builtin_and_only_what_was_given() -> None:
    class Handler(Tensor):
        calls: list[tuple[Any, ...]] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.calls.append((func, len(args), kwargs))
            return "handled"

    query, key, value = decode()
    assert ours(query, key.as_subclass(Handler), value) == "handled"
    assert ours(query, key.as_subclass(Handler), value, enable_gqa=True, scale=2.0) == "handled"
    assert Handler.calls == [(NATIVE, 3, {}), (NATIVE, 3, {"scale": 2.0, "enable_gqa": True})]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs() -> None:
    sizes = (3, 5)
    for layout in (torch.jagged, torch.strided):
        query, key, value = (
            torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in sizes], layout=layout)
            for _ in range(3)
        )
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if layout is torch.strided:
            query, key, value = (t.contiguous() for t in (query, key, value))
        out, native = ours(query, key, value), NATIVE(query, key, value)
        for a, b in zip(out.unbind(), native.unbind(), strict=True):
            assert torch.equal(a, b)


def test_a_negated_view_is_read_with_its_sign() -> None:
    query, key, value = decode()
    value = torch.complex(torch.zeros_like(value), value).conj().imag
    assert value.is_neg()
    close(ours(query, key, value, enable_gqa=True), NATIVE(query, key, value, enable_gqa=True))


# --- compiled and exported ------------------------------------------------------------------------


def grouped(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
    return ours(q, k, v, m, enable_gqa=True)


def compiled(function: Callable[..., Tensor] = grouped, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, **{"backend": "aot_eager", "fullgraph": True, **options})


@pytest.mark.parametrize(("name", "dynamic"), [("contiguous", None), ("BSHD", True)])
def test_compiles_to_one_graph_that_calls_the_kernel(
    name: str, dynamic: bool | None, ran: list[str]
) -> None:
    call = compiled(dynamic=dynamic)
    for length, tokens in ((1, 4200), (1, 4201), (3, 4300)):
        query = layouts(length)[name]
        _, key, value = decode(tokens=tokens)
        mask = torch.rand(2, 1, length, tokens) < 0.8
        ran.clear()
        close(call(query, key, value), NATIVE(query, key, value, enable_gqa=True))
        close(call(query, key, value, mask), NATIVE(query, key, value, mask, enable_gqa=True))
        assert len(ran) == 2


def test_the_default_compiler_runs_the_kernel(ran: list[str]) -> None:
    tensors = decode()
    close(compiled(backend="inductor")(*tensors), NATIVE(*tensors, enable_gqa=True))
    assert len(ran) == 1


def test_a_compiled_call_that_wants_a_gradient_is_torchs(ran: list[str]) -> None:
    query, key, value = decode()
    query.requires_grad_()
    compiled()(query, key, value).square().sum().backward()
    grad, query.grad = query.grad, None
    NATIVE(query, key, value, enable_gqa=True).square().sum().backward()
    torch.testing.assert_close(grad, query.grad)
    assert not ran


@pytest.mark.parametrize("name", ["sdpa_kernel(MATH)", "autocast"])
def test_a_context_inside_of_the_graph_is_honoured(name: str, ran: list[str]) -> None:
    def call(*tensors: Tensor) -> Tensor:
        with CONTEXTS[name]():
            return ours(*tensors, enable_gqa=True)

    tensors = decode()
    torch.testing.assert_close(compiled(call)(*tensors), call(*tensors))
    assert not ran


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_compiled_vmap_is_torchs() -> None:
    query, key, value = (t[:, None] for t in decode(batch=2))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(grouped)(q, k, v)

    torch.testing.assert_close(compiled(call)(query, key, value), call(query, key, value))


def test_a_length_that_depends_on_data_compiles() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        tokens = keep.nonzero().squeeze(1)
        torch._check(tokens.shape[0] >= 2)
        return ours(q, k[:, :, tokens], v[:, :, tokens], enable_gqa=True)

    query, key, value = decode()
    keep = torch.rand(4200) < 0.5
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = compiled(call)(query, key, value, keep)
    kept = key[:, :, keep], value[:, :, keep]
    torch.testing.assert_close(out, NATIVE(query, *kept, enable_gqa=True))


class Attend(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ours(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_torchs_operation_alone(strict: bool) -> None:
    tensors = decode()
    tokens = torch.export.Dim("tokens", min=2)
    shapes = {"query": None, "key": {2: tokens}, "value": {2: tokens}}
    program = torch.export.export(Attend(), tensors, dynamic_shapes=shapes, strict=strict)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called == ["aten.scaled_dot_product_attention.default"]
    other = decode(tokens=44)
    close(program.module()(*other), NATIVE(*other, enable_gqa=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_script_holds_torchs_operation_alone(recwarn: pytest.WarningsRecorder) -> None:
    traced = torch.jit.trace(grouped, decode())
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    other = decode(tokens=44)
    close(traced(*other), NATIVE(*other, enable_gqa=True))
    assert "vattn" not in {node.kind().split("::")[0] for node in traced.graph.nodes()}


@pytest.mark.parametrize("impl", sorted(paths.IMPLS))
@pytest.mark.parametrize("kind", ["none", "bool", "float", "3-D"])
def test_the_operation_passes_torchs_checks(impl: str, kind: str) -> None:
    usable(impl)
    tensors = decode(tokens=70)
    shape = (1, 1, 70) if kind == "3-D" else (2, 1, 1, 70)
    mask = None if kind == "none" else torch.rand(shape) < 0.7
    mask = torch.randn(shape) if kind == "float" else mask
    checks = torch.library.opcheck(sdpa_op.attend, (*tensors, mask, 0.3, impl))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shared", [(), (0,), (1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "shape", [None, (1, 70), (1, 1, 70), (2, 1, 1, 70), (1, 8, 1, 70)], ids=str
)
def test_the_operation_maps_over_any_argument(shape: Any, shared: tuple[int, ...]) -> None:
    arguments: list[Any] = [torch.stack([t, t + 1, -t]) for t in decode(tokens=70)]
    arguments.append(None if shape is None else torch.rand(3, *shape) < 0.7)
    arguments = [a[0] if i in shared and a is not None else a for i, a in enumerate(arguments)]
    dims = [None if i in shared or a is None else 0 for i, a in enumerate(arguments)]

    def call(*args: Any) -> Tensor:
        return torch.ops.vattn.attend(*args, None, "packed")

    out = torch.vmap(call, in_dims=tuple(dims))(*arguments)
    for i in range(3):
        one = [a if at is None else a[i] for a, at in zip(arguments, dims, strict=True)]
        torch.testing.assert_close(out[i], call(*one))


def test_the_context_of_a_plain_call_is_no_context(ran: list[str]) -> None:
    """The control of the contexts above: without one, the same call takes a kernel."""
    with nullcontext():
        ours(*decode(), enable_gqa=True)
    assert len(ran) == 1
    assert F.scaled_dot_product_attention is NATIVE


def test_the_public_operation_refuses_what_its_kernel_would_misread() -> None:
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1000, 16)
    with pytest.raises(ValueError, match="tokens and head_dim must agree"):
        torch.ops.vattn.attend(query, key, key[:, :, :2], None, None, "packed")
    wide = torch.randn(1, 2, 1000, 32)[..., ::2]
    with pytest.raises(ValueError, match="must have 1"):
        torch.ops.vattn.attend(query, wide, wide, None, None, "packed")
