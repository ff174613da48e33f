"""A GPU as the place of a measurement: its clock, its copy bandwidth, its state.

Nothing here runs on import, and nothing without a GPU but what is told of it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.plan import Budget
from bench.runner import Runner

_STATE = (
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "clocks_throttle_reasons.active",
)
_LEAST_L2 = 1 << 26
# The GPU is kept busy for this many times as long as the host takes to enqueue a call.
_HEAD_START = 1.5
# torch.cuda._sleep counts cycles; at no clock are there fewer in a second.
_CYCLES = 2.2e9


class DeviceClock:
    """Seconds of a run on the GPU alone, with cold caches or those that the run before has left.

    Twice the L2 is read before every run, if it is to be flushed. The GPU then waits until the host
    has enqueued all of the run, so what the host takes for that is not timed: as long as a call
    waits for nothing, the result is that of a graph's replay.
    """

    def __init__(self, l2_bytes: int = 0, cuda: Any = torch.cuda, *, flush: bool = True) -> None:
        """``l2_bytes``: 0 asks the GPU. ``flush``: whether caches are cold."""
        self._cuda = cuda
        self._flushes = flush
        size = l2_bytes or getattr(cuda.get_device_properties(0), "L2_cache_size", 0)
        self.l2_bytes: int = size or _LEAST_L2
        where = "cuda" if cuda is torch.cuda else "cpu"
        words = 2 * max(self.l2_bytes, _LEAST_L2) // 4
        self._flush = torch.zeros(words, dtype=torch.int32, device=where)
        self._host = 2e-4

    def __call__(self, run: Callable[[], None]) -> float:
        """Seconds between two events around the run."""
        cuda = self._cuda
        # Read, not written: dirty lines would be written back during the run.
        if self._flushes:
            self._flush.max()
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda._sleep(int(_HEAD_START * self._host * _CYCLES))
        begin.record()
        started = time.perf_counter()
        run()
        # Contenders take turns: the slowest host sets the head start, and is forgotten slowly.
        self._host = max(time.perf_counter() - started, 0.9 * self._host)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def copy_bandwidth(clock: DeviceClock) -> float:
    """Bytes read and written per second by the best of ten copies of a gibibyte."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * 4 * source.numel() / min(clock(copy) for _ in range(10))


def runner(budget: Budget, *, flush: bool = True) -> tuple[Runner, dict[str, dict[str, float]]]:
    """Who runs cases on the GPU, and its ceilings as reports have them.

    Args:
        budget: Of each case.
        flush: Whether the L2 is emptied before every run; else only the ids change.
    """
    clock = DeviceClock(flush=flush)
    ceilings = {"cuda": {"copy": copy_bandwidth(clock)}}
    on_gpu = Runner(
        budget=budget,
        timer=clock,
        ceilings=ceilings,
        available=free_bytes,
        cache_bytes=clock.l2_bytes,
    )
    return on_gpu, ceilings


def free_bytes() -> float:
    """Memory of the GPU that nobody holds, the allocator's own reserve counted as free."""
    free, _ = torch.cuda.mem_get_info()
    return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def state() -> dict[str, str]:
    """Clocks, temperature and what slows the GPU down, as ``nvidia-smi`` says; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(_STATE, (value.strip() for value in lines[0].split(",")), strict=False))
