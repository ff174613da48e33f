"""Backwards that update the table: the sum of a row's gradient goes straight into the optimizer.

As ``reduce.py``, with a step of the optimizer where that stores a gradient: rows of one piece in
the first pass, hot rows in the second. How many rows there are is never asked, so the host waits
for nothing and, after one call to compile the kernels, a CUDA graph can hold all of it. The
learning rate is an argument: a captured update repeats the one it was captured with, and the step
too, unless a counter on the device follows the states.

Rows wider than a tile are shared by several programs, but for row-wise Adagrad, which needs the sum
of squares of a whole row first: there a program owns its rows' ``BLOCKS`` column blocks and sums
gradients twice, once for the squares and once for the step, since a row doesn't fit its registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels._arguments import Step, Wishes
from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import Lookups
from amtl_kernels.triton.plan import Plan, make_plan, piece_number
from amtl_kernels.triton.reduce import (
    RUN_TIME,
    Masks,
    hot_row,
    partial_sums,
    read_pieces,
    store_partial,
    sum_groups,
    sum_hot_row,
    sum_pieces,
)
from amtl_kernels.triton.rules import (
    ADAM,
    ROWWISE_ADAGRAD,
    SGD,
    States,
    bound_vector,
    rates,
    rounds,
    seed_of_step,
    step_rates,
    sum_squares,
    update_row_state,
    update_tile,
)
from amtl_kernels.triton.samples import sample_grad
from amtl_kernels.triton.tables import Table, place, round_up, row_of_tier, size_at


@triton.jit
def state_start(
    row,
    tier,
    tiers_ptr,
    RULE: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """First value of the state of rows [R]; with tiers, of ``[3, TIERS]`` tables of their own."""
    if TIERS > 0:
        first, _ = row_of_tier(row, tier, tiers_ptr, TIERS, 1 if RULE == ROWWISE_ADAGRAD else VEC)
    elif RULE == ROWWISE_ADAGRAD:
        first = row
    else:
        first = row * D
    return first


@triton.jit
def states_start(
    row,
    tier,
    state_tiers_ptr,
    second_tiers_ptr,
    RULE: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """As :func:`state_start`, of both states; anything for a state that the rule has not."""
    first = row
    if RULE != SGD:
        first = state_start(row, tier, state_tiers_ptr, RULE, D, TIERS, VEC)
    second = first
    if RULE == ADAM:
        second = state_start(row, tier, second_tiers_ptr, RULE, D, TIERS, VEC)
    return first, second


@triton.jit(do_not_specialize=[*RUN_TIME, "programs"])
def reduce_update_kernel(
    grad_ptr,
    source_ptr,
    scale_ptr,
    keys_ptr,
    counts_ptr,
    pieces_ptr,
    partial_ptr,
    mask_ptr,
    mask_partial_ptr,
    group_tiers_ptr,
    weight_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    state_ptr,
    second_ptr,
    state_tiers_ptr,
    second_tiers_ptr,
    chunk,
    num_lookups,
    num_rows,
    windows,
    programs,
    lr,
    weight_decay,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    inverse_root2,
    log1,
    log2,
    rounding_mix,
    step_ptr,
    HAS_SCALE: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    GROUP_TIERS: tl.constexpr,
    GRAD_STEP: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    RULE: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    STATE_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """First pass: sums pieces as ``reduce_rows_kernel``, and updates the rows of one piece.

    Grid (programs, ceil(D / BLOCK_D) / BLOCKS). Weights of hot rows, which the mask gradient reads
    here, change in the second pass only; those of other rows belong to this program.
    grad [M, D], source/scale [L] -> weight, state, second [N, D] (or [N]) or tiers, partial
    [2 * windows, D] fp32, mask [G, D] fp32, mask_partial [2 * programs, D] fp32.
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
    first, width, tier, number = place(row, tiers_ptr, D, TIERS, VEC)
    size = size_at(
        number, width, tier, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, Q, TIERS, VEC
    )
    needed = size
    if WRITE_MASK:
        needed = round_up(tl.where(live, width, 0).to(tl.int32), VEC)
    gradient = (grad_ptr, source_ptr, scale_ptr)
    total = sum_pieces(
        gradient, pieces, needed, cols, HAS_SCALE, GRAD_STEP, GRAD_VEC, BLOCK_D, LANES
    )
    sole = (before != key) & (after != key)
    size = tl.where(sole, size, 0)
    state_first, second_first = states_start(
        row, tier, state_tiers_ptr, second_tiers_ptr, RULE, D, TIERS, STATE_VEC
    )
    root = tl.zeros([LANES], tl.float32)
    if RULE == ROWWISE_ADAGRAD:
        squares = sum_squares(weight_ptr, first, size, cols, total, weight_decay, VEC)
        for block in tl.range(1, BLOCKS):
            more = cols + block * BLOCK_D
            total = sum_pieces(
                gradient, pieces, needed, more, HAS_SCALE, GRAD_STEP, GRAD_VEC, BLOCK_D, LANES
            )
            squares += sum_squares(weight_ptr, first, size, more, total, weight_decay, VEC)
        root = update_row_state(state_ptr, state_first, size, squares, eps)
    lr, inverse_root2 = step_rates(lr, inverse_root2, log1, log2, step_ptr, RULE)
    rounding_seed = seed_of_step(rounding_mix, step_ptr)
    row_place = (first, size, number, state_first, second_first)
    masks = (mask_ptr, mask_partial_ptr, group_tiers_ptr)
    scalars = (lr, weight_decay, eps, beta1, rest1, beta2, rest2, inverse_root2)
    for block in tl.range(0, BLOCKS):
        more = cols + block * BLOCK_D
        if BLOCKS > 1:
            total = sum_pieces(
                gradient, pieces, needed, more, HAS_SCALE, GRAD_STEP, GRAD_VEC, BLOCK_D, LANES
            )
        if WRITE_MASK:
            sum_groups(
                weight_ptr,
                first,
                needed,
                total,
                pieces,
                masks,
                num_rows,
                programs,
                more,
                D,
                GROUP_TIERS,
                VEC,
                LANES,
            )
        store_partial(partial_ptr, total, live & (sole == 0), start, chunk, windows, more, D)
        update_tile(
            weight_ptr,
            state_ptr,
            second_ptr,
            row_place,
            more,
            total,
            root,
            scalars,
            rounding_seed,
            RULE,
            ROUND,
            VEC,
        )


