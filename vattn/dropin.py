"""The ways into the drop-in: `patch` for a process, `SDPAMode` for a block of one thread.

Nothing here happens at import. What each way catches of the calls that a program makes:

    the call                                      patch()       SDPAMode   registry
    F.scaled_dot_product_attention                yes           yes        flash calls
    a name imported earlier                       modules=[..]  yes        flash calls
    torch._C._nn.scaled_dot_product_attention     no            yes        flash calls
    torch.ops.aten.scaled_dot_product_attention   no            no         flash calls
    TorchScript                                   no            no         flash calls
    nn.MultiheadAttention, nn.Transformer*        yes           no         flash calls
      the same: eval mode, no gradient            fastpath=False  no       no
    transformers, attn_implementation="sdpa"      yes           yes        flash calls
    torch.compile'd before                        recompiles    recompiles yes
    another thread                                yes           no         yes

`patch` together with `SDPAMode` catches all but torch.ops.aten and TorchScript. "registry" is
`vattn.registry`: torch's own switch below its choice of a backend. "flash calls" are those which
torch sends to its flash kernel; see there. In eval mode and without gradients torch.nn's encoder
and attention modules call a fused kernel with no attention function in it: `fastpath=False` turns
that off meanwhile, as `torch.backends.mha.set_fastpath_enabled(False)` does (padded positions are
then not zero).

`CausalBias` and the tensor subclasses that overload the function keep their meaning everywhere.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from vattn.sdpa import scaled_dot_product_attention
from vattn.sdpa_checks import native as _native

NAME = "scaled_dot_product_attention"
MODULE_NAME = "multi_head_attention_forward"
_mha: Any = getattr(F, MODULE_NAME)
_bias_before = vars(CausalBias)["__torch_function__"]
_lock = threading.RLock()


def patch(*, modules: Iterable[ModuleType] = (), fastpath: bool = True) -> Patch:
    """Put `vattn.scaled_dot_product_attention` in the place of torch's, until undone.

        with vattn.patch():           switch = vattn.patch()
            model(x)                  switch.undo()

    It works at once, for the whole process: every thread sees it, and a call that is running ends
    with the function it began with. ``modules`` are modules that imported torch's function by
    name: that name is changed as well. ``fastpath=False`` turns torch's encoder fast path off.

    Patches nest, in any order and from any thread: what stood there before comes back when the
    last one is undone. If somebody else has put a function there since, it is left in place with
    a RuntimeWarning; once it is gone, another `undo` puts back the rest. A module that imports
    the name from torch while it is patched keeps our function, which goes on working.

    Raises TypeError or ValueError, before anything is changed, for an entry of ``modules`` that is
    no module or holds no such name.
    """
    names: list[tuple[Any, str, Any]] = [(F, NAME, scaled_dot_product_attention)]
    for module in modules:
        names += [(module, name, scaled_dot_product_attention) for name in _names(module)]
    names.append((CausalBias, "__torch_function__", _BIAS))
    if getattr(F, MODULE_NAME) in (_mha, multi_head_attention_forward):
        names.append((F, MODULE_NAME, multi_head_attention_forward))
    # TorchScript compiles what stands under torch's name: ours means torch's operation to it.
    torch.jit._builtins._register_builtin(scaled_dot_product_attention, f"aten::{NAME}")
    return Patch(names, fastpath)


def patched() -> bool:
    """Whether `torch.nn.functional.scaled_dot_product_attention` is ours now."""
    return getattr(F, NAME) is scaled_dot_product_attention


class SDPAMode(TorchFunctionMode):
    """A block of one thread in which torch's function is ours, under whatever name it is called.

        with vattn.SDPAMode():
            script()

    Changes nothing in torch, costs every torch call in the block about a microsecond, and does
    not see into `torch.nn.MultiheadAttention`: torch runs that with the mode put aside.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        called = scaled_dot_product_attention if func is _native else func
        return called(*args, **(kwargs or {}))


class Patch:
    """What one call of `patch` changed. Entering it again after an `undo` patches again."""

    def __init__(self, names: Iterable[tuple[Any, str, Any]], fastpath: bool = True) -> None:
        self._places = [_place(_Attribute(owner, name), ours) for owner, name, ours in names]
        if not fastpath:
            self._places.append(_place(_FastPath(), False))
        self._depth = 0
        self._apply()

    @property
    def active(self) -> bool:
        """Whether this patch is in force: from its making to its `undo`."""
        with _lock:
            return any(place.held_by(self) for place in self._places)

    def undo(self) -> None:
        """Put back what was there, unless another patch still needs ours; again is no error."""
        self._undo()

    def __enter__(self) -> Patch:
        with _lock:
            if not self.active:
                self._apply()
            self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._depth -= 1
            if self._depth == 0:
                self._undo()

    def __repr__(self) -> str:
        places = ", ".join(place.where.label for place in self._places)
        return f"<vattn.patch {'active' if self.active else 'undone'}: {places}>"

    def _apply(self) -> None:
        with _lock:
            for place in self._places:
                place.join(self)

    def _undo(self) -> None:
        with _lock:
            covered = [p.where.label for p in reversed(self._places) if not p.leave(self)]
        for label in covered:
            warnings.warn(
                f"{label} was changed after vattn.patch(): it was left as it is; "
                "undo that change first, then call undo() again",
                RuntimeWarning,
                stacklevel=3,
            )


