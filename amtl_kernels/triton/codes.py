"""Lookups in tables of few bits: one launch a table, plain or pooled.

Rows are found as those of any tiers, of codes in bytes. Each number is taken out of its byte and
decoded where it is used, or rounded to what a code stands for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import Lookups
from amtl_kernels.triton.tables import Table, clamp_row, place

_INT32_MAX = torch.iinfo(torch.int32).max


@triton.jit
def decode(
    table_ptr,
    row,
    live,
    cols,
    steps_ptr,
    tiers_ptr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
):
    """Numbers [R, C] of rows [R] at columns [C], 0 beyond a row's width and where not ``live``."""
    PER: tl.constexpr = 8 // BITS if CODED else 1
    LAST: tl.constexpr = (1 << BITS) - 1
    first, width, tier, _ = place(row, tiers_ptr, D, TIERS, 1)
    kept = live[:, None] & (cols[None, :] < (width * PER)[:, None])
    stored = tl.load(table_ptr + first[:, None] + (cols // PER)[None, :], mask=kept, other=0)
    step = tl.load(steps_ptr + tier, mask=live, other=1.0)[:, None]
    if CODED:
        code = (stored.to(tl.int32) >> ((cols % PER) * BITS)[None, :]) & LAST
        code = code.to(tl.float32)
    else:
        code = tl.div_rn(stored.to(tl.float32), step + tl.zeros_like(stored).to(tl.float32))
        code = code + LAST * 0.5
        # Comparisons leave a NaN; from 2^23 on numbers are whole, and ties go to the even one.
        code = tl.where(code < 0.0, 0.0, tl.where(code > LAST, LAST * 1.0, code))
        code = (code + 8388608.0) - 8388608.0
    return tl.where(kept, (code - LAST * 0.5) * step, 0.0)


@triton.jit(do_not_specialize=["num_lookups", "num_rows"])
def gather_codes_kernel(
    table_ptr,
    index_ptr,
    out_ptr,
    steps_ptr,
    tiers_ptr,
    num_lookups,
    num_rows,
    CLAMP_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the numbers of every looked-up row, zeros behind them. index [L] -> out [L, D].

    Grid (ceil(L / R), ceil(D / BLOCK_D)) with R = TILE / BLOCK_D lookups per program.
    """
    R: tl.constexpr = TILE // BLOCK_D
    lookup = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = lookup < num_lookups
    row = tl.load(index_ptr + lookup, mask=valid, other=0).to(tl.int64)
    if CLAMP_ROWS:
        row = clamp_row(row, num_rows)
    values = decode(table_ptr, row, valid, cols, steps_ptr, tiers_ptr, BITS, CODED, D, TIERS)
    tl.store(
        out_ptr + lookup[:, None] * D + cols[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < D),
    )


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "num_bags", "num_offsets", "padding_idx"])
def pooled_codes_kernel(
    table_ptr,
    index_ptr,
    offset_ptr,
    weight_ptr,
    out_ptr,
    steps_ptr,
    tiers_ptr,
    num_lookups,
    num_rows,
    num_bags,
    num_offsets,
    padding_idx,
    CLAMP_ROWS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HUGE: tl.constexpr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums (or averages) the rows of a bag, one after the other.

    Grid (ceil(B / R), ceil(D / BLOCK_D)) with R = TILE / BLOCK_D bags per program.
    index [L], offset [num_offsets], weight [L] -> out [B, D].
    """
    R: tl.constexpr = TILE // BLOCK_D
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = bag < num_bags
    start = tl.load(offset_ptr + bag, mask=valid, other=0).to(tl.int64)
    # Ends are clipped so that unchecked offsets can't lead out of the index array.
    inner = valid & (bag + 1 < num_offsets)
    end = tl.load(offset_ptr + bag + 1, mask=inner, other=num_lookups).to(tl.int64)
    start = tl.maximum(start, 0)
    length = tl.where(valid, tl.minimum(end, num_lookups), 0) - start
    if not HUGE:
        length = length.to(tl.int32)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    count = tl.zeros([R], tl.int32)
    for step in tl.range(0, tl.max(length, axis=0), loop_unroll_factor=2):
        at = start + step
        live = step < length
        row = tl.load(index_ptr + at, mask=live, other=0).to(tl.int64)
        if CLAMP_ROWS:
            row = clamp_row(row, num_rows)
        if HAS_PADDING:
            live = live & (row != padding_idx)
        values = decode(table_ptr, row, live, cols, steps_ptr, tiers_ptr, BITS, CODED, D, TIERS)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + at, mask=live, other=0.0)
            values = values * weight.to(tl.float32)[:, None]
        total += values
        count += live.to(tl.int32)
    if IS_MEAN:
        total = total * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    tl.store(
        out_ptr + bag[:, None] * D + cols[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < D),
    )


def look_up(lookups: Lookups, table: Table, steps: Tensor, bits: int, clamp: bool) -> None:
    """Writes rows or bags of a table of few bits to ``lookups.values``.

    Args:
        lookups: What is looked up.
        table: The table, a tier a step size; widths of codes are bytes, ``dim`` is the output's.
        steps: ``[C]``.
        bits: Of a code.
        clamp: Whether indices outside the table are moved into it.
    """
    bags, count = lookups.bags, lookups.flat.numel()
    shared = {
        "CLAMP_ROWS": clamp,
        "BITS": bits,
        "CODED": table.data.dtype == torch.uint8,
        **{name: table.meta[name] for name in ("D", "TIERS", "BLOCK_D")},
        "TILE": max(launch.tile(table.dim), table.meta["BLOCK_D"]),
    }
    number = count if bags is None else bags.number
    rows = shared["TILE"] // table.meta["BLOCK_D"]
    grid = (launch.cdiv(number, rows), launch.cdiv(table.dim, table.meta["BLOCK_D"]))
    found = (steps, table.tiers, count, table.rows)
    with launch.device_guard(lookups.flat):
        if bags is None:
            inputs = (table.data, lookups.flat, lookups.values)
            launch.launch(gather_codes_kernel, grid, *inputs, *found, **shared)
            return
        launch.launch(
            pooled_codes_kernel,
            grid,
            *(table.data, lookups.flat, bags.offsets, lookups.weights, lookups.values),
            *(*found, number, bags.offsets.numel(), lookups.padding_idx),
            HAS_PADDING=lookups.has_padding,
            HAS_WEIGHTS=lookups.weights is not None,
            IS_MEAN=bags.is_mean,
            HUGE=count > _INT32_MAX,
            **shared,
        )
