"""The threads of polars, which a forked process does not have."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_started = False
"""Whether polars' threads ran when a process was forked."""
_left = False
"""Whether this process was forked from one with such threads, so that they are not here."""


def require_threads() -> None:
    """Refuse what polars would do in a process that lacks its threads: it would wait for ever.

    Raises:
        RuntimeError: this process was forked from one in which polars had been used.
    """
    if _left:
        raise RuntimeError(
            "this process was forked from one that had used polars, whose threads are not here, so "
            "it would wait for ever: open the model in each worker after the fork, and use no "
            "model before it (gunicorn without --preload, uWSGI with lazy-apps, multiprocessing "
            "and DataLoader with 'spawn')"
        )


def _look() -> None:
    global _started
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # of a thread that has just ended
            names.append(path.read_text())
    _started = any(re.match(r"polars-\d", name) for name in names)


def _forked() -> None:
    global _left
    _left = _left or _started


os.register_at_fork(before=_look, after_in_child=_forked)
