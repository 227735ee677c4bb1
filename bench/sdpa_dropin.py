"""Whole models with and without vattn.patch(): same numbers, whole graphs, and what a call costs.

`error` is the worst of output and gradients against float64, as a share of what is allowed: three
times torch's own error and one rounding. `graph_breaks` are what torch.compile counts under the
patch: behind its gate the model is compiled with fullgraph=True, and agrees as well. `overhead` is
the time of a call less that of torch's, in the same rounds, on one thread; `prefill` and `step` are
ratios to torch's. `step` is one token through a grouped-query layer of a large model's shape.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vattn
from bench.dropin_models import Decoder, Logits, Subject, subjects
from bench.harness import Bench, Comparison, Sample
from vattn import paths, sdpa, sdpa_op

SHIPPED = Path(vattn.__file__).parent / "assets" / "model"
NATIVE = torch._C._nn.scaled_dot_product_attention
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = ((1, 1, 1, 8), (1, 2, 1, 16))
PREFILL = (1, 8, 1024, 64)
STEP = (32, 8, 128)  # query heads, KV heads, head_dim
TEXT = SHIPPED.parent / "texts" / "persuasion.txt"
SHORT, LONG = 44, 4500  # bytes of a prompt
PADDING = 20
AS_TORCH, WHOLE, OVERHEAD, AS_FAST = "<= 1", "<= 0", "<= 5", "ratio >= 0.98"
BACKENDS = ("inductor", "aot_eager")


def run(bench: Bench) -> None:
    models = subjects(bench.seed)
    if bench.peer("transformers") is not None:
        model = our_model()
        models.append(Subject("our_model", Logits(model), prompts(SHORT), slow=True))
        tokens = bench.pick(64, 12)
        for prompt in bench.pick((SHORT, LONG), (SHORT,)):
            bench.figure(
                f"sdpa_dropin/our_model/greedy/{prompt}",
                tokens,
                "tokens",
                gate=partial(greedy, model, prompt, tokens),
            )
    for subject in models:
        agreement(bench, subject)
    bench.figure("sdpa_dropin/opcheck", partial(opcheck, bench), "calls", gate=True)
    for shape in TINY:
        overhead(bench, shape)
    for dtype in DTYPES:
        prefill(bench, dtype)
        step(bench, dtype)


# ---- same numbers --------------------------------------------------------------------------------
def agreement(bench: Bench, subject: Subject) -> None:
    """Outputs and gradients in each dtype, then the graphs."""
    forward_only = replace(subject, gradients=subject.gradients and not subject.slow)
    for name, dtype in DTYPES.items():
        worst: list[float] = []
        each = subject if dtype == torch.float32 else bench.pick(subject, forward_only)
        bench.figure(
            f"sdpa_dropin/{subject.name}/{name}/error",
            partial(largest, worst),
            "of allowed",
            gate=partial(agrees, each, dtype, worst),
            target=AS_TORCH,
        )
    breaks: list[float] = []
    bench.figure(
        f"sdpa_dropin/{subject.name}/graph_breaks",
        partial(largest, breaks),
        "breaks",
        gate=partial(compiles, bench.pick(subject, forward_only), bench.pick(*BACKENDS), breaks),
        target=WHOLE,
    )


def agrees(subject: Subject, dtype: torch.dtype, worst: list[float], call: Any = None) -> bool:
    """Ours is called, and errs on no tensor more than three times as much as torch."""
    exact = subject.run(torch.float64, rounded=dtype)
    theirs = subject.run(dtype, rounded=dtype)
    # A compiled model calls what our function was compiled to: the operation, or torch's.
    function = paths.run if subject.kernels else sdpa.scaled_dot_product_attention
    with vattn.patch(fastpath=False), counted(function) as calls:
        found = subject.run(dtype, rounded=dtype, call=call)
    assert calls() or not (subject.kernels or call is None), "the patch was not reached"
    again = subject.run(dtype, rounded=dtype)
    assert all(map(torch.equal, again, theirs)), "something stayed changed after the patch"
    worst += [share(*each) for each in zip(found, theirs, exact, strict=True)]
    assert max(worst) <= 1, f"errors are {max(worst):.3g} of what is allowed"
    return True


def largest(found: list[float]) -> float:
    return max(found)


def share(found: Tensor, theirs: Tensor, exact: Tensor) -> float:
    """The largest error of ``found`` as a share of the largest that is allowed."""
    assert found.shape == theirs.shape == exact.shape, f"shape {tuple(found.shape)}"
    assert found.dtype == theirs.dtype, f"dtype {found.dtype}"
    assert found.isfinite().all(), "not finite"
    rounding = torch.finfo(found.dtype).eps * exact.abs().max().item()
    error, native = ((t.double() - exact).abs().max().item() for t in (found, theirs))
    return error / (3 * native + rounding) if error else 0.0


def compiles(subject: Subject, backend: str, breaks: list[float]) -> bool:
    """Compiled with fullgraph=True under the patch, it is one graph, and agrees."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = partial(torch.compile, backend=backend, fullgraph=True)
    try:
        agreed = agrees(subject, torch.float32, [], call=compiled)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        raise AssertionError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    breaks.append(sum(counters["graph_break"].values()))
    assert counters["stats"]["unique_graphs"] == 1, f"{dict(counters['stats'])}"
    return agreed


