"""The integer hash that decides sizes and roundings, and stochastic rounding by it.

The same on every backend, because no floating-point number takes part in the hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF


def row_term(rows: Tensor, seed: int | Tensor) -> Tensor:
    """What row and seed add to a hash, to be mixed."""
    rows = rows.to(torch.int64)
    x = (rows ^ (rows >> 32)) & _U32
    y = (seed ^ (seed >> 32)) & _U32
    return (x * 0x9E3779B1 + y * 0x85EBCA77 % (1 << 32)) & _U32


def mix(x: Tensor) -> Tensor:
    """Two multiply-xorshift rounds on 32 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _U32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _U32
    return x ^ (x >> 16)


def rounding_bits(rows: Tensor, columns: int, seed: int | Tensor) -> Tensor:
    """32 random bits for each value of ``rows`` in an optimizer step, the same on every backend.

    Args:
        rows: ``[U]`` row numbers, counted within their own tensor.
        columns: Number of columns ``D``.
        seed: The step.

    Returns:
        int64 ``[U, D]`` in ``0..2^32-1``.
    """
    column = torch.arange(columns, device=rows.device)
    return mix((row_term(rows, seed)[:, None] + column * 0xC2B2AE3D) & _U32)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds to one of the two neighbours, with the probability that keeps the mean.

    Args:
        values: float32, any shape.
        dtype: float16 or bfloat16.
        bits: int64 random bits of the same shape, see :func:`rounding_bits`.

    Returns:
        ``values`` in ``dtype``.
    """
    half = dtype == torch.float16
    dropped = 0x1FFF if half else 0xFFFF
    raw = values.contiguous().view(torch.int32).to(torch.int64) & _U32
    up = ((raw + (bits & dropped)) & ~dropped & _U32).to(torch.int32).view(torch.float32)
    if half:
        # Below 2^-14 fp16 is a grid of steps of 2^-24, whatever the exponent.
        scaled = values.abs() * 2.0**24
        whole = scaled.floor()
        steps = whole + ((bits >> 8) < (scaled - whole) * 2.0**24)
        up = torch.where(values.abs() < 2.0**-14, (steps * 2.0**-24).copysign(values), up)
    # No second neighbour: from the largest number on, infinity, NaN.
    return torch.where(values.abs() < torch.finfo(dtype).max, up, values).to(dtype)
