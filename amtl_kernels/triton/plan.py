"""The work of a backward: lookups sorted by row, and cut into pieces of bounded length.

One row may own a tenth of all lookups while most own one. So the sorted lookups are cut wherever a
new row starts and at every multiple of ``chunk``; a lane sums one piece, and a row of several
pieces ("hot") is put together in a second pass. Where mask gradients are wanted the order is by
group first and by row within it, so that one sort serves both gradients.

Two launches before the sort's end and two after it, and no wait: how many rows and pieces there are
stays on the device, and grids are as large as they could get. What fits this is that cuts depend on
nothing but a lookup's own position and its neighbour's key.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import (
    FIRST_GROUP,
    FIRST_ROW,
    GROUPS,
    NUMBERS,
    Lookups,
    bag_of,
    gradient_row,
    lower_bound,
    mean_scale,
    row_in_table,
    table_line,
)
from amtl_kernels.triton.tables import Table

CHUNK = 0
"""Lookups per piece at most; 0 lets the plan choose. Tests make it small, for the second pass."""
_INT32_MAX = torch.iinfo(torch.int32).max


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    index_ptr,
    offset_ptr,
    row_group_ptr,
    tables_ptr,
    key_ptr,
    bag_ptr,
    num_lookups,
    num_rows,
    num_offsets,
    num_bags,
    padding_idx,
    limit,
    steps,
    HAS_BAGS: tl.constexpr,
    GROUPED: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each lookup is sorted by: its row, or ``group * num_rows + row``.

    What gets no gradient (padding, no bag, no such row) has ``limit`` and goes last.
    Grid (ceil(L / BLOCK)). index [L], offset [num_offsets] -> key [L], bag [L].
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    row = tl.load(index_ptr + at, mask=valid, other=-1).to(tl.int64)
    bag = at
    if HAS_BAGS:
        bag = bag_of(at, offset_ptr, num_offsets, steps)
        tl.store(bag_ptr + at, bag.to(tl.int32), mask=valid)
    live, table = row_in_table(
        row, bag, tables_ptr, num_rows, num_bags, padding_idx, HAS_BAGS, TABLES
    )
    key = row
    if TABLES > 0:
        key += table_line(tables_ptr, table, FIRST_ROW, TABLES)
    if GROUPED:
        if TABLES > 0:
            row += table_line(tables_ptr, table, GROUPS, TABLES)
        group = tl.load(row_group_ptr + row, mask=live, other=0).to(tl.int64)
        if TABLES > 0:
            group += table_line(tables_ptr, table, FIRST_GROUP, TABLES)
        key += group * num_rows
    key = tl.where(live, key, limit)
    tl.store(key_ptr + at, key.to(key_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=[*NUMBERS, "chunk", "step"])
def cut_kernel(
    key_ptr,
    order_ptr,
    bag_ptr,
    offset_ptr,
    counted_ptr,
    weight_ptr,
    tables_ptr,
    flag_ptr,
    source_ptr,
    scale_ptr,
    num_lookups,
    num_offsets,
    num_bags,
    step,
    limit,
    chunk,
    HAS_BAGS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks where rows (bit 32) and pieces (bit 0) start, and takes sources and scales along.

    Grid (ceil((L + 1) / BLOCK)). key (sorted), order, bag, weight [L] -> flag [L + 1] int64, one
    place late so that their cumulative sum starts at 0; source [L], scale [L] fp32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - 1
    valid = (at >= 0) & (at < num_lookups)
    key = tl.load(key_ptr + at, mask=valid, other=0).to(tl.int64)
    before = tl.load(key_ptr + at - 1, mask=valid & (at > 0), other=-1).to(tl.int64)
    live = valid & (key < limit)
    row_starts = live & (key != before)
    piece_starts = live & ((key != before) | (at % chunk == 0))
    flag = (row_starts.to(tl.int64) << 32) | piece_starts.to(tl.int64)
    tl.store(flag_ptr + at + 1, flag, mask=at < num_lookups)
    if HAS_BAGS or HAS_WEIGHTS:
        origin = tl.load(order_ptr + at, mask=live, other=0)
    if HAS_BAGS:
        bag = tl.load(bag_ptr + origin, mask=live, other=0)
        source = bag.to(tl.int64)
        if TABLES > 0:
            table = source // tl.maximum(num_bags // TABLES, 1)
            source = gradient_row(source, table, tables_ptr, num_bags, step, TABLES)
        tl.store(source_ptr + at, source.to(source_ptr.dtype.element_ty), mask=live)
    if HAS_WEIGHTS:
        scale = tl.load(weight_ptr + origin, mask=live, other=0.0).to(tl.float32)
    if IS_MEAN:
        inverse = mean_scale(
            bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING
        )
        scale = scale * inverse if HAS_WEIGHTS else inverse
    if HAS_WEIGHTS or IS_MEAN:
        tl.store(scale_ptr + at, scale, mask=live)


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "num_groups", "limit", "steps"])
def pieces_kernel(
    key_ptr,
    count_ptr,
    piece_ptr,
    row_ptr,
    group_ptr,
    num_lookups,
    num_rows,
    num_groups,
    limit,
    steps,
    GROUPED: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where each piece starts, and behind the last one where it ends; more where asked for.

    Grid (ceil(max(L, G + 1) / BLOCK)). key [L], count [L + 1] -> piece [P + 1] int32, distinct row
    [U] int64, first piece of each group [G + 1] int32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    count = tl.load(count_ptr + at, mask=valid, other=0)
    after = tl.load(count_ptr + at + 1, mask=valid, other=0)
    starts = valid & (piece_number(after) != piece_number(count))
    tl.store(piece_ptr + piece_number(count), at.to(tl.int32), mask=starts)
    key = tl.load(key_ptr + at, mask=valid, other=limit).to(tl.int64)
    following = tl.load(key_ptr + at + 1, mask=valid & (at + 1 < num_lookups), other=limit)
    ends = (key < limit) & (following.to(tl.int64) >= limit)
    tl.store(piece_ptr + piece_number(after), (at + 1).to(tl.int32), mask=ends)
    if LIST_ROWS:
        row_starts = valid & ((after >> 32) != (count >> 32))
        tl.store(row_ptr + (count >> 32), key % num_rows, mask=row_starts)
    if GROUPED:  # noqa: SIM102 - compile-time and run-time conditions can't be joined
        if tl.program_id(0) * BLOCK <= num_groups:
            first = lower_bound(key_ptr, num_lookups, at * num_rows, steps, 1)
            first = piece_number(tl.load(count_ptr + first, mask=at <= num_groups, other=0))
            tl.store(group_ptr + at, first.to(tl.int32), mask=at <= num_groups)


@triton.jit
def piece_number(count):
    """Pieces that start before a position, of its entry in ``counts``."""
    return count & 0xFFFFFFFF


@triton.jit(do_not_specialize=["num_lookups", "limit", "num_rows", "steps"])
def tier_counts_kernel(
    key_ptr, count_ptr, ends_ptr, out_ptr, num_lookups, limit, num_rows, steps, TIERS: tl.constexpr
):
    """Distinct rows looked up before the end of each tier, or of each table. One program.

    Keys are below ``end * num_rows``, which is 1 for keys that are rows. -> out [TIERS] int64.
    """
    tier = tl.arange(0, TIERS)
    end = tl.minimum(tl.load(ends_ptr + tier), limit // num_rows) * num_rows
    position = lower_bound(key_ptr, num_lookups, end, steps, 1)
    tl.store(out_ptr + tier, tl.load(count_ptr + position) >> 32)


@dataclass(frozen=True)
class Plan:
    """Sorted lookups and how they are cut; all tensors stay on the device.

    Attributes:
        keys: [L] sorted; those from ``limit`` on get no gradient.
        source: [L] integers, the row of the incoming gradient that each lookup takes or, of several
            tables, the vector that it starts at.
        scale: fp32 [L], what it is multiplied by, or None.
        counts: int64 [L + 1], rows (upper 32 bits) and pieces (lower) that start before a position.
        pieces: int32 [most_pieces + 1], where each piece starts.
        row_of: int64 [most_rows], the distinct rows in the order of their keys, or None.
        group_piece: int32 [G + 1], first piece of each group of grouped keys.
        lookups: L.
        rows: Number of rows of the table, or of all tables.
        limit: The smallest key that stands for no row.
        group_tiers: Table of tiers of the groups' mask gradients of several tables, or None.
        grouped: Whether a key is ``group * rows + row``, or the row alone.
        chunk: Lookups per piece at most.
        lanes: Pieces per program.
        most_pieces: Pieces at most.
    """

    keys: Tensor
    source: Tensor
    scale: Tensor | None
    counts: Tensor
    pieces: Tensor
    row_of: Tensor | None
    group_piece: Tensor
    lookups: int
    rows: int
    limit: int
    group_tiers: Tensor | None
    grouped: bool
    chunk: int
    lanes: int
    most_pieces: int

    @property
    def windows(self) -> int:
        """Stretches of ``chunk`` sorted lookups, in each of which two pieces may be partial."""
        return launch.cdiv(self.lookups, self.chunk)

    @property
    def programs(self) -> int:
        """Programs of a pass over all pieces, at most."""
        return launch.cdiv(self.most_pieces, self.lanes)

    def ascending_places(self, distinct: int) -> Tensor:
        """The rank of each of the ``distinct`` rows, which are in the order of their keys."""
        assert self.row_of is not None
        order = torch.argsort(self.row_of.narrow(0, 0, distinct))
        return torch.empty_like(order).scatter_(
            0, order, torch.arange(distinct, device=order.device)
        )

    def count_rows(self, tiers: Tensor | None) -> list[int]:
        """Distinct rows before the end of each tier of ``Table.tiers``, or of all. Waits."""
        if tiers is None:
            return [count >> 32 for count in launch.read(self.counts[-1:])]
        ends = self.group_tiers if self.grouped else tiers
        below = torch.empty(tiers.shape[1], dtype=torch.int64, device=tiers.device)
        with launch.device_guard(self.keys):
            launch.launch(
                tier_counts_kernel,
                (1,),
                self.keys,
                self.counts,
                ends,
                below,
                self.lookups,
                self.limit,
                self.rows if self.grouped else 1,
                self.lookups.bit_length(),
                TIERS=tiers.shape[1],
            )
        return launch.read(below)


def chunk_length(lookups: int) -> int:
    """Lookups per piece: as long as needed for the second pass to stay as short as the first.

    A row owning most of the lookups is a loop of ``chunk`` steps, then one over its pieces, some
    tens of which are in flight at once: about the square root of the lookups balances the two.
    """
    return min(max(launch.next_power_of_two(math.isqrt(lookups) // 4), 64), 1024)


def make_plan(lookups: Lookups, table: Table, grouped: bool, list_rows: bool = False) -> Plan:
    """Sorts lookups, at least one, by row or by group and row, and cuts them. No wait.

    Args:
        lookups: What was looked up.
        table: The table, or the tables.
        grouped: Whether mask gradients are wanted.
        list_rows: Whether ``row_of`` is wanted.
    """
    count, device, bags = lookups.indices.numel(), lookups.indices.device, lookups.bags
    chunk = CHUNK or chunk_length(count)
    groups = lookups.groups if grouped else 0
    limit = table.rows * groups if grouped else table.rows
    # A radix sort of 32-bit keys moves half the bytes.
    keys = torch.empty(
        count, dtype=torch.int32 if limit < _INT32_MAX else torch.int64, device=device
    )
    bag = None if bags is None else torch.empty(count, dtype=torch.int32, device=device)
    block = launch.flat_block()
    offsets = None if bags is None else bags.offsets
    num_offsets, num_bags = (0, 0) if bags is None else (bags.offsets.numel(), bags.number)
    is_mean = bags is not None and bags.mean
    counted = lookups.counted
    scale = None
    if is_mean or lookups.per_sample_weights is not None:
        scale = torch.empty(count, dtype=torch.float32, device=device)
    with launch.device_guard(lookups.indices):
        launch.launch(
            keys_kernel,
            (launch.cdiv(count, block),),
            lookups.indices,
            offsets,
            lookups.row_group if grouped else None,
            lookups.lines,
            keys,
            bag,
            count,
            table.rows,
            num_offsets,
            num_bags,
            lookups.padding_idx,
            limit,
            0 if bags is None else bags.steps,
            HAS_BAGS=bags is not None,
            GROUPED=grouped,
            TABLES=lookups.tables,
            BLOCK=block,
        )
        keys, order = torch.sort(keys, stable=True)
        wide = max(num_bags * lookups.step, num_bags) > _INT32_MAX
        source = order
        if bags is not None:
            source = order.new_empty(count, dtype=torch.int64 if wide else torch.int32)
        flags = torch.empty(count + 1, dtype=torch.int64, device=device)
        launch.launch(
            cut_kernel,
            (launch.cdiv(count + 1, block),),
            keys,
            order,
            bag,
            offsets,
            counted,
            lookups.per_sample_weights,
            lookups.lines,
            flags,
            None if bags is None else source,
            scale,
            count,
            num_offsets,
            num_bags,
            lookups.step,
            limit,
            chunk,
            HAS_BAGS=bags is not None,
            HAS_WEIGHTS=lookups.per_sample_weights is not None,
            IS_MEAN=is_mean,
            HAS_PADDING=counted is not None,
            TABLES=lookups.tables,
            BLOCK=block,
        )
        counts = flags.cumsum(0)
        most_rows = min(count, table.rows)
        most_pieces = min(count, most_rows + launch.cdiv(count, chunk))
        pieces = torch.empty(most_pieces + 1, dtype=torch.int32, device=device)
        group_piece = torch.empty(groups + 1, dtype=torch.int32, device=device)
        row_of = None
        if list_rows:
            row_of = torch.empty(most_rows, dtype=torch.int64, device=device)
        launch.launch(
            pieces_kernel,
            (launch.cdiv(max(count, groups + 1), block),),
            keys,
            counts,
            pieces,
            row_of,
            group_piece,
            count,
            table.rows,
            groups,
            limit,
            count.bit_length(),
            GROUPED=grouped,
            LIST_ROWS=list_rows,
            BLOCK=block,
        )
    return Plan(
        keys=keys,
        source=source,
        scale=scale,
        counts=counts,
        pieces=pieces,
        row_of=row_of,
        group_piece=group_piece,
        lookups=count,
        rows=table.rows,
        limit=limit,
        group_tiers=None if lookups.several is None else lookups.several.group_tiers,
        grouped=grouped,
        chunk=chunk,
        lanes=launch.tile_rows(table.dim, most=32),
        most_pieces=most_pieces,
    )