@contextlib.contextmanager
def counted(function: Callable[..., Tensor]) -> Iterator[Callable[[], int]]:
    """Count the calls of a function in this thread."""
    code, calls = function.__code__, 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is code

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield lambda: calls
    finally:
        sys.setprofile(before)


# ---- our model -----------------------------------------------------------------------------------
def our_model() -> Any:
    """The shipped byte-level model, under transformers' own "sdpa" attention."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(
        SHIPPED, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def prompts(length: int) -> tuple[Tensor, Tensor]:
    """Two prompts of bytes, the shorter padded on the left, and their mask."""
    text = list(TEXT.read_bytes()[:length])
    ids = torch.tensor([text, [0] * PADDING + text[PADDING:]])
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids, mask


def greedy(model: Any, prompt: int, tokens: int) -> bool:
    """Greedy decoding gives the same tokens, alone and in a padded batch, and the same logits."""
    for rows in (slice(0, 1), slice(0, 2)):
        ids, mask = (t[rows] for t in prompts(prompt))
        theirs = generate(model, ids, mask, tokens)
        with vattn.patch():
            ours = generate(model, ids, mask, tokens)
            with counted(sdpa.scaled_dot_product_attention) as calls:
                generate(model, ids, mask, 2)
        assert calls() == 2 * model.config.num_hidden_layers, f"{calls()} calls reached the patch"
        assert torch.equal(ours.sequences, theirs.sequences), "other tokens"
        whole = theirs.sequences[:, :-1]
        seen = torch.cat([mask, mask.new_ones(mask.shape[0], tokens - 1)], dim=1)
        with torch.no_grad():
            exact = model.double()(whole, attention_mask=seen).logits[:, -tokens:]
            model.float()
        found, native = (torch.stack(each.logits, dim=1) for each in (ours, theirs))
        assert (error := share(found, native, exact)) <= 1, f"logits {error:.3g} of what is allowed"
    return True


def generate(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )


# ---- the operation in compiled graphs ------------------------------------------------------------
def opcheck(bench: Bench) -> float:
    """torch.library.opcheck on our operation; returns the number of calls that passed."""
    generator = torch.Generator().manual_seed(bench.seed)
    passed = 0
    layouts = bench.pick((False, True), (True,))
    grid = itertools.product(paths.IMPLS, DTYPES.values(), (False, True), layouts)
    for impl, dtype, masked, strided in grid:
        shapes = (2, 4, 8, 16), (2, 70, 8, 16), (2, 70, 8, 16)
        query, key, value = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
        key, value = key[:, :, :2], value[:, :, :2]
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if not strided:
            query, key, value = (t.contiguous() for t in (query, key, value))
        mask = torch.rand(2, 1, 4, 70, generator=generator) < 0.7 if masked else None
        if paths.IMPLS[impl].cannot(query, key, value, mask) is not None:
            continue
        results = torch.library.opcheck(sdpa_op.attend, (query, key, value, mask, None, impl))
        assert set(results.values()) == {"SUCCESS"}, f"{results}"
        passed += 1
    return float(passed)


# ---- what a call costs ---------------------------------------------------------------------------
def overhead(bench: Bench, shape: tuple[int, ...]) -> None:
    """Microseconds more than torch for one tiny call."""
    query, key, value = (torch.randn(shape) for _ in range(3))
    options: dict[str, Any] = {"repeat": bench.pick(400, 60), "calls": bench.pick(200, 50)}
    options["clock"] = "thread"

    def difference() -> Sample:
        with single_thread(), torch.no_grad():
            both = bench.race(
                {
                    "ours": lambda: sdpa.scaled_dot_product_attention(query, key, value),
                    "torch": lambda: NATIVE(query, key, value),
                },
                **options,
            )
        pairs = zip(both["ours"].seconds, both["torch"].seconds, strict=True)
        return Sample(tuple(ours - theirs for ours, theirs in pairs))

    bench.figure(
        f"sdpa_dropin/overhead/{'x'.join(map(str, shape))}",
        difference,
        "us",
        gate=lambda: torch.equal(
            sdpa.scaled_dot_product_attention(query, key, value), NATIVE(query, key, value)
        ),
        target=OVERHEAD,
    )


def prefill(bench: Bench, dtype: str) -> None:
    """A causal prefill, which is torch's kernel in both cases."""
    query, key, value = (torch.randn(PREFILL).to(DTYPES[dtype]) for _ in range(3))
    ours = partial(sdpa.scaled_dot_product_attention, query, key, value, is_causal=True)
    theirs = partial(NATIVE, query, key, value, is_causal=True)
    bench.figure(
        f"sdpa_dropin/prefill/{dtype}",
        partial(bench.compare, ours, theirs, repeat=bench.pick(200, 20)),
        "ms",
        gate=lambda: torch.equal(ours(), theirs()),
        target=AS_FAST,
        peer="torch",
    )


