"""Where a row lives and how much of it is kept: device functions shared by all kernels.

Four kinds of table, told apart at compile time:

    row sizes        ``TIERS == 0``, ``Q == 0``    sizes [N], row i of a dense [N, D] table
    groups           ``TIERS == 0``, ``Q >= 1``    sizes [G, Q] at (row_group[i], hash(i) mod Q)
    tiers            ``TIERS >= 1``, ``Q == -1``   a [3, TIERS] table: last row + 1, base, width
    several tables   ``TIERS >= 1``, ``Q >= 0``    rows numbered on from table to table, so that
                     each is a tier; three more lines say where its sizes and row groups start
                     and how many columns its sizes have

Several tables in tiers are no kind of their own: they have more tiers.

A per-element prefix mask makes the compiler emit scalar loads. So load bounds are rounded up to
``VEC`` values (16 bytes) where rows are aligned to it, and the tail is set to zero in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import itertools
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
def kept_size(
    row,
    valid,
    sizes_ptr,
    row_group_ptr,
    seed_mix,
    columns,
    sizes_start,
    groups_start,
    Q: tl.constexpr,
):
    """Kept size [R] int32 of rows [R], as stored; 0 where not ``valid``.

    ``columns`` are those of the sizes; sizes and row groups begin ``_start`` values behind their
    pointers.
    """
    at = row
    if Q > 0:
        at = tl.load(row_group_ptr + groups_start + row, mask=valid, other=0).to(tl.int64)
        if Q > 1:
            at = at * columns + hash_column(row, seed_mix, columns)
    return tl.load(sizes_ptr + sizes_start + at, mask=valid, other=0).to(tl.int32)


@triton.jit
def round_up(size, VEC: tl.constexpr):
    """The next multiple of VEC; also how the compiler learns that masks change at multiples."""
    return (size + (VEC - 1)) // VEC * VEC


@triton.jit
def tier_of(row, tiers_ptr, TIERS: tl.constexpr):
    """Tier (int64) of rows [R]. Few ends are compared with all at once, many are searched."""
    tier = tl.zeros_like(row)
    if TIERS <= 8:
        for c in tl.static_range(TIERS - 1):
            tier += (row >= tl.load(tiers_ptr + c)).to(tl.int64)
    else:
        step = tl.full([], TIERS // 2, tl.int64)
        while step > 0:
            tier += tl.where(row >= tl.load(tiers_ptr + tier + step - 1), step, 0)
            step = step // 2
    return tier


@triton.jit
def row_of_tier(row, tier, tiers_ptr, TIERS: tl.constexpr, VEC: tl.constexpr):
    """First value of rows [R] that are in tiers [R], and their width; both int64."""
    width = tl.load(tiers_ptr + 2 * TIERS + tier)
    first = tl.load(tiers_ptr + TIERS + tier) + row * width
    if VEC > 1:
        first = tl.multiple_of(first, VEC)
    return first, width


@triton.jit
def place(row, tiers_ptr, D: tl.constexpr, TIERS: tl.constexpr, VEC: tl.constexpr):
    """Where rows [R] are: first value, width, tier, and number within the tier; all int64."""
    tier = tl.zeros_like(row)
    number = row
    if TIERS > 0:
        tier = tier_of(row, tiers_ptr, TIERS)
        first, width = row_of_tier(row, tier, tiers_ptr, TIERS, VEC)
        number = row - tl.load(tiers_ptr + tier - 1, mask=tier > 0, other=0)
    else:
        first = row * D
        width = tl.zeros_like(row) + D
    return first, width, tier, number


@triton.jit
def size_at(
    number,
    width,
    tier,
    valid,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Kept size [R] int32 of rows that :func:`place` found; 0 where not ``valid``.

    No size is over the row's width, whatever is stored, so that no load leaves its row. Widths of
    tiers are multiples of VEC as they are; rounding them up tells the compiler so.
    """
    width = tl.where(valid, width, 0).to(tl.int32)
    if Q < 0:
        size = round_up(width, VEC)
    elif TIERS > 0:
        sizes = tl.load(tiers_ptr + 3 * TIERS + tier)
        groups = tl.load(tiers_ptr + 4 * TIERS + tier)
        columns = tl.load(tiers_ptr + 5 * TIERS + tier)
        size = kept_size(
            number, valid, sizes_ptr, row_group_ptr, seed_mix, columns, sizes, groups, Q
        )
        size = tl.minimum(tl.maximum(size, 0), width)
    else:
        size = kept_size(number, valid, sizes_ptr, row_group_ptr, seed_mix, Q, 0, 0, Q)
        size = tl.minimum(tl.maximum(size, 0), width)
    return size


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

    A row that is not ``valid`` has size 0, so nothing of it is read.
    """
    first, width, tier, number = place(row, tiers_ptr, D, TIERS, VEC)
    size = size_at(
        number,
        width,
        tier,
        valid,
        sizes_ptr,
        row_group_ptr,
        tiers_ptr,
        seed_mix,
        Q,
        TIERS,
        VEC,
    )
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
        dim: Columns ``D`` of a looked-up row; of several tables, of the widest.
        ends: End of each tier or of each of several tables; None for one dense table.
        args: ``(sizes, row_group, tiers, seed_mix)``, None where the kind has no use for it.
        meta: ``D, Q, TIERS, VEC, BLOCK_D``.
        steps: Of few bits the step size of each tier, [C] float32; else None. Widths of tiers of
            codes are bytes, ``dim`` is the output's in any case.
        numbers: ``BITS, CODED``, 0 and False unless of few bits: lookups alone ask.
    """

    def __init__(
        self,
        data: Tensor,
        rows: int,
        dim: int,
        *,
        sizes: Tensor | None = None,
        row_group: Tensor | None = None,
        columns: int = 1,
        seed: int = 0,
        tiers: Tensor | None = None,
        ends: Sequence[int] | None = None,
        vector: int = 1,
        steps: Tensor | None = None,
        bits: int = 0,
    ) -> None:
        """``columns`` are those of the sizes, more than 1 if any of several tables has more."""
        self.data = data
        self.rows = rows
        self.dim = dim
        self.ends = ends
        q = -1 if sizes is None else 0 if row_group is None else columns
        self.args = (sizes, row_group, tiers, mix_seed(seed))
        self.steps = steps
        self.numbers = {"BITS": bits, "CODED": data.dtype == torch.uint8}
        self.meta: dict[str, Any] = {
            "D": dim,
            "Q": q,
            "TIERS": 0 if tiers is None else tiers.shape[1],
            "VEC": vector,
            "BLOCK_D": launch.block_d(dim),
        }

    @property
    def tiers(self) -> Tensor | None:
        """The table of tiers, or None."""
        return self.args[2]

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
            columns=size_columns(group_dims),
            seed=seed,
            vector=launch.vector(dim, weight),
        )

    @staticmethod
    def by_tiers(
        blocks: Sequence[Tensor],
        tier_ends: Sequence[int],
        dim: int,
        keep: bool = True,
        steps: Tensor | None = None,
        bits: int = 0,
    ) -> Table:
        """``blocks[c] [rows, width]``; tier c ends before row ``tier_ends[c]``.

        ``keep`` says whether the blocks will come again and their device table is worth keeping.
        """
        anchor = first_with_memory(blocks)
        rows = tier_ends[-1] if tier_ends else 0
        return Table(
            anchor,
            rows,
            dim,
            tiers=tier_table(blocks, tier_ends, anchor, keep=keep),
            ends=tier_ends,
            vector=1 if bits else common_vector(blocks),
            steps=steps,
            bits=bits,
        )

    @staticmethod
    def by_tables(
        weights: Sequence[Tensor],
        sizes: Sequence[Tensor],
        row_groups: Sequence[Tensor] = (),
        seed: int = 0,
    ) -> Table:
        """Several tables ``[N, D]`` and their sizes, ``[N]`` or, with row groups, ``[G(, Q)]``."""
        anchor, sizes_anchor = first_with_memory(weights), first_with_memory(sizes)
        columns = [size_columns(each) for each in sizes]
        groups_anchor = first_with_memory(row_groups) if row_groups else None
        groups = [0] * len(weights)
        if groups_anchor is not None:
            groups = distances(row_groups, groups_anchor)
        ends = list(itertools.accumulate(weight.shape[0] for weight in weights))
        lines = [distances(sizes, sizes_anchor), groups, columns]
        return Table(
            anchor,
            ends[-1],
            max(weight.shape[1] for weight in weights),
            sizes=sizes_anchor,
            row_group=groups_anchor,
            columns=2 if max(columns) > 1 else 1,
            seed=seed,
            tiers=tier_table(weights, ends, anchor, lines),
            ends=ends,
            vector=common_vector(weights),
        )


