"""Optimizers: the kept prefix moves as in the reference, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton import implementations, launch

OPERATORS = implementations()
RATES: dict[str, tuple[Any, ...]] = {
    "apply_sgd_": (0.1, 0.01),
    "apply_adagrad_": (0.1, 1e-8, 0.01),
    "apply_rowwise_adagrad_": (0.1, 1e-8, 0.01),
    "apply_adam_": (3, 0.1, 0.9, 0.999, 1e-8, 0.01),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def state_of(op: str, rows: int, dim: int, device: str) -> list[Tensor]:
    if op == "apply_rowwise_adagrad_":
        return [torch.rand(rows, device=device)]
    count = {"apply_sgd_": 0, "apply_adagrad_": 1, "apply_adam_": 2}[op]
    return [torch.rand(rows, dim, device=device) for _ in range(count)]


def gradient(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows that end in zeros, one of zeros only, and zeros inside the kept prefix."""
    grads = torch.randn(rows, dim, device=device)
    kept = torch.randint(0, dim + 1, (rows, 1), device=device)
    grads = torch.where(torch.arange(dim, device=device) < kept, grads, 0)
    return torch.where(torch.rand_like(grads) < 0.1, 0, grads).to(dtype)


def compare(op: str, rows: int, touched: int, dim: int, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(rows, dim, device=device).to(dtype)
    row_numbers = torch.randperm(rows, device=device)[:touched].sort().values
    grads = gradient(touched, dim, dtype, device)
    got = [weight, *state_of(op, rows, dim, device)]
    want = [tensor.double() for tensor in got]
    before = [tensor.clone() for tensor in got]
    OPERATORS[op](*got, row_numbers, grads, *RATES[op])
    reference.IMPLEMENTATIONS[op](*want, row_numbers, grads.double(), *RATES[op])
    for new, wide, old in zip(got, want, before, strict=True):
        torch.testing.assert_close(new.double(), wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        touched_values = torch.zeros_like(new, dtype=torch.bool)
        kept = reference.kept_prefix(grads)
        touched_values[row_numbers] = kept if new.dim() == 2 else kept.any(1)
        assert torch.equal(new[~touched_values], old[~touched_values])


@pytest.mark.parametrize("op", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates(op: str, dtype: torch.dtype, device: str) -> None:
    for dim in (1, 3, 17, 64, 129):
        compare(op, 50, 30, dim, dtype, device)
    compare(op, 5, 0, 8, dtype, device)


@pytest.mark.parametrize("op", RATES)
def test_updates_of_rows_wider_than_a_tile(
    op: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 16)
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 64)
    for dim in (33, 48):
        compare(op, 20, 9, dim, torch.float32, device)


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    op=st.sampled_from(list(RATES)),
    rows=st.integers(1, 60),
    share=st.floats(0, 1),
    dim=st.integers(1, 80),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_drawn_updates(
    op: str, rows: int, share: float, dim: int, dtype: torch.dtype, seed: int, device: str
) -> None:
    torch.manual_seed(seed)
    compare(op, rows, int(rows * share), dim, dtype, device)


def test_nan_gradient_counts_as_a_value(device: str) -> None:
    weight = torch.ones(2, 8, device=device)
    grads = torch.zeros(1, 8, device=device)
    grads[0, 4] = float("nan")
    OPERATORS["apply_sgd_"](weight, torch.tensor([1], device=device), grads, 0.1, 0.0)
    assert weight[1, :4].eq(1).all() and weight[1, 4].isnan() and weight[1, 5:].eq(1).all()
    assert weight[0].eq(1).all()
