"""SGD, Adagrad, row-wise Adagrad and Adam on touched rows and, in them, on the kept prefix.

The kept prefix is read off the gradient: what follows its last non-zero value is left as it is, in
the weights and in the state. Stores are rounded up to 16 bytes like loads, with the old values in
the tail, so that they stay vector stores; a row belongs to one program, so nobody sees them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.triton import launch
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


@triton.jit
def touched(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    num_rows,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """This program's gradient rows, table rows, kept sizes and load bounds, all [R]."""
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = at < num_rows
    row = tl.load(rows_ptr + at, mask=live, other=0).to(tl.int64)
    size = kept_prefix(grad_ptr, at, live, D, BLOCK_D)
    return at, row, size, round_up(size, VEC)


@triton.jit
def load_tile(ptr, row, cols, bound, D: tl.constexpr):
    """fp32 tile [R, C] of rows ``row``, up to ``bound``."""
    return tl.load(
        ptr + row[:, None] * D + cols[None, :], mask=cols[None, :] < bound[:, None], other=0.0
    ).to(tl.float32)


@triton.jit
def store_tile(ptr, row, cols, bound, values, D: tl.constexpr):
    """Writes a tile back, up to ``bound``."""
    tl.store(
        ptr + row[:, None] * D + cols[None, :],
        values.to(ptr.dtype.element_ty),
        mask=cols[None, :] < bound[:, None],
    )


