"""Stochastic rounding of 16-bit weights: unbiased, and the same bits in kernels and reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import RULES, Call, applying, call, states
from torch import Tensor

import amtl_kernels
from amtl_kernels import reference, rounding

from . import simulator as sim
from .calls import run

NARROW = (torch.bfloat16, torch.float16)
ROOMS = (sim.IMPLEMENTATIONS, reference.IMPLEMENTATIONS)
ROWS, DIM = 50, 24


def awkward(dtype: torch.dtype, count: int = 600) -> Tensor:
    """float32 values of every magnitude that the type knows, its subnormals included."""
    g = torch.Generator().manual_seed(1)
    low = -140 if dtype == torch.bfloat16 else -30
    exponents = torch.rand(count, generator=g) * (15 - low) + low
    values = torch.randn(count, generator=g).sign() * 2.0 ** exponents.double()
    edges = [0.0, -0.0, 1.0, -1.5, 2.0**-14, 2.0**-24, 2.0**-25, 1 + 2.0**-12]
    return torch.cat([values.float(), torch.tensor(edges)])


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of the type next below and above, both the value itself where it is one."""
    near = values.to(dtype)
    bits = near.view(torch.int16)
    step = torch.where(near == 0, 1, torch.where(near > 0, 1, -1)).to(torch.int16)
    above = torch.where(near == 0, bits.abs() * 0 + 1, bits + step).to(torch.int16).view(dtype)
    below = torch.where(near == 0, -32767, bits - step).to(torch.int16).view(dtype)
    low = torch.where(near.double() > values.double(), below, near)
    high = torch.where(near.double() < values.double(), above, near)
    return low.double(), high.double()


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """The mean of 4,096 roundings, each to a neighbour, is within 5 standard errors of the value.

    One rounding is low or high with the probabilities 1 - p and p that keep the mean, so a mean of
    n has the standard error ``(high - low) sqrt(p (1 - p) / n)``.
    """
    count = 4096
    values = awkward(dtype)
    columns = values.numel()
    total = torch.zeros(columns, dtype=torch.float64)
    low, high = neighbours(values, dtype)
    for number in range(count):
        bits = rounding.rounding_bits(torch.tensor([7]), columns, number)
        rounded = rounding.round_stochastically(values[None], dtype, bits)[0].double()
        assert ((rounded == low) | (rounded == high)).all()
        total += rounded
    p = (values.double() - low) / (high - low).clamp(min=1e-300)
    deviation = (high - low) * (p * (1 - p) / count).sqrt()
    # Chances are multiples of 2^-24.
    coarse = (high - low) * 2.0**-24
    assert ((total / count - values.double()).abs() <= 5 * deviation + coarse).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_past_the_largest_number_rounding_is_to_nearest(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    values = torch.tensor([top, -top, top * (1 + 2.0**-13), math.inf, -math.inf, math.nan])
    bits = torch.full((1, 6), 0xFFFFFFFF)
    rounded = rounding.round_stochastically(values[None], dtype, bits)[0]
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert rounded[:3].isfinite().all()


def weight_and_grad(dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights of many magnitudes, among them fp16 subnormals, and gradients to match."""
    scale = 2.0 ** (-torch.arange(DIM).double())
    weight = (torch.randn(ROWS, DIM, generator=g) * scale).to(dtype)
    return weight, (torch.randn(ROWS, DIM, generator=g) * scale).to(dtype)


def rounding_step(number: float, rounds: bool) -> list[float]:
    """The last of ``hyper``."""
    return [number, 1.0] if rounds else [number]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [1, 2**40 + 3])
def test_updates_round_as_the_reference_does(rule: str, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(2)
    weight, grads = weight_and_grad(dtype, g)
    state = states(rule, [weight], partial(torch.rand, generator=g))
    rows = torch.randperm(ROWS, generator=g)[:30].sort().values
    grads = grads[:30].contiguous()
    results = []
    for room, rounds in ((ROOMS[0], True), (ROOMS[1], True), (ROOMS[1], False)):
        w, s = weight.clone(), [moment.clone() for moment in state]
        hyper = [1e-3, 1e-6, 0.01, 0.9, 0.99, *rounding_step(seed, rounds)]
        run("apply_", applying([w], [rows], [grads], rule, hyper, s), room)
        results.append(w)
    assert torch.equal(*results[:2])
    assert not torch.equal(*results[1:])


def fused_call(kind: str, dtype: torch.dtype) -> Call:
    """A fused update with one lookup a row: sums are exact, so only rounding can differ."""
    g = torch.Generator().manual_seed(3)
    weight, grad = weight_and_grad(dtype, g)
    indices = torch.randperm(ROWS, generator=g)
    sizes = torch.randint(0, DIM + 1, (ROWS,), generator=g).int()
    if kind == "masked":
        return call([weight], indices, grad, sizes=[sizes])
    if kind == "adaptive":
        groups = {"row_groups": [torch.arange(ROWS).int() // 5], "sizes": [sizes[:10].contiguous()]}
        return call([weight], indices, grad, **groups, seed=3)
    blocks = [weight[:20].contiguous(), weight[20:, :8].contiguous()]
    return call(blocks, indices, grad, dims=[DIM])


def run_fused(
    room: Any, kind: str, dtype: torch.dtype, rule: str, hyper: list[float], counter: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks and states after a step, whose number a ``counter`` above 0 holds."""
    of = fused_call(kind, dtype)
    blocks = of.tables["blocks"]
    state = states(rule, blocks, partial(torch.full, fill_value=0.1))
    given = [*state, torch.tensor(counter)] if counter else state
    # The reference makes its backward and its update of other operators.
    with amtl_kernels.use_backend("reference"):
        run("lookup_update_", of.update(rule, hyper, given, blocks), room)
    return blocks, state


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["masked", "adaptive", "tiered"])
def test_fused_updates_round_as_the_reference_does(kind: str, dtype: torch.dtype) -> None:
    """Rows of a tier are hashed by their number in the tier, as the reference has them."""
    hyper = [1e-3, 0.0, 0.0, 0.0, 0.0, 9.0, 1.0]
    got, want = (run_fused(room, kind, dtype, "sgd", hyper)[0] for room in ROOMS)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [300, 520])
