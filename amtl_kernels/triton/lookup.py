"""Plain and pooled lookup: one kernel each for row sizes, groups with size noise, and tiers."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.reference import CLAMP, MEAN
from amtl_kernels.triton import check, launch
from amtl_kernels.triton.tables import Table, clamp_row, load_prefix, locate


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "seed_mix"])
def gather_fwd_kernel(
    table_ptr,
    index_ptr,
    out_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_rows,
    CLAMP_ROWS: tl.constexpr,
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
    first, size = locate(
        row, valid, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC
    )
    values = load_prefix(table_ptr, first, size, cols, VEC)
    tl.store(
        out_ptr + lookup[:, None] * D + cols[None, :],
        values,
        mask=valid[:, None] & (cols[None, :] < D),
    )


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
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
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
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums (or averages) the kept prefixes of a bag's rows in fp32, rounded once at the end.

    Grid (ceil(B / R), ceil(D / BLOCK_D)); the TILE / BLOCK_D lanes of a program serve R bags with
    SPLIT lanes each, and every lane walks its bag in steps of SPLIT. With SPLIT == 1 a bag is
    summed in the order of its lookups by one lane, so neither TILE nor the warps can change the
    result; more lanes per bag are for long bags, where one lane leaves the memory idle.
    index [L], offset [num_offsets], weight [L] -> out [B, D].
    """
    LANES: tl.constexpr = TILE // BLOCK_D
    R: tl.constexpr = LANES // SPLIT
    lane = tl.arange(0, LANES)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.program_id(0).to(tl.int64) * R + lane // SPLIT
    valid = bag < num_bags
    start = tl.load(offset_ptr + bag, mask=valid, other=0).to(tl.int64)
    # The last offset is left out unless include_last_offset: then the lookups end there. Ends are
    # clipped so that unchecked offsets can't lead out of the index array.
    end = tl.load(offset_ptr + bag + 1, mask=valid & (bag + 1 < num_offsets), other=num_lookups).to(
        tl.int64
    )
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
        if HAS_PADDING:
            live = live & (row != padding_idx)
        first, size = locate(
            row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC
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
    tl.store(
        out_ptr + bag[:, None] * D + cols[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < D),
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


def _gather_rows(table: Table, indices: Tensor, bounds_check: int) -> Tensor:
    flat = indices.reshape(-1).contiguous()
    out = torch.empty(*indices.shape, table.dim, dtype=table.data.dtype, device=flat.device)
    check.lookups(table, flat, bounds_check)
    block = table.meta["BLOCK_D"]
    with launch.device_guard(flat):
        _gather(
            lambda tile: (
                launch.cdiv(flat.numel(), tile // block),
                launch.cdiv(table.dim, block),
            ),
            table.data,
            flat,
            out,
            *table.args,
            flat.numel(),
            table.rows,
            CLAMP_ROWS=bounds_check == CLAMP,
            **table.meta,
        )
    return out


def _pool_rows(
    table: Table,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    flat = indices.reshape(-1).contiguous()
    offsets = offsets.contiguous()
    bags = offsets.numel() - int(include_last_offset)
    check.lookups(table, flat, bounds_check, offsets, include_last_offset)
    out = torch.empty(max(bags, 0), table.dim, dtype=table.data.dtype, device=flat.device)
    block = table.meta["BLOCK_D"]
    length = flat.numel() // max(bags, 1)
    lanes = launch.tile(table.dim) // block
    split = max(1, min(_LONG_BAG_LANES, lanes)) if length >= _LONG_BAG else 1
    kernel = _pooled if split == 1 else _untuned_pooled
    with launch.device_guard(flat):
        kernel(
            lambda tile: (
                launch.cdiv(max(bags, 0), max(tile // block // split, 1)),
                launch.cdiv(table.dim, block),
            ),
            table.data,
            flat,
            offsets,
            None if weights is None else weights.contiguous(),
            out,
            *table.args,
            flat.numel(),
            table.rows,
            bags,
            offsets.numel(),
            padding_idx,
            launch.next_power_of_two(max(length, 1)),
            CLAMP_ROWS=bounds_check == CLAMP,
            HAS_PADDING=padding_idx >= 0,
            HAS_WEIGHTS=weights is not None,
            IS_MEAN=mode == MEAN,
            HUGE=flat.numel() > _INT32_MAX,
            SPLIT=split,
            **table.meta,
        )
    return out


def _untuned_pooled(grid: Callable[[int], tuple[int, ...]], *args: Any, **meta: Any) -> None:
    size = launch.tile(meta["D"])
    launch.launch(pooled_fwd_kernel, grid(size), *args, **meta, TILE=size)


def masked_embedding(
    weight: Tensor, indices: Tensor, row_dims: Tensor, padding_idx: int, bounds_check: int
) -> Tensor:
    """``out[.., j] = weight[i, j]`` for ``j < row_dims[i]``, else 0."""
    return _gather_rows(Table.by_rows(weight, row_dims), indices, bounds_check)


def masked_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    """Masked rows pooled by bag."""
    table = Table.by_rows(weight, row_dims)
    return _pool_rows(
        table,
        indices,
        offsets,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        bounds_check,
    )


def adaptive_embedding(
    weight: Tensor,
    indices: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    seed: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    """As :func:`masked_embedding`, with sizes read through groups and hashed columns."""
    table = Table.by_groups(weight, row_group, group_dims, seed)
    return _gather_rows(table, indices, bounds_check)


def adaptive_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    bounds_check: int,
) -> Tensor:
    """As :func:`masked_embedding_bag`, with sizes read through groups and hashed columns."""
    table = Table.by_groups(weight, row_group, group_dims, seed)
    return _pool_rows(
        table,
        indices,
        offsets,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        bounds_check,
    )


def tiered_embedding(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    embedding_dim: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    """Row ``i`` of tier ``c`` is ``blocks[c][i - tier_ends[c-1]]``, followed by zeros."""
    table = Table.by_tiers(blocks, tier_ends, embedding_dim)
    return _gather_rows(table, indices, bounds_check)


def tiered_embedding_bag(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    """Tier rows pooled by bag."""
    table = Table.by_tiers(blocks, tier_ends, embedding_dim)
    return _pool_rows(
        table,
        indices,
        offsets,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        bounds_check,
    )


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding": masked_embedding,
    "masked_embedding_bag": masked_embedding_bag,
    "adaptive_embedding": adaptive_embedding,
    "adaptive_embedding_bag": adaptive_embedding_bag,
    "tiered_embedding": tiered_embedding,
    "tiered_embedding_bag": tiered_embedding_bag,
}
"""Operator name to implementation."""