def size_columns(sizes: Tensor) -> int:
    """Columns of ``[G]`` or ``[G, Q]`` sizes."""
    return sizes.shape[1] if sizes.dim() == 2 else 1


def first_with_memory(tensors: Sequence[Tensor]) -> Tensor:
    """The first tensor that is not empty, or the first."""
    return next((t for t in tensors if t.numel()), tensors[0])


def distances(tensors: Sequence[Tensor], anchor: Tensor) -> list[int]:
    """Values from the start of ``anchor`` to that of each tensor; 0 for one without memory."""
    start, size = anchor.data_ptr(), anchor.element_size()
    return [(t.data_ptr() - start) // size if t.numel() else 0 for t in tensors]


def common_vector(blocks: Sequence[Tensor]) -> int:
    """``launch.vector`` of rows of all ``blocks``, which are of one type."""
    lanes = launch.vector(0, blocks[0])
    fits = all(b.shape[1] % lanes == 0 and b.data_ptr() % 16 == 0 for b in blocks)
    return lanes if fits else 1


def tier_table(
    blocks: Sequence[Tensor],
    ends: Sequence[int],
    anchor: Tensor,
    more: Sequence[Sequence[int]] = (),
    keep: bool = True,
) -> Tensor:
    """The [3, T] int64 table of :func:`place`, T the next power of two from the number of tiers.

    A row's first value is ``base + row * width`` counted from ``anchor``: one pointer reaches all
    blocks, their number is no part of the kernel's signature, and few sizes T are compiled.
    ``more`` are further lines.
    """
    starts = [0, *ends[:-1]]
    widths = [block.shape[1] for block in blocks]
    bases = [
        distance - start * width
        for distance, start, width in zip(distances(blocks, anchor), starts, widths, strict=True)
    ]
    return padded_table([ends, bases, widths, *more], anchor.device, keep)


def padded_table(lines: Sequence[Sequence[int]], device: torch.device, keep: bool = True) -> Tensor:
    """``lines`` [n, T] on the device, T rounded up to a power of two by tiers that have no rows."""
    ends, *rest = (list(line) for line in lines)
    padding = launch.next_power_of_two(len(ends)) - len(ends)
    ends += [_INT64_MAX] * padding
    return launch.constant([ends, *(line + line[-1:] * padding for line in rest)], device, keep)
