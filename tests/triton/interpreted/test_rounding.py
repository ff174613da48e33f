"""Stochastic rounding and steps counted on the device: the reference's bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import RULES, applying, call, in_order, states
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference
from amtl_kernels._arguments import Step
from amtl_kernels.triton import implementations, launch, plan, rules

OPERATORS = implementations()
EXPECTED = reference.IMPLEMENTATIONS
NARROW = [torch.float16, torch.bfloat16]
ROWS, DIM = 40, 24
# Of weight and gradients: from 1 down to fp16's smallest steps.
SCALE = 2.0 ** -torch.arange(DIM).double()


def draw(dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight, grad = (torch.randn(ROWS, DIM, generator=g) * SCALE for _ in range(2))
    # Without zeros: the reference ends a kept prefix at the last value that is none.
    grad = torch.where(grad.to(dtype) == 0, 2.0**-20, grad)
    return weight.to(dtype), grad.to(dtype)


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit in the interpreter; a GPU fuses multiplications and additions."""
    if launch.INTERPRETED:
        assert torch.equal(got.cpu(), want)
    else:
        assert (got.cpu() != want).double().mean() < 0.01


def tenths(rule: str, tables: list[Tensor]) -> list[Tensor]:
    return states(rule, tables, partial(torch.full, fill_value=0.1, device=tables[0].device))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("seed", [1, 2**40 + 3])
def test_given_gradients(rule: str, dtype: torch.dtype, seed: int, device: str) -> None:
    """The seed is the step, by ``hyper`` or by a counter on the device."""
    g = torch.Generator().manual_seed(2)
    weight, grads = draw(dtype, g)
    rows = torch.randperm(ROWS, generator=g)[:30].sort().values
    grads = grads[:30]

    def apply(
        operators: Any, where: str, step: int, *stochastic: float, counter: int | None = None
    ) -> Tensor:
        table, touched = weight.to(where, copy=True), rows.to(where)
        state = tenths(rule, [table])
        if counter is not None:
            state.append(torch.tensor(counter, device=where))
        hyper = [1e-3, 1e-6, 0.01, 0.9, 0.99, float(step), *stochastic]
        arguments = applying([table], [touched], [grads.to(where)], rule, hyper, state)
        operators["apply_"](*in_order("apply_", arguments))
        return table

    want = apply(EXPECTED, "cpu", seed, 1.0)
    got = apply(OPERATORS, device, seed, 1.0)
    same(got, want)
    assert not torch.equal(got, apply(OPERATORS, device, seed))
    if rule != "adam":  # Whose corrections for a counter differ in the last bit.
        assert torch.equal(apply(OPERATORS, device, 7, 1.0, counter=seed), got)


