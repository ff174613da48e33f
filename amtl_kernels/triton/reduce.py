"""Sums of gradient rows per table row and, for soft masks, of ``W * G`` per group.

Two passes and no float atomics, so that results are equal bit for bit in every run: partial sums in
a fixed order first, then their sums. The order depends on shapes alone, never on timing, which is
why nothing here is autotuned.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.plan import SortedLookups, Work
from amtl_kernels.triton.tables import Table, load_prefix, locate, round_up


@triton.jit
def output_row(
    position,
    live,
    rows_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Where gradient row ``position`` [R] starts, how much of it is kept, and how wide it is.

    Gradients of a dense table are D wide whatever is kept; those of a tier are as wide as the tier.
    """
    if TIERS > 0:
        first, size = locate(
            position, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC
        )
        width = size
    else:
        row = tl.load(rows_ptr + position, mask=live, other=0)
        _, size = locate(row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, 0, 1)
        first = position * D
        width = round_up(tl.where(live, D, 0), VEC)
    return first, size, width


@triton.jit(do_not_specialize=["seed_mix", "chunk"])
def reduce_rows_kernel(
    grad_ptr,
    source_ptr,
    scale_ptr,
    rows_ptr,
    starts_ptr,
    piece_row_ptr,
    row_piece_ptr,
    row_slot_ptr,
    block_first_ptr,
    block_end_ptr,
    block_group_ptr,
    group_block_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
    mask_ptr,
    mask_partial_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    chunk,
    HAS_SCALE: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    WEIGHT_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """First pass: every lane sums one piece, up to ``chunk`` lookups of one row, in fp32.

    Grid (blocks, ceil(D / BLOCK_D)), LANES pieces per program. A row of one piece is rounded and
    written at once; the pieces of a hot row go to ``partial``. With WRITE_MASK the program's
    pieces belong to one group, and the sum over lanes of piece * weight row goes to the group if
    the program is its only one, else to ``mask_partial``.
    grad [M, D], source/scale [L], rows [U], starts [U + 1], weight [N, D] -> out [U, D] or tiers,
    partial [slots, D] fp32, mask [G, D] fp32, mask_partial [blocks, D] fp32.
    """
    block = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    piece = tl.load(block_first_ptr + block) + tl.arange(0, LANES)
    live = piece < tl.load(block_end_ptr + block)
    position = tl.load(piece_row_ptr + piece, mask=live, other=0)
    row_start = tl.load(starts_ptr + position, mask=live, other=0)
    row_end = tl.load(starts_ptr + position + 1, mask=live, other=0)
    number = piece - tl.load(row_piece_ptr + position, mask=live, other=0)
    start = row_start + number * chunk
    end = tl.minimum(start + chunk, row_end)
    first, size, width = output_row(
        position,
        live,
        rows_ptr,
        sizes_ptr,
        row_group_ptr,
        tiers_ptr,
        seed_mix,
        D,
        Q,
        TIERS,
        OUT_VEC,
    )
    needed = size
    if WRITE_MASK:
        needed = width
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    longest = tl.max(tl.where(live, end - start, 0), axis=0).to(tl.int32)
    for step in tl.range(0, longest, loop_unroll_factor=2):
        at = start + step
        more = live & (at < end)
        source = tl.load(source_ptr + at, mask=more, other=0).to(tl.int64)
        values = load_prefix(grad_ptr, source * D, tl.where(more, needed, 0), cols, GRAD_VEC)
        values = values.to(tl.float32)
        if HAS_SCALE:
            values = values * tl.load(scale_ptr + at, mask=more, other=0.0)[:, None]
        total += values
    if WRITE_ROWS:
        sole = row_end - row_start <= chunk
        kept = tl.where(cols[None, :] < size[:, None], total, 0.0)
        tl.store(
            out_ptr + first[:, None] + cols[None, :],
            kept.to(out_ptr.dtype.element_ty),
            mask=(live & sole)[:, None] & (cols[None, :] < width[:, None]),
        )
        slot = tl.load(row_slot_ptr + position, mask=live, other=0) + number
        tl.store(
            partial_ptr + slot[:, None] * D + cols[None, :],
            kept,
            mask=(live & (row_end - row_start > chunk))[:, None] & (cols[None, :] < D),
        )
    if WRITE_MASK:
        row = tl.load(rows_ptr + position, mask=live, other=0)
        weight = load_prefix(weight_ptr, row * D, width, cols, WEIGHT_VEC).to(tl.float32)
        product = tl.sum(total * weight, axis=0)
        group = tl.load(block_group_ptr + block)
        blocks = tl.load(group_block_ptr + group + 1) - tl.load(group_block_ptr + group)
        if blocks == 1:
            tl.store(mask_ptr + group * D + cols, product, mask=cols < D)
        else:
            tl.store(mask_partial_ptr + block * D + cols, product, mask=cols < D)


@triton.jit(do_not_specialize=["seed_mix"])
def combine_rows_kernel(
    partial_ptr,
    hot_ptr,
    slots_ptr,
    rows_ptr,
    out_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a hot row's partial sums, rounded once.

    Grid (H, ceil(D / BLOCK_D)), LANES partial sums in flight.
    partial [slots, D] fp32, hot [H], slots [H, 2] -> the hot rows of out.
    """
    at = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = sum_rows(
        partial_ptr,
        tl.load(slots_ptr + 2 * at),
        tl.load(slots_ptr + 2 * at + 1),
        cols,
        D,
        BLOCK_D,
        LANES,
    )
    position = tl.load(hot_ptr + at) + tl.zeros([1], tl.int64)
    first, size, width = output_row(
        position,
        position >= 0,
        rows_ptr,
        sizes_ptr,
        row_group_ptr,
        tiers_ptr,
        seed_mix,
        D,
        Q,
        TIERS,
        OUT_VEC,
    )
    kept = tl.where(cols[None, :] < size[:, None], total[None, :], 0.0)
    tl.store(
        out_ptr + first[:, None] + cols[None, :],
        kept.to(out_ptr.dtype.element_ty),
        mask=cols[None, :] < width[:, None],
    )


@triton.jit
def combine_groups_kernel(
    partial_ptr,
    group_block_ptr,
    mask_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a group's partial mask gradients; zeros for a group without lookups.

    Grid (G, ceil(D / BLOCK_D)). A group of one block was written by the first pass.
    partial [blocks, D] fp32, group_block [G + 1] -> mask [G, D] fp32.
    """
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(group_block_ptr + group)
    end = tl.load(group_block_ptr + group + 1)
    if end - start != 1:
        total = sum_rows(partial_ptr, start, end, cols, D, BLOCK_D, LANES)
        tl.store(mask_ptr + group * D + cols, total, mask=cols < D)


@triton.jit
def sum_rows(
    partial_ptr,
    start,
    end,
    cols,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum [C] of rows ``start..end-1`` of ``partial [., D]`` at ``cols`` [C]."""
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for step in tl.range(start, end, LANES, loop_unroll_factor=2):
        at = step + tl.arange(0, LANES)
        total += tl.load(
            partial_ptr + at.to(tl.int64)[:, None] * D + cols[None, :],
            mask=(at < end)[:, None] & (cols[None, :] < D),
            other=0.0,
        )
    return tl.sum(total, axis=0)


def reduce_rows(
    grad: Tensor,
    lookups: SortedLookups,
    work: Work,
    table: Table,
    weight: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Writes row gradients and mask gradients.

    Args:
        grad: Incoming gradient [M, D], contiguous.
        lookups: Sorted lookups.
        work: Their plan, with groups if ``mask`` is wanted.
        table: Kept sizes by row number or, for tiers, the gradient rows by position.
        weight: Table [N, D], read for ``mask`` only.
        out: Row gradients [U, D], or the anchor of the tiers' gradients; None if not wanted.
        mask: fp32 [G, D], or None.
    """
    dim = table.dim
    columns = launch.cdiv(dim, table.meta["BLOCK_D"])
    blocks = work.block_first.numel()
    partial = torch.empty(
        work.slots if out is not None else 0, dim, dtype=torch.float32, device=grad.device
    )
    mask_partial = torch.empty(
        blocks if mask is not None else 0, dim, dtype=torch.float32, device=grad.device
    )
    constants = {name: table.meta[name] for name in ("D", "Q", "TIERS", "BLOCK_D")}
    if table.meta["TIERS"]:
        constants["OUT_VEC"] = table.meta["VEC"]
    else:
        constants["OUT_VEC"] = 1 if out is None else launch.vector(dim, out)
    with launch.device_guard(grad):
        launch.launch(
            reduce_rows_kernel,
            (blocks, columns),
            grad,
            lookups.source,
            lookups.scale,
            lookups.rows,
            lookups.starts,
            work.piece_row,
            work.row_piece,
            work.row_slot,
            work.block_first,
            work.block_end,
            work.block_group,
            work.group_block,
            weight,
            out,
            partial,
            mask,
            mask_partial,
            *table.args,
            work.chunk,
            HAS_SCALE=lookups.scale is not None,
            WRITE_ROWS=out is not None,
            WRITE_MASK=mask is not None,
            GRAD_VEC=launch.vector(dim, grad),
            WEIGHT_VEC=launch.vector(dim, weight),
            LANES=work.lanes,
            **constants,
        )
        lanes = launch.tile_rows(dim, most=32)
        if out is not None:
            launch.launch(
                combine_rows_kernel,
                (work.hot.numel(), columns),
                partial,
                work.hot,
                work.hot_slots,
                lookups.rows,
                out,
                *table.args,
                LANES=lanes,
                **constants,
            )
        if mask is not None:
            launch.launch(
                combine_groups_kernel,
                (mask.shape[0], columns),
                mask_partial,
                work.group_block,
                mask,
                D=dim,
                BLOCK_D=table.meta["BLOCK_D"],
                LANES=lanes,
            )
