"""Sums of gradient rows per table row and, for soft masks, of ``W * G`` per group.

Two passes and no float atomics, so that results are equal bit for bit in every run: partial sums in
a fixed order first, then their sums. The order depends on the lookups alone, never on timing, which
is why nothing here is autotuned.

A partial sum needs no list of who wrote it. A row that is cut has one piece per window of ``chunk``
sorted lookups, which either starts with the window (slot ``w``) or ends with it (slot ``windows +
w``); a group that several programs share takes the same two places in each of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.plan import Plan, lower_bound, piece_number
from amtl_kernels.triton.tables import Table, load_prefix, locate, round_up


@triton.jit
def read_pieces(pieces_ptr, keys_ptr, num_pieces, num_lookups, LANES: tl.constexpr):
    """This program's pieces [LANES]: live, start, end, key, and the keys around (-1: none)."""
    piece = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = piece < num_pieces
    start = tl.load(pieces_ptr + piece, mask=live, other=0)
    end = tl.load(pieces_ptr + piece + 1, mask=live, other=0)
    key = tl.load(keys_ptr + start, mask=live, other=0).to(tl.int64)
    before = tl.load(keys_ptr + start - 1, mask=live & (start > 0), other=-1).to(tl.int64)
    after = tl.load(keys_ptr + end, mask=live & (end < num_lookups), other=-1).to(tl.int64)
    return live, start, end, key, before, after


