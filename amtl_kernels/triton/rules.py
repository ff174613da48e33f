"""The optimizers' formulas, as the fused and the standalone kernels share them.

A store is rounded up to 16 bytes like a load, with the old values in the tail, so that it stays a
vector store; a row belongs to one program, so nobody sees them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels._arguments import MOMENTS, Step
from amtl_kernels.triton.tables import (
    first_with_memory,
    mix,
    mix_seed,
    round_up,
    row_term,
    tier_table,
)

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
def round_randomly(values, bits, HALF: tl.constexpr):
    """fp32 tile moved to one of its two neighbours in fp16 (``HALF``) or bf16, by random ``bits``.

    As ``rounding.round_stochastically``; numbers that a neighbour is not there for stay.
    """
    DROPPED: tl.constexpr = 13 if HALF else 16
    raw = values.to(tl.uint32, bitcast=True)
    magnitude = raw & tl.full([], 0x7FFFFFFF, tl.uint32)
    low = bits & tl.full([], (1 << DROPPED) - 1, tl.uint32)
    up = ((raw + low) >> DROPPED) << DROPPED
    if HALF:
        # Below 2^-14 fp16 is a grid of steps of 2^-24, whatever the exponent.
        scaled = tl.where(magnitude < 0x38800000, tl.abs(values), 0.0) * 16777216.0
        whole = tl.floor(scaled)
        more = (bits >> 8).to(tl.float32) < (scaled - whole) * 16777216.0
        steps = tl.where(more, whole + 1.0, whole) * (1.0 / 16777216.0)
        signed = steps.to(tl.uint32, bitcast=True) | ((raw >> 31) << 31)
        up = tl.where(magnitude < 0x38800000, signed, up)
    LARGEST: tl.constexpr = 0x477FE000 if HALF else 0x7F7F0000
    return tl.where(magnitude < LARGEST, up, raw).to(tl.float32, bitcast=True)


@triton.jit
def seed_of_step(seed_mix, step_ptr):
    """The seed's part of the hash, uint32: ``seed_mix`` or, if there is one, a counter's."""
    mixed = seed_mix.to(tl.uint32)
    if step_ptr is not None:
        step = tl.load(step_ptr)
        mixed = (step ^ (step >> 32)).to(tl.uint32) * tl.full([], 0x85EBCA77, tl.uint32)
    return mixed


@triton.jit
def one_minus_exp(x):
    """``1 - e^x`` of a scalar below 0, without the digits that the subtraction would lose."""
    near = 1.0 + x * (1.0 / 9)
    near = 1.0 + x * (1.0 / 8) * near
    near = 1.0 + x * (1.0 / 7) * near
    near = 1.0 + x * (1.0 / 6) * near
    near = 1.0 + x * (1.0 / 5) * near
    near = 1.0 + x * (1.0 / 4) * near
    near = 1.0 + x * (1.0 / 3) * near
    near = 1.0 + x * (1.0 / 2) * near
    return tl.where(x > -0.5, -x * near, 1.0 - tl.exp(x))


@triton.jit
def step_rates(lr, inverse_root2, log1, log2, step_ptr, RULE: tl.constexpr):
    """Adam's ``lr`` and ``inverse_root2``, corrected for the counter's step if there is one."""
    if (RULE == ADAM) and (step_ptr is not None):
        step = tl.load(step_ptr).to(tl.float32)
        lr = lr / one_minus_exp(step * log1)
        inverse_root2 = 1.0 / tl.sqrt(one_minus_exp(step * log2))
    return lr, inverse_root2


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
    state_ptr,
    second_ptr,
    place,
    cols,
    grad,
    root,
    scalars,
    seed_mix,
    RULE: tl.constexpr,
    ROUND: tl.constexpr,
    VEC: tl.constexpr,
):
    """One step of columns ``cols`` [C] of rows [R], of which those before their size are kept.

    ``place`` tells where rows start in the weights, their sizes, their numbers within their own
    tensor, and where they start in the two states, all [R]; ``root`` [R] is row-wise Adagrad's. A
    row of size 0 is left alone. ``scalars`` are the first eight of :class:`Rates`: for Adam ``lr``
    is ``lr / (1 - beta1^t)``, ``rest = 1 - beta`` and ``inverse_root2 = (1 - beta2^t)^-1/2``.
    With ``ROUND`` weights are rounded by the hash of ``seed_mix`` and the rows' numbers.
    """
    first, size, number, state_first, second_first = place
    lr, weight_decay, eps, beta1, rest1, beta2, rest2, inverse_root2 = scalars
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
    new = tl.where(kept, old - change, old)
    if ROUND:
        column = cols.to(tl.uint32) * tl.full([], 0xC2B2AE3D, tl.uint32)
        bits = mix((row_term(number) + seed_mix)[:, None] + column[None, :])
        new = round_randomly(new, bits, weight_ptr.dtype.element_ty == tl.float16)
    store_tile(weight_ptr, first, cols, bound, new)
    if RULE == ADAGRAD or RULE == ADAM:  # noqa: SIM109
        store_tile(state_ptr, state_first, cols, bound, state)
    if RULE == ADAM:
        store_tile(second_ptr, second_first, cols, bound, second)


class Rates(NamedTuple):
    """The kernels' scalars, see :func:`update_tile` and :func:`step_rates`."""

    lr: float
    weight_decay: float
    eps: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    inverse_root2: float
    log1: float
    log2: float
    rounding_mix: int


