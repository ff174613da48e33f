from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.inputs import Case, make_problem
from bench.traffic import Traffic, useful_bytes

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
