"""Where a Triton kernel is tested: interpreted on the CPU always, on a device with ``-m gpu``."""

from __future__ import annotations

import pytest

PLACES = [
    pytest.param("cpu", id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
