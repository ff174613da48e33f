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

TILE = 1024
"""Elements of a tile where the order of a sum depends on it, so that it can't be tuned by time.

With 4 warps a thread has two 16-byte fp32 loads in flight, four where a loop is unrolled by two,
and needs few enough registers for hundreds of threads beside it."""

INTERPRETED_TILE = 1 << 13
"""The interpreter pays about 2 ms per program whatever its size."""

WARPS = 4

REGISTERS = {
    "combine_update_kernel": 96,
    "pieces_kernel": 96,
    "pooled_fwd_kernel": 96,
    "reduce_rows_kernel": 96,
    "reduce_update_kernel": 96,
}
"""Registers per thread at most, 64 for kernels not named. Stated to the compiler, since without a
ceiling it moves single registers to memory to fit one more program on a multiprocessor, and some
other one with every change; with these nothing spills (``tests/triton/test_ahead_of_time.py``)."""

REGISTERS_OF_FLAT_MASKS = 128
"""The same where mask gradients of several tables are summed (``GROUP_TIERS``), whose rows take
more numbers to be found and written. 512 threads a multiprocessor instead of 640."""

recorder: Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any]], None] | None = None
"""Where set, launches are handed to it instead of being run: how the tests collect every
specialisation to compile ahead of time."""


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n >= 1``."""
    return 1 << max(n - 1, 0).bit_length()


def block_d(dim: int) -> int:
    """Columns of a tile for rows of ``dim`` values."""
    return min(next_power_of_two(dim), MAX_BLOCK_D)


def tile(dim: int) -> int:
    """Elements of an untuned tile: a quarter where rows of ``dim`` values load one by one."""
    if INTERPRETED:
        return INTERPRETED_TILE
    return TILE // 4 if dim % 4 else TILE


def tile_rows(dim: int, most: int) -> int:
    """Rows of an untuned tile: as many as fill it, a power of two, between 1 and ``most``."""
    return max(1, min(most, tile(dim) // block_d(dim)))


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


def flat_block() -> int:
    """Elements per program of a kernel over a flat array: four a thread, which a search needs."""
    return 1 << 15 if INTERPRETED else 4 * 32 * WARPS


def read(tensor: Tensor) -> list[int]:
    """The integers of a small tensor: the one place where a backward waits for the device."""
    if recorder is not None:
        return [1] * tensor.numel()
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a backward has to ask how many distinct rows there are, which a CUDA graph can't; "
            "capture a fused update instead"
        )
    return tensor.tolist()


def upload(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 tensor on ``device``, without a wait."""
    host = torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph would read this description of tables from memory that is gone by then; "
            "run the same call once before capturing it"
        )
    return host.pin_memory().to(device, non_blocking=True)


def constant(values: Sequence[Sequence[int]], device: torch.device, keep: bool = True) -> Tensor:
    """As :func:`upload`, from the last call with equal values if there was one.

    What a CUDA graph reads is kept for good. ``keep`` says whether the values will come again: then
    the first call waits until they are there, since the next may be on another stream.
    """
    if not keep:
        return upload(values, device)
    key = (device, tuple(map(tuple, values)))
    found = _captured.get(key)
    if found is None:
        found = _constants.pop(key, None)
        if found is None:
            found = upload(values, device)
            # Both for the new one to arrive, and for no stream to read what is dropped any more.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            while len(_constants) >= CONSTANTS_KEPT:
                _constants.pop(next(iter(_constants)))
        _constants[key] = found
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[key] = found
    return found


CONSTANTS_KEPT = 4096
_constants: dict[Any, Tensor] = {}
_captured: dict[Any, Tensor] = {}


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
    most = registers(kernel, meta)
    if recorder is not None:
        recorder(kernel, grid, args, {**meta, "num_warps": warps, "maxnreg": most})
        return
    kernel[grid](*args, **meta, num_warps=warps, maxnreg=most)


def registers(kernel: Any, meta: Mapping[str, Any]) -> int:
    """The ceiling of a launch: :data:`REGISTERS`, :data:`REGISTERS_OF_FLAT_MASKS`."""
    most = REGISTERS.get(kernel.fn.__name__, 64)
    return REGISTERS_OF_FLAT_MASKS if most > 64 and meta.get("GROUP_TIERS") else most


@dataclass(frozen=True)
class Choice:
    """One point of a tuning space.

    Attributes:
        loads: Loads of the table per thread and step: of 16 bytes, or of single values where
            rows are not aligned.
        warps: Warps per program.
    """

    loads: int
    warps: int

    def tile(self, vector: int, least: int) -> int:
        """Elements per tile of loads of ``vector`` values; at least ``least``, to hold a row."""
        return max(self.loads * self.warps * 32 * vector, least)


WIDE_SPACE = (Choice(4, 4), Choice(2, 4), Choice(4, 8))
"""For the plain lookup. It is bound by memory latency: what matters is bytes in flight per
multiprocessor, which is loads per thread times resident threads. Four loads per thread and 128
threads are the middle (first, and the choice when tuning is off); half hides less per thread but
leaves registers for more programs, and 8 warps do the same with fewer, larger programs, which suits
long rows. Double takes more than 64 registers."""

NARROW_SPACE = (Choice(2, 4), Choice(1, 4), Choice(2, 2), Choice(2, 8))
"""For the pooled lookup, whose loop is unrolled by two and holds its sum in registers: the same
reasoning with half the loads, since four take 128 registers and more. Two warps instead leave fewer
bags waiting for the longest one of their program."""


class Tuned:
    """A kernel with ``TILE`` and the number of warps chosen by time on the first call of a key.

    Only for kernels where neither can change a bit of the result: nothing is summed across lanes.
    ``AMTL_TRITON_AUTOTUNE=0`` takes the first choice always. Tuning launches the kernel many times
    and synchronises, so call once before capturing a CUDA graph.
    """

    def __init__(self, kernel: Any, space: Sequence[Choice], key: Sequence[str]) -> None:
        """Wraps a jitted kernel; ``key`` names the arguments whose change asks for a new choice."""
        self.kernel = kernel
        self.space = tuple(space)
        self._key = list(key)
        self._tuners: dict[tuple[tuple[int, int], ...], Any] = {}

    def __call__(self, grid: Callable[[int], tuple[int, ...]], *args: Any, **meta: Any) -> None:
        """Launches over ``grid(tile)``."""
        least = meta["BLOCK_D"]
        points = tuple(
            dict.fromkeys((choice.tile(meta["VEC"], least), choice.warps) for choice in self.space)
        )
        if recorder is not None:
            for point in points:
                self._launch(point, grid, args, meta)
        elif INTERPRETED:
            self._launch((max(INTERPRETED_TILE, least), WARPS), grid, args, meta)
        elif os.environ.get("AMTL_TRITON_AUTOTUNE", "1") == "0":
            self._launch(points[0], grid, args, meta)
        elif 0 not in grid(points[0][0]):
            if points not in self._tuners:
                most = registers(self.kernel, meta)
                configs = [
                    triton.Config({"TILE": size}, num_warps=warps, maxnreg=most)
                    for size, warps in points
                ]
                self._tuners[points] = triton.autotune(configs, key=self._key)(self.kernel)
            self._tuners[points][lambda chosen: grid(chosen["TILE"])](*args, **meta)

    def _launch(
        self,
        point: tuple[int, int],
        grid: Callable[[int], tuple[int, ...]],
        args: Sequence[Any],
        meta: Mapping[str, Any],
    ) -> None:
        size, warps = point
        launch(self.kernel, grid(size), *args, **meta, TILE=size, warps=warps)
