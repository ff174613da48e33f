"""The integer hash that decides sizes and roundings, stochastic rounding by it, and codes in bytes.

The same on every backend, because no floating-point number takes part in the hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF

BITS = (2, 4, 8, 16)
"""Of a code."""


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


def code_type(bits: int) -> torch.dtype:
    """What holds codes of so many bits one by one."""
    return torch.uint8 if bits <= 8 else torch.int32


def code_stochastically(values: Tensor, step: float | Tensor, bits: int, random: Tensor) -> Tensor:
    """Codes of numbers: one of the two around each, with the probability that keeps the mean.

    With ``half = (2**bits - 1) / 2`` and ``p = clamp(x / step + half, 0, 2 * half)`` the code is
    ``floor(p) + 1`` with probability ``p - floor(p)``, else ``floor(p)``. A NaN has none: it
    becomes code 0.

    Args:
        values: float32, any shape.
        step: Step size, or one for each value.
        bits: Of a code: 2, 4, 8 or 16.
        random: int64 random bits of the shape of ``values``, see :func:`rounding_bits`.

    Returns:
        uint8 of that shape, of 16 bits int32.
    """
    half = (2**bits - 1) / 2
    place = (values / step + half).nan_to_num(nan=0.0).clamp(0, 2 * half)
    whole = place.floor()
    return (whole + ((random >> 8) < (place - whole) * 2.0**24)).to(code_type(bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, w]`` as bytes ``[n, w * bits / 8]``, the first code in the lowest bits.

    A code of 16 bits is two bytes, the lower one first.

    Args:
        codes: uint8, of 16 bits int32; ``w`` is a multiple of ``8 / bits``.
        bits: 2, 4, 8 or 16.
    """
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], -1).flatten(-2).to(torch.uint8)
    count = 8 // bits
    parts = codes.reshape(len(codes), codes.shape[1] // count, count)
    packed = parts[..., 0].clone()
    for position in range(1, count):
        packed |= parts[..., position] << (bits * position)
    return packed.contiguous()


def decode_codes(packed: Tensor, step: float | Tensor, bits: int) -> Tensor:
    """Numbers ``(code - half) * step`` of bytes ``[n, w * bits / 8]``, float32 ``[n, w]``."""
    return (unpack_codes(packed, bits).to(torch.float32) - (2**bits - 1) / 2) * step


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_codes`."""
    if bits == 16:
        pairs = packed.to(torch.int32).unflatten(-1, (-1, 2))
        return pairs[..., 0] | pairs[..., 1] << 8
    mask = 2**bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)
