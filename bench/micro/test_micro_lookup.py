"""Micro benchmarks: ``pytest bench/micro --benchmark-only``; CI runs them once, untimed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.contenders import CONTENDERS
from bench.inputs import Case, make_problem
from bench.traffic import Optimizer, Work

NAMES = ("torch", "fbgemm", "amtl_search", "amtl_masked", "amtl_frozen")
SIZES = {"one lookup": (1, 1), "small": (64, 20), "medium": (1024, 20)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("work", "optimizer"), [("forward", "none"), ("backward", "none"), ("step", "sgd")]
)
@pytest.mark.parametrize("name", NAMES)
def test_micro(benchmark: Any, name: str, work: Work, optimizer: Optimizer, size: str) -> None:
    bags, bag_size = SIZES[size]
    case = Case(
        work, 20_000, (name,), (), optimizer=optimizer, bags=bags, bag_size=bag_size,
        distribution="zipf", threads=1,
    )  # fmt: skip
    contender = CONTENDERS[name]
    reason = contender.absent() or contender.refuses(case)
    if reason:
        pytest.skip(f"{name}: {reason}; {contender.install}")
    session = contender.prepare(make_problem(case))
    benchmark.group = f"{work}, {size}"
    benchmark.extra_info["lookups"] = bags * bag_size
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        session.call(turn % 11)

    benchmark(call)