def rates(step: Step, counted: bool) -> Rates:
    """Scalars of a step; corrections in double precision.

    If steps are ``counted`` on the device, kernels correct for them, and its number means nothing.
    """
    lr, eps, weight_decay, beta1, beta2 = step.hyper[:5]
    root, log1, log2 = 1.0, 0.0, 0.0
    if step.optimizer == reference.ADAM and counted:
        log1, log2 = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    elif step.optimizer == reference.ADAM:
        lr /= 1 - beta1**step.number
        root = (1 - beta2**step.number) ** -0.5
    return Rates(
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        inverse_root2=root,
        log1=log1,
        log2=log2,
        rounding_mix=mix_seed(step.number),
    )


def rounds(weights: Sequence[Tensor], step: Step) -> bool:
    """Whether tables are rounded stochastically: only 16-bit ones are."""
    return step.stochastic_rounding and weights[0].element_size() == 2


def check_states(
    step: Step, blocks: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], Tensor | None]:
    """State of every block, and the step counter that may follow (None if it does not).

    Raises:
        ValueError: No such rule, or a state that does not fit its block.
    """
    states, counter = step.states(blocks)
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        raise ValueError("the step counter must be one int64")
    for block, mine in zip(blocks, states, strict=True):
        shape = block.shape[:1] if step.optimizer == reference.ROWWISE_ADAGRAD else block.shape
        for tensor in mine:
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"optimizer state must be contiguous and {list(shape)}, got "
                    f"{list(tensor.shape)}"
                )
        if not block.is_contiguous():
            raise ValueError("a table that is updated must be contiguous")
    return states, counter


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


class States:
    """A table's optimizer state as the kernels see it.

    Attributes:
        pointers: Two tensors at which rows' states start, None where there is none.
        tiers: Their tables of tiers, None for a dense table.
        tensors: All state tensors that rows of values start in.
        counter: One int64 that counts the steps, or None.
    """

    def __init__(self, step: Step, weights: Sequence[Tensor], ends: Any) -> None:
        states, self.counter = check_states(step, weights)
        row_wise = step.optimizer == reference.ROWWISE_ADAGRAD
        self.tensors = [] if row_wise else [tensor for mine in states for tensor in mine]
        self.pointers: list[Tensor | None] = [None, None]
        self.tiers: list[Tensor | None] = [None, None]
        for i in range(MOMENTS[step.optimizer]):
            mine = [of_block[i] for of_block in states]
            if row_wise:
                mine = [tensor.unsqueeze(1) for tensor in mine]
            if len({tensor.dtype for tensor in mine}) > 1:
                raise ValueError("the states of blocks differ in type")
            anchor = first_with_memory(mine)
            self.pointers[i] = anchor
            if ends is not None:
                self.tiers[i] = tier_table(mine, ends, anchor, keep=True)
