"""What a result was measured on: processor, memory, versions, and the ceilings it reaches."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import binding

# Of each bandwidth: the best counts.
_ATTEMPTS = 7
_PACKAGES = ("torch", "numpy", "triton", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "amtl-kernels")


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name) for name in ("level", "type", "size"))
        if level.exists() and size.exists():
            name = f"L{level.read_text().strip()} {kind.read_text().strip().lower()}"
            found[name] = size.read_text().strip()
    return found


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the system reports, 32 MiB where it reports none."""
    units = {"K": 1024, "M": 1024**2}
    sizes = [int(size[:-1]) * units[size[-1]] for size in _caches().values() if size[-1:] in units]
    return max(sizes, default=32 * 1024**2)


def memory_bytes(field: str = "MemTotal") -> int:
    """A field of /proc/meminfo in bytes, 0 where there is none."""
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def available_bytes() -> float:
    """Memory that a process can take without pushing anybody out; infinite where none can tell."""
    try:
        import psutil
    except ImportError:
        return float(memory_bytes("MemAvailable") or "inf")
    return float(psutil.virtual_memory().available)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "amtl_kernels", "csrc", "python")
    return f"{head}, with uncommitted changes" if head and changed else head


def versions() -> dict[str, str]:
    """Installed versions of what takes part."""
    installed = {
        d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    # The metadata of PyPI's build do not say which CUDA it is for.
    installed["torch"] = torch.__version__
    found = {name: installed[name] for name in _PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


def amtl_build() -> dict[str, Any]:
    """How the measured operators were built, empty where the package can't be imported."""
    if importlib.util.find_spec("amtl_kernels") is None:
        return {}
    # Not at the top: stages of `bench gpu` are forked off a process that has imported this file,
    # and have to load the operators that one of them has built.
    import amtl_kernels

    info = getattr(amtl_kernels, "build_info", None)
    return dict(info()) if callable(info) else {}


def describe() -> dict[str, Any]:
    """The machine as a JSON-ready dict; nothing in it names the host or its user."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "asimd", "sve")
    description: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": len(binding.allowed_cpus()),
        "isa": [flag for flag in wanted if flag in flags],
        "caches": _caches(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "virtual_machine": "hypervisor" in flags,
        "huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "threads_environment": binding.settings(),
        "versions": versions(),
        "build": amtl_build(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _best(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_ATTEMPTS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def ceilings(threads: int, *, megabytes: int = 512) -> dict[str, float]:
    """Measured bandwidths of this machine in bytes per second, best of a few.

    ``copy`` counts bytes read plus bytes written. ``rows`` reads whole rows of 256 bytes at
    random places, which is what a lookup does to a table larger than the caches, and ``lines`` rows
    of one cache line.

    Args:
        threads: Threads to use.
        megabytes: Size of each buffer.
    """
    torch.set_num_threads(threads)
    count = megabytes * 2**20 // 4
    source = torch.ones(count)
    target = torch.zeros(count)
    size = 4.0 * count
    found = {
        "read": size / _best(lambda: source.sum()),
        "copy": 2 * size / _best(lambda: target.copy_(source)),
    }
    found["rows"] = _random_rows(source.view(-1, 64))
    found["lines"] = _random_rows(source.view(-1, 16))
    return found


def _random_rows(table: torch.Tensor) -> float:
    """Bytes per second at which rows are read wherever they lie, in bags of 32."""
    picked = min(table.shape[0], 1 << 17)
    offsets = torch.arange(0, picked, 32)
    best = float("inf")
    for seed in range(_ATTEMPTS):
        rows = torch.randint(
            table.shape[0], (picked,), generator=torch.Generator().manual_seed(seed)
        )
        start = time.perf_counter()
        torch.nn.functional.embedding_bag(rows, table, offsets, mode="sum")
        best = min(best, time.perf_counter() - start)
    return picked * table[0].nbytes / best


class ThreadProbe:
    """Times one fixed pooled lookup with one thread and with several.

    On a machine whose other cores are busy the second number is no better than the first, and
    whatever is measured at that moment says nothing.
    """

    def __init__(self) -> None:
        rows, lookups = 1 << 18, 1 << 17
        generator = torch.Generator().manual_seed(1)
        self._table = torch.ones(rows, 64)
        self._ids = torch.randint(rows, (lookups,), generator=generator)
        self._offsets = torch.arange(0, lookups, 16)

    def speedup(self, threads: int) -> float:
        """Median time with one thread over that with ``threads``; 1 where only one is asked for.

        Medians, not minima: a minimum finds the quiet moment that the timings will not have.
        """
        if threads == 1:
            return 1.0
        before = torch.get_num_threads()
        times: dict[int, list[float]] = {1: [], threads: []}
        for _ in range(9):
            for count, found in times.items():
                torch.set_num_threads(count)
                self._lookup()
                start = time.perf_counter()
                self._lookup()
                found.append(time.perf_counter() - start)
        torch.set_num_threads(before)
        return statistics.median(times[1]) / statistics.median(times[threads])

    def _lookup(self) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(self._ids, self._table, self._offsets, mode="sum")


def peak_resident_bytes() -> int:
    """High-water mark of resident memory since the last ``reset_peak_resident``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak_resident() -> bool:
    """Starts the high-water mark afresh; False where the system refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
