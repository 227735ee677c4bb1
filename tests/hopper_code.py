"""What the Hopper prefill's launcher compiles, read from PTX and SASS, in a child process: here
Triton interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton import knobs

from bench.compiled.device import DEVICES, pretended
from vattn.kernels.kv import KV
from vattn.kernels.prefill_hopper import prefill_hopper_lse, why_not
from vattn.kernels.scores import Scores

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_and_read(
    dim: int, dtype: str, causal: str | None, window: int | None, softcap: float | None
) -> dict:
    """What the launcher compiles for an H100."""
    query = torch.empty(2, 4, 200, dim, dtype=getattr(torch, dtype))
    key, counts = query[:, :2].contiguous(), torch.ones(2, dtype=torch.int32)
    kv, scores = KV(key, key, counts, counts, counts), Scores(None, causal, window, 0, softcap)
    files: dict[str, bytes] = {}
    shared = []

    def keep(*, metadata, metadata_group, **_) -> None:
        shared.append(metadata["shared"])
        files.update(
            {Path(name).suffix: Path(p).read_bytes() for name, p in metadata_group.items()}
        )

    with pretended(DEVICES[90]), knobs.compilation.scope():
        knobs.compilation.listener = keep
        before = why_not(query, kv, scores)
        prefill_hopper_lse(query, kv, scores)
    ptx = files[".ptx"].decode()
    sass = tool("nvdisasm", files[".cubin"], "-c")
    remarks = tool("ptxas", files[".ptx"], "-v", "--gpu-name=sm_90a", "-o", os.devnull)
    return {
        "refused": before,
        "shared": shared[0],
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", remarks))),
        "serialised": "serialized" in remarks,
        "registers": re.findall(r"setmaxnreg\S*\s+(\d+)", ptx),
        "threads": int(re.findall(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)[0]),
        "wide": [len(re.findall(op, sass)) for op in (r"LDG\.E\.128", r"STG\.E\.128")],
        "overlaps": overlaps(sass),
    }


def tool(name: str, data: bytes, *arguments: str) -> str:
    """Output of a tool of the triton wheel on a file of these bytes."""
    with NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [str(TOOLS / name), file.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def overlaps(sass: str) -> list[tuple[int, int]]:
    """Of each step: (wgmma issued before the wait for the first, exponentials up to the second)."""
    found, issued, exponentials, waiting = [], 0, 0, False
    for line in sass.splitlines():
        if "HGMMA" in line:
            issued += 1
        elif "MUFU.EX2" in line:
            exponentials += 1
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([01])", line):
            if wait[1] == "0" and waiting:
                found.append((issued, exponentials))
            issued = issued if wait[1] == "1" else 0
            waiting, exponentials = wait[1] == "1", 0
    return found


def child(*cases: tuple) -> list[dict]:
    """`compile_and_read` of each case, in a process of its own."""
    program = (
        "import json, sys\n"
        "from tests.hopper_code import compile_and_read\n"
        "print(json.dumps([compile_and_read(*case) for case in json.loads(sys.argv[1])]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(cases)],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
