"""Plain and pooled lookup: one kernel each for all kinds of table, and for several in one call.

Tables of few bits are tiers with a step size each, whose numbers are taken out of their bytes, or
rounded, where they are used (``BITS``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from amtl_kernels.triton import launch
from amtl_kernels.triton.codes import decode
from amtl_kernels.triton.lookups import (
    COLUMN,
    FIRST_ROW,
    FIRST_TIER,
    LAST_TIER,
    PADDING,
    ROWS,
    WIDTH,
    Lookups,
    table_line,
)
from amtl_kernels.triton.tables import (
    Table,
    clamp_row,
    load_prefix,
    locate,
    place,
    row_of_tier,
    size_at,
)


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "seed_mix"])
def gather_fwd_kernel(
    table_ptr,
    index_ptr,
    out_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    steps_ptr,
    num_lookups,
    num_rows,
    CLAMP_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the kept prefix of every looked-up row, zeros behind it.

    Grid (ceil(L / R), ceil(D / BLOCK_D)) with R = TILE / BLOCK_D lookups per program, all in
    flight at once. index [L] -> out [L, D].
    """
    R: tl.constexpr = TILE // BLOCK_D
    lookup = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = lookup < num_lookups
    row = tl.load(index_ptr + lookup, mask=valid, other=0).to(tl.int64)
    if CLAMP_ROWS:
        row = clamp_row(row, num_rows)
    if BITS > 0:
        first, width, tier, _ = place(row, tiers_ptr, D, TIERS, VEC)
        values = decode(table_ptr, first, width, tier, valid, cols, steps_ptr, BITS, CODED)
    else:
        first, size = locate(
            row, valid, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC
        )
        values = load_prefix(table_ptr, first, size, cols, VEC)
    tl.store(
        out_ptr + lookup[:, None] * D + cols[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < D),
    )


@triton.jit
def place_in(
    table,
    row,
    tables_ptr,
    tiers_ptr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    TABLES: tl.constexpr,
    VEC: tl.constexpr,
):
    """As :func:`place`, of rows [R] of one ``table``: only its own tiers are searched, if any.

    The number is that within the table.
    """
    number = row
    row += table_line(tables_ptr, table, FIRST_ROW, TABLES)
    tier = table
    if Q < 0:
        first_tier = table_line(tables_ptr, table, FIRST_TIER, TABLES)
        last_tier = table_line(tables_ptr, table, LAST_TIER, TABLES)
        tier = tl.zeros_like(row) + first_tier
        for c in tl.range(first_tier, last_tier):
            tier += (row >= tl.load(tiers_ptr + c)).to(tl.int64)
    first, width = row_of_tier(row, tier, tiers_ptr, TIERS, VEC)
    return first, width, tier, number