# ---- what is changed, and what stood there -------------------------------------------------------
@dataclass(frozen=True)
class _Attribute:
    """An attribute of a module or class."""

    owner: Any
    name: str

    @property
    def label(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def read(self) -> Any:
        return vars(self.owner)[self.name]

    def write(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass(frozen=True)
class _FastPath:
    """The switch of torch's fused encoder layer."""

    label = "torch.backends.mha.fastpath"

    def read(self) -> bool:
        return torch.backends.mha.get_fastpath_enabled()

    def write(self, value: bool) -> None:
        torch.backends.mha.set_fastpath_enabled(value)


@dataclass
class _Layer:
    """Ours over something that was there, and the patches that asked for it: True while active."""

    before: Any
    patches: dict[Patch, bool] = field(default_factory=dict)

    def idle(self) -> bool:
        return not any(self.patches.values())


class _Place:
    """One thing that patches change: layers of ours, the last on top.

        native                          layers = []
        patch a  ours                   [native {a}]
        patch b  ours                   [native {a, b}]          b joins what is on top
        (other)  theirs over ours
        patch c  ours                   [native {a, b}, theirs {c}]

    A layer goes when no active patch holds it *and* ours is what stands there, or already what
    was there before: theirs is never touched.
    """

    def __init__(self, where: _Attribute | _FastPath, ours: Any) -> None:
        self.where, self.ours = where, ours
        self.layers: list[_Layer] = []

    def held_by(self, patch: Patch) -> bool:
        return any(layer.patches.get(patch) for layer in self.layers)

    def join(self, patch: Patch) -> None:
        now = self.where.read()
        if not (self.layers and now is self.ours):
            self.layers.append(_Layer(now))
            self.where.write(self.ours)
        self.layers[-1].patches[patch] = True

    def leave(self, patch: Patch) -> bool:
        """Take a patch off; False if its layer must wait for what somebody else put on it."""
        for layer in self.layers:
            if patch in layer.patches:
                layer.patches[patch] = False
        while self.layers and self.layers[-1].idle():
            now, before = self.where.read(), self.layers[-1].before
            if now is self.ours:
                self.where.write(before)
            elif now is not before:
                break
            self.layers.pop()
        return not any(layer.idle() and patch in layer.patches for layer in self.layers)


_places: dict[_Attribute | _FastPath, _Place] = {}


def _place(where: _Attribute | _FastPath, ours: Any) -> _Place:
    with _lock:
        return _places.setdefault(where, _Place(where, ours))


def _names(module: ModuleType) -> Iterator[str]:
    """The names under which a module holds torch's function, or held it before a patch."""
    if not isinstance(module, ModuleType):
        raise TypeError(f"modules holds {module!r}: every entry must be a module")
    found = False
    for name, value in list(vars(module).items()):
        ours = value is scaled_dot_product_attention and _Attribute(module, name) in _places
        if value is _native or ours:
            found = True
            yield name
    if not found:
        raise ValueError(
            f"module {module.__name__} holds no name of torch's {NAME}: "
            "leave it out of modules, patch() catches what it calls as F." + NAME
        )


# ---- what else must know -------------------------------------------------------------------------
def _twin(function: Any) -> Any:
    """The same code over the same globals: another function only to who asks which one it is.

    Dynamo keeps torch's attention module function as one node of its graph and does not look into
    it, so code compiled before a patch would be taken for current after it. It does look at which
    code has the name. That the twin is of this module keeps its graphs apart in caches on disk.
    """
    if not isinstance(function, types.FunctionType):
        return function  # somebody's own: nothing is known about it
    code, defaults = function.__code__.replace(), function.__defaults__
    twin = types.FunctionType(code, function.__globals__, function.__name__, defaults)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__doc__ = function.__doc__
    twin.__module__ = __name__
    return torch.compiler.allow_in_graph(twin)


multi_head_attention_forward = _twin(_mha)


def _bias_torch_function(
    cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """`CausalBias` compares with the name in F: let it know torch's own function as well."""
    func = getattr(F, NAME) if func is _native else func
    return _bias_before.__get__(None, cls)(func, types, args, kwargs)


_BIAS = classmethod(_bias_torch_function)
