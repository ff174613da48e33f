"""The optimizers' formulas, as the fused and the standalone kernels share them.

A store is rounded up to 16 bytes like a load, with the old values in the tail, so that it stays a
vector store; a row belongs to one program, so nobody sees them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton.tables import round_up

SGD = tl.constexpr(reference.SGD)
ADAGRAD = tl.constexpr(reference.ADAGRAD)
ROWWISE_ADAGRAD = tl.constexpr(reference.ROWWISE_ADAGRAD)
ADAM = tl.constexpr(reference.ADAM)


@triton.jit
def load_tile(ptr, first, cols, bound):
    """fp32 tile [R, C] of rows that start at ``first`` [R], up to ``bound`` [R]."""
    return tl.load(
        ptr + first[:, None] + cols[None, :], mask=cols[None, :] < bound[:, None], other=0.0
    ).to(tl.float32)


@triton.jit
def store_tile(ptr, first, cols, bound, values):
    """Writes a tile back, up to ``bound``."""
    tl.store(
        ptr + first[:, None] + cols[None, :],
        values.to(ptr.dtype.element_ty),
        mask=cols[None, :] < bound[:, None],
    )


@triton.jit
def sum_squares(weight_ptr, first, size, cols, grad, weight_decay, VEC: tl.constexpr):
    """fp32 [R], of the kept gradient with weight decay: what row-wise Adagrad adds up."""
    g = grad + weight_decay * load_tile(weight_ptr, first, cols, round_up(size, VEC))
    g = tl.where(cols[None, :] < size[:, None], g, 0.0)
    return tl.sum(g * g, axis=1)


@triton.jit
def update_row_state(state_ptr, at, size, squares, eps):
    """``s += mean(g^2)`` of rows [R] whose state is at ``at``; returns ``sqrt(s) + eps``."""
    state = tl.load(state_ptr + at, mask=size > 0, other=0.0).to(tl.float32)
    # Every warp that shares a row holds its own copy: none may read what another has written.
    tl.debug_barrier()
    state += squares / tl.maximum(size, 1).to(tl.float32)
    tl.store(state_ptr + at, state.to(state_ptr.dtype.element_ty), mask=size > 0)
    return tl.sqrt(state) + eps


@triton.jit
def update_tile(
    weight_ptr,
    first,
    size,
    cols,
    grad,
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
    RULE: tl.constexpr,
    VEC: tl.constexpr,
):
    """One step of columns ``cols`` [C] of rows [R], of which those before ``size`` are kept.

    Rows start at ``first`` in the weights and at ``state_first`` and ``second_first`` in the
    states; ``root`` [R] is row-wise Adagrad's. A row of size 0 is left alone. For Adam ``lr`` is
    ``lr / (1 - beta1^t)``, ``rest = 1 - beta`` and ``inverse_root2 = (1 - beta2^t)^-1/2``.
    """
    bound = round_up(size, VEC)
    kept = cols[None, :] < size[:, None]
    old = load_tile(weight_ptr, first, cols, bound)
    g = grad + weight_decay * old
    if RULE == SGD:
        change = lr * g
    elif RULE == ROWWISE_ADAGRAD:
        change = lr / root[:, None] * g
    elif RULE == ADAGRAD:
        state = load_tile(state_ptr, state_first, cols, bound)
        state = tl.where(kept, state + g * g, state)
        change = lr * g / (tl.sqrt(state) + eps)
    else:
        state = load_tile(state_ptr, state_first, cols, bound)
        second = load_tile(second_ptr, second_first, cols, bound)
        state = tl.where(kept, beta1 * state + rest1 * g, state)
        second = tl.where(kept, beta2 * second + rest2 * g * g, second)
        change = lr * state / (tl.sqrt(second) * inverse_root2 + eps)
    # Tiles with fewer values than threads are held several times over: as in the row's state.
    tl.debug_barrier()
    store_tile(weight_ptr, first, cols, bound, tl.where(kept, old - change, old))
    if RULE == ADAGRAD or RULE == ADAM:  # noqa: SIM109
        store_tile(state_ptr, state_first, cols, bound, state)
    if RULE == ADAM:
        store_tile(second_ptr, second_first, cols, bound, second)


def states_per_table(optimizer: int) -> int:
    """State tensors that an optimizer keeps for a table."""
    return {reference.SGD: 0, reference.ADAM: 2}.get(optimizer, 1)


def take_counter(
    tables: int, state: Sequence[Tensor], optimizer: int, hyper: Sequence[float]
) -> tuple[Sequence[Tensor], Sequence[float]]:
    """The state without the step counter that may follow it, and ``hyper`` with its value.

    Reading it waits for the GPU.
    """
    if len(state) != tables * states_per_table(optimizer) + 1:
        return state, hyper
    return state[:-1], [*hyper[:5], float(state[-1]), *hyper[6:]]


def rates(optimizer: int, hyper: Sequence[float]) -> tuple[float, ...]:
    """The kernels' scalars, from ``lr, eps, weight_decay, beta1, beta2, step``.

    Returns:
        ``lr, weight_decay, eps, beta1, rest1, beta2, rest2, inverse_root2`` of
        :func:`update_tile`; Adam's corrections in double precision.
    """
    lr, eps, weight_decay, beta1, beta2, step, *stochastic = hyper
    if any(stochastic):
        raise NotImplementedError("the Triton kernels do not round stochastically")
    if optimizer != reference.ADAM:
        return lr, weight_decay, eps, 0.0, 0.0, 0.0, 0.0, 0.0
    return (
        lr / (1 - beta1**step),
        weight_decay,
        eps,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
    )


def bound_vector(widths: Sequence[int], tensors: Sequence[Tensor]) -> int:
    """Values to which load bounds of rows in all ``tensors`` may be rounded up.

    As many as the narrowest type has in 16 bytes, where all rows of ``widths`` values start on
    them.
    """
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return 1
    for lanes in sorted({16 // tensor.element_size() for tensor in tensors}, reverse=True):
        if not any(width % lanes for width in widths):
            return lanes
    return 1
