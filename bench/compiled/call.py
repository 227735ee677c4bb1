"""A launcher call of the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.compiled.need import Need


@dataclass(frozen=True)
class Call:
    """One configuration.

    Args:
        name: kernel family and configuration, "decode/bf16/d128/g4".
        launch: calls the launcher with tensors made for it; nothing runs, so they hold anything.
        needs: what the kernels it launches must show, by the name of the kernel function. One that
            is not named must only fit and not spill.
        quick: whether it is part of ``--quick``.
        archs: where it can be launched at all.
    """

    name: str
    launch: Callable[[], object]
    needs: Mapping[str, Need] = field(default_factory=dict)
    quick: bool = False
    archs: tuple[int, ...] = (80, 90, 100)
