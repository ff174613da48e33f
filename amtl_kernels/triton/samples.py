"""Gradient of ``per_sample_weights``."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.plan import Bags, bag_of, mean_scale
from amtl_kernels.triton.tables import Table, load_prefix, locate


@triton.jit(
    do_not_specialize=[
        "num_lookups",
        "num_rows",
        "num_bags",
        "num_offsets",
        "padding_idx",
        "steps",
        "seed_mix",
    ]
)
def sample_grad_kernel(
    grad_ptr,
    table_ptr,
    index_ptr,
    offset_ptr,
    counted_ptr,
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
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
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
    row = tl.load(index_ptr + at, mask=valid, other=0).to(tl.int64)
    bag = bag_of(at, offset_ptr, num_offsets, steps)
    live = valid & (row != padding_idx) & (row >= 0) & (row < num_rows)
    live = live & (bag >= 0) & (bag < num_bags)
    row = tl.where(live, row, 0)
    first, size = locate(row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        values = load_prefix(table_ptr, first, size, cols, VEC).to(tl.float32)
        grad = load_prefix(grad_ptr, bag * D, size, cols, GRAD_VEC).to(tl.float32)
        total += values * grad
    dot = tl.sum(total, axis=1)
    if IS_MEAN:
        dot = dot * mean_scale(
            bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING
        )
    tl.store(out_ptr + at, dot.to(out_ptr.dtype.element_ty), mask=valid)


def sample_grad(grad: Tensor, table: Table, flat: Tensor, bags: Bags, padding_idx: int) -> Tensor:
    """``out[l] = <grad[bag(l)], kept prefix of row(l)>``, over the bag's count for a mean.

    Args:
        grad: [B, D], contiguous.
        table: The table looked up.
        flat: Indices [L].
        bags: The bag of each lookup.
        padding_idx: Row whose lookups get 0, or -1.

    Returns:
        [L] in the table's dtype.
    """
    out = torch.empty(flat.numel(), dtype=table.data.dtype, device=flat.device)
    rows = launch.tile_rows(table.dim, most=1024)
    with launch.device_guard(flat):
        launch.launch(
            sample_grad_kernel,
            (launch.cdiv(flat.numel(), rows),),
            grad,
            table.data,
            flat,
            bags.offsets,
            bags.counted,
            out,
            *table.args,
            flat.numel(),
            table.rows,
            bags.number,
            bags.offsets.numel(),
            padding_idx,
            bags.steps,
            IS_MEAN=bags.is_mean,
            HAS_PADDING=bags.counted is not None,
            GRAD_VEC=launch.vector(table.dim, grad),
            R=rows,
            **table.meta,
        )
    return out