@triton.jit
def sum_pieces(
    grad_ptr,
    source_ptr,
    scale_ptr,
    live,
    start,
    end,
    needed,
    cols,
    HAS_SCALE: tl.constexpr,
    D: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """fp32 sums [LANES, BLOCK_D] of pieces ``start..end-1``, the first ``needed`` columns."""
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for step in tl.range(0, tl.max(end - start, axis=0), loop_unroll_factor=2):
        at = start + step
        more = live & (at < end)
        source = tl.load(source_ptr + at, mask=more, other=0).to(tl.int64)
        values = load_prefix(grad_ptr, source * D, tl.where(more, needed, 0), cols, GRAD_VEC)
        values = values.to(tl.float32)
        if HAS_SCALE:
            values = values * tl.load(scale_ptr + at, mask=more, other=0.0)[:, None]
        total += values
    return total


@triton.jit
def store_partial(partial_ptr, total, cut, start, chunk, windows, cols, D: tl.constexpr):
    """The sums of ``cut`` pieces to their slots, ``partial [2 * windows, D]``."""
    slot = start // chunk + tl.where(start % chunk == 0, 0, windows)
    tl.store(
        partial_ptr + slot.to(tl.int64)[:, None] * D + cols[None, :],
        total,
        mask=cut[:, None] & (cols[None, :] < D),
    )


@triton.jit
def sum_groups(
    product,
    live,
    group,
    group_before,
    group_after,
    mask_ptr,
    mask_partial_ptr,
    programs,
    cols,
    D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums ``product [LANES, C]`` per group, over ascending groups [LANES].

    A group that lies within this program goes to ``mask [G, D]``. One that goes on into a
    neighbour goes to ``mask_partial [2 * programs, D]``: to the first half where it came from the
    program before, to the second half where it starts here.
    """
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    lane = tl.arange(0, LANES)
    from_before = tl.max(tl.where(live & (lane == 0), group_before, -1), axis=0)
    last = tl.max(tl.where(live, lane, -1), axis=0)
    to_after = tl.max(tl.where(lane == last, group_after, -1), axis=0)
    current = tl.min(tl.where(live, group, NONE), axis=0)
    program = tl.program_id(0).to(tl.int64)
    while current < NONE:
        mine = live & (group == current)
        total = tl.sum(tl.where(mine[:, None], product, 0.0), axis=0)
        if current == from_before:
            tl.store(mask_partial_ptr + program * D + cols, total, mask=cols < D)
        elif current == to_after:
            tl.store(mask_partial_ptr + (programs + program) * D + cols, total, mask=cols < D)
        else:
            tl.store(mask_ptr + current * D + cols, total, mask=cols < D)
        current = tl.min(tl.where(live & (group > current), group, NONE), axis=0)


@triton.jit
def hot_row(keys_ptr, num_lookups, limit, chunk, windows, steps):
    """The row that is cut at the end of this program's window, if that is its first cut.

    Returns whether it is, its key, the position of the cut, the slot of its first piece, and the
    first and last + 1 slot of the others.
    """
    window = tl.program_id(0) + 1
    cut = window * chunk
    key = tl.load(keys_ptr + cut).to(tl.int64)
    is_cut = (tl.load(keys_ptr + cut - 1).to(tl.int64) == key) & (key < limit)
    # The window before: does the row start with it, and does it start before it?
    with_window = tl.load(keys_ptr + cut - chunk).to(tl.int64) == key
    earlier = tl.load(keys_ptr + cut - chunk - 1, mask=window > 1, other=-1).to(tl.int64) == key
    slot = window - 1 + tl.where(with_window, 0, windows)
    end = window
    if is_cut and not earlier:
        end = lower_bound(keys_ptr, windows, key + 1, steps, chunk)
    return is_cut and not earlier, key, cut, slot, window, end


@triton.jit
def sum_hot_row(
    partial_ptr,
    slot,
    start,
    end,
    cols,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum [C] of partial row ``slot`` and of rows ``start..end-1``."""
    first = tl.load(partial_ptr + slot.to(tl.int64) * D + cols, mask=cols < D, other=0.0)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for step in tl.range(start, end, LANES, loop_unroll_factor=2):
        at = step + tl.arange(0, LANES)
        total += tl.load(
            partial_ptr + at.to(tl.int64)[:, None] * D + cols[None, :],
            mask=(at < end)[:, None] & (cols[None, :] < D),
            other=0.0,
        )
    return first + tl.sum(total, axis=0)


@triton.jit
def output_row(
    position,
    row,
    live,
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
        _, size = locate(row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, 0, 1)
        first = position * D
        width = round_up(tl.where(live, D, 0), VEC)
    return first, size, width


@triton.jit(
    do_not_specialize=[
        "seed_mix",
        "chunk",
        "num_lookups",
        "num_rows",
        "windows",
        "programs",
    ]
)
def reduce_rows_kernel(
    grad_ptr,
    source_ptr,
    scale_ptr,
    keys_ptr,
    counts_ptr,
    pieces_ptr,
    place_ptr,
    weight_ptr,
    rows_ptr,
    out_ptr,
    partial_ptr,
    mask_ptr,
    mask_partial_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    chunk,
    num_lookups,
    num_rows,
    windows,
    programs,
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

    Grid (programs, ceil(D / BLOCK_D)), LANES pieces per program. A row of one piece is rounded and
    written at once; the pieces of a hot row go to ``partial``. With WRITE_MASK keys are grouped,
    and the sums over lanes of piece * weight row go to the groups.
    grad [M, D], source/scale [L], weight [N, D] -> rows [U], out [U, D] or tiers, partial
    [2 * windows, D] fp32, mask [G, D] fp32, mask_partial [2 * programs, D] fp32; ``place`` [U]
    says where the gradients of rows in the order of grouped keys go.
    """
    num_pieces = piece_number(tl.load(counts_ptr + num_lookups))
    if tl.program_id(0) * LANES >= num_pieces:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live, start, end, key, before, after = read_pieces(
        pieces_ptr, keys_ptr, num_pieces, num_lookups, LANES
    )
    row = key
    if WRITE_MASK:
        row = key % num_rows
    if WRITE_ROWS:
        position = (tl.load(counts_ptr + start + 1, mask=live, other=0) >> 32) - 1
        if WRITE_MASK:
            position = tl.load(place_ptr + position, mask=live, other=0)
        first, size, width = output_row(
            position,
            row,
            live,
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
        needed = round_up(tl.where(live, D, 0), WEIGHT_VEC)
    total = sum_pieces(
        grad_ptr,
        source_ptr,
        scale_ptr,
        live,
        start,
        end,
        needed,
        cols,
        HAS_SCALE,
        D,
        GRAD_VEC,
        BLOCK_D,
        LANES,
    )
    if WRITE_ROWS:
        sole = (before != key) & (after != key)
        if tl.program_id(1) == 0:
            tl.store(rows_ptr + position, row, mask=live & (before != key))
        kept = tl.where(cols[None, :] < size[:, None], total, 0.0)
        tl.store(
            out_ptr + first[:, None] + cols[None, :],
            kept.to(out_ptr.dtype.element_ty),
            mask=(live & sole)[:, None] & (cols[None, :] < width[:, None]),
        )
        store_partial(partial_ptr, kept, live & (sole == 0), start, chunk, windows, cols, D)
    if WRITE_MASK:
        weight = load_prefix(weight_ptr, row * D, needed, cols, WEIGHT_VEC).to(tl.float32)
        sum_groups(
            total * weight,
            live,
            key // num_rows,
            tl.where(before >= 0, before // num_rows, -1),
            tl.where(after >= 0, after // num_rows, -1),
            mask_ptr,
            mask_partial_ptr,
            programs,
            cols,
            D,
            LANES,
        )


@triton.jit(
    do_not_specialize=["seed_mix", "chunk", "num_lookups", "num_rows", "limit", "windows", "steps"]
)
def combine_rows_kernel(
    partial_ptr,
    keys_ptr,
    counts_ptr,
    place_ptr,
    out_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    chunk,
    num_lookups,
    num_rows,
    limit,
    windows,
    steps,
    GROUPED: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a hot row's partial sums, rounded once.

    Grid (windows - 1, ceil(D / BLOCK_D)), LANES partial sums in flight; a program whose window
    ends no row's first piece has nothing to do. partial [2 * windows, D] -> the hot rows of out.
    """
    hot, key, cut, slot, start, end = hot_row(keys_ptr, num_lookups, limit, chunk, windows, steps)
    if hot:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = sum_hot_row(partial_ptr, slot, start, end, cols, D, BLOCK_D, LANES)
        position = (tl.load(counts_ptr + cut) >> 32) - 1
        row = key
        if GROUPED:
            position = tl.load(place_ptr + position)
            row = key % num_rows
        one = tl.zeros([1], tl.int64)
        first, size, width = output_row(
            position + one,
            row + one,
            one == 0,
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


@triton.jit(do_not_specialize=["programs"])
def combine_groups_kernel(
    partial_ptr,
    group_piece_ptr,
    mask_ptr,
    programs,
    PER_PROGRAM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a group's partial mask gradients; zeros for a group without lookups.

    Grid (G, ceil(D / BLOCK_D)). A group within one program was written by the first pass.
    partial [2 * programs, D] fp32 -> mask [G, D] fp32.
    """
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(group_piece_ptr + group)
    last = tl.load(group_piece_ptr + group + 1)
    start = first // PER_PROGRAM
    end = (last - 1) // PER_PROGRAM
    if last == first:
        tl.store(mask_ptr + group * D + cols, tl.zeros([BLOCK_D], tl.float32), mask=cols < D)
    elif end > start:
        total = sum_hot_row(
            partial_ptr, programs + start, start + 1, end + 1, cols, D, BLOCK_D, LANES
        )
        tl.store(mask_ptr + group * D + cols, total, mask=cols < D)


def partial_sums(
    plan: Plan, programs: int, dim: int, rows: bool, mask: bool
) -> tuple[Tensor, Tensor]:
    """Memory for the first pass: of rows and of groups, empty where not asked for."""
    like = torch.empty(0, dtype=torch.float32, device=plan.keys.device)
    return (
        like.new_empty(2 * plan.windows if rows else 0, dim),
        like.new_empty(2 * programs if mask else 0, dim),
    )


def combine_groups(plan: Plan, partial: Tensor, mask: Tensor, block_d: int) -> None:
    """Launches :func:`combine_groups_kernel`; ``partial`` has two rows a program."""
    groups, dim = mask.shape
    launch.launch(
        combine_groups_kernel,
        (groups, launch.cdiv(dim, block_d)),
        partial,
        plan.group_piece,
        mask,
        partial.shape[0] // 2,
        PER_PROGRAM=plan.lanes,
        D=dim,
        BLOCK_D=block_d,
        LANES=launch.tile_rows(dim, most=32),
    )


def reduce_rows(
    grad: Tensor,
    plan: Plan,
    pieces: int,
    table: Table,
    weight: Tensor,
    place: Tensor | None,
    rows: Tensor | None,
    out: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Writes row gradients and mask gradients.

    Args:
        grad: Incoming gradient [M, D], contiguous.
        plan: Sorted lookups, with groups if ``mask`` is wanted.
        pieces: Number of pieces, or more.
        table: Kept sizes by row number or, for tiers, the gradient rows by position.
        weight: Table [N, D], read for ``mask`` only.
        place: int64 [U], place in ``out`` of each row in the order of grouped keys; else None.
        rows: int64 [U], gets the row numbers; None if not wanted.
        out: Row gradients [U, D], or the anchor of the tiers' gradients; None if not wanted.
        mask: fp32 [G, D], or None.
    """
    dim = table.dim
    columns = launch.cdiv(dim, table.meta["BLOCK_D"])
    programs = launch.cdiv(pieces, plan.lanes)
    partial, mask_partial = partial_sums(plan, programs, dim, out is not None, mask is not None)
    constants = {name: table.meta[name] for name in ("D", "Q", "TIERS", "BLOCK_D")}
    if table.meta["TIERS"]:
        constants["OUT_VEC"] = table.meta["VEC"]
    else:
        constants["OUT_VEC"] = 1 if out is None else launch.vector(dim, out)
    with launch.device_guard(grad):
        launch.launch(
            reduce_rows_kernel,
            (programs, columns),
            grad,
            plan.source,
            plan.scale,
            plan.keys,
            plan.counts,
            plan.pieces,
            place,
            weight,
            rows,
            out,
            partial,
            mask,
            mask_partial,
            *table.args,
            plan.chunk,
            plan.lookups,
            plan.rows,
            plan.windows,
            programs,
            HAS_SCALE=plan.scale is not None,
            WRITE_ROWS=out is not None,
            WRITE_MASK=mask is not None,
            GRAD_VEC=launch.vector(dim, grad),
            WEIGHT_VEC=launch.vector(dim, weight),
            LANES=plan.lanes,
            **constants,
        )
        if out is not None:
            launch.launch(
                combine_rows_kernel,
                (plan.windows - 1, columns),
                partial,
                plan.keys,
                plan.counts,
                place,
                out,
                *table.args,
                plan.chunk,
                plan.lookups,
                plan.rows,
                plan.limit,
                plan.windows,
                plan.windows.bit_length(),
                GROUPED=plan.grouped,
                LANES=launch.tile_rows(dim, most=32),
                **constants,
            )
        if mask is not None:
            combine_groups(plan, mask_partial, mask, table.meta["BLOCK_D"])