@triton.jit(do_not_specialize=["num_rows"])
def sgd_kernel(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    num_rows,
    lr,
    weight_decay,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """``w -= lr * (g + weight_decay * w)``.

    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, D] -> weight [N, D].
    """
    at, row, size, bound = touched(weight_ptr, rows_ptr, grad_ptr, num_rows, D, VEC, BLOCK_D, R)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        old = load_tile(weight_ptr, row, cols, bound, D)
        g = load_tile(grad_ptr, at, cols, bound, D) + weight_decay * old
        new = tl.where(cols[None, :] < size[:, None], old - lr * g, old)
        store_tile(weight_ptr, row, cols, bound, new, D)


@triton.jit(do_not_specialize=["num_rows"])
def adagrad_kernel(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    num_rows,
    lr,
    weight_decay,
    state_ptr,
    eps,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)``.

    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, D] -> weight, state [N, D].
    """
    at, row, size, bound = touched(weight_ptr, rows_ptr, grad_ptr, num_rows, D, VEC, BLOCK_D, R)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        kept = cols[None, :] < size[:, None]
        old = load_tile(weight_ptr, row, cols, bound, D)
        g = load_tile(grad_ptr, at, cols, bound, D) + weight_decay * old
        before = load_tile(state_ptr, row, cols, bound, D)
        state = tl.where(kept, before + g * g, before)
        new = tl.where(kept, old - lr * g / (tl.sqrt(state) + eps), old)
        store_tile(state_ptr, row, cols, bound, state, D)
        store_tile(weight_ptr, row, cols, bound, new, D)


@triton.jit(do_not_specialize=["num_rows"])
def rowwise_adagrad_kernel(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    num_rows,
    lr,
    weight_decay,
    state_ptr,
    eps,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """``s += mean(g^2)`` over the kept prefix, ``w -= lr * g / (sqrt(s) + eps)``.

    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, D] -> weight [N, D], state [N].
    """
    at, row, size, bound = touched(weight_ptr, rows_ptr, grad_ptr, num_rows, D, VEC, BLOCK_D, R)
    squares = tl.zeros([R], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        old = load_tile(weight_ptr, row, cols, bound, D)
        g = load_tile(grad_ptr, at, cols, bound, D) + weight_decay * old
        g = tl.where(cols[None, :] < size[:, None], g, 0.0)
        squares += tl.sum(g * g, axis=1)
    any_kept = size > 0
    state = tl.load(state_ptr + row, mask=any_kept, other=0.0).to(tl.float32)
    # Every warp that shares a row holds its own copy: none may read what another has written.
    tl.debug_barrier()
    state += squares / tl.maximum(size, 1).to(tl.float32)
    tl.store(state_ptr + row, state.to(state_ptr.dtype.element_ty), mask=any_kept)
    step = lr / (tl.sqrt(state) + eps)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        old = load_tile(weight_ptr, row, cols, bound, D)
        g = load_tile(grad_ptr, at, cols, bound, D) + weight_decay * old
        new = tl.where(cols[None, :] < size[:, None], old - step[:, None] * g, old)
        store_tile(weight_ptr, row, cols, bound, new, D)


@triton.jit(do_not_specialize=["num_rows"])
def adam_kernel(
    weight_ptr,
    rows_ptr,
    grad_ptr,
    num_rows,
    step_size,
    weight_decay,
    avg_ptr,
    avg_sq_ptr,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    inverse_root2,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """Lazy Adam: moments and weights of touched rows move.

    ``rest = 1 - beta``; ``step_size = lr / (1 - beta1^t)`` and ``inverse_root2 = (1 -
    beta2^t)^-1/2`` correct the bias and are computed on the host in double precision.
    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, D] -> weight, avg, avg_sq [N, D].
    """
    at, row, size, bound = touched(weight_ptr, rows_ptr, grad_ptr, num_rows, D, VEC, BLOCK_D, R)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        kept = cols[None, :] < size[:, None]
        old = load_tile(weight_ptr, row, cols, bound, D)
        g = load_tile(grad_ptr, at, cols, bound, D) + weight_decay * old
        m = load_tile(avg_ptr, row, cols, bound, D)
        v = load_tile(avg_sq_ptr, row, cols, bound, D)
        m = tl.where(kept, beta1 * m + rest1 * g, m)
        v = tl.where(kept, beta2 * v + rest2 * g * g, v)
        change = step_size * m / (tl.sqrt(v) * inverse_root2 + eps)
        store_tile(avg_ptr, row, cols, bound, m, D)
        store_tile(avg_sq_ptr, row, cols, bound, v, D)
        store_tile(weight_ptr, row, cols, bound, tl.where(kept, old - change, old), D)


def _apply(
    kernel: object,
    weight: Tensor,
    rows: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    rates: tuple[float, float],
    *more: object,
) -> None:
    dim = weight.shape[1]
    grads = grads.contiguous()
    wide = [weight, grads, *(s for s in state if s.dim() == 2)]
    most = launch.tile_rows(dim, most=1024)
    with launch.device_guard(weight):
        launch.launch(
            kernel,
            (launch.cdiv(rows.numel(), most),),
            weight,
            rows.contiguous(),
            grads,
            rows.numel(),
            *rates,
            *state,
            *more,
            D=dim,
            VEC=launch.vector(dim, *wide),
            BLOCK_D=launch.block_d(dim),
            R=most,
        )


def apply_sgd_(weight: Tensor, rows: Tensor, grads: Tensor, lr: float, weight_decay: float) -> None:
    """``w -= lr * (g + weight_decay * w)``."""
    _apply(sgd_kernel, weight, rows, grads, (), (lr, weight_decay))


def apply_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad``."""
    _apply(adagrad_kernel, weight, rows, grads, (state_sum,), (lr, weight_decay), eps)


def apply_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    """``s += mean(g^2)`` over the kept prefix, ``w -= lr * g / (sqrt(s) + eps)``; ``s`` is [N]."""
    _apply(rowwise_adagrad_kernel, weight, rows, grads, (state_sum,), (lr, weight_decay), eps)


def apply_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grads: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Lazy Adam: ``torch.optim.Adam`` at step ``step`` on the kept prefix of the touched rows."""
    _apply(
        adam_kernel,
        weight,
        rows,
        grads,
        (exp_avg, exp_avg_sq),
        (lr / (1 - beta1**step), weight_decay),
        eps,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
    )


OPERATORS: dict[str, Callable[..., object]] = {
    "apply_sgd_": apply_sgd_,
    "apply_adagrad_": apply_adagrad_,
    "apply_rowwise_adagrad_": apply_rowwise_adagrad_,
    "apply_adam_": apply_adam_,
}
"""Operator name to implementation."""
