"""Backwards that update the table: the sum of a row's gradient goes straight into the optimizer.

As ``reduce.py``, with a step of the optimizer where that stores a gradient: rows of one piece in
the first pass, hot rows in the second. How many rows there are is never asked, so the host waits
for nothing and, after one call to compile the kernels, a CUDA graph can hold all of it. The
learning rate and Adam's step are arguments: a captured update repeats those it was captured with.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton import backward, launch
from amtl_kernels.triton.plan import Plan, find_bags, make_plan, piece_number
from amtl_kernels.triton.reduce import (
    combine_groups,
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
    bound_vector,
    rates,
    states_per_table,
    sum_squares,
    take_counter,
    update_row_state,
    update_tile,
)
from amtl_kernels.triton.samples import sample_grad
from amtl_kernels.triton.tables import Table, load_prefix, locate, round_up, row_of_tier, tier_table


@triton.jit
def state_start(
    row,
    tiers_ptr,
    RULE: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """First value of the state of rows [R]; with tiers, of ``[3, TIERS]`` tables of their own."""
    if TIERS > 0:
        first, _ = row_of_tier(row, tiers_ptr, TIERS, 1 if RULE == ROWWISE_ADAGRAD else VEC)
    elif RULE == ROWWISE_ADAGRAD:
        first = row
    else:
        first = row * D
    return first


@triton.jit
def update_rows(
    weight_ptr,
    state_ptr,
    second_ptr,
    state_tiers_ptr,
    second_tiers_ptr,
    row,
    first,
    size,
    total,
    cols,
    lr,
    weight_decay,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    inverse_root2,
    RULE: tl.constexpr,
    D: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    STATE_VEC: tl.constexpr,
):
    """One step of rows [R] by their summed gradients ``total`` [R, C]; those of size 0 stay."""
    state_first = first
    if RULE != SGD:
        state_first = state_start(row, state_tiers_ptr, RULE, D, TIERS, STATE_VEC)
    second_first = state_first
    if RULE == ADAM:
        second_first = state_start(row, second_tiers_ptr, RULE, D, TIERS, STATE_VEC)
    root = tl.zeros_like(size).to(tl.float32)
    if RULE == ROWWISE_ADAGRAD:
        squares = sum_squares(weight_ptr, first, size, cols, total, weight_decay, VEC)
        root = update_row_state(state_ptr, state_first, size, squares, eps)
    update_tile(
        weight_ptr,
        first,
        size,
        cols,
        total,
        root,
        state_ptr,
        state_first,
        second_ptr,
        second_first,
        lr,
        weight_decay,
        eps,
        beta1,
        rest1,
        beta2,
        rest2,
        inverse_root2,
        RULE,
        VEC,
    )


@triton.jit(
    do_not_specialize=["seed_mix", "chunk", "num_lookups", "num_rows", "windows", "programs"]
)
def reduce_update_kernel(
    grad_ptr,
    source_ptr,
    scale_ptr,
    keys_ptr,
    counts_ptr,
    pieces_ptr,
    weight_ptr,
    state_ptr,
    second_ptr,
    partial_ptr,
    mask_ptr,
    mask_partial_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
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
    HAS_SCALE: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    RULE: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    VEC: tl.constexpr,
    STATE_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """First pass: sums pieces as ``reduce_rows_kernel``, and updates the rows of one piece.

    Grid (programs, ceil(D / BLOCK_D)). Weights of hot rows, which the mask gradient reads here,
    change in the second pass only; those of other rows belong to this program.
    grad [M, D], source/scale [L] -> weight, state, second [N, D] (or [N]) or tiers, partial
    [2 * windows, D] fp32, mask [G, D] fp32, mask_partial [2 * programs, D] fp32.
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
    first, size = locate(row, live, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC)
    needed = size
    if WRITE_MASK:
        needed = round_up(tl.where(live, D, 0), VEC)
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
    if WRITE_MASK:
        weight = load_prefix(weight_ptr, first, needed, cols, VEC).to(tl.float32)
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
    sole = (before != key) & (after != key)
    store_partial(partial_ptr, total, live & (sole == 0), start, chunk, windows, cols, D)
    update_rows(
        weight_ptr,
        state_ptr,
        second_ptr,
        state_tiers_ptr,
        second_tiers_ptr,
        row,
        first,
        tl.where(sole, size, 0),
        total,
        cols,
        lr,
        weight_decay,
        eps,
        beta1,
        rest1,
        beta2,
        rest2,
        inverse_root2,
        RULE,
        D,
        TIERS,
        VEC,
        STATE_VEC,
    )


