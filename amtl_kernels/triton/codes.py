"""Tables of few bits: what a number is, and updates of codes.

Rows are found as those of any tiers, of codes in bytes. An update takes gradients of rows, one
launch for rows with one step size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels._arguments import Step
from amtl_kernels.reference_updates import CodePart
from amtl_kernels.triton import launch
from amtl_kernels.triton.rules import (
    ROWWISE_ADAGRAD,
    check_states,
    rates,
    seed_of_step,
    update_row_state,
)
from amtl_kernels.triton.tables import mix, row_term


@triton.jit
def load_pairs(at, kept):
    """Two bytes each, the lower one first, as int32: codes may begin at any address."""
    low = tl.load(at, mask=kept, other=0).to(tl.int32)
    return low | (tl.load(at + 1, mask=kept, other=0).to(tl.int32) << 8)


@triton.jit
def decode(
    table_ptr,
    first,
    width,
    tier,
    live,
    cols,
    steps_ptr,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
):
    """Numbers [R, C] of rows [R] at columns [C], 0 beyond a row's width and where not ``live``.

    ``first`` and ``width`` count codes in bytes, floats in numbers; a tier has one step size.
    """
    PAIRS: tl.constexpr = CODED and BITS == 16
    PER: tl.constexpr = 8 // BITS if CODED and not PAIRS else 1
    LAST: tl.constexpr = (1 << BITS) - 1
    numbers = width // 2 if PAIRS else width * PER
    kept = live[:, None] & (cols[None, :] < numbers[:, None])
    if PAIRS:
        stored = load_pairs(table_ptr + first[:, None] + (cols * 2)[None, :], kept)
    else:
        stored = tl.load(table_ptr + first[:, None] + (cols // PER)[None, :], mask=kept, other=0)
    step = tl.load(steps_ptr + tier, mask=live, other=1.0)[:, None]
    if CODED:
        code = (stored.to(tl.int32) >> ((cols % PER) * BITS)[None, :]) & LAST
        code = code.to(tl.float32)
    else:
        code = tl.div_rn(stored.to(tl.float32), step + tl.zeros_like(stored).to(tl.float32))
        code = code + LAST * 0.5
        # Comparisons leave a NaN; from 2^23 on numbers are whole, and ties go to the even one.
        code = tl.where(code < 0.0, 0.0, tl.where(code > LAST, LAST * 1.0, code))
        code = (code + 8388608.0) - 8388608.0
    return tl.where(kept, (code - LAST * 0.5) * step, 0.0)


@triton.jit
def load_codes(codes_ptr, row, kept, at, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Words ``at`` [C] of rows [R] as int32, 0 where not ``kept`` [R, C].

    A word is a byte, or the two bytes of a code of 16 bits.
    """
    if BITS == 16:
        word = load_pairs(codes_ptr + row[:, None] * BYTES + (at * 2)[None, :], kept)
    else:
        start = codes_ptr + row[:, None] * BYTES
        word = tl.load(start + at[None, :], mask=kept, other=0).to(tl.int32)
    return word


@triton.jit
def store_codes(codes_ptr, row, kept, at, word, BITS: tl.constexpr, BYTES: tl.constexpr):
    """The inverse of ``load_codes``."""
    if BITS == 16:
        start = codes_ptr + row[:, None] * BYTES + (at * 2)[None, :]
        tl.store(start, (word & 255).to(tl.uint8), mask=kept)
        tl.store(start + 1, (word >> 8).to(tl.uint8), mask=kept)
    else:
        start = codes_ptr + row[:, None] * BYTES + at[None, :]
        tl.store(start, word.to(tl.uint8), mask=kept)


