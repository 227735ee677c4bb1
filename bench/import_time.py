"""Importing the allocator in a fresh interpreter, beside torch and transformers.

The time is that of the import statement, read inside of the new process; starting Python is not
counted, and files are in the page cache. The gate: the allocator works after it, and torch was not
loaded.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness import Bench, Comparison, Sample

ROOT = Path(__file__).resolve().parent.parent
OURS = "vattn.allocator.pool, vattn.allocator.arena"
PEERS = ("torch", "transformers")
TARGET = "<= 0.3"
TIMED = """
import json, sys, time
begin = time.perf_counter()
import {modules}
taken = time.perf_counter() - begin
{check}
print(json.dumps([taken, "torch" in sys.modules]))
"""
WORKS = """
from vattn.allocator.host import HostBackend
backend = HostBackend(4096)
pool = vattn.allocator.pool.Pool(backend, budget_bytes=1 << 20)
arena = vattn.allocator.arena.Arena(pool, slots=1, lanes=1, lane_pages=8)
arena.grow_to(0, 8)
assert pool.mapped == 8
"""


def run(bench: Bench) -> None:
    repeat = bench.pick(15, 3)
    peers = [name for name in PEERS if importlib.util.find_spec(name)]
    taken: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    fresh_import(OURS)  # compiles what is not compiled yet
    for turn in range(repeat):
        for name in list(taken) if turn % 2 == 0 else reversed(taken):
            taken[name].append(fresh_import(OURS if name == "ours" else name)[0])
    samples = {name: Sample(tuple(seconds)) for name, seconds in taken.items()}
    for name in PEERS:
        value: Sample | Comparison = samples["ours"]
        if name in samples:
            value = bench.versus(samples["ours"], samples[name])
        bench.figure(
            "import_time" if name == PEERS[0] else f"import_time/beside_{name}",
            value,
            "s",
            gate=no_torch,
            target=TARGET,
            peer=name,
        )


def fresh_import(modules: str, check: str = "") -> tuple[float, bool]:
    """Seconds that a fresh interpreter takes to import ``modules``, and whether torch came too."""
    code = TIMED.format(modules=modules, check=check)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, torch_loaded = json.loads(done.stdout)
    return float(seconds), bool(torch_loaded)


def no_torch() -> Any:
    """The allocator is there and works, and torch is not."""
    try:
        _, torch_loaded = fresh_import(OURS, WORKS)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"the import failed: {error.stderr[-300:]}") from error
    assert not torch_loaded, "torch was imported"
    return True
