"""Thread binding, decided before torch is imported: OpenMP reads its environment once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_SETTINGS = {"OMP_PROC_BIND": "true"}
_AFFINITY = "BENCH_CPUS"


def settle() -> None:
    """Binds OpenMP's threads to cores, unless the caller's environment says otherwise.

    The processors that this process may use are remembered: once bound, the main thread's own
    affinity is one core, and a child process would inherit that.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if hasattr(os, "sched_getaffinity"):
        allowed = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        os.environ.setdefault(_AFFINITY, allowed)


def allowed_cpus() -> list[int]:
    """Processors that the suite may use, as they were before any thread was bound."""
    recorded = os.environ.get(_AFFINITY)
    if recorded:
        return [int(cpu) for cpu in recorded.split(",")]
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def settings() -> dict[str, str]:
    """The thread settings in force, for the result file."""
    names = (*_SETTINGS, "OMP_NUM_THREADS", "OMP_PLACES", "MKL_NUM_THREADS", "AMTL_BACKEND")
    return {name: os.environ[name] for name in names if name in os.environ}


def run_python(arguments: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    """Runs a fresh Python with every allowed processor, from the current folder, for ten minutes.

    Args:
        arguments: What follows ``python``.
        environment: Variables to add.

    Returns:
        What it printed.

    Raises:
        RuntimeError: It failed; the message holds the end of its error output.
    """
    cpus = allowed_cpus()

    def widen() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)

    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        preexec_fn=widen,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"{' '.join(arguments[:3])} ended with {done.returncode}:\n{tail}")
    return done.stdout