@triton.jit
def number_and_grad(
    word,
    grad_ptr,
    u,
    kept,
    at,
    step,
    decay,
    E: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Number ``E`` of each word [R, C], and its gradient with weight decay."""
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS
    WIDTH: tl.constexpr = BYTES * 8 // BITS
    LAST: tl.constexpr = (1 << BITS) - 1
    number = (((word >> (E * BITS)) & LAST).to(tl.float32) - LAST * 0.5) * step
    columns = (at * PER + E)[None, :]
    grad = tl.load(grad_ptr + u[:, None] * WIDTH + columns, mask=kept, other=0.0)
    return number, grad + decay * number


@triton.jit(do_not_specialize=["num_rows", "before", "rounding_mix"])
def update_codes_kernel(
    codes_ptr,
    rows_ptr,
    grad_ptr,
    state_ptr,
    size_ptr,
    num_rows,
    before,
    lr,
    weight_decay,
    eps,
    rounding_mix,
    step_ptr,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """One step of rows of codes by their gradients, rounded at random so that the mean is kept.

    Grid (ceil(U / R)), a program owns R rows. rows [U], grad [U, BYTES * 8 / BITS] -> codes
    [N, BYTES], state [N]; ``size`` [1] is the step size, and ``before`` are the rows of the block
    before these.
    """
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS
    WORDS: tl.constexpr = BYTES // 2 if BITS == 16 else BYTES
    LAST: tl.constexpr = (1 << BITS) - 1
    u = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = u < num_rows
    row = tl.load(rows_ptr + u, mask=live, other=0).to(tl.int64)
    step = tl.load(size_ptr)
    root = tl.zeros([R], tl.float32)
    if RULE == ROWWISE_ADAGRAD:
        for start in tl.range(0, WORDS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            kept = live[:, None] & (at[None, :] < WORDS)
            word = load_codes(codes_ptr, row, kept, at, BITS, BYTES)
            for e in tl.static_range(PER):
                _, g = number_and_grad(
                    word, grad_ptr, u, kept, at, step, weight_decay, e, BITS, BYTES
                )
                root += tl.sum(tl.where(kept, g * g, 0.0), axis=1)
        size = tl.where(live, WORDS * PER, 0).to(tl.int32)
        root = update_row_state(state_ptr, row, size, root, eps)
    seed = row_term(before + row) + seed_of_step(rounding_mix, step_ptr)
    for start in tl.range(0, WORDS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = live[:, None] & (at[None, :] < WORDS)
        word = load_codes(codes_ptr, row, kept, at, BITS, BYTES)
        changed = tl.zeros([R, BLOCK], tl.int32)
        for e in tl.static_range(PER):
            number, g = number_and_grad(
                word, grad_ptr, u, kept, at, step, weight_decay, e, BITS, BYTES
            )
            if RULE == ROWWISE_ADAGRAD:
                number -= lr / root[:, None] * g
            else:
                number -= lr * g
            code = tl.div_rn(number, step + tl.zeros([R, BLOCK], tl.float32)) + LAST * 0.5
            # A NaN is not above zero.
            code = tl.where(code > 0.0, code, 0.0)
            code = tl.where(code < LAST, code, LAST * 1.0)
            whole = tl.floor(code)
            column = (at * PER + e).to(tl.uint32) * tl.full([], 0xC2B2AE3D, tl.uint32)
            random = mix(seed[:, None] + column[None, :])
            up = (random >> 8).to(tl.float32) < (code - whole) * 16777216.0
            changed |= (whole + tl.where(up, 1.0, 0.0)).to(tl.int32) << (e * BITS)
        # Tiles with fewer values than threads are held several times over.
        tl.debug_barrier()
        store_codes(codes_ptr, row, kept, at, changed, BITS, BYTES)


def update_codes(
    blocks: Sequence[Tensor],
    parts: Sequence[CodePart],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: Step,
) -> None:
    """One step of the parts of tables of codes, a launch a part.

    Args:
        blocks: The codes.
        parts: What has one step size.
        rows: Of each part, [U], each row once, counted from the part's start.
        grads: Their gradients, [U, w].
        step: Of SGD or row-wise Adagrad.
    """
    states, counter = check_states(step, blocks)
    found = rates(step, counter is not None)
    scalars = (found.lr, found.weight_decay, found.eps, found.rounding_mix, counter)
    for part, mine, grad in zip(parts, rows, grads, strict=True):
        codes = blocks[part.block][part.start :]
        moments = [each[part.start :] for each in states[part.block]]
        if codes.shape[1] == 0 or mine.numel() == 0:
            continue
        # A code of 16 bits is one word of two bytes, and others share a byte.
        words = codes.shape[1] // max(1, part.bits // 8)
        most = launch.tile_rows(words, most=1024)
        with launch.device_guard(codes):
            launch.launch(
                update_codes_kernel,
                (launch.cdiv(mine.numel(), most),),
                *(codes, mine, grad, *(*moments, None)[:1], part.step),
                *(mine.numel(), part.start, *scalars),
                RULE=step.optimizer,
                BITS=part.bits,
                BYTES=codes.shape[1],
                BLOCK=launch.block_d(words),
                R=most,
            )
