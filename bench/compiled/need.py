"""What a compiled kernel must show whatever the committed table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.compiled.code import Code

# The matrix instruction of an architecture; products of fewer than 64 rows take `mma` on all.
TILES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
ROWS = {80: "mma", 90: "mma", 100: "mma"}


@dataclass(frozen=True)
class Need:
    """Limits of one kernel.

    Args:
        matrix: the matrix instruction that its hot loop must hold, by architecture.
        narrow: how many global loads of the hot loop may be narrower than 128 bits, everywhere or
            by architecture (None: any number); a kernel without a loop must then have a wide load.
        specialised: architectures on which warps must be specialised (setmaxnreg).
        spill_bytes: the most that may be spilled, by architecture: 0 where nothing is said.
        dependent_loads: loads at loaded addresses that the hot loop may hold.
    """

    matrix: Mapping[int, str] | None = None
    narrow: int | Mapping[int, int] | None = None
    specialised: tuple[int, ...] = ()
    spill_bytes: Mapping[int, int] | None = None
    dependent_loads: int = 0

    def failures(self, arch: int, code: Code) -> list[str]:
        """What ``code`` does not show, in words; empty if all is well."""
        allowed = (self.spill_bytes or {}).get(arch, 0)
        matrix = self.matrix and self.matrix.get(arch)
        checks = [
            (
                code.programs > 0,
                f"does not fit a processor: {code.shared_bytes} bytes shared, "
                f"{code.registers} registers, {code.threads} threads",
            ),
            (code.spill_bytes <= allowed, f"spills {code.spill_bytes} bytes, {allowed} allowed"),
            (not matrix or code.mix.get(matrix, 0) > 0, f"holds no {matrix} instruction"),
            (not matrix or code.loop_matrix > 0, "has no loop with matrix instructions"),
            (
                self._wide(arch, code),
                f"{code.loop_narrow} of {code.loop_loads} global loads in the hot loop are "
                f"narrower than 128 bits, {self._narrow(arch)} allowed",
            ),
            (
                arch not in self.specialised or "setmaxnreg" in code.mix,
                "warps are not specialised: no setmaxnreg",
            ),
            (
                code.dependent_loads <= self.dependent_loads,
                f"{code.dependent_loads} loads of the hot loop are at an address that it loaded",
            ),
        ]
        return [text for holds, text in checks if not holds]

    def _narrow(self, arch: int) -> int | None:
        return self.narrow.get(arch, 0) if isinstance(self.narrow, Mapping) else self.narrow

    def _wide(self, arch: int, code: Code) -> bool:
        """Whether K and V come in loads of 128 bits or by TMA."""
        narrow = self._narrow(arch)
        if narrow is None:
            return True
        if code.loop_instructions:
            return code.loop_narrow <= narrow
        return code.mix.get("wide_loads", 0) + code.mix.get("tma_loads", 0) > 0
