"""Memory a run would take, against what the machine has left."""

from __future__ import annotations

import os
from pathlib import Path

from amtl.errors import UserError
from amtl.run.config import TrainConfig

_STATES = {"adam": 2, "adagrad": 1}
"""Numbers an optimizer keeps per weight."""


def least_memory(config: TrainConfig, rows: int, fields: int) -> int:
    """Bytes that training takes at least: less than a run does, so nothing that fits has more.

    Counted are table and MLP with their optimizers' states, and the inputs of a step with their
    gradients.

    Args:
        config: settings.
        rows: rows of the table.
        fields: embedded fields.
    """
    mlp = 4 * fields * (config.hidden[0] if config.hidden else 1)
    return 4 * config.dim * (_of_table(config, rows) + mlp + _of_step(config, fields))


def _of_table(config: TrainConfig, rows: int) -> int:
    return rows * (1 + _STATES.get(config.table_optimizer, 0))


def _of_step(config: TrainConfig, fields: int) -> int:
    return 2 * fields * config.batch_size


def require_memory(config: TrainConfig, rows: int, fields: int) -> None:
    """Refuses a run whose numbers of width `config.dim` do not fit into the memory that is free.

    Args:
        config: settings.
        rows: rows of the table.
        fields: embedded fields.

    Raises:
        UserError: if it does not fit.
    """
    needed, free = least_memory(config, rows, fields), available_memory()
    if free is not None and needed > free:
        wide = _of_step(config, fields) < _of_table(config, rows)
        raise UserError(
            f"--dim {config.dim} would take {_size(needed)} of memory ({rows:,} rows, "
            f"{config.batch_size:,} samples a step), and {_size(free)} are free: choose a smaller "
            f"--dim{'' if wide else ' or --batch-size'}"
        )


def available_memory() -> int | None:
    """Bytes this process may still take, within its control group; None if unknown."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:")]
    except (OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, taken = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(limit - taken + int(stat.get("file", 0)))  # the kernel gives its cache back
    except (OSError, ValueError):
        pass
    return max(min(limits), 0) if limits else None


def _size(n: int) -> str:
    return f"{n / 1e9:,.0f} GB" if n >= 1e10 else f"{n / 1e9:.1f} GB"
