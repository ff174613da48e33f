"""The unmasked kernel that ours are compared with computes what it should, on simulated devices."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.contenders import CONTENDERS
from bench.inputs import Case, make_problem
from bench.oracle import compare, expected

pytest.importorskip("amtl_kernels._tools", reason="build with AMTL_TOOLS=on")
from amtl_kernels import _tools

CASE = Case("step", 30, ("tbe",), (), optimizer="rowwise_adagrad", bags=16, dim=16, threads=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"bag_size": 1, "bags": 40},
        # Rows of more lookups than a group of threads sums, and than one piece holds.
        {"bag_size": 20, "rows": 2, "dim": 8},
        {"bag_size": 80, "rows": 1, "bags": 40, "dim": 12},
        {"bag_size": 3, "tables": 3, "dim": 132},
        {"bag_size": 5, "dtype": "float16", "dim": 200, "tables": 2},
        {"bag_size": 5, "dim": 4, "distribution": "zipf"},
    ],
    ids=lambda changes: "-".join(f"{k}{v}" for k, v in changes.items()),
)
def test_rows_of_any_number_of_lookups(changes: dict[str, object]) -> None:
    case = dataclasses.replace(CASE, **changes)  # type: ignore[arg-type]
    # Watching for races takes long.
    races = case.tables * case.bags * case.bag_size < 1_000
    problem = make_problem(case, rotations=2)
    contender = CONTENDERS["tbe"]
    assert contender.absent() == "" and contender.refuses(case) == ""
    _tools.configure(seed=3, track_races=races)
    try:
        session = contender.prepare(problem)
        wanted = expected(problem, 1, contender.equations)
        compare("tbe", session.outcome(1), wanted, case.torch_dtype)
        forward = make_problem(dataclasses.replace(case, work="forward", optimizer="none"))
        wanted = expected(forward, 1, contender.equations)
        compare("tbe", contender.prepare(forward).outcome(1), wanted, case.torch_dtype)
    finally:
        _tools.configure()


def test_the_same_bits_in_any_order() -> None:
    """Rows are listed in an order that changes from run to run; their sums do not."""
    results = []
    for seed in range(3):
        problem = make_problem(dataclasses.replace(CASE, bag_size=40, rows=5, dim=8))
        _tools.configure(seed=seed)
        CONTENDERS["tbe"].prepare(problem).call(0)
        results.append(problem.weight)
    _tools.configure()
    assert all(torch.equal(results[0], other) for other in results[1:])
