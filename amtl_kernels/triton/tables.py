"""Where a row lives and how much of it is kept: device functions shared by all kernels.

Three kinds of table, told apart at compile time:

    row sizes   ``Q == 0``, ``TIERS == 0``   sizes [N], row i of a dense [N, D] table
    groups      ``Q >= 1``, ``TIERS == 0``   sizes [G, Q] at (row_group[i], hash(seed, i) mod Q)
    tiers       ``TIERS >= 1``               a [3, TIERS] table: last row + 1, base, width

A per-element prefix mask makes the compiler emit scalar loads. So load bounds are rounded up to
``VEC`` values (16 bytes) where rows are aligned to it, and the tail is set to zero in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch

_INT64_MAX = torch.iinfo(torch.int64).max


@triton.jit
def row_term(row):
    """What rows [R] (int64, not negative) add to a hash, uint32."""
    return (row ^ (row >> 32)).to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)


@triton.jit
def mix(x):
    """Two multiply-xorshift rounds on uint32, equal on all backends."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def hash_column(row, seed_mix, Q):
    """Column ``0..Q-1`` (int64) of rows [R].

    ``seed_mix``, a scalar int32, holds the bits of ``fold(seed) * 0x85EBCA77``.
    """
    return (mix(row_term(row) + seed_mix.to(tl.uint32)).to(tl.int64) * Q) >> 32


@triton.jit
def kept_size(row, valid, sizes_ptr, row_group_ptr, seed_mix, Q: tl.constexpr):
    """Kept size [R] int32 of rows [R], as stored; 0 where not ``valid``."""
    at = row
    if Q > 0:
        at = tl.load(row_group_ptr + row, mask=valid, other=0).to(tl.int64)
        if Q > 1:
            at = at * Q + hash_column(row, seed_mix, Q)
    return tl.load(sizes_ptr + at, mask=valid, other=0).to(tl.int32)


@triton.jit
def round_up(size, VEC: tl.constexpr):
    """The next multiple of VEC; also how the compiler learns that masks change at multiples."""
    return (size + (VEC - 1)) // VEC * VEC


@triton.jit
def row_of_tier(row, tiers_ptr, TIERS: tl.constexpr, VEC: tl.constexpr):
    """First value of rows [R] of a table of tiers, and their width; both int64."""
    tier = tl.zeros_like(row)
    for c in tl.static_range(TIERS - 1):
        tier += (row >= tl.load(tiers_ptr + c)).to(tl.int64)
    width = tl.load(tiers_ptr + 2 * TIERS + tier)
    first = tl.load(tiers_ptr + TIERS + tier) + row * width
    if VEC > 1:
        first = tl.multiple_of(first, VEC)
    return first, width


@triton.jit
def row_in_tier(row, tiers_ptr, TIERS: tl.constexpr):
    """Rows [R] of a table of tiers, counted within their tiers."""
    first = tl.zeros_like(row)
    for c in tl.static_range(TIERS - 1):
        end = tl.load(tiers_ptr + c)
        first = tl.where(row >= end, end, first)
    return row - first


