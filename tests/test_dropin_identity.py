"""Who is who under a patch: subclasses, modes, pickles, signatures, compiled and scripted code."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests import ways
from tests.ways import (
    NATIVE,
    WAYS,
    activated,
    counted,
    grouped,
    left_as_found,
    scripted,
    through_f,
    through_name,
    worth_a_kernel,
)
from vattn import dropin
from vattn.dropin import SDPAMode, patch
from vattn.sdpa import scaled_dot_product_attention as ours

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    with left_as_found() as value:
        yield value


BIASES = {"upper_left": causal_upper_left, "lower_right": causal_lower_right}
NAMES = {
    "F": lambda: F.scaled_dot_product_attention,
    "earlier": lambda: ways.earlier,
    "C": lambda: NATIVE,
}


@pytest.mark.parametrize("name", [*NAMES, "ours"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("way", [*WAYS, "none"])
def test_bias_classes_keep_their_meaning(way: str, bias: str, name: str) -> None:
    query, key, value = (torch.randn(1, 2, n, 8) for n in (4, 6, 6))
    keep = torch.ones(4, 6, dtype=torch.bool).tril(2 if bias == "lower_right" else 0)
    expected = NATIVE(query, key, value, keep)
    with WAYS.get(way, contextlib.nullcontext)():
        attend = NAMES.get(name, lambda: ours)()
        out = attend(query, key, value, BIASES[bias](4, 6))
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            attend(query, key, value, BIASES[bias](4, 6), is_causal=True)
    assert type(out) is Tensor
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "ours"])
@pytest.mark.parametrize("way", [*WAYS, "none"])
def test_jagged_tensors_keep_their_meaning(way: str, name: str) -> None:
    rows = [torch.randn(n, 2, 8) for n in (3, 5)]
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with WAYS.get(way, contextlib.nullcontext)():
        out = NAMES.get(name, lambda: ours)()(jagged, jagged, jagged)
    for found, row in zip(out.transpose(1, 2).unbind(), rows, strict=True):
        alone = row.transpose(0, 1)[None]
        expected = NATIVE(alone, alone, alone)[0].transpose(0, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_another_mode_is_no_obstacle() -> None:
    tensors = grouped()
    for way in (patch, SDPAMode):
        with way(), torch.device("cpu"), counted() as calls:
            F.scaled_dot_product_attention(*tensors, enable_gqa=True)
        assert calls() > 0


def test_what_is_installed_pickles_and_has_a_signature() -> None:
    with patch():
        assert pickle.loads(pickle.dumps(F.scaled_dot_product_attention)) is ours
        assert list(inspect.signature(F.scaled_dot_product_attention).parameters)[:8] == [
            *("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
            *("scale", "enable_gqa"),
        ]
        whole = F.multi_head_attention_forward
        assert pickle.loads(pickle.dumps(whole)) is whole
        inside = inspect.signature(whole)
    assert inside == inspect.signature(F.multi_head_attention_forward)


# ---- compiled code -------------------------------------------------------------------------------
class Graphs:
    """A torch.compile backend that keeps the operations of each graph it is given."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.seen: list[set[Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.seen.append({node.target for node in graph.graph.nodes})
        return graph.forward

    def ours(self) -> list[bool]:
        """For each graph, whether it calls our operation, or the module function put in by us."""
        marks = {torch.ops.vattn.attend.default, dropin.multi_head_attention_forward}
        return [bool(seen & marks) for seen in self.seen]


COMPILED = {"patch": through_f, "modules": through_name, "mode": through_name}


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_code_follows_the_switch(way: str) -> None:
    tensors = worth_a_kernel()
    graphs = Graphs()
    compiled = torch.compile(COMPILED[way], backend=graphs, fullgraph=True)
    expected = compiled(*tensors)
    for _ in range(2):
        with WAYS[way]():
            out = compiled(*tensors)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(compiled(*tensors), expected)
    assert graphs.ours() == [False, True]


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_modules_follow_the_switch(padded: bool) -> None:
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    graphs = Graphs()

    @torch.compile(backend=graphs, fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    expected = compiled(x)
    for _ in range(2):
        with patch():
            torch.testing.assert_close(compiled(x), expected)
        assert torch.equal(compiled(x), expected)
    assert graphs.ours() == [False, True]


def test_compiled_code_reaches_the_registry_without_a_new_graph() -> None:
    tensors = grouped()
    torch._dynamo.reset()
    compiled = torch.compile(through_f, backend="aot_eager", fullgraph=True)
    expected = compiled(*tensors)
    with counted() as calls:
        with activated(), torch.compiler.set_stance("fail_on_recompile"):
            out = compiled(*tensors)
        assert calls() == 1
        compiled(*tensors)
        assert calls() == 1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_compiled_graphs_are_whole() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    with patch():
        torch._dynamo.reset()
        assert torch._dynamo.explain(layer)(x).graph_break_count == 0
        torch._dynamo.reset()
        assert torch._dynamo.explain(through_f)(*grouped()).graph_break_count == 0


def test_the_switch_inside_compiled_code() -> None:
    tensors = worth_a_kernel()
    graphs = Graphs()

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with SDPAMode():
            return ways.earlier(q, k, v, enable_gqa=True)

    out = torch.compile(inside, backend=graphs, fullgraph=True)(*tensors)
    assert graphs.ours() == [True]
    torch.testing.assert_close(out, NATIVE(*tensors, enable_gqa=True), atol=1e-5, rtol=1e-5)

    def switched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with patch():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    out = torch.compile(switched, backend="eager")(*tensors)
    torch.testing.assert_close(out, NATIVE(*tensors, enable_gqa=True), atol=1e-5, rtol=1e-5)


def test_scripting_while_patched_means_torchs_operation() -> None:
    tensors, x = grouped(), torch.randn(5, 2, 16)
    layer = nn.MultiheadAttention(16, 4)
    with patch():
        call = scripted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.script(layer)
        out, whole = call(*tensors), module(x, x, x)[0]
    assert torch.equal(out, NATIVE(*tensors, enable_gqa=True))
    torch.testing.assert_close(whole, layer(x, x, x)[0])


def test_somebody_elses_module_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(F, "multi_head_attention_forward", lambda *args, **kwargs: "theirs")
        with patch():
            assert F.multi_head_attention_forward() == "theirs"