def test_wide_row_wise_steps_round_as_the_reference_does(dim: int, dtype: torch.dtype) -> None:
    """Gradients of 1 upon a state of 3 divide by 2: all is exact but the rounding."""
    results = []
    for room in ROOMS:
        g = torch.Generator().manual_seed(6)
        weight = torch.randn(ROWS, dim, generator=g).to(dtype)
        blocks = [weight[:20].contiguous(), weight[20:].contiguous()]
        state = states("rowwise_adagrad", blocks, partial(torch.full, fill_value=3.0))
        grad = torch.ones(ROWS, dim, dtype=dtype)
        of = call(blocks, torch.randperm(ROWS, generator=g), grad)
        hyper = [2.0**-9, 0.0, 0.0, 0.0, 0.0, 9.0, 1.0]
        with amtl_kernels.use_backend("reference"):
            run("lookup_update_", of.update("rowwise_adagrad", hyper, state, blocks), room)
        assert all(torch.equal(moment, torch.full_like(moment, 4.0)) for moment in state)
        results.append(blocks)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["masked", "adaptive", "tiered"])
@pytest.mark.parametrize("room", ROOMS)
def test_a_counter_on_the_device_is_the_step(kind: str, room: Any) -> None:
    """A counter takes the place of the step of ``hyper``, in rounding and in bias correction."""
    hyper = [1e-3, 1e-6, 0.0, 0.9, 0.99, 9.0, 1.0]
    other = [*hyper[:5], 1.0, 1.0]
    want, _ = run_fused(room, kind, torch.bfloat16, "sgd", hyper)
    got, _ = run_fused(room, kind, torch.bfloat16, "sgd", other, counter=9)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    want, want_states = run_fused(room, kind, torch.float32, "adam", hyper)
    got, got_states = run_fused(room, kind, torch.float32, "adam", other, counter=9)
    for a, b in zip([*got, *got_states], [*want, *want_states], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("counted", [False, True])
def test_several_tables_round_as_the_reference_does(dtype: torch.dtype, counted: bool) -> None:
    """Rows are hashed by their number in their own table, in one call of all as in many."""
    results = []
    for room in ROOMS:
        g = torch.Generator().manual_seed(4)
        weights, grads = zip(*(weight_and_grad(dtype, g) for _ in range(3)), strict=True)
        of = call(
            weights,
            torch.cat([torch.randperm(ROWS, generator=g) for _ in weights]),
            torch.cat(grads, 1),
            sizes=[torch.randint(0, DIM + 1, (ROWS,), generator=g).int() for _ in weights],
            offsets=torch.arange(3 * ROWS + 1),
        )
        state = [torch.tensor(9)] if counted else []
        hyper = [1e-3, 0.0, 0.0, 0.0, 0.0, 1.0 if counted else 9.0, 1.0]
        with amtl_kernels.use_backend("reference"):
            run("lookup_update_", of.update("sgd", hyper, state, list(weights)), room)
        results.append(weights)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", NARROW)
def test_sums_that_stall_to_nearest_move(dtype: torch.dtype) -> None:
    """400 steps of an eighth of half a unit each: to nearest none moves, at random all arrive.

    A weight's error is a sum of 400 roundings of at most ``eps``, so the mean of n weights has a
    standard error below ``eps / 2 sqrt(400 / n)``; the interval is five of these.
    """
    steps, eps = 400, torch.finfo(dtype).eps
    rate = eps / 16
    weight = torch.ones(ROWS, DIM, dtype=dtype)
    nearest = weight.clone()
    rows, grads = torch.arange(ROWS), torch.ones(ROWS, DIM, dtype=dtype)
    for number in range(1, steps + 1):
        for table, rounds in ((weight, True), (nearest, False)):
            hyper = [rate, 0.0, 0.0, 0.0, 0.0, *rounding_step(number, rounds)]
            run("apply_", applying([table], [rows], [grads], "sgd", hyper))
    assert torch.equal(nearest, torch.ones_like(nearest))
    error = eps / 2 * math.sqrt(steps / weight.numel())
    assert abs(weight.double().mean().item() - (1 - steps * rate)) < 5 * error
