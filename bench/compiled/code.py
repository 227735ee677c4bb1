"""What one compiled kernel is made of, read from the files that the compiler wrote.

cuobjdump gives registers and stack, nvdisasm the machine code; both are part of the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton

from bench.compiled import elf, ptx, sass
from bench.compiled.sass import Instruction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# CUDA C programming guide, "Technical specifications per compute capability": of one processor.
REGISTERS, THREADS, PROGRAMS, TENSOR_COLUMNS = 65536, 2048, 32, 512
SHARED_KIB = {80: 164, 90: 228, 100: 228}
RESERVED_BYTES = 1024  # of shared memory, for each program
GRANULE = 8  # registers of a thread are given out in eights


@dataclass(frozen=True)
class Code:
    """A kernel on one architecture.

    ``programs`` is how many fit on a processor at once (CTAs per SM). ``spill_bytes`` counts stores
    and loads. ``loop_*`` are of the hot loop (`sass.hot_loop`), or of the whole kernel without one;
    ``loop_narrow`` are its global loads of fewer than 128 bits; ``dependent_loads`` are loads at an
    address that the loop loaded (`ptx`). ``mix`` counts instructions of the whole kernel.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    programs: int
    instructions: int
    loop_instructions: int
    loop_matrix: int
    loop_loads: int
    loop_narrow: int
    dependent_loads: int
    mix: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What a compilation listener of triton is given: metadata, and paths of files by name."""

    kernel: str
    metadata: Mapping[str, Any]
    files: Mapping[str, str]

    def path(self, kind: str) -> Path:
        """The file that ends in ``kind``."""
        return next(Path(path) for path in self.files.values() if path.endswith(kind))


def read(arch: int, kernels: Sequence[Compiled]) -> list[Code]:
    """Read kernels of one architecture; raises CalledProcessError if a tool refuses a file."""
    codes = disassembled(arch, [each.path(".cubin").read_bytes() for each in kernels])
    return [_code(arch, each, code) for each, code in zip(kernels, codes, strict=True)]


def disassembled(arch: int, cubins: Sequence[bytes]) -> list[list[Instruction]]:
    """The machine code of each, by one nvdisasm for all: its start takes half a second."""
    if not cubins:
        return []
    texts = [elf.text(cubin) for cubin in cubins]
    with NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        suffix = "a" if arch >= 90 else ""
        code = sass.parse(_output("nvdisasm", "--binary", f"SM{arch}{suffix}", file.name))
    ends = list(accumulate(map(len, texts)))
    bounds = zip([0, *ends], ends, strict=False)
    return [[each for each in code if low <= each.address < high] for low, high in bounds]


def _code(arch: int, compiled: Compiled, code: list[Instruction]) -> Code:
    metadata, text = compiled.metadata, compiled.path(".ptx").read_text()
    usage = _output("cuobjdump", "-res-usage", str(compiled.path(".cubin")))
    registers, stack = (int(found) for found in re.findall(r"(?:REG|STACK):(\d+)", usage))
    threads = _threads(text, 32 * metadata["num_warps"])
    loop = sass.hot_loop(code)
    counts = sass.mix(loop or code)
    loads = counts.get("global_loads", 0) + counts.get("async_copies", 0)
    return Code(
        registers=registers,
        spill_bytes=sass.spilled(code),
        stack_bytes=stack,
        shared_bytes=metadata["shared"],
        threads=threads,
        programs=programs(arch, registers, threads, metadata["shared"], metadata.get("tmem_size")),
        instructions=len(code),
        loop_instructions=len(loop),
        loop_matrix=sass.matrix(loop),
        loop_loads=loads + counts.get("tma_loads", 0),
        loop_narrow=loads - counts.get("wide_loads", 0),
        dependent_loads=ptx.dependent_loads(text),
        mix=sass.mix(code),
    )


def programs(arch: int, registers: int, threads: int, shared: int, columns: int | None) -> int:
    """Programs that one processor holds at once; 0 if not even one fits."""
    given = -(-registers // GRANULE) * GRANULE
    limits = [PROGRAMS, THREADS // threads, REGISTERS // (given * threads)]
    limits.append((SHARED_KIB[arch] << 10) // (shared + RESERVED_BYTES))
    if columns:
        limits.append(TENSOR_COLUMNS // columns)
    return min(limits)


def _threads(text: str, otherwise: int) -> int:
    """Threads of a program: warps that work on their own (warp specialisation) are in PTX only."""
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
    return int(found[1]) if found else otherwise


def _output(tool: str, *arguments: str) -> str:
    command = (str(TOOLS / tool), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
