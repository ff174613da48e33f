"""Budgets are solved natively, and what is found is what PyTorch's operations find."""

from __future__ import annotations

import math

import pytest
import torch
from amtl.layer.budget import fit_shifts, fit_tilts
from hypothesis import given, settings
from hypothesis import strategies as st

import amtl_kernels
from amtl_kernels import backend

pytestmark = pytest.mark.skipif(
    "error" in amtl_kernels.build_info()["native"], reason="no native module: make test builds it"
)


def both(solver, *given):
    """What is found natively, and by PyTorch."""
    native, backend.native = backend.native, None
    try:
        want = solver(*given)
    finally:
        backend.native = native
    calls = []

    class Watched:
        def fit(self, *numbers):
            calls.append(native.fit(*numbers))
            return calls[-1]

    backend.native = Watched()
    try:
        return solver(*given), want, calls
    finally:
        backend.native = native


shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 63, 64, 130]), st.integers(2, 20))


def tables(seed, shape):
    """Rows and steps of tables, and a generator."""
    g = torch.Generator().manual_seed(seed)
    count, groups, levels = shape
    rows = torch.randint(0, 50, (count, groups), generator=g).double()
    steps = torch.randint(0, 3, (count, levels), generator=g).double()
    return g, rows, steps


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(0, 10**6), st.sampled_from([0, 0.1, 0.7, 2]), st.booleans())
def test_shifts_are_those_of_pytorch(shape, seed, share, ties):
    g, rows, steps = tables(seed, shape)
    count, groups, levels = shape
    score = torch.randn(count, groups, generator=g).double() * 3
    score = score.round() if ties else score
    thresholds = (torch.randn(count, levels, generator=g).double() * 4).sort(-1)[0]
    capacity = (rows.sum(-1) * steps.sum(-1) * share).floor()
    got, want, calls = both(fit_shifts, score, rows, thresholds, steps, capacity)
    assert calls == [True] and torch.equal(got, want)
    turned = score.T.contiguous().T
    assert torch.equal(fit_shifts(turned, rows, thresholds, steps, capacity), want)


@settings(max_examples=150, deadline=None)
@given(
    shapes,
    st.integers(0, 10**6),
    st.sampled_from([0, 0.1, 0.7, 2]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["", "avx2", "generic"]),
)
def test_tilts_are_those_of_pytorch(shape, seed, share, ties, dtype, capability):
    g, rows, steps = tables(seed, shape)
    logits = torch.randn(*shape, generator=g).to(dtype)
    logits = logits.round() if ties else logits
    sizes = torch.rand(shape[2], generator=g).to(dtype).add(0.05).cumsum(0)
    stored = steps.cumsum(-1)
    capacity = (rows.sum(-1) * stored[:, -1] * share).floor()
    backend.native.use_cpu_capability(capability)
    try:
        got, want, calls = both(fit_tilts, logits, rows, sizes, stored, capacity)
    finally:
        backend.native.use_cpu_capability("")
    assert calls == [True] and got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_pytorch(odd):
    _, rows, steps = tables(0, (2, 5, 4))
    score = torch.arange(10.0).double().view(2, 5)
    score[1, 2] = odd
    thresholds = torch.arange(4.0).double().expand(2, 4)
    got, want, calls = both(fit_shifts, score, rows, thresholds, steps, rows.sum(-1))
    assert calls == [False] and torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    logits = torch.arange(40.0).view(2, 5, 4)
    logits[1, 2, 3] = odd
    given = logits, rows, torch.arange(4.0), steps.cumsum(-1), rows.sum(-1)
    got, want, calls = both(fit_tilts, *given)
    assert calls == [False] and torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_the_module_refuses_other_calls():
    with pytest.raises(TypeError, match="fit takes 10 numbers"):
        backend.native.fit(1, 2)
    with pytest.raises(TypeError):
        backend.native.fit(*"abcdefghij")