@triton.jit
def locate(
    row,
    valid,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """First value (int64 offset from the table's pointer) and kept size (int32) of rows [R].

    A row that is not ``valid`` has size 0, so nothing of it is read. No size is over D, whatever
    is stored, so that no load leaves its row. Widths of tiers are multiples of VEC as they are;
    rounding them up tells the compiler so.
    """
    if TIERS > 0:
        first, width = row_of_tier(row, tiers_ptr, TIERS, VEC)
        size = round_up(tl.where(valid, width, 0).to(tl.int32), VEC)
    else:
        first = row * D
        size = kept_size(row, valid, sizes_ptr, row_group_ptr, seed_mix, Q)
        size = tl.minimum(tl.maximum(size, 0), D)
    return first, size


@triton.jit
def load_prefix(table_ptr, first, size, cols, VEC: tl.constexpr):
    """Tile [R, C] of rows at ``first`` [R], columns ``cols`` [C], zero from ``size`` [R] on."""
    bound = round_up(size, VEC)
    values = tl.load(
        table_ptr + first[:, None] + cols[None, :], mask=cols[None, :] < bound[:, None], other=0.0
    )
    if VEC > 1:
        values = tl.where(cols[None, :] < size[:, None], values, 0.0)
    return values


@triton.jit
def clamp_row(row, num_rows):
    """Row numbers moved into ``0..num_rows-1``."""
    return tl.minimum(tl.maximum(row, 0), num_rows - 1)


def mix_seed(seed: int) -> int:
    """The seed's part of the hash; signed and 32 bits wide, so that one kernel serves all seeds."""
    fold = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    mixed = fold * 0x85EBCA77 & 0xFFFFFFFF
    return mixed - (1 << 32) if mixed >= 1 << 31 else mixed


class Table:
    """A table as kernels see it: pointers and compile-time constants for :func:`locate`.

    Attributes:
        data: A tensor at whose pointer row offsets start.
        rows: Number of rows.
        dim: Columns ``D`` of a looked-up row.
        tiers: The [3, TIERS] table, or None.
        args: ``(sizes, row_group, tiers, seed_mix)``, None where the kind has no use for it.
        meta: ``D, Q, TIERS, VEC, BLOCK_D``.
    """

    def __init__(
        self,
        data: Tensor,
        rows: int,
        dim: int,
        *,
        sizes: Tensor | None = None,
        row_group: Tensor | None = None,
        seed: int = 0,
        tiers: Tensor | None = None,
        vector: int = 1,
    ) -> None:
        self.data = data
        self.rows = rows
        self.dim = dim
        q = 0
        if row_group is not None and sizes is not None:
            q = sizes.shape[1] if sizes.dim() == 2 else 1
        self.tiers = tiers
        self.args = (sizes, row_group, tiers, mix_seed(seed))
        self.meta: dict[str, Any] = {
            "D": dim,
            "Q": q,
            "TIERS": 0 if tiers is None else tiers.shape[1],
            "VEC": vector,
            "BLOCK_D": launch.block_d(dim),
        }

    @staticmethod
    def by_rows(weight: Tensor, row_dims: Tensor) -> Table:
        """``weight [N, D]``, ``row_dims [N]`` of uint8 or int32."""
        rows, dim = weight.shape
        return Table(weight, rows, dim, sizes=row_dims, vector=launch.vector(dim, weight))

    @staticmethod
    def by_groups(weight: Tensor, row_group: Tensor, group_dims: Tensor, seed: int) -> Table:
        """``weight [N, D]``, ``row_group [N]``, ``group_dims [G]`` or ``[G, Q]``."""
        rows, dim = weight.shape
        return Table(
            weight,
            rows,
            dim,
            sizes=group_dims,
            row_group=row_group,
            seed=seed,
            vector=launch.vector(dim, weight),
        )

    @staticmethod
    def by_tiers(
        blocks: Sequence[Tensor], tier_ends: Sequence[int], dim: int, keep: bool = True
    ) -> Table:
        """``blocks[c] [rows, width]``; tier c ends before row ``tier_ends[c]``.

        ``keep`` says whether the blocks will come again and their device table is worth keeping.
        """
        anchor = next((b for b in blocks if b.numel()), blocks[0])
        lanes = min(launch.vector(b.shape[1], anchor, b) for b in blocks)
        rows = tier_ends[-1] if tier_ends else 0
        return Table(
            anchor, rows, dim, tiers=tier_table(blocks, tier_ends, anchor, keep), vector=lanes
        )


def tier_table(blocks: Sequence[Tensor], ends: Sequence[int], anchor: Tensor, keep: bool) -> Tensor:
    """The [3, T] int64 table of :func:`locate`, T the next power of two from the number of tiers.

    A row's first value is ``base + row * width`` counted from ``anchor``: one pointer reaches all
    blocks, their number is no part of the kernel's signature, and few sizes T are compiled.
    """
    key = (
        anchor.data_ptr(),
        tuple((b.data_ptr(), b.shape[1], end) for b, end in zip(blocks, ends, strict=True)),
        anchor.device,
        anchor.dtype,
    )
    found = _tier_tables.get(key)
    if found is not None:
        return found
    size = anchor.element_size()
    last, base, widths, start = [], [], [], 0
    for block, end in zip(blocks, ends, strict=True):
        width = block.shape[1]
        distance = (block.data_ptr() - anchor.data_ptr()) // size if block.numel() else 0
        last.append(end)
        base.append(distance - start * width)
        widths.append(width)
        start = end
    padding = launch.next_power_of_two(len(last)) - len(last)
    last += [_INT64_MAX] * padding
    base += base[-1:] * padding
    widths += widths[-1:] * padding
    table = launch.upload([last, base, widths], anchor.device)
    if keep:
        while len(_tier_tables) >= _TIER_TABLES_KEPT:
            _tier_tables.pop(next(iter(_tier_tables)))
        _tier_tables[key] = table
    return table


_TIER_TABLES_KEPT = 4096
_tier_tables: dict[Any, Tensor] = {}
