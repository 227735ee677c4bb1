"""The ways into the drop-in: what each catches, what it misses, and that undoing it is exact."""

from __future__ import annotations

import random
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vattn
from tests import ways
from tests.models import model, prompts
from tests.ways import CALLS, HERE, NATIVE, WAYS, counted, grouped, left_as_found, prepare_thread
from vattn import dropin
from vattn.dropin import SDPAMode, patch, patched
from vattn.sdpa import scaled_dot_product_attention as ours

UNTOUCHED_BY_IMPORT = F.scaled_dot_product_attention is NATIVE
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    with left_as_found() as value:
        yield value


# ---- the table -----------------------------------------------------------------------------------
BY_NAME = {"F", "attention", "cross", "encoder", "transformers", "thread"}
BY_MODE = {"F", "earlier", "C", "transformers"}
CAUGHT = {
    "patch": BY_NAME,
    "modules": BY_NAME | {"earlier"},
    "fastpath": BY_NAME | {"attention_eval", "encoder_eval"},
    "mode": BY_MODE,
    "patch_and_mode": CALLS.keys() - {"aten", "scripted"},
    "registry": CALLS.keys() - {"attention_eval", "encoder_eval"},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_catches_what_its_row_says(way: str, call: str) -> None:
    run = CALLS[call]()
    expected = run()
    with counted() as calls:
        with WAYS[way]():
            found = run()
        inside = calls()
        after = run()
        outside = calls() - inside
    assert (inside > 0) == (call in CAUGHT[way])
    assert outside == 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, expected)


def test_nothing_happens_at_import() -> None:
    assert UNTOUCHED_BY_IMPORT
    assert not patched()
    assert vattn.patch is patch
    assert vattn.patched is patched
    assert vattn.SDPAMode is SDPAMode


# ---- undo ----------------------------------------------------------------------------------------
def test_switch_and_undo() -> None:
    switch = patch()
    assert F.scaled_dot_product_attention is ours
    assert patched()
    assert switch.active
    assert "active" in repr(switch)
    switch.undo()
    assert F.scaled_dot_product_attention is NATIVE
    assert not switch.active
    switch.undo()
    assert not patched()
    with switch:
        assert patched()
    assert not patched()


def test_patches_nest_and_the_last_one_ends_it() -> None:
    with patch() as outer:
        with patch(), outer:
            pass
        assert patched()
        first, second = patch(), patch()
    assert patched()
    first.undo()
    first.undo()
    assert patched()
    second.undo()
    assert not patched()


def test_undo_inside_the_block() -> None:
    with patch() as switch:
        switch.undo()
        assert not patched()


def test_an_exception_undoes_it() -> None:
    with pytest.raises(RuntimeError, match="size"), patch(fastpath=False, modules=[HERE]):
        F.scaled_dot_product_attention(*(torch.randn(1, n, 4, 8) for n in (2, 3, 4)))
    with pytest.raises(KeyboardInterrupt), SDPAMode():
        raise KeyboardInterrupt


def theirs(*args: Any, **kwargs: Any) -> Tensor:
    return NATIVE(*args, **kwargs)