@triton.jit(
    do_not_specialize=[
        "num_lookups",
        "num_rows",
        "seed_mix",
        "num_bags",
        "num_offsets",
        "padding_idx",
        "bag_length",
    ]
)
def pooled_fwd_kernel(
    table_ptr,
    index_ptr,
    offset_ptr,
    weight_ptr,
    out_ptr,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    steps_ptr,
    num_lookups,
    num_rows,
    num_bags,
    num_offsets,
    padding_idx,
    bag_length,
    CLAMP_ROWS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HUGE: tl.constexpr,
    TABLES: tl.constexpr,
    STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums (or averages) the kept prefixes of a bag's rows in fp32, rounded once at the end.

    Grid (ceil(B / R), ceil(D / BLOCK_D), T); the TILE / BLOCK_D lanes of a program serve R bags of
    one table with SPLIT lanes each, and every lane walks its bag in steps of SPLIT. With SPLIT == 1
    a bag is summed in the order of its lookups by one lane, so neither TILE nor the warps can
    change the result; more lanes per bag are for long bags, where one lane leaves the memory idle.
    index [L], offset [num_offsets], weight [L] -> out [B, STRIDE], of several tables each in its
    own columns. ``num_bags`` are those of one table, and D columns those of the widest.
    """
    LANES: tl.constexpr = TILE // BLOCK_D
    R: tl.constexpr = LANES // SPLIT
    lane = tl.arange(0, LANES)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.program_id(0).to(tl.int64) * R + lane // SPLIT
    valid = bag < num_bags
    begin = bag
    if TABLES > 0:
        table = tl.program_id(2)
        begin += table.to(tl.int64) * num_bags
        num_rows = table_line(tables_ptr, table, ROWS, TABLES)
        padding_idx = table_line(tables_ptr, table, PADDING, TABLES)
    start = tl.load(offset_ptr + begin, mask=valid, other=0).to(tl.int64)
    # The last offset is left out unless include_last_offset: then the lookups end there. Ends are
    # clipped so that unchecked offsets can't lead out of the index array.
    end = tl.load(
        offset_ptr + begin + 1, mask=valid & (begin + 1 < num_offsets), other=num_lookups
    ).to(tl.int64)
    start = tl.maximum(start, 0)
    end = tl.where(valid, tl.minimum(end, num_lookups), 0)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    count = tl.zeros([LANES], tl.int32)
    # This lane's lookups, counted from its first one: 32 bits save registers in the loop.
    start += lane % SPLIT
    length = end - start
    if not HUGE:
        length = length.to(tl.int32)
    for step in tl.range(0, tl.max(length, axis=0), SPLIT, loop_unroll_factor=2):
        at = start + step
        live = step < length
        row = tl.load(index_ptr + at, mask=live, other=0).to(tl.int64)
        if CLAMP_ROWS:
            row = clamp_row(row, num_rows)
            if TABLES > 0:
                # A table without rows.
                live = live & (row >= 0)
        if HAS_PADDING:
            live = live & (row != padding_idx)
        if TABLES > 0:
            first, width, tier, number = place_in(
                table, row, tables_ptr, tiers_ptr, Q, TIERS, TABLES, VEC
            )
        else:
            first, width, tier, number = place(row, tiers_ptr, D, TIERS, VEC)
        if BITS > 0:
            values = decode(table_ptr, first, width, tier, live, cols, steps_ptr, BITS, CODED)
        else:
            size = size_at(
                number,
                width,
                tier,
                live,
                sizes_ptr,
                row_group_ptr,
                tiers_ptr,
                seed_mix,
                Q,
                TIERS,
                VEC,
            )
            values = load_prefix(table_ptr, first, size, cols, VEC).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
            values = values * weight[:, None]
        total += values
        if IS_MEAN and HAS_PADDING:
            count += live.to(tl.int32)
    if IS_MEAN:
        if not HAS_PADDING:
            count = (tl.maximum(length, 0) + (SPLIT - 1)) // SPLIT
        if SPLIT > 1:
            count = tl.sum(tl.reshape(count, [R, SPLIT]), axis=1)
        scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if SPLIT > 1:
        total = tl.sum(tl.reshape(total, [R, SPLIT, BLOCK_D]), axis=1)
        bag = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        valid = bag < num_bags
    if IS_MEAN:
        total = total * scale[:, None]
    out = bag[:, None] * STRIDE + cols[None, :]
    columns = D
    if TABLES > 0:
        out += table_line(tables_ptr, table, COLUMN, TABLES) * UNIT
        columns = table_line(tables_ptr, table, WIDTH, TABLES) * UNIT
    tl.store(
        out_ptr + out,
        total.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < columns),
    )


_gather = launch.Tuned(gather_fwd_kernel, launch.WIDE_SPACE, key=["D", "Q", "TIERS"])
_pooled = launch.Tuned(
    pooled_fwd_kernel, launch.NARROW_SPACE, key=["D", "Q", "TIERS", "bag_length"]
)

_INT32_MAX = torch.iinfo(torch.int32).max

_LONG_BAG = 64
"""Mean lookups per bag from which eight lanes share a bag. A fixed rule, not tuned by time: it
decides the order of a sum."""
_LONG_BAG_LANES = 8


def gather(lookups: Lookups, table: Table, clamp: bool) -> None:
    """Writes the rows of a plain lookup to ``lookups.values``, one launch.

    Args:
        lookups: What is looked up.
        table: The table.
        clamp: Whether indices outside the table are moved into it.
    """
    count, block = lookups.indices.numel(), table.meta["BLOCK_D"]

    def grid(tile: int) -> tuple[int, ...]:
        return launch.cdiv(count, tile // block), launch.cdiv(table.dim, block)

    inputs = (table.data, lookups.indices, lookups.values, *table.args, table.steps)
    arguments = (*inputs, count, table.rows)
    constants = {"CLAMP_ROWS": clamp, **table.numbers, **table.meta}
    with launch.device_guard(lookups.indices):
        if table.steps is None:
            _gather(grid, *arguments, **constants)
        else:
            tile = max(block, launch.tile(table.dim))
            launch.launch(gather_fwd_kernel, grid(tile), *arguments, **constants, TILE=tile)


def pool(lookups: Lookups, table: Table, clamp: bool) -> None:
    """Writes the sums or means of all bags to ``lookups.values``, one launch.

    Args:
        lookups: What is looked up, with bags.
        table: The table, or the tables.
        clamp: Whether indices outside their table are moved into it.
    """
    bags, several = lookups.bags, lookups.several
    assert bags is not None
    count, block = lookups.indices.numel(), table.meta["BLOCK_D"]
    number = bags.number // max(lookups.tables, 1)
    length = count // max(number, 1)
    lanes = launch.tile(table.dim) // block
    split = 1
    if several is None and length >= _LONG_BAG:
        split = max(1, min(_LONG_BAG_LANES, lanes))

    def grid(tile: int) -> tuple[int, ...]:
        rows = launch.cdiv(number, max(tile // block // split, 1))
        return rows, launch.cdiv(table.dim, block), max(lookups.tables, 1)

    arguments = (
        table.data,
        lookups.indices,
        bags.offsets,
        lookups.per_sample_weights,
        lookups.values,
        lookups.lines,
        *table.args,
        table.steps,
        count,
        table.rows,
        number,
        bags.offsets.numel(),
        lookups.padding_idx,
        launch.next_power_of_two(max(length, 1)),
    )
    constants = {
        "CLAMP_ROWS": clamp,
        "HAS_PADDING": lookups.has_padding,
        "HAS_WEIGHTS": lookups.per_sample_weights is not None,
        "IS_MEAN": bags.mean,
        "HUGE": count > _INT32_MAX,
        "TABLES": lookups.tables,
        "STRIDE": table.dim if several is None else several.stride,
        "UNIT": 1 if several is None else several.unit,
        "SPLIT": split,
        **table.numbers,
        **table.meta,
    }
    with launch.device_guard(lookups.indices):
        if several is None and split == 1 and table.steps is None:
            _pooled(grid, *arguments, **constants)
        else:
            # A bag's lanes decide the order of its sum; and tuning is for one table at a time, and
            # for loads of whole vectors.
            tile = max(block, launch.tile(table.dim))
            if several is not None and table.steps is None:
                tile = max(block, launch.tile(table.dim if table.meta["VEC"] > 1 else 1))
            launch.launch(pooled_fwd_kernel, grid(tile), *arguments, **constants, TILE=tile)
