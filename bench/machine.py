"""What a figure was measured on: versions, processor, device."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, Any]:
    """Versions and hardware names; torch and the device only where a benchmark loaded torch."""
    import numpy

    import vattn

    found: dict[str, Any] = {
        "vattn": vattn.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "kernel": platform.release(),
        "cpu": cpu_model(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
            found["driver"] = driver()
    return found


@cache
def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def commit() -> str | None:
    """The commit of the checkout, with a plus sign when files differ from it."""
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--match=-")
    return described or None


@cache
def driver() -> str | None:
    """The NVIDIA driver's version."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
