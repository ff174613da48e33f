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
from amtl_kernels.triton.lookups import Lookups, lower_bound
from amtl_kernels.triton.plan import Plan, piece_number
from amtl_kernels.triton.tables import (
    Table,
    load_prefix,
    place,
    round_up,
    row_of_tier,
    size_at,
    tier_of,
)

RUN_TIME = ["seed_mix", "rounding_mix", "chunk", "num_lookups", "num_rows", "windows"]
"""Integers that kernels are not compiled for."""


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
    gradient,
    pieces,
    needed,
    cols,
    HAS_SCALE: tl.constexpr,
    GRAD_STEP: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """fp32 sums [LANES, BLOCK_D] of what :func:`read_pieces` found, the first ``needed`` columns.

    ``gradient`` is ``(grad, source, scale)`` of :func:`reduce_rows_kernel`.
    """
    grad_ptr, source_ptr, scale_ptr = gradient
    live, start, end, _, _, _ = pieces
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for step in tl.range(0, tl.max(end - start, axis=0), loop_unroll_factor=2):
        at = start + step
        more = live & (at < end)
        source = tl.load(source_ptr + at, mask=more, other=0).to(tl.int64)
        values = load_prefix(
            grad_ptr, source * GRAD_STEP, tl.where(more, needed, 0), cols, GRAD_VEC
        )
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
def group_row(group, group_tiers_ptr, D: tl.constexpr, GROUP_TIERS: tl.constexpr):
    """Where a group's mask gradient starts, and how wide it is."""
    first = group * D
    width = tl.full([], D, tl.int64)
    if GROUP_TIERS > 0:
        tier = tier_of(group, group_tiers_ptr, GROUP_TIERS)
        first, width = row_of_tier(group, tier, group_tiers_ptr, GROUP_TIERS, 1)
    return first, width


