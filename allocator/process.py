"""Which process and thread are we? Without a system call or a lookup at every question."""

from __future__ import annotations

import os
import threading

_forks = 0
_main = threading.main_thread().ident


def _forked() -> None:
    global _forks, _main
    _forks += 1
    _main = threading.main_thread().ident


os.register_at_fork(after_in_child=_forked)


def forks() -> int:
    """How many forks lie between the process that imported this and the running one."""
    return _forks


def main_thread() -> int | None:
    """Identifier of the thread that Python delivers signals to."""
    return _main