@triton.jit(
    do_not_specialize=["seed_mix", "chunk", "num_lookups", "num_rows", "limit", "windows", "steps"]
)
def combine_update_kernel(
    partial_ptr,
    keys_ptr,
    weight_ptr,
    state_ptr,
    second_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    state_tiers_ptr,
    second_tiers_ptr,
    chunk,
    num_lookups,
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
    GROUPED: tl.constexpr,
    RULE: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
    STATE_VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Second pass: sums a hot row's partial sums and updates it.

    Grid (windows - 1, ceil(D / BLOCK_D)), as ``combine_rows_kernel``.
    partial [2 * windows, D] -> the hot rows of weight, state and second.
    """
    hot, key, _, slot, start, end = hot_row(keys_ptr, num_lookups, limit, chunk, windows, steps)
    if hot:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = sum_hot_row(partial_ptr, slot, start, end, cols, D, BLOCK_D, LANES)
        row = key + tl.zeros([1], tl.int64)
        if GROUPED:
            row = row % num_rows
        first, size = locate(
            row, row >= 0, sizes_ptr, row_group_ptr, tiers_ptr, seed_mix, D, Q, TIERS, VEC
        )
        update_rows(
            weight_ptr,
            state_ptr,
            second_ptr,
            state_tiers_ptr,
            second_tiers_ptr,
            row,
            first,
            size,
            total[None, :],
            cols,
            lr,
            weight_decay,
            eps,
            beta1,
            rest1,
            beta2,
            rest2,
            inverse_root2,
            RULE,
            D,
            TIERS,
            VEC,
            STATE_VEC,
        )


class _States:
    """A table's optimizer state as the kernels see it.

    Attributes:
        pointers: Two tensors at which rows' states start, None where there is none.
        tiers: Their tables of tiers, None for a dense table.
        tensors: All state tensors that rows of values start in.
    """

    def __init__(
        self, optimizer: int, weights: Sequence[Tensor], state: Sequence[Tensor], ends: Any
    ) -> None:
        count = states_per_table(optimizer)
        if len(state) != count * len(weights):
            raise ValueError(
                f"this optimizer has {count} state tensors per table, got {len(state)} for "
                f"{len(weights)}"
            )
        row_wise = optimizer == reference.ROWWISE_ADAGRAD
        for i, tensor in enumerate(state):
            table = weights[i // count]
            shape = table.shape[:1] if row_wise else table.shape
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"optimizer state must be contiguous and {list(shape)}, got "
                    f"{list(tensor.shape)}"
                )
        if any(not weight.is_contiguous() for weight in weights):
            raise ValueError("a table that is updated must be contiguous")
        self.tensors = [] if row_wise else list(state)
        self.pointers: list[Tensor | None] = [None, None]
        self.tiers: list[Tensor | None] = [None, None]
        for i in range(count):
            mine = list(state[i::count])
            if row_wise:
                mine = [tensor[:, None] for tensor in mine]
            if len({tensor.dtype for tensor in mine}) > 1:
                raise ValueError("the states of blocks differ in type")
            anchor = next((tensor for tensor in mine if tensor.numel()), mine[0])
            self.pointers[i] = anchor
            if ends is not None:
                self.tiers[i] = tier_table(mine, ends, anchor, keep=True)


def _update(
    grad: Tensor,
    plan: Plan,
    table: Table,
    weights: Sequence[Tensor],
    states: _States,
    mask: Tensor | None,
    optimizer: int,
    hyper: Sequence[float],
) -> None:
    dim, block_d = table.dim, table.meta["BLOCK_D"]
    columns = launch.cdiv(dim, block_d)
    partial, mask_partial = partial_sums(plan, plan.programs, dim, True, mask is not None)
    tensors = [weight for weight in weights if weight.numel()]
    vec = bound_vector(
        [weight.shape[1] for weight in weights],
        [*tensors, *(state for state in states.tensors if state.numel())],
    )
    constants = {name: table.meta[name] for name in ("D", "Q", "TIERS", "BLOCK_D")}
    constants |= {
        "VEC": vec,
        "STATE_VEC": min([vec, *(16 // state.element_size() for state in states.tensors)]),
        "RULE": optimizer,
    }
    scalars = rates(optimizer, hyper)
    with launch.device_guard(grad):
        launch.launch(
            reduce_update_kernel,
            (plan.programs, columns),
            grad,
            plan.source,
            plan.scale,
            plan.keys,
            plan.counts,
            plan.pieces,
            table.data,
            *states.pointers,
            partial,
            mask,
            mask_partial,
            *table.args,
            *states.tiers,
            plan.chunk,
            plan.lookups,
            plan.rows,
            plan.windows,
            plan.programs,
            *scalars,
            HAS_SCALE=plan.scale is not None,
            WRITE_MASK=mask is not None,
            GRAD_VEC=launch.vector(dim, grad),
            LANES=plan.lanes,
            **constants,
        )
        launch.launch(
            combine_update_kernel,
            (plan.windows - 1, columns),
            partial,
            plan.keys,
            table.data,
            *states.pointers,
            *table.args,
            *states.tiers,
            plan.chunk,
            plan.lookups,
            plan.rows,
            plan.limit,
            plan.windows,
            plan.windows.bit_length(),
            *scalars,
            GROUPED=plan.grouped,
            LANES=launch.tile_rows(dim, most=32),
            **constants,
        )
        if mask is not None:
            combine_groups(plan, mask_partial, mask, block_d)


def _too_wide(optimizer: int, dim: int) -> bool:
    """Whether a row-wise rule would need more of a row than a program holds."""
    return optimizer == reference.ROWWISE_ADAGRAD and dim > launch.MAX_BLOCK_D


def _run(
    table: Table,
    weights: Sequence[Tensor],
    ends: Sequence[int] | None,
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor | None,
    groups: int,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Mask gradient (with ``row_group``) and sample gradient, [0, ...] if not asked for."""
    if optimizer not in (
        reference.SGD,
        reference.ADAGRAD,
        reference.ROWWISE_ADAGRAD,
        reference.ADAM,
    ):
        raise ValueError("optimizer must be 0, 1, 2 or 3")
    state, hyper = take_counter(len(weights), state, optimizer, hyper)
    states = _States(optimizer, weights, state, ends)
    flat = indices.reshape(-1).contiguous()
    grad = grad.reshape(-1, table.dim).contiguous()
    bags = None
    if offsets is not None:
        bags = find_bags(flat, offsets, mode, padding_idx, include_last_offset)
    psw = weights[0].new_empty(0)
    if psw_grad and bags is not None:
        # Before the weights change.
        psw = sample_grad(grad, table, flat, bags, padding_idx)
    mask = torch.empty(
        0 if row_group is None else groups, table.dim, dtype=torch.float32, device=grad.device
    )
    if flat.numel() == 0:
        return mask.zero_(), psw
    plan = make_plan(
        flat,
        table.rows,
        table.dim,
        padding_idx,
        bags,
        per_sample_weights,
        row_group,
        groups,
        chunk=backward.CHUNK,
    )
    wanted = None if row_group is None else mask
    _update(grad, plan, table, weights, states, wanted, optimizer, hyper)
    return mask, psw


def masked_embedding_update_(
    weight: Tensor,
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> Tensor:
    """``masked_embedding_backward`` and the optimizer's update of the rows, kept prefixes only."""
    if _too_wide(optimizer, weight.shape[1]):
        return reference.masked_embedding_update_(
            weight,
            list(state),
            grad,
            indices,
            offsets,
            row_dims,
            per_sample_weights,
            mode,
            padding_idx,
            include_last_offset,
            psw_grad,
            optimizer,
            list(hyper),
        )
    _, psw = _run(
        Table.by_rows(weight, row_dims),
        [weight],
        None,
        state,
        grad,
        indices,
        offsets,
        None,
        0,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        psw_grad,
        optimizer,
        hyper,
    )
    return psw


def adaptive_embedding_update_(
    weight: Tensor,
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    mask_grad: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """``adaptive_embedding_backward`` and the optimizer's update of the rows.

    The mask gradient is that of the weights before the update.
    """
    if _too_wide(optimizer, weight.shape[1]):
        return reference.adaptive_embedding_update_(
            weight,
            list(state),
            grad,
            indices,
            offsets,
            row_group,
            group_dims,
            per_sample_weights,
            mode,
            padding_idx,
            include_last_offset,
            seed,
            mask_grad,
            psw_grad,
            optimizer,
            list(hyper),
        )
    return _run(
        Table.by_groups(weight, row_group, group_dims, seed),
        [weight],
        None,
        state,
        grad,
        indices,
        offsets,
        row_group if mask_grad else None,
        group_dims.shape[0],
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        psw_grad,
        optimizer,
        hyper,
    )


def tiered_embedding_update_(
    blocks: Sequence[Tensor],
    state: Sequence[Tensor],
    grad: Tensor,
    tier_ends: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> Tensor:
    """``tiered_embedding_backward`` and the optimizer's update of every block."""
    if _too_wide(optimizer, embedding_dim):
        return reference.tiered_embedding_update_(
            list(blocks),
            list(state),
            grad,
            list(tier_ends),
            indices,
            offsets,
            per_sample_weights,
            embedding_dim,
            mode,
            padding_idx,
            include_last_offset,
            psw_grad,
            optimizer,
            list(hyper),
        )
    _, psw = _run(
        Table.by_tiers(blocks, tier_ends, embedding_dim),
        blocks,
        tier_ends,
        state,
        grad,
        indices,
        offsets,
        None,
        0,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        psw_grad,
        optimizer,
        hyper,
    )
    return psw


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding_update_": masked_embedding_update_,
    "adaptive_embedding_update_": adaptive_embedding_update_,
    "tiered_embedding_update_": tiered_embedding_update_,
}
"""Operator name to implementation."""