@triton.jit
def sum_groups(
    weight_ptr,
    first,
    needed,
    total,
    pieces,
    masks,
    num_rows,
    programs,
    cols,
    D: tl.constexpr,
    GROUP_TIERS: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums, per group, the products of sums ``total [LANES, C]`` of pieces and their weights.

    The weights are the first ``needed`` columns of the rows at ``first`` [LANES]; keys ascend along
    the pieces. ``masks`` is ``(mask, mask_partial, group_tiers)``: a group that lies within this
    program goes to ``mask [G, D]`` or, of several tables, to its place in their flat mask
    gradients. One that goes on into a neighbour goes to ``mask_partial [2 * programs, D]``: to the
    first half where it came from the program before, to the second half where it starts here.
    """
    live, _, _, key, before, after = pieces
    mask_ptr, mask_partial_ptr, group_tiers_ptr = masks
    product = total * load_prefix(weight_ptr, first, needed, cols, VEC).to(tl.float32)
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    lane = tl.arange(0, LANES)
    group = key // num_rows
    group_before = tl.where(before >= 0, before // num_rows, -1)
    group_after = tl.where(after >= 0, after // num_rows, -1)
    from_before = tl.max(tl.where(live & (lane == 0), group_before, -1), axis=0)
    last = tl.max(tl.where(live, lane, -1), axis=0)
    to_after = tl.max(tl.where(lane == last, group_after, -1), axis=0)
    current = tl.min(tl.where(live, group, NONE), axis=0)
    program = tl.program_id(0).to(tl.int64)
    while current < NONE:
        mine = live & (group == current)
        of_group = tl.sum(tl.where(mine[:, None], product, 0.0), axis=0)
        if current == from_before:
            tl.store(mask_partial_ptr + program * D + cols, of_group, mask=cols < D)
        elif current == to_after:
            tl.store(mask_partial_ptr + (programs + program) * D + cols, of_group, mask=cols < D)
        else:
            at, width = group_row(current, group_tiers_ptr, D, GROUP_TIERS)
            tl.store(mask_ptr + at + cols, of_group, mask=cols < width)
        current = tl.min(tl.where(live & (group > current), group, NONE), axis=0)


@triton.jit
def hot_row(keys_ptr, limit, chunk, windows, steps):
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
    live,
    out_tiers_ptr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Where gradient row ``position`` [R] starts and how wide it is, whatever is kept of it."""
    first, width, _, _ = place(position, out_tiers_ptr, D, TIERS, VEC)
    return first, round_up(tl.where(live, width, 0), VEC)


@triton.jit(do_not_specialize=[*RUN_TIME, "programs"])
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
    out_tiers_ptr,
    partial_ptr,
    mask_ptr,
    mask_partial_ptr,
    group_tiers_ptr,
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
    GROUP_TIERS: tl.constexpr,
    GRAD_STEP: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    VEC: tl.constexpr,
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
    pieces = read_pieces(pieces_ptr, keys_ptr, num_pieces, num_lookups, LANES)
    live, start, _, key, before, after = pieces
    row = key
    if WRITE_MASK:
        row = key % num_rows
    weight_first, weight_width, tier, number = place(row, tiers_ptr, D, TIERS, VEC)
    if WRITE_ROWS:
        position = (tl.load(counts_ptr + start + 1, mask=live, other=0) >> 32) - 1
        if WRITE_MASK:
            position = tl.load(place_ptr + position, mask=live, other=0)
        first, width = output_row(position, live, out_tiers_ptr, D, TIERS, OUT_VEC)
        size = size_at(
            number,
            weight_width,
            tier,
            live,
            sizes_ptr,
            row_group_ptr,
            tiers_ptr,
            seed_mix,
            Q,
            TIERS,
            OUT_VEC,
        )
        needed = size
    if WRITE_MASK:
        needed = round_up(tl.where(live, weight_width, 0).to(tl.int32), VEC)
    gradient = (grad_ptr, source_ptr, scale_ptr)
    total = sum_pieces(
        gradient, pieces, needed, cols, HAS_SCALE, GRAD_STEP, GRAD_VEC, BLOCK_D, LANES
    )
    if WRITE_ROWS:
        sole = (before != key) & (after != key)
        if tl.program_id(1) == 0:
            tl.store(rows_ptr + position, number, mask=live & (before != key))
        kept = tl.where(cols[None, :] < size[:, None], total, 0.0)
        tl.store(
            out_ptr + first[:, None] + cols[None, :],
            kept.to(out_ptr.dtype.element_ty),
            mask=(live & sole)[:, None] & (cols[None, :] < width[:, None]),
        )
        store_partial(partial_ptr, kept, live & (sole == 0), start, chunk, windows, cols, D)
    if WRITE_MASK:
        sum_groups(
            weight_ptr,
            weight_first,
            needed,
            total,
            pieces,
            (mask_ptr, mask_partial_ptr, group_tiers_ptr),
            num_rows,
            programs,
            cols,
            D,
            GROUP_TIERS,
            VEC,
            LANES,
        )


@triton.jit(do_not_specialize=[*RUN_TIME, "limit", "steps"])
def combine_rows_kernel(
    partial_ptr,
    keys_ptr,
    counts_ptr,
    place_ptr,
    out_ptr,
    out_tiers_ptr,
    chunk,
    limit,
    windows,
    steps,
    GROUPED: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a hot row's partial sums, which end with what is kept, rounded once.

    Grid (windows - 1, ceil(D / BLOCK_D)), LANES partial sums in flight; a program whose window
    ends no row's first piece has nothing to do. partial [2 * windows, D] -> the hot rows of out.
    """
    hot, _, cut, slot, start, end = hot_row(keys_ptr, limit, chunk, windows, steps)
    if hot:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = sum_hot_row(partial_ptr, slot, start, end, cols, D, BLOCK_D, LANES)
        position = (tl.load(counts_ptr + cut) >> 32) - 1
        if GROUPED:
            position = tl.load(place_ptr + position)
        position += tl.zeros([1], tl.int64)
        first, width = output_row(position, position >= 0, out_tiers_ptr, D, TIERS, OUT_VEC)
        tl.store(
            out_ptr + first[:, None] + cols[None, :],
            total[None, :].to(out_ptr.dtype.element_ty),
            mask=cols[None, :] < width[:, None],
        )


@triton.jit(do_not_specialize=["programs"])
def combine_groups_kernel(
    partial_ptr,
    group_piece_ptr,
    mask_ptr,
    group_tiers_ptr,
    programs,
    PER_PROGRAM: tl.constexpr,
    D: tl.constexpr,
    GROUP_TIERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: a group's partial mask gradients; zeros for a group without lookups.

    Grid (G, ceil(D / BLOCK_D)). A group within one program was written by the first pass.
    partial [2 * programs, D] fp32 -> mask [G, D] fp32, or flat.
    """
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(group_piece_ptr + group)
    last = tl.load(group_piece_ptr + group + 1)
    start = first // PER_PROGRAM
    end = (last - 1) // PER_PROGRAM
    if (last == first) | (end > start):
        total = tl.zeros([BLOCK_D], tl.float32)
        if end > start:
            total = sum_hot_row(
                partial_ptr, programs + start, start + 1, end + 1, cols, D, BLOCK_D, LANES
            )
        at, width = group_row(group, group_tiers_ptr, D, GROUP_TIERS)
        tl.store(mask_ptr + at + cols, total, mask=cols < width)


class Masks:
    """Mask gradients, and the memory and constants with which kernels write them.

    Attributes:
        sums: fp32 [G, D], or flat for several tables; None if not wanted.
        tiers: The table of tiers of the flat form, or None.
        partial: fp32 [2 * programs, D].
        meta: ``WRITE_MASK, GROUP_TIERS``.
    """

    def __init__(self, plan: Plan, sums: Tensor | None, dim: int) -> None:
        self.sums = sums
        self.tiers = plan.group_tiers if sums is not None else None
        self.partial = torch.empty(
            2 * plan.programs if sums is not None else 0,
            dim,
            dtype=torch.float32,
            device=plan.keys.device,
        )
        self.meta = {
            "WRITE_MASK": sums is not None,
            "GROUP_TIERS": 0 if self.tiers is None else self.tiers.shape[1],
        }

    @property
    def args(self) -> tuple[Tensor | None, ...]:
        """What the first pass takes."""
        return self.sums, self.partial, self.tiers

    def combine(self, plan: Plan, table: Table) -> None:
        """Launches :func:`combine_groups_kernel` where there is something to write."""
        if self.sums is None:
            return
        launch.launch(
            combine_groups_kernel,
            (plan.group_piece.numel() - 1, launch.cdiv(table.dim, table.meta["BLOCK_D"])),
            self.partial,
            plan.group_piece,
            self.sums,
            self.tiers,
            plan.programs,
            PER_PROGRAM=plan.lanes,
            D=table.dim,
            GROUP_TIERS=self.meta["GROUP_TIERS"],
            BLOCK_D=table.meta["BLOCK_D"],
            LANES=launch.tile_rows(table.dim, most=32),
        )


def partial_sums(plan: Plan, dim: int, wanted: bool = True) -> Tensor:
    """Memory for the first pass's sums of hot rows, fp32 [2 * windows, D]."""
    count = 2 * plan.windows if wanted else 0
    return torch.empty(count, dim, dtype=torch.float32, device=plan.keys.device)


def reduce_rows(
    lookups: Lookups,
    plan: Plan,
    table: Table,
    places: Tensor | None,
    rows: Tensor | None,
    out: Table | None,
    mask: Tensor | None,
) -> None:
    """Writes row gradients and mask gradients.

    Args:
        lookups: What was looked up, and the incoming gradient.
        plan: The same sorted, with groups if ``mask`` is wanted.
        table: The table: what is kept of its rows and, for ``mask``, its values.
        places: int64 [U], place in ``out`` of each row in the order of grouped keys; else None.
        rows: int64 [U], gets the row numbers within table or tier; None if not wanted.
        out: Row gradients as a table of U rows, in tiers if ``table`` is; None if not wanted.
        mask: fp32 [G, D] or flat, or None.
    """
    dim = table.dim
    columns = launch.cdiv(dim, table.meta["BLOCK_D"])
    partial, masks = partial_sums(plan, dim, out is not None), Masks(plan, mask, dim)
    out_vector = 1 if out is None else out.meta["VEC"]
    written = (None, None) if out is None else (out.data, out.tiers)
    constants = {name: table.meta[name] for name in ("D", "TIERS", "BLOCK_D")}
    constants["OUT_VEC"] = out_vector
    with launch.device_guard(lookups.indices):
        launch.launch(
            reduce_rows_kernel,
            (plan.programs, columns),
            lookups.values,
            plan.source,
            plan.scale,
            plan.keys,
            plan.counts,
            plan.pieces,
            places,
            table.data,
            rows,
            *written,
            partial,
            *masks.args,
            *table.args,
            plan.chunk,
            plan.lookups,
            plan.rows,
            plan.windows,
            plan.programs,
            HAS_SCALE=plan.scale is not None,
            WRITE_ROWS=out is not None,
            LANES=plan.lanes,
            Q=table.meta["Q"],
            VEC=table.meta["VEC"],
            **constants,
            **masks.meta,
            **lookups.gradient_layout(dim),
        )
        if out is not None:
            launch.launch(
                combine_rows_kernel,
                (plan.windows - 1, columns),
                partial,
                plan.keys,
                plan.counts,
                places,
                *written,
                plan.chunk,
                plan.limit,
                plan.windows,
                plan.windows.bit_length(),
                GROUPED=plan.grouped,
                LANES=launch.tile_rows(dim, most=32),
                **constants,
            )
        masks.combine(plan, table)
