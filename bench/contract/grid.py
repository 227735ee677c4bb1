"""The grid: blocks of axes, every combination in full, few of them when quick.

A block is a function from axis values to a call. `covering` picks a small set of combinations in
which any two values of two axes meet at least once: most faults need one or two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.contract.call import Call
from bench.contract.cases import Case
from bench.contract.inputs import Random

Values = Mapping[str, Any]


def everywhere(_: Values) -> bool:
    return True


@dataclass(frozen=True)
class Block:
    """Axes and the call that a combination of their values stands for."""

    name: str
    axes: Mapping[str, tuple[Any, ...]]
    build: Callable[..., Call]  # build(random, **values)
    makes_sense: Callable[[Values], bool] = everywhere
    truth: Callable[[Call], Call] | None = None
    leaves: tuple[str, ...] = ("query", "key", "value")  # () for no gradients
    marks: frozenset[str] = frozenset()
    strength: int | None = None  # how many axes meet in full; None for all of them
    strength_quick: int = 2

    def combinations(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.axes.values()):
            found = dict(zip(self.axes, values, strict=True))
            if self.makes_sense(found):
                yield found

    def cases(
        self, seed: int, *, quick: bool, every: bool = False, strength: int | None = None
    ) -> list[Case]:
        """The combinations in which ``strength`` axes meet in full, drawn with ``seed``; by default
        as many as the block says."""
        chosen = list(self.combinations())
        if strength is None and not every:
            strength = self.strength_quick if quick else self.strength
        if strength is not None:
            chosen = covering(chosen, strength, Random(seed, self.name))
        return [self.case(values, seed) for values in chosen]

    def case(self, values: dict[str, Any], seed: int) -> Case:
        def build(random: Random) -> Call:
            return self.build(random, **values)

        shown = ",".join(f"{axis}={plain(value)}" for axis, value in values.items())
        name = f"{self.name}[{shown}]"
        return Case("grid", name, seed, build, self.truth, self.leaves, self.marks)


def plain(value: Any) -> str:
    """An axis value in a name: short, without spaces or commas."""
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.removeprefix("torch.").replace(" ", "")


def covering(
    combinations: list[dict[str, Any]], strength: int, random: Random
) -> list[dict[str, Any]]:
    """A subset in which any values of ``strength`` axes that meet anywhere still meet."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for index in random.permutation(len(combinations)):
        items = [(axis, plain(value)) for axis, value in combinations[index].items()]
        new = set(itertools.combinations(items, strength)) - seen
        if new:
            kept.append(index)
            seen |= new
    return [combinations[index] for index in sorted(kept)]
