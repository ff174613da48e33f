"""Optimizers: the kept prefix moves as in the reference, and nothing else is touched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import RULES, applying, in_order, states, wide
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton import implementations, launch

OPERATORS = implementations()
HYPER = [0.1, 1e-8, 0.01, 0.9, 0.999, 3.0]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def gradient(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows that end in zeros, one of zeros only, and zeros inside the kept prefix."""
    grads = torch.randn(rows, dim, device=device)
    kept = torch.randint(0, dim + 1, (rows, 1), device=device)
    grads = torch.where(torch.arange(dim, device=device) < kept, grads, 0)
    return torch.where(torch.rand_like(grads) < 0.1, 0, grads).to(dtype)


def compare(
    rule: str, rows: int, touched: int, dims: list[int], dtype: torch.dtype, device: str
) -> None:
    """Blocks of ``dims`` columns, in one call."""
    blocks = [torch.randn(rows, dim, device=device).to(dtype) for dim in dims]
    touched_rows = [torch.randperm(rows, device=device)[:touched].sort().values for _ in dims]
    grads = [gradient(touched, dim, dtype, device) for dim in dims]
    state = states(rule, blocks, partial(torch.rand, device=device))
    arguments = applying(blocks, touched_rows, grads, rule, HYPER, state)
    double = wide(arguments)
    before = [tensor.clone() for tensor in (*blocks, *state)]
    OPERATORS["apply_"](*in_order("apply_", arguments))
    reference.IMPLEMENTATIONS["apply_"](*in_order("apply_", double))
    moments = len(state) // len(blocks)
    of_block = [*range(len(blocks)), *(c for c in range(len(blocks)) for _ in range(moments))]
    got, want = [*blocks, *state], [*double["blocks"], *double["state"]]
    for c, new, exact, old in zip(of_block, got, want, before, strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(new.double(), exact, rtol=tolerance, atol=tolerance)
        touched_values = torch.zeros_like(new, dtype=torch.bool)
        kept = reference.kept_prefix(grads[c])
        touched_values[touched_rows[c]] = kept if new.dim() == 2 else kept.any(1)
        assert torch.equal(new[~touched_values], old[~touched_values])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates(rule: str, dtype: torch.dtype, device: str) -> None:
    compare(rule, 50, 30, [1, 3, 17, 64, 129, 0], dtype, device)
    compare(rule, 5, 0, [8], dtype, device)


@pytest.mark.parametrize("rule", RULES)
def test_updates_of_rows_wider_than_a_tile(
    rule: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 16)
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 64)
    compare(rule, 20, 9, [33, 48], torch.float32, device)


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rule=st.sampled_from([*RULES]),
    rows=st.integers(1, 60),
    share=st.floats(0, 1),
    dim=st.integers(1, 80),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_drawn_updates(
    rule: str, rows: int, share: float, dim: int, dtype: torch.dtype, seed: int, device: str
) -> None:
    torch.manual_seed(seed)
    compare(rule, rows, int(rows * share), [dim], dtype, device)


def test_nan_gradient_counts_as_a_value(device: str) -> None:
    weight = torch.ones(2, 8, device=device)
    grads = torch.zeros(1, 8, device=device)
    grads[0, 4] = float("nan")
    rows, hyper = torch.tensor([1], device=device), [0.1, *[0.0] * 4, 1.0]
    arguments = applying([weight], [rows], [grads], "sgd", hyper)
    OPERATORS["apply_"](*in_order("apply_", arguments))
    assert weight[1, :4].eq(1).all() and weight[1, 4].isnan() and weight[1, 5:].eq(1).all()
    assert weight[0].eq(1).all()


def test_nothing_changes_where_a_state_does_not_fit(device: str) -> None:
    """All blocks are checked before the first is updated."""
    blocks = [torch.ones(3, 8, device=device), torch.ones(4, 8, device=device)]
    rows, grads = [torch.tensor([1], device=device)] * 2, [torch.ones(1, 8, device=device)] * 2
    state = [torch.zeros(3, 8, device=device), torch.zeros(5, 8, device=device)]
    arguments = applying(blocks, rows, grads, "adagrad", HYPER, state)
    with pytest.raises(ValueError, match=r"must be contiguous and \[4, 8\]"):
        OPERATORS["apply_"](*in_order("apply_", arguments))
    assert all(block.eq(1).all() for block in blocks) and not state[0].any()
