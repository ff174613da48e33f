from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bench.inputs import Case, make_problem
from bench.traffic import Traffic, floor_bytes, misses, useful_bytes

TRAFFIC = Traffic(
    lookups=1000, distinct=400, outputs=50, dim=64, lookup_mean=32.0, distinct_mean=16.0
)


def test_pooled_lookup() -> None:
    # 4·L·k̄ + 4·B·D + 8·L
    assert useful_bytes(TRAFFIC, "forward") == 4 * 1000 * 32 + 4 * 50 * 64 + 8 * 1000


def test_plain_lookup_writes_every_row() -> None:
    plain = dataclasses.replace(TRAFFIC, outputs=1000)
    assert useful_bytes(plain, "forward") == 4 * 1000 * (32 + 64) + 8 * 1000


def test_backward_reads_whole_rows_for_the_mask_gradient_only() -> None:
    search = dataclasses.replace(TRAFFIC, mask_gradient=True)
    forward = useful_bytes(TRAFFIC, "forward")
    plain = useful_bytes(TRAFFIC, "backward") - forward
    assert plain == 4 * 1000 * 64 + 4 * 400 * 16 + 8 * 1000
    assert useful_bytes(search, "backward") - forward - plain == 4 * 400 * 64


def test_update_bytes() -> None:
    backward = useful_bytes(TRAFFIC, "backward")
    kept = 400 * 16
    assert useful_bytes(TRAFFIC, "step", "sgd") - backward == 12 * kept
    assert useful_bytes(TRAFFIC, "step", "rowwise_adagrad") - backward == 12 * kept + 8 * 400
    assert useful_bytes(TRAFFIC, "step", "adagrad") - backward == 20 * kept


def test_elements_and_indices_of_other_widths() -> None:
    half = dataclasses.replace(TRAFFIC, element=2, index=4)
    assert useful_bytes(half, "forward") == useful_bytes(TRAFFIC, "forward") / 2


@pytest.mark.parametrize("noise", [False, True])
def test_traffic_of_a_problem_counts_what_is_there(noise: bool) -> None:
    case = Case("forward", 500, ("a",), (), bags=30, bag_size=4, dim=16, noise=noise)
    problem = make_problem(case)
    ids = problem.global_ids[0]
    dims = problem.dims_of(ids, noise=noise)
    traffic = problem.traffic(ids, dims, mask_gradient=False)
    sizes = {int(row): int(size) for row, size in zip(ids, dims, strict=True)}
    assert traffic.lookups == 120
    assert traffic.distinct == len(sizes)
    assert traffic.outputs == 30
    assert traffic.lookup_mean == pytest.approx(dims.double().mean().item())
    assert traffic.distinct_mean == pytest.approx(sum(sizes.values()) / len(sizes))
    assert traffic.index == 8
    assert torch.unique(ids).numel() == traffic.distinct


def test_a_cache_drops_the_oldest() -> None:
    ids = np.array([1, 2, 1, 3, 2, 1, 1])
    # 1 and 2 missed; 1 hit; 3 pushes 2 out, 2 pushes 1 out, 1 pushes 3 out; 1 hit.
    assert misses(ids, 2) == 5
    assert misses(ids, 3) == 3
    assert misses(ids, 1) == 6


def test_the_floor_lies_between_distinct_rows_and_every_lookup() -> None:
    generator = np.random.default_rng(0)
    ids = np.minimum(generator.zipf(1.3, 4_000), 500) - 1
    distinct = np.unique(ids).size
    traffic = Traffic(4_000, distinct, 200, 64, 30.0, 20.0, mask_gradient=True)
    for work, optimizer in (("forward", "none"), ("backward", "none"), ("step", "adam")):
        asked = (work, optimizer)
        every = useful_bytes(traffic, *asked)  # type: ignore[arg-type]
        sizes = (1, 1 << 12, 1 << 16, 1 << 30)
        floors = [floor_bytes(traffic, ids, 20, size, *asked) for size in sizes]  # type: ignore[arg-type]
        assert floors == sorted(floors, reverse=True) and floors[0] <= every
        # Everything is read once, and the incoming gradient once a bag.
        rows = 4 * distinct * 20.0 + 4 * 200 * 64 + 8 * 4_000
        if work == "forward":
            assert floors[-1] == rows
        if work == "backward":
            assert floors[-1] == rows + 4 * 200 * 64 + 4 * distinct * (64 + 20.0) + 8 * 4_000
