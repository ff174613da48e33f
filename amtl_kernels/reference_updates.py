"""What the optimizers do with gradients of rows, in plain PyTorch: a part of ``reference``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amtl_kernels._arguments import ADAM, Step
from amtl_kernels.rounding import (
    code_stochastically,
    decode_codes,
    pack_codes,
    round_stochastically,
    rounding_bits,
)


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of a type are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_prefix(grads: Tensor) -> Tensor:
    """``[U, D]`` bool: True up to the last non-zero value of each gradient row."""
    if grads.numel() == 0:
        return grads.to(torch.bool)
    return (grads != 0).to(torch.uint8).flip(1).cummax(1).values.flip(1).to(torch.bool)


def _touch(
    weight: Tensor, rows: Tensor, grads: Tensor, kept: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Touched weights, and their gradients with weight decay.

    Past the kept prefix the gradient is zero, whatever the weights are there.
    """
    compute = compute_type(weight.dtype)
    old = weight[rows].to(compute)
    return old, torch.where(kept, grads.to(compute) + weight_decay * old, 0.0)


def _write(
    weight: Tensor, rows: Tensor, kept: Tensor, values: Tensor, rounding_seed: int | None
) -> None:
    """Writes the kept prefix of the rows; what lies past it stays, bit for bit."""
    values = torch.where(kept, values, weight[rows].to(values.dtype))
    if rounding_seed is None or weight.element_size() != 2:
        weight[rows] = values.to(weight.dtype)
    else:
        bits = rounding_bits(rows, weight.shape[1], rounding_seed)
        weight[rows] = round_stochastically(values, weight.dtype, bits)


def _apply_sgd(
    weight: Tensor,
    rows: Tensor,
    grads: Tensor,
    kept: Tensor,
    lr: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``w -= lr * (g + weight_decay * w)``."""
    old, g = _touch(weight, rows, grads, kept, weight_decay)
    _write(weight, rows, kept, old - lr * g, rounding_seed)


def _apply_adagrad(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    kept: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad``."""
    old, g = _touch(weight, rows, grads, kept, weight_decay)
    state = state_sum[rows].to(g.dtype)
    state = torch.where(kept, state + g * g, state)
    state_sum[rows] = state.to(state_sum.dtype)
    _write(weight, rows, kept, old - lr * g / (state.sqrt() + eps), rounding_seed)


def _apply_rowwise_adagrad(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    kept: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``s += mean(g^2)`` over the kept prefix, ``w -= lr * g / (sqrt(s) + eps)``; ``s`` is [N]."""
    old, g = _touch(weight, rows, grads, kept, weight_decay)
    state, size = state_sum[rows].to(g.dtype), kept.sum(1)
    state = torch.where(size > 0, state + (g * g).sum(1) / size, state)
    state_sum[rows] = state.to(state_sum.dtype)
    _write(weight, rows, kept, old - lr * g / (state.sqrt() + eps)[:, None], rounding_seed)


def _apply_adam(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grads: Tensor,
    kept: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """Lazy Adam: ``torch.optim.Adam`` at step ``step`` on the kept prefix of the touched rows."""
    old, g = _touch(weight, rows, grads, kept, weight_decay)
    m = exp_avg[rows].to(g.dtype)
    v = exp_avg_sq[rows].to(g.dtype)
    m = torch.where(kept, beta1 * m + (1 - beta1) * g, m)
    v = torch.where(kept, beta2 * v + (1 - beta2) * g * g, v)
    exp_avg[rows] = m.to(exp_avg.dtype)
    exp_avg_sq[rows] = v.to(exp_avg_sq.dtype)
    change = lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    _write(weight, rows, kept, old - change, rounding_seed)


_UPDATES: tuple[Callable[..., None], ...] = (
    _apply_sgd,
    _apply_adagrad,
    _apply_rowwise_adagrad,
    _apply_adam,
)
"""By the number of the optimizer."""


def _plan(blocks: Sequence[Tensor], step: Step) -> tuple[list[Sequence[Tensor]], list[float], int]:
    """States of each block, the rule's numbers, and which step it is."""
    lr, eps, weight_decay, beta1, beta2 = step.hyper[:5]
    states, counter = step.states(blocks)
    number = step.number if counter is None else int(counter)
    rates: list[float] = [lr, *([eps] if step.optimizer else []), weight_decay]
    if step.optimizer == ADAM:
        rates = [number, lr, beta1, beta2, eps, weight_decay]
    return states, rates, number


def update(
    blocks: list[Tensor],
    rows: list[Tensor],
    grads: list[Tensor],
    kept: list[Tensor],
    step: Step,
) -> None:
    """Updates the kept values of ``rows``."""
    states, rates, number = _plan(blocks, step)
    for c, block in enumerate(blocks):
        seed = number if step.stochastic_rounding else None
        _UPDATES[step.optimizer](block, *states[c], rows[c], grads[c], kept[c], *rates, seed)


class CodePart(NamedTuple):
    """Rows of a block of codes with one step size.

    Attributes:
        block: Its number.
        start: The first of the rows.
        step: Their step size.
        bits: Of a code.
    """

    block: int
    start: int
    step: Tensor
    bits: int


def update_codes(
    blocks: list[Tensor],
    parts: list[CodePart],
    rows: list[Tensor],
    grads: list[Tensor],
    kept: list[Tensor],
    step: Step,
) -> None:
    """Updates ``rows`` of each part, counted from its start, as those of a table of floats.

    Their numbers are decoded, updated, and rounded at random to codes again. States are row-wise.
    """
    states, rates, number = _plan(blocks, step)
    for part, mine, g, keeps in zip(parts, rows, grads, kept, strict=True):
        if not mine.numel():
            continue
        block, at = blocks[part.block], part.start + mine
        numbers = decode_codes(block[at], part.step, part.bits)
        touched = [each[at] for each in states[part.block]]
        every = torch.arange(len(at), device=at.device)
        _UPDATES[step.optimizer](numbers, *touched, every, g, keeps, *rates)
        for each, values in zip(states[part.block], touched, strict=True):
            each[at] = values
        random = rounding_bits(at, numbers.shape[1], number)
        block[at] = pack_codes(
            code_stochastically(numbers, part.step, part.bits, random), part.bits
        )