@pytest.fixture
def somebody_else(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def test_what_somebody_put_there_before_comes_back(somebody_else: pytest.MonkeyPatch) -> None:
    with somebody_else.context() as other:
        other.setattr(F, "scaled_dot_product_attention", theirs)
        with patch():
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is theirs


def test_what_somebody_put_there_since_stays(somebody_else: pytest.MonkeyPatch) -> None:
    switch = patch()
    with somebody_else.context() as other:
        other.setattr(F, "scaled_dot_product_attention", theirs)
        with pytest.warns(RuntimeWarning, match=r"functional\.scaled_dot_product_attention was ch"):
            switch.undo()
        assert F.scaled_dot_product_attention is theirs
        with patch():
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is theirs
    assert F.scaled_dot_product_attention is ours
    switch.undo()
    assert F.scaled_dot_product_attention is NATIVE


@pytest.mark.filterwarnings("ignore:.*was changed after:RuntimeWarning")
def test_any_order_of_patches_and_others_ends_where_it_began(seed: int) -> None:
    """Ours come and go in any order; others put back what they found when theirs stands there."""
    chance = random.Random(seed)
    for _ in range(60):
        made: list[dropin.Patch] = [patch()]
        others: list[tuple[Any, Any]] = []
        for _ in range(chance.randrange(2, 14)):
            step = chance.choice(["patch", "undo", "again", "other", "restore"])
            if step == "patch":
                made.append(patch())
                assert patched()
            elif step == "undo":
                chance.choice(made).undo()
            elif step == "again":
                chance.choice(made).__enter__()
            elif step == "other":
                other = lambda *args, **kwargs: NATIVE(*args, **kwargs)  # noqa: E731
                others.append((other, F.scaled_dot_product_attention))
                F.scaled_dot_product_attention = other
            elif others and F.scaled_dot_product_attention is others[-1][0]:
                F.scaled_dot_product_attention = others.pop()[1]
            assert patched() or others or not any(switch.active for switch in made)
        while others or patched():
            if others and F.scaled_dot_product_attention is others[-1][0]:
                F.scaled_dot_product_attention = others.pop()[1]
            chance.choice(made).undo()
        assert F.scaled_dot_product_attention is NATIVE
        assert not any(switch.active for switch in made)


def test_what_somebody_put_back_already_is_no_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch():
            F.scaled_dot_product_attention = NATIVE
    assert not patched()


def test_threads_share_one_patch() -> None:
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with patch():
                if not patched():
                    wrong.append("not patched inside the block")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not patched()


def test_a_mode_is_of_its_thread_only() -> None:
    run = prepare_thread()
    with counted() as calls, SDPAMode():
        run()
        assert calls() == 0


def test_modes_nest() -> None:
    tensors = grouped()
    with SDPAMode() as mode, SDPAMode(), mode, counted() as calls:
        out = ways.earlier(*tensors, enable_gqa=True)
        assert calls() >= 1
    torch.testing.assert_close(out, NATIVE(*tensors, enable_gqa=True), atol=1e-5, rtol=1e-5)


# ---- names imported earlier ----------------------------------------------------------------------
def test_names_of_given_modules_are_changed_and_put_back() -> None:
    module = types.ModuleType("somebody")
    module.attend, module.other = NATIVE, len  # type: ignore[attr-defined]
    with patch(modules=[module, module]), patch(modules=[module]):
        assert module.attend is ours
        assert module.other is len
    assert module.attend is NATIVE


def test_modules_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(ValueError, match="module math holds no name"):
        patch(modules=[HERE, sys.modules["math"]])
    with pytest.raises(TypeError, match="must be a module"):
        patch(modules=["tests.test_dropin"])  # type: ignore[list-item]
    assert not patched()


def test_a_module_that_imports_while_patched_keeps_a_function_that_works() -> None:
    module = types.ModuleType("later")
    with patch():
        exec(
            "from torch.nn.functional import scaled_dot_product_attention as attend",
            vars(module),
        )
    tensors = grouped()
    out = module.attend(*tensors, enable_gqa=True)
    torch.testing.assert_close(out, NATIVE(*tensors, enable_gqa=True), atol=1e-5, rtol=1e-5)


def test_the_fast_path_comes_back_as_it_was() -> None:
    switch = torch.backends.mha
    with patch(fastpath=False):
        assert not switch.get_fastpath_enabled()
        with patch():
            assert not switch.get_fastpath_enabled()
    assert switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(False)
    with patch(fastpath=False):
        pass
    assert not switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(True)


# ---- transformers --------------------------------------------------------------------------------
def test_the_name_in_transformers_works_with_and_without_a_patch() -> None:
    ids = prompts(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        eager = model("llama", attention="eager")(ids, attention_mask=mask).logits
        with counted() as calls:
            plain = model("llama")(ids, attention_mask=mask).logits
            assert calls() == 2
            with patch():
                inside = model("llama")(ids, attention_mask=mask).logits
                stock = model("llama", attention="sdpa")(ids, attention_mask=mask).logits
            assert calls() == 6
    assert torch.equal(plain, inside)
    for logits in (plain, stock):
        torch.testing.assert_close(logits[mask.bool()], eager[mask.bool()], atol=2e-3, rtol=1e-3)
