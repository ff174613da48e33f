"""SGD, Adagrad, row-wise Adagrad and Adam on touched rows and, in them, on the kept prefix.

The kept prefix is read off the gradient: what follows its last non-zero value is left as it is, in
the weights and in the state.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels._arguments import Step
from amtl_kernels.triton import launch
from amtl_kernels.triton.rules import (
    ROWWISE_ADAGRAD,
    bound_vector,
    check_states,
    load_tile,
    rates,
    rounds,
    seed_of_step,
    step_rates,
    sum_squares,
    update_row_state,
    update_tile,
)
from amtl_kernels.triton.tables import round_up


@triton.jit
def kept_prefix(grad_ptr, at, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Position after the last non-zero value (NaN counts) of gradient rows ``at`` [R]."""
    size = tl.zeros_like(at).to(tl.int32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        grad = tl.load(
            grad_ptr + at[:, None] * D + cols[None, :],
            mask=live[:, None] & (cols[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        size = tl.maximum(size, tl.max(tl.where(grad != 0.0, cols[None, :] + 1, 0), axis=1))
    return size


@triton.jit(do_not_specialize=["num_rows", "rounding_mix"])
def apply_kernel(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    state_ptr,
    second_ptr,
    num_rows,
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
    RULE: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """One step of the rows ``rows``, by their gradients.

    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, D] -> weight, state, second
    [N, D]; row-wise Adagrad's state is [N].
    """
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = at < num_rows
    row = tl.load(rows_ptr + at, mask=live, other=0).to(tl.int64)
    size = kept_prefix(grad_ptr, at, live, D, BLOCK_D)
    bound = round_up(size, VEC)
    root = tl.zeros([R], tl.float32)
    if RULE == ROWWISE_ADAGRAD:
        for start in tl.range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            grad = load_tile(grad_ptr, at * D, cols, bound)
            root += sum_squares(weight_ptr, row * D, size, cols, grad, weight_decay, VEC)
        root = update_row_state(state_ptr, row, size, root, eps)
    lr, inverse_root2 = step_rates(lr, inverse_root2, log1, log2, step_ptr, RULE)
    rounding_seed = seed_of_step(rounding_mix, step_ptr)
    place = (row * D, size, row, row * D, row * D)
    scalars = (lr, weight_decay, eps, beta1, rest1, beta2, rest2, inverse_root2)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        grad = load_tile(grad_ptr, at * D, cols, bound)
        update_tile(
            weight_ptr,
            state_ptr,
            second_ptr,
            place,
            cols,
            grad,
            root,
            scalars,
            rounding_seed,
            RULE,
            ROUND,
            VEC,
        )


def apply_(blocks: list[Tensor], rows: list[Tensor], grads: list[Tensor], step: Step) -> None:
    """The optimizer's update of every block's ``rows``, a launch a block.

    A step counter behind the states counts in place of the step's number; nothing waits for it.

    Args:
        blocks: Tables or tiers, each [N, D].
        rows: Of each block, [U], each row once.
        grads: Their gradients, [U, D].
        step: The optimizer's.

    Raises:
        ValueError: No such rule, or a state that does not fit its block.
    """
    states, counter = check_states(step, blocks)
    scalars = (*rates(step, counter is not None), counter)
    for block, mine, touched, grad in zip(blocks, states, rows, grads, strict=True):
        dim = block.shape[1]
        if dim == 0:
            continue
        grad = grad.contiguous()
        most = launch.tile_rows(dim, most=1024)
        with launch.device_guard(block):
            launch.launch(
                apply_kernel,
                (launch.cdiv(touched.numel(), most),),
                block,
                touched.contiguous(),
                grad,
                *(*mine, None, None)[:2],
                touched.numel(),
                *scalars,
                RULE=step.optimizer,
                ROUND=rounds([block], step),
                D=dim,
                VEC=bound_vector([dim], [block, grad, *(s for s in mine if s.dim() == 2)]),
                BLOCK_D=launch.block_d(dim),
                R=most,
            )
