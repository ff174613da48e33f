"""Goals: judged in their own terms, on the machines they are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.results import Comparison, Report, Timing
from bench.suites import GOALS, SUITES, evaluate
from bench.tables import goals_table

XEON = {"cpu": "Intel(R) Xeon(R) Processor", "cpu_family_model": "6/207"}
ZEN5 = {"cpu": "AMD EPYC", "cpu_family_model": "26/2"}
ZEN4 = {"cpu": "AMD EPYC", "cpu_family_model": "25/17"}


def report(machine: dict[str, str], times: dict[str, float], **case: object) -> Report:
    """One case of the goals with a time and a share of the ceiling of ``0.7`` for everybody."""
    fields: dict[str, Any] = {
        "name": "a case", "group": "goals", "work": "step", "optimizer": "rowwise_adagrad",
        "distribution": "uniform",
    }  # fmt: skip
    timings = {
        name: Timing(name, name.startswith("amtl"), [time] * 3, 10, 1e3)
        for name, time in times.items()
    }
    for timing in timings.values():
        timing.facts["ceiling_share"] = 0.7
    entry = Comparison({**fields, **case}, timings, {}, ["fbgemm"])
    return Report("goals", dict(machine), comparisons=[entry])


def judged(found: Report) -> dict[str, tuple[float, bool]]:
    """Goal to what came out and whether that reaches it."""
    return {str(goal["goal"]): (goal["value"], goal["reached"]) for goal in evaluate(found)}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("machine", "time", "reached"),
    [
        (XEON, 0.11, {"never slower": True, "Xeon": True}),
        (XEON, 0.13, {"never slower": True, "Xeon": False}),
        (ZEN5, 0.59, {"never slower": True, "Zen 5": True}),
        (ZEN5, 1.01, {"never slower": False, "Zen 5": False}),
        (ZEN4, 0.61, {"never slower": True}),
    ],
)
def test_limits_of_one_machine_are_for_that_machine(
    machine: dict[str, str], time: float, reached: dict[str, bool]
) -> None:
    found = judged(report(machine, {"amtl_search": time, "fbgemm": 1.0}))
    peer = {goal.rpartition(", ")[2]: told for goal, told in found.items() if "FBGEMM" in goal}
    assert {name: told[1] for name, told in peer.items()} == reached
    assert all(value == pytest.approx(time) for value, _ in peer.values())


@pytest.mark.parametrize(("ids", "reached"), [("uniform", True), ("zipf", False)])
def test_a_share_of_the_ceiling_is_reached_from_below(ids: str, reached: bool) -> None:
    fused = {"amtl_search": 1.0, "amtl_search_fused": 1.0}
    found = report(XEON, fused, distribution=ids)
    found.comparisons[0].timings["amtl_search"].facts["ceiling_share"] = 0.01
    goal = "search step, row-wise Adagrad, of the machine's ceiling"
    assert judged(found) == {goal: (0.7, reached)}
    assert f"| {'≥ 65%' if reached else '≥ 80%'} | 70% |" in goals_table(evaluate(found))


def test_a_result_without_shares_is_not_judged_by_them() -> None:
    found = report(XEON, {"amtl_search": 1.0})
    del found.comparisons[0].timings["amtl_search"].facts["ceiling_share"]
    assert evaluate(found) == []


@pytest.mark.parametrize(("time", "reached"), [(0.32, True), (0.34, False)])
def test_speeds_are_inverse_ratios(time: float, reached: bool) -> None:
    found = report(XEON, {"amtl_frozen": time, "fbgemm": 1.0}, work="forward", optimizer="none")
    goal = "frozen pooled lookup against FBGEMM"
    assert judged(found)[goal] == (pytest.approx(1 / time), reached)
    assert f"| ≥ 3× as fast | {1 / time:.3g}×" in goals_table(evaluate(found))


def test_the_search_step_of_a_million_rows_is_beside_sparse_adam() -> None:
    (of, against) = ("amtl_collection_search", "torch_embeddings_sparse")
    cases = [case for case in SUITES["product"]().cases if {of, against} <= set(case.contenders)]
    assert [case.distribution for case in cases] == ["uniform", "zipf"]
    for case in cases:
        assert (case.tables * case.rows, case.tables, case.dim) == (1_000_000, 5, 64)
        assert (case.bags, case.bag_size, case.optimizer) == (8192, 1, "adam")
    goals = [goal for goal in GOALS if goal.against == against]
    forms = ("amtl_collection", "amtl_layers")
    assert {g.of for g in goals} == {
        f"{f}_{state}" for f in forms for state in ("search", "ordinal")
    }
    assert all((goal.limit, goal.kind) == (1.0, "time") for goal in goals)


def test_a_file_is_judged_by_today_s_goals(tmp_path: Path) -> None:
    found = report(XEON, {"amtl_search": 1.0})
    found.machine |= {"cores": 2, "isa": [], "memory_gib": 1, "date": "2026-01-01", "versions": {}}
    found.comparisons[0].case |= dataclasses.asdict(SUITES["goals"]().cases[0])
    found.goals = [{"goal": "of another day"}]
    found.write(tmp_path / "result.json")
    text = CliRunner().invoke(app, ["table", str(tmp_path / "result.json")]).output
    assert "of another day" not in text
    assert "| ≥ 65% | 70% | yes |" in text