@triton.jit(do_not_specialize=[*RUN_TIME, "limit", "steps"])
def combine_update_kernel(
    partial_ptr,
    keys_ptr,
    weight_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    state_ptr,
    second_ptr,
    state_tiers_ptr,
    second_tiers_ptr,
    chunk,
    num_rows,
    limit,
    windows,
    steps,
    lr,
    weight_decay,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    inverse_root2,
    log1,
    log2,
    rounding_mix,
    step_ptr,
    GROUPED: tl.constexpr,
    RULE: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    STATE_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: sums a hot row's partial sums and updates it.

    Grid (windows - 1, ceil(D / BLOCK_D) / BLOCKS), as ``combine_rows_kernel``.
    partial [2 * windows, D] -> the hot rows of weight, state and second.
    """
    hot, key, _, slot, start, end = hot_row(keys_ptr, limit, chunk, windows, steps)
    if hot:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = sum_hot_row(partial_ptr, slot, start, end, cols, D, BLOCK_D, LANES)[None, :]
        row = key + tl.zeros([1], tl.int64)
        if GROUPED:
            row = row % num_rows
        first, width, tier, number = place(row, tiers_ptr, D, TIERS, VEC)
        size = size_at(
            number,
            width,
            tier,
            row >= 0,
            sizes_ptr,
            row_group_ptr,
            tiers_ptr,
            seed_mix,
            Q,
            TIERS,
            VEC,
        )
        state_first, second_first = states_start(
            row, tier, state_tiers_ptr, second_tiers_ptr, RULE, D, TIERS, STATE_VEC
        )
        root = tl.zeros([1], tl.float32)
        if RULE == ROWWISE_ADAGRAD:
            squares = sum_squares(weight_ptr, first, size, cols, total, weight_decay, VEC)
            for block in tl.range(1, BLOCKS):
                more = cols + block * BLOCK_D
                total = sum_hot_row(partial_ptr, slot, start, end, more, D, BLOCK_D, LANES)[None, :]
                squares += sum_squares(weight_ptr, first, size, more, total, weight_decay, VEC)
            root = update_row_state(state_ptr, state_first, size, squares, eps)
        lr, inverse_root2 = step_rates(lr, inverse_root2, log1, log2, step_ptr, RULE)
        rounding_seed = seed_of_step(rounding_mix, step_ptr)
        row_place = (first, size, number, state_first, second_first)
        scalars = (lr, weight_decay, eps, beta1, rest1, beta2, rest2, inverse_root2)
        for block in tl.range(0, BLOCKS):
            more = cols + block * BLOCK_D
            if BLOCKS > 1:
                total = sum_hot_row(partial_ptr, slot, start, end, more, D, BLOCK_D, LANES)[None, :]
            update_tile(
                weight_ptr,
                state_ptr,
                second_ptr,
                row_place,
                more,
                total,
                root,
                scalars,
                rounding_seed,
                RULE,
                ROUND,
                VEC,
            )


def _launch(
    lookups: Lookups,
    plan: Plan,
    table: Table,
    weights: Sequence[Tensor],
    states: States,
    mask: Tensor | None,
    step: Step,
) -> None:
    dim = table.dim
    columns = launch.cdiv(dim, table.meta["BLOCK_D"])
    blocks = columns if step.optimizer == reference.ROWWISE_ADAGRAD else 1
    partial, masks = partial_sums(plan, dim), Masks(plan, mask, dim)
    aligned = [*weights, *states.tensors]
    vec = bound_vector(
        [weight.shape[1] for weight in weights], [tensor for tensor in aligned if tensor.numel()]
    )
    constants = {name: table.meta[name] for name in ("D", "Q", "TIERS", "BLOCK_D")}
    constants |= {
        "VEC": vec,
        "STATE_VEC": min([vec, *(16 // state.element_size() for state in states.tensors)]),
        "BLOCKS": blocks,
        "RULE": step.optimizer,
        "ROUND": rounds(weights, step),
    }
    where = (table.data, *table.args, *states.pointers, *states.tiers)
    scalars = (*rates(step, states.counter is not None), states.counter)
    with launch.device_guard(lookups.indices):
        launch.launch(
            reduce_update_kernel,
            (plan.programs, columns // blocks),
            lookups.values,
            plan.source,
            plan.scale,
            plan.keys,
            plan.counts,
            plan.pieces,
            partial,
            *masks.args,
            *where,
            plan.chunk,
            plan.lookups,
            plan.rows,
            plan.windows,
            plan.programs,
            *scalars,
            HAS_SCALE=plan.scale is not None,
            LANES=plan.lanes,
            **lookups.gradient_layout(dim),
            **masks.meta,
            **constants,
        )
        launch.launch(
            combine_update_kernel,
            (plan.windows - 1, columns // blocks),
            partial,
            plan.keys,
            *where,
            plan.chunk,
            plan.rows,
            plan.limit,
            plan.windows,
            plan.windows.bit_length(),
            *scalars,
            GROUPED=plan.grouped,
            LANES=launch.tile_rows(dim, most=32),
            **constants,
        )
        masks.combine(plan, table)


def update(
    lookups: Lookups, table: Table, weights: Sequence[Tensor], wishes: Wishes, step: Step
) -> tuple[Tensor, Tensor]:
    """One step of one table or several. No wait.

    Args:
        lookups: What was looked up, and the incoming gradient.
        table: The table, or the tables.
        weights: Its one tensor, or those of its tiers or tables.
        wishes: The gradients wanted, those of masks by the weights before the step.
        step: The optimizer's.

    Returns:
        Mask gradients (flat, fp32) and the gradient of per-sample weights [L]; [0] where they are
        not wanted.

    Raises:
        ValueError: No such rule, or states that do not fit the weights.
    """
    states = States(step, weights, table.ends)
    masks = lookups.mask_gradients(table.dim, wishes.mask_grad)
    mask = masks if masks.numel() else None
    # Before the weights change.
    psw = sample_grad(lookups, table, wishes.psw_grad)
    if lookups.indices.numel():
        plan = make_plan(lookups, table, mask is not None)
        _launch(lookups, plan, table, weights, states, mask, step)
    elif mask is not None:
        mask.zero_()
    return masks, psw