def fused(
    operators: Any,
    kind: str,
    device: str,
    dtype: torch.dtype,
    rule: str,
    hyper: list[float],
    *end: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tables and states after an update in which each row has one lookup, so that sums are exact.

    ``end`` is the counter, if there is one.
    """
    g = torch.Generator().manual_seed(3)
    weight, grad = draw(dtype, g)
    indices = torch.randperm(ROWS, generator=g).to(device)
    sizes = torch.randint(0, DIM + 1, (ROWS,), generator=g).int().to(device)
    group = (torch.arange(ROWS).int() // 5).to(device)
    weight, grad = weight.to(device, copy=True), grad.to(device)
    tables = [weight]
    described: dict[str, Any] = {"sizes": [sizes]}
    if kind == "tiered":
        tables = [weight[:20].clone(), weight[20:32].clone(), weight[32:, :8].clone()]
        described = {"dims": [DIM]}
    elif kind == "adaptive":
        described = {"sizes": [sizes[:10].contiguous()], "row_groups": [group], "seed": 3}
    state = tenths(rule, tables)
    given = [*state, *(torch.tensor(value, device=device) for value in end)]
    arguments = call(tables, indices, grad, **described).update(rule, hyper, given, tables)
    with ak.use_backend("reference"):
        operators["lookup_update_"](*in_order("lookup_update_", arguments))
    return tables, state


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["masked", "adaptive", "tiered"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("counter", [(), (2**33 + 9,)])
def test_fused_updates(
    kind: str, dtype: torch.dtype, rule: str, counter: tuple[int, ...], device: str
) -> None:
    """Rows are hashed by their number in their own tensor, by the counter's step if there is any.

    Adam's corrections for a counter differ in the last bit, and with them some roundings.
    """
    if counter and rule == "adam":
        rule = "sgd"
    hyper = [1e-3, 1e-6, 0.0, 0.9, 0.99, 9.0, 1.0]
    got, _ = fused(OPERATORS, kind, device, dtype, rule, hyper, *counter)
    want, _ = fused(EXPECTED, kind, "cpu", dtype, rule, hyper, *counter)
    for a, b in zip(got, want, strict=True):
        same(a, b)


@triton.jit
def one_minus_exp_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, rules.one_minus_exp(tl.load(x_ptr + at)))


def test_small_corrections_keep_their_digits(device: str) -> None:
    """As ``-expm1``: a subtraction from 1 is wrong in the fifth digit at 0.999's first step."""
    x = -torch.logspace(-9, 2, 256, dtype=torch.float64, device=device).float()
    out = torch.empty_like(x)
    one_minus_exp_kernel[(1,)](x, out, BLOCK=256)
    torch.testing.assert_close(out.double(), -x.double().expm1(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["masked", "adaptive", "tiered"])
@pytest.mark.parametrize("steps", [1, 2, 7, 60, 693, 10**6])
def test_adams_steps_counted_on_the_device(kind: str, steps: int, device: str) -> None:
    """In place of the step of ``hyper``; corrections are float32, of few steps by a series."""
    hyper = [1.0, 1e-6, 0.0, 0.9, 0.999, 5.0]
    got, states = fused(OPERATORS, kind, device, torch.float32, "adam", hyper, steps)
    want, wanted = fused(EXPECTED, kind, "cpu", torch.float32, "adam", hyper, steps)
    for a, b in zip([*got, *states], [*want, *wanted], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=3e-6, atol=5e-7)


def test_float32_tables_are_not_rounded(device: str) -> None:
    hyper = [1e-3, 0.0, 0.0, 0.0, 0.0, 9.0]
    results = [
        fused(OPERATORS, "masked", device, torch.float32, "sgd", [*hyper, r]) for r in (0.0, 1.0)
    ]
    assert torch.equal(results[0][0][0], results[1][0][0])


def test_hot_rows_are_rounded_in_the_second_pass(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of many lookups, with gradients whose sums are exact."""
    monkeypatch.setattr(plan, "CHUNK", 8)
    results = []
    for operators, where in ((OPERATORS, device), (EXPECTED, "cpu")):
        weight = torch.ones(5, DIM, dtype=torch.bfloat16, device=where)
        grad = torch.full((50, DIM), 2.0**-12, dtype=torch.bfloat16, device=where)
        sizes = torch.full((5,), DIM, dtype=torch.int32, device=where)
        indices = torch.full((50,), 3, device=where)
        hyper = [0.25, 0.0, 0.0, 0.0, 0.0, 7.0, 1.0]
        of = call([weight], indices, grad, sizes=[sizes])
        arguments = of.update("sgd", hyper, blocks=[weight])
        with ak.use_backend("reference"):
            operators["lookup_update_"](*in_order("lookup_update_", arguments))
        results.append(weight.cpu())
    assert torch.equal(*results)
    assert results[0][3].unique().numel() == 2
    assert results[0][:3].eq(1).all() and results[0][4].eq(1).all()


@pytest.mark.parametrize("counter", [(), (9,)])
def test_several_tables(counter: tuple[int, ...], device: str) -> None:
    """One counter counts for all tables."""
    results = []
    for operators, where in ((OPERATORS, device), (EXPECTED, "cpu")):
        g = torch.Generator().manual_seed(4)
        weights, grads = zip(*(draw(torch.bfloat16, g) for _ in range(3)), strict=True)
        tables = [w.to(where, copy=True) for w in weights]
        sizes = [torch.randint(0, DIM + 1, (ROWS,), generator=g).int().to(where) for _ in tables]
        indices = torch.cat([torch.randperm(ROWS, generator=g) for _ in tables]).to(where)
        of_all = call(
            tables,
            indices,
            torch.cat(grads, 1).to(where),
            sizes=sizes,
            offsets=torch.arange(3 * ROWS + 1, device=where),
        )
        state = tenths("adagrad", tables)
        state += [torch.tensor(value, device=where) for value in counter]
        hyper = [1e-3, 1e-6, 0.0, 0.0, 0.0, 1.0, 1.0]
        arguments = of_all.update("adagrad", hyper, state, tables)
        with ak.use_backend("reference"):
            operators["lookup_update_"](*in_order("lookup_update_", arguments))
        results.append(tables)
    for got, want in zip(*results, strict=True):
        same(got, want)


def test_bad_counters_are_refused(device: str) -> None:
    weight = torch.ones(4, DIM, device=device)
    for state, message in (
        ([weight, weight], "one int64"),
        ([weight, torch.zeros(2, dtype=torch.int64, device=device)], "one int64"),
        ([weight, weight, torch.tensor(1, device=device)], "at most a step counter"),
    ):
        with pytest.raises(ValueError, match=message):
            rules.check_states(Step(state, reference.ADAGRAD, []), [weight])
