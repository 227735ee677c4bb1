"""Compile the driver emulator once, and load it where `cuda.bindings` will look for the driver.

`cuda.bindings` asks the dynamic loader for ``libcuda.so.1``. A library of that soname that is there
already is what it gets, so loading ours first is all it takes: no environment variable, no second
process. A process that has, or could load, the real driver is left alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")
SONAME = "libcuda.so.1"
FLAGS = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{SONAME}", "-lpthread"]


class NoEmulator(Exception):
    """Why the emulator cannot be used here."""


class RealDriver(NoEmulator):
    """This process has a real driver, and keeps it."""


@cache
def build() -> Path:
    """The compiled library; compiled again only when its source changed.

    Raises:
        NoEmulator: no C compiler, or it refused.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoEmulator("no C compiler (cc, gcc or clang) is installed")
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"vattn-emulator-{os.getuid()}-{digest}"
    target = folder / SONAME
    if not target.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        fresh = folder / f"{os.getpid()}.so"
        done = subprocess.run(
            [compiler, str(SOURCE), "-o", str(fresh), *FLAGS], capture_output=True, text=True
        )
        if done.returncode:
            raise NoEmulator(f"{compiler} refused {SOURCE.name}: {done.stderr}")
        fresh.replace(target)
    return target


@cache
def load() -> ctypes.CDLL:
    """The emulator, loaded as this process's driver.

    Raises:
        NoEmulator: no compiler. RealDriver: it would hide the real one.
    """
    try:
        found = ctypes.CDLL(SONAME)
    except OSError:
        return ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(found, "emu_reset"):
        raise RealDriver(
            f"a real {SONAME} is installed: test_emulator.py runs this in a process of its own, "
            f"with LD_LIBRARY_PATH={build().parent}"
        )
    return found
