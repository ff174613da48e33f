"""Launching: device guard, autotuning, block sizes. Host code only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True when kernels run on CPU tensors in Triton's interpreter."""

MAX_BLOCK_D = 1024
"""Columns one tile spans at most; wider tables take several column blocks."""

TILE = 2048
"""Elements of a tile where the order of a sum depends on it, so that it can't be tuned by time.

With 4 warps that is 16 values or four 16-byte fp32 loads in flight per thread."""

INTERPRETED_TILE = 1 << 15
"""The interpreter pays about 2 ms per program whatever its size."""

WARPS = 4

recorder: Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any]], None] | None = None
"""Where set, launches are handed to it instead of being run: how the tests collect every
specialisation to compile ahead of time."""


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n >= 1``."""
    return 1 << max(n - 1, 0).bit_length()


def block_d(dim: int) -> int:
    """Columns of a tile for rows of ``dim`` values."""
    return min(next_power_of_two(dim), MAX_BLOCK_D)


def tile() -> int:
    """Elements of an untuned tile."""
    return INTERPRETED_TILE if INTERPRETED else TILE


def tile_rows(dim: int, most: int) -> int:
    """Rows of an untuned tile: as many as fill it, a power of two, between 1 and ``most``."""
    return max(1, min(most, tile() // block_d(dim)))


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def vector(dim: int, *tensors: Tensor) -> int:
    """Values in a 16-byte load if every row of ``dim`` values starts on 16 bytes, else 1.

    Where it is more than 1 kernels may round a row's load bound up to it without leaving the row.
    """
    size = max(t.element_size() for t in tensors)
    lanes = 16 // size
    if dim % lanes or any(t.data_ptr() % 16 for t in tensors):
        return 1
    return lanes


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current, since Triton launches on the current one."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not INTERPRETED and recorder is None:
        raise RuntimeError(
            "the Triton backend runs on CUDA tensors; for CPU tensors set TRITON_INTERPRET=1 "
            "before the first use of the backend"
        )
    return contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = WARPS, **meta: Any) -> None:
    """Runs ``kernel`` over ``grid``; nothing to do when the grid is empty."""
    if 0 in grid:
        return
    if recorder is not None:
        recorder(kernel, grid, args, {**meta, "num_warps": warps})
        return
    kernel[grid](*args, **meta, num_warps=warps)


@dataclass(frozen=True)
class Choice:
    """One point of a tuning space: elements per tile and warps per program."""

    tile: int
    warps: int


TUNING_SPACE = (Choice(2048, 4), Choice(1024, 4), Choice(4096, 4), Choice(4096, 8))
"""Lookups are bound by memory latency: what matters is bytes in flight per multiprocessor, which is
loads per thread times resident threads. Four 16-byte fp32 loads per thread and 128 threads are the
middle (first, and the choice when tuning is off); half hides less per thread but leaves registers
for more programs, double hides more, and 8 warps do the same with fewer, larger programs, which
suits long rows. More would repeat these products."""


class Tuned:
    """A kernel with ``TILE`` and the number of warps chosen by time on the first call of a key.

    Only for kernels where neither can change a bit of the result: nothing is summed across lanes.
    ``AMTL_TRITON_AUTOTUNE=0`` takes the first choice always. Tuning launches the kernel many times
    and synchronises, so call once before capturing a CUDA graph.
    """

    def __init__(self, kernel: Any, key: Sequence[str]) -> None:
        """Wraps a jitted kernel; ``key`` names the arguments whose change asks for a new choice."""
        self.kernel = kernel
        self._key = list(key)
        self._tuner: Any = None

    def __call__(self, grid: Callable[[int], tuple[int, ...]], *args: Any, **meta: Any) -> None:
        """Launches over ``grid(tile)``."""
        if recorder is not None:
            for choice in TUNING_SPACE:
                launch(
                    self.kernel,
                    grid(choice.tile),
                    *args,
                    **meta,
                    TILE=choice.tile,
                    warps=choice.warps,
                )
            return
        if INTERPRETED or os.environ.get("AMTL_TRITON_AUTOTUNE", "1") == "0":
            size = tile() if INTERPRETED else TUNING_SPACE[0].tile
            launch(self.kernel, grid(size), *args, **meta, TILE=size, warps=TUNING_SPACE[0].warps)
            return
        if 0 in grid(TUNING_SPACE[0].tile):
            return
        if self._tuner is None:
            configs = [triton.Config({"TILE": c.tile}, num_warps=c.warps) for c in TUNING_SPACE]
            self._tuner = triton.autotune(configs=configs, key=self._key)(self.kernel)
        self._tuner[lambda chosen: grid(chosen["TILE"])](*args, **meta)