def step(bench: Bench, dtype: str) -> None:
    """One token through a grouped-query layer, over a cache that grows by it."""
    heads, kv_heads, dim = STEP
    context = bench.pick(4096, 1024)
    layer = Decoder(heads, kv_heads, dim, prompt=context).to(DTYPES[dtype])
    rows = torch.randn(1, context + 1, layer.norm.normalized_shape[0]).to(DTYPES[dtype])
    cache = torch.randn(2, 1, kv_heads, context + 1, dim).to(DTYPES[dtype])

    @torch.no_grad()
    def decode() -> Tensor:
        return layer.step(rows[:, -1:], cache, context)

    def theirs_then_ours() -> Comparison:
        """Both in the same rounds; the patch goes on and off outside of the timed calls."""
        functions = {"ours": sdpa.scaled_dot_product_attention, "peer": NATIVE}
        callers = {name: partial(under, function, decode) for name, function in functions.items()}
        both = bench.race(callers, repeat=bench.pick(60, 10))
        return bench.versus(both["ours"], both["peer"])

    bench.figure(
        f"sdpa_dropin/step/{dtype}/{context // 1024}k",
        theirs_then_ours,
        "ms",
        gate=partial(same_step, layer, rows[:, -1:], cache, context),
        peer="torch",
    )


def under(function: Any, call: Callable[[], Tensor]) -> Tensor:
    """Call with ``function`` under torch's name: what a patch does, and nothing else."""
    F.scaled_dot_product_attention = function
    try:
        return call()
    finally:
        F.scaled_dot_product_attention = NATIVE


@torch.no_grad()
def same_step(layer: Decoder, x: Tensor, cache: Tensor, at: int) -> bool:
    """The step under the patch is as near to float64 as torch's."""
    theirs = layer.step(x, cache, at)
    with vattn.patch():
        found = layer.step(x, cache, at)
    exact = layer.double().step(x.double(), cache.double(), at)
    layer.to(x.dtype)
    assert (error := share(found, theirs, exact)) <= 1, f"{error:.3g} of what is allowed"
    return True


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """A tiny call gains nothing from threads, and waking one costs more than the call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
