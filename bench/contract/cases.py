"""A case: one seeded call with its truth, torch's answer and torch's gradients, each worked out
once; and a probe: one check of one case, the unit in which the suite counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.contract.call import Attend, Call, exact, gradient_sizes, torchs
from bench.contract.inputs import Random

Build = Callable[[Random], Call]


@dataclass(frozen=True)
class Probe:
    """One check against one implementation: ``run`` returns, or raises to say what differs."""

    family: str
    check: str
    name: str
    run: Callable[[Attend], None]

    @property
    def label(self) -> str:
        return f"{self.family}/{self.name}/{self.check}"


@dataclass(eq=False)
class Case:
    """A call that is drawn from ``seed`` and its own name.

    ``truth`` gives the call whose oracle is right, where that is another one (rows that only a
    leak could read are zeros there). ``leaves`` are the arguments whose gradients are compared.
    """

    family: str
    name: str
    seed: int
    build: Build
    truth: Callable[[Call], Call] | None = None
    leaves: tuple[str, ...] = ("query", "key", "value")
    marks: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def call(self) -> Call:
        return self.build(Random(self.seed, f"{self.family}/{self.name}"))

    @cached_property
    def exact(self) -> Tensor:
        return exact(self.call if self.truth is None else self.truth(self.call))

    @cached_property
    def native(self) -> Tensor | Exception:
        """torch's result, or the error it refuses the call with."""
        try:
            return self.call.run(torchs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            return error.with_traceback(None)

    @cached_property
    def cotangent(self) -> Tensor:
        """The gradient that flows into the result."""
        dtype = self.call.query.dtype
        return Random(self.seed, f"cotangent/{self.name}").normal(*self.exact.shape, dtype=dtype)

    @cached_property
    def native_gradients(self) -> dict[str, Tensor]:
        return gradients(torchs, self.call, self.leaves, self.cotangent)

    @cached_property
    def exact_gradients(self) -> dict[str, Tensor]:
        def definition(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
            mask = options["attn_mask"]
            assert mask is None or isinstance(mask, Tensor)
            return exact(replace(self.call, query=query, key=key, value=value, mask=mask))

        wide = self.call.map(lambda each: each.double() if each.is_floating_point() else each)
        return gradients(definition, wide, self.leaves, self.cotangent.double())

    @cached_property
    def gradient_sizes(self) -> dict[str, Tensor]:
        return gradient_sizes(self.call, self.cotangent)

    def forget(self) -> None:
        """Draw the call again at its next use: an implementation has changed its tensors."""
        self.__dict__.pop("call", None)


def gradients(
    attend: Attend, call: Call, leaves: tuple[str, ...], cotangent: Tensor
) -> dict[str, Tensor]:
    """First derivatives of the named arguments; one that autograd does not reach is left out."""
    tensors = call.tensors()
    wanted = {n: tensors[n].detach().requires_grad_() for n in leaves if n in tensors}
    out = call.having(wanted).run(attend)
    if not out.requires_grad:
        return {}
    found = torch.autograd.grad(out, list(wanted.values()), cotangent, allow_unused=True)
    return {name: each for name, each in zip(wanted, found, strict=True) if each is not None}
