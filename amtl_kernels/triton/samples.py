"""Gradient of ``per_sample_weights``."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import (
    FIRST_ROW,
    NUMBERS,
    Lookups,
    bag_of,
    gradient_row,
    mean_scale,
    row_in_table,
    table_line,
)
from amtl_kernels.triton.tables import Table, load_prefix, locate


@triton.jit(do_not_specialize=[*NUMBERS, "step", "seed_mix"])
def sample_grad_kernel(
    grad_ptr,
    table_ptr,
    index_ptr,
    offset_ptr,
    counted_ptr,
    tables_ptr,
    out_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_rows,
    num_bags,
    num_offsets,
    padding_idx,
    steps,
    step,
    TABLES: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    GRAD_STEP: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """Dot product of a bag's gradient with each of its kept rows; 0 for padding.

    Grid (ceil(L / R)). Neighbouring lookups share a bag, so its gradient comes from the cache.
    grad [B, D], index [L], offset [num_offsets] -> out [L].
    """
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = at < num_lookups
    row = tl.load(index_ptr + at, mask=valid, other=-1).to(tl.int64)
    bag = bag_of(at, offset_ptr, num_offsets, steps)
    live, table = row_in_table(row, bag, tables_ptr, num_rows, num_bags, padding_idx, True, TABLES)
    if TABLES > 0:
        row += table_line(tables_ptr, table, FIRST_ROW, TABLES)
    row = tl.where(live, row, 0)
    source = gradient_row(bag, table, tables_ptr, num_bags, step, TABLES)
    first, size = locate(row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        values = load_prefix(table_ptr, first, size, cols, VEC).to(tl.float32)
        grad = load_prefix(grad_ptr, source * GRAD_STEP, size, cols, GRAD_VEC).to(tl.float32)
        total += values * grad
    dot = tl.sum(total, axis=1)
    if IS_MEAN:
        dot = dot * mean_scale(
            bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING
        )
    tl.store(out_ptr + at, dot.to(out_ptr.dtype.element_ty), mask=valid)


def sample_grad(lookups: Lookups, table: Table, wanted: bool) -> Tensor:
    """``out[l] = <grad[bag(l)], kept prefix of row(l)>``, over the bag's count for a mean.

    Args:
        lookups: What was looked up, and the incoming gradient.
        table: The table, or the tables.
        wanted: Whether there is anything to do, as there is for bags only.

    Returns:
        [L] in the table's dtype, or [0].
    """
    flat, bags = lookups.indices, lookups.bags
    if not wanted or bags is None:
        return table.data.new_empty(0)
    out = torch.empty(flat.numel(), dtype=table.data.dtype, device=flat.device)
    rows = launch.tile_rows(table.dim, most=1024)
    with launch.device_guard(flat):
        launch.launch(
            sample_grad_kernel,
            (launch.cdiv(flat.numel(), rows),),
            lookups.values,
            table.data,
            flat,
            bags.offsets,
            lookups.counted,
            lookups.lines,
            out,
            *table.args,
            flat.numel(),
            table.rows,
            bags.number,
            bags.offsets.numel(),
            lookups.padding_idx,
            bags.steps,
            lookups.step,
            TABLES=lookups.tables,
            IS_MEAN=bags.mean,
            HAS_PADDING=lookups.counted is not None,
            R=rows,
            **lookups.gradient_layout(table.dim),
            **table.meta,
        )
    return out
