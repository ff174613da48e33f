"""Every backend against the reference: forward, row gradients, mask and weight gradients."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FORMS,
    Case,
    assert_agrees,
    build,
    cases,
    expected,
    in_order,
    join,
    several,
)

import amtl_kernels

LONGER = 1 if os.environ.get("AMTL_SOAK", "0") in ("", "0") else 20


def limited(backend: Any, case: Case) -> Case:
    """The case, cut to what the backend can afford in a test."""
    return replace(
        case,
        lookups=min(case.lookups, backend.max_lookups),
        dim=min(case.dim, backend.max_dim),
        groups=min(case.groups, max(5, backend.max_lookups // 4)),
    )


def check(backend: Any, case: Case, count: int) -> None:
    """Forward and backward of one table, or of several in one call."""
    if count == 1:
        inputs = build(case, backend.device)
        asked = [*inputs.forwards(), *inputs.backwards()]
    else:
        tables = several(case, count, device=backend.device)
        calls = [join(form, tables) for form in FORMS]
        asked = [("lookup", in_order("lookup", one.lookup())) for one in calls]
        asked += [("lookup_backward", in_order("lookup_backward", one.backward())) for one in calls]
    for op, arguments in asked:
        got = getattr(torch.ops.amtl, op)(*arguments)
        assert_agrees(got, expected(op, arguments), case, op)
        if op == "lookup":
            assert got.dtype == case.dtype


EDGES = {
    "plain": Case(),
    "empty input": Case(lookups=0),
    "no bags": Case(bags=0),
    "one row holds every lookup": Case(pattern="one row", lookups=20_000, dim=16),
    "all distinct": Case(pattern="distinct", rows=20_000, lookups=20_000, dim=16),
    "large enough to sort in parallel": Case(rows=20_000, lookups=70_000, dim=8),
    "larger than the caches": Case(rows=70_000, dim=16),
    "unsorted groups": Case(sorted_groups=False),
    "one group": Case(groups=1, columns=0),
    "half, weighted": Case(dtype=torch.float16, weighted=True, dim=17),
    "bfloat16, mean, padding": Case(
        dtype=torch.bfloat16, mean=True, padding="first", include_last_offset=True
    ),
    "mean": Case(mean=True, include_last_offset=True),
    "wide": Case(dim=300, rows=37, lookups=300),
    "one column": Case(dim=1, size_dtype=torch.uint8, index_dtype=torch.int32),
    "past the last offset": Case(include_last_offset=True, bags=40, padding="last"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(backend: Any, edge: str, count: int) -> None:
    check(backend, limited(backend, EDGES[edge]), count)


@pytest.mark.parametrize("count", [1, 3])
def test_drawn_lookups(backend: Any, count: int) -> None:
    @settings(
        deadline=None,
        max_examples=LONGER * backend.examples,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(min(6_000, backend.max_lookups), backend.max_dim))
    def run(case: Case) -> None:
        check(backend, case, count)

    run()


def test_masked_values_are_never_read(backend: Any) -> None:
    """NaN and Inf past the kept sizes reach neither outputs nor row gradients."""
    inputs = build(limited(backend, Case(dim=40)), backend.device)
    columns = torch.arange(40, device=backend.device)
    inputs.weight[columns >= inputs.row_dims[:, None]] = float("nan")
    weight = inputs.weight.requires_grad_()
    out = amtl_kernels.masked_embedding_bag(weight, inputs.indices, inputs.offsets, inputs.row_dims)
    assert out.isfinite().all()
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad._values().isfinite().all()


def test_results_repeat_bit_for_bit(backend: Any) -> None:
    inputs = build(limited(backend, Case(lookups=30_000, sorted_groups=False)), backend.device)
    threads = torch.get_num_threads()
    answers = []
    try:
        # Only kernels in C++ run in threads of torch.
        for count in (1, 2, 2, 3, 4) if backend.name.startswith("cpu") else (1, 1):
            torch.set_num_threads(count)
            answers.append(
                [
                    getattr(torch.ops.amtl, op)(*arguments)
                    for op, arguments in [*inputs.forwards(), *inputs.backwards()]
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        for first, again in zip(answers[0], other, strict=True):
            assert_identical(first, again)


def assert_identical(first: Any, again: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, again)
        return
    for x, y in zip(first, again, strict=True):
        assert_identical(x, y)


@example(rows=[0, 1, 2**31, 2**40 + 3], seed=-1)
@given(rows=st.lists(st.integers(0, 2**62), max_size=50), seed=st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None)
def test_hash_columns_of_the_reference(rows: list[int], seed: int) -> None:
    """The hash written out in Python's integers."""
    got = amtl_kernels.reference.hash_columns(torch.tensor(rows, dtype=torch.int64), seed, 64)
    assert got.tolist() == [oracle.column(row, seed, 64) for row in rows]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_are_columns_of_a_wider_one(backend: Any, fused: bool, pooled: bool) -> None:
    """What `torch.cat` of several lookups hands back; the CPU's operators take it as it is."""
    g = torch.Generator().manual_seed(5)
    blocks = [torch.randn(n, w, generator=g).to(backend.device) for n, w in ((9, 20), (30, 7))]
    rows = torch.randint(0, 39, (48,), generator=g).to(backend.device)
    wide = torch.randn(24 if pooled else 48, 3 + 20 + 13, generator=g).to(backend.device)
    weights = torch.randn(24, 2, generator=g).to(backend.device)
    results = []
    for grad in (wide[:, 3:23], wide[:, 3:23].contiguous()):
        table = [torch.nn.Parameter(block.clone()) for block in blocks]
        psw = weights.clone().requires_grad_()
        optimizer = amtl_kernels.optim.Adam(table, lr=0.1) if fused else None
        if pooled:
            out = amtl_kernels.tiered_embedding_bag(
                *(table, [9, 39], rows.view(24, 2)), per_sample_weights=psw, optimizer=optimizer
            )
        else:
            out = amtl_kernels.tiered_embedding(table, [9, 39], rows, optimizer=optimizer)
        out.backward(grad)
        results.append([*table, *(block.grad for block in table), psw.grad])
    for apart, together in zip(*results, strict=True):
        assert apart is together is None or torch.equal(apart.to_dense(), together.to_dense())
