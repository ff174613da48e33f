"""Costs told beforehand, and cases that must not exhaust the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import cli, memory, plan
from bench.cli import app
from bench.contenders import CONTENDERS
from bench.contenders.base import Contender
from bench.contenders.torch_eager import Bag
from bench.inputs import Case
from bench.plan import Budget
from bench.results import Comparison, Report, Timing
from bench.runner import Runner
from bench.scale_plots import draw
from bench.suites import SUITES, Suite

CASE = Case("forward", 5000, ("lean", "greedy"), ("lean",), bags=16, bag_size=3, dim=8, threads=1)
SHORT = Budget(0.01, minimal_rounds=3, maximal_rounds=3)


class Lean(Bag):
    name = "lean"


class Greedy(Bag):
    name = "greedy"

    def allocates(self, case: Case) -> dict[str, float]:
        return {"copy": 3 * plan.GB}


class Sharing(Greedy):
    name = "sharing"


def runner(free: float, *contenders: Contender) -> Runner:
    named = {one.name: one for one in contenders}
    return Runner(budget=SHORT, contenders=named, available=lambda: free)


def test_who_does_not_fit_is_listed_with_gigabytes_and_not_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greedy = Greedy()
    monkeypatch.setattr(greedy, "prepare", lambda problem: pytest.fail("was set up"))
    result = runner(3.5 * plan.GB, Lean(), greedy).run(CASE)
    assert set(result.timings) == {"lean"}
    assert result.left_out == {"greedy": "does not fit: with it 4.0 GB have to be free, 3.5 GB are"}


def test_with_room_everybody_takes_part() -> None:
    result = runner(4.5 * plan.GB, Lean(), Greedy()).run(CASE)
    assert set(result.timings) == {"lean", "greedy"}
    assert result.left_out == {}


def test_a_case_that_does_not_fit_at_all_makes_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.runner.make_problem", lambda *a, **k: pytest.fail("was made"))
    huge = dataclasses.replace(CASE, rows=60_000_000, dim=64)
    result = runner(10 * plan.GB, Lean(), Greedy()).run(huge)
    assert result.timings == {}
    assert set(result.left_out) == {"lean", "greedy"}
    assert all("does not fit" in reason for reason in result.left_out.values())


def test_a_copy_of_the_same_name_counts_once() -> None:
    one = plan.admit(CASE, [Greedy()], 1e12).peak
    two = plan.admit(CASE, [Greedy(), Sharing()], 1e12).peak
    assert two - one < 0.01 * plan.GB


def test_the_table_of_an_earlier_case_counts_as_free() -> None:
    case = dataclasses.replace(CASE, rows=100_000, contenders=("lean",))
    shared = plan.shared_bytes(case)
    the_runner = runner(2e9, Lean())
    the_runner.run(case)
    the_runner.available = lambda: shared + plan.RESERVE - plan.table_bytes(case) / 2
    assert set(the_runner.run(case).timings) == {"lean"}
    the_runner.forget()
    assert the_runner.run(case).timings == {}


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_the_estimate_bounds_what_a_process_takes(optimizer: str) -> None:
    case = Case(
        "step",
        400_000,
        ("amtl_frozen_fused",),
        (),
        optimizer=optimizer,
        dim=64,
        threads=1,  # type: ignore[arg-type]
    )
    contender = CONTENDERS["amtl_frozen_fused"]
    if contender.absent():
        pytest.skip(contender.absent())
    cost = plan.estimate(case, [contender], seconds=0, available=1e12)
    assert memory.measure(case.as_dict(), contender.name)["process_peak_bytes"] < cost.peak_bytes


@pytest.mark.parametrize(("suite", "minutes"), [("quick", 5), ("scale", 15), ("full", 40)])
def test_suites_stay_within_their_minutes(suite: str, minutes: float) -> None:
    chosen = SUITES[suite]()
    runner = Present()
    found = plan.make_plan(chosen, runner.willing, runner.available(), chosen.seconds, peaks=True)
    assert found.seconds < 60 * minutes
    assert found.peak_bytes < 22 * plan.GB
    assert not any("does not fit" in reason for _, reason in found.left_out())


class Present(Runner):
    """Takes every contender for installed, on a machine of 24 GB."""

    def __init__(self) -> None:
        super().__init__(available=lambda: 23 * plan.GB)

    def absent(self, asked: Iterable[str] | None = None) -> dict[str, str]:
        return {}


def test_the_scale_suite_reaches_sixty_million_rows_on_every_axis() -> None:
    suite = SUITES["scale"]()
    for work in ("step", "forward"):
        cases = [case for case in suite.cases if case.work == work]
        assert {"uniform", "zipf"} <= {case.distribution for case in cases}
        assert max(case.rows for case in cases) == 60_000_000
        assert {case.dim for case in cases} >= {8, 128}
        assert {case.bag_size for case in cases} >= {1, 20, 100}
        assert all({"torch", "fbgemm", "amtl_masked"} <= set(case.contenders) for case in cases)
    assert {case.rows for case in suite.memory} >= {100_000, 60_000_000}


def test_full_takes_steps_of_thirty_million_rows_and_of_none_that_a_peer_gets_wrong() -> None:
    large = {
        (case.work, case.optimizer) for case in SUITES["full"]().cases if case.rows == 30_000_000
    }
    assert large == {("step", "sgd"), ("backward", "none"), ("forward", "none")}


def test_a_dry_run_lists_cases_with_minutes_and_gigabytes_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.machine, "ceilings", lambda *a, **k: pytest.fail("measured"))
    out = tmp_path / "result.json"
    done = CliRunner().invoke(app, ["run", "--suite", "quick", "--dry-run", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert not out.exists()
    names = [case.name for case in SUITES["quick"]().cases]
    printed = done.output.splitlines()
    end = next(i for i, line in enumerate(printed) if line.endswith("in total"))
    lines = {line.split(maxsplit=2)[2]: line.split() for line in printed[1 : end + 1]}
    assert set(names) < set(lines)
    minutes = sum(float(lines[name][0]) for name in lines if name != "in total")
    assert float(lines["in total"][0]) == pytest.approx(minutes, abs=0.2)


def _comparison(case: Case, absent: Sequence[str] = ()) -> Comparison:
    timings = {
        name: Timing(name, name.startswith("amtl"), [1e-3, 1.1e-3, 1.2e-3], 100, 1000.0)
        for name in case.contenders
        if name not in absent
    }
    left_out = dict.fromkeys(absent, "does not fit: with it 9.9 GB have to be free, 1.0 GB are")
    return Comparison(case.as_dict(), timings, left_out, list(case.baselines))


def test_scale_plots_and_tables_name_who_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite: Suite = SUITES["scale"]()
    report = Report("scale", {"cpu": "a processor", "date": "2026-01-01", "versions": {}})
    report.comparisons = [
        _comparison(case, ("fbgemm",) if case.rows == 60_000_000 else ()) for case in suite.cases
    ]
    for case in suite.memory:
        for name in case.contenders:
            sizes = {"extra_bytes": 1e6, "table_bytes": 4.0 * case.rows * case.dim}
            shown = {"rows": case.rows, "dim": case.dim, "group": case.group, "title": name}
            report.memory.append({"contender": name, **shown, **sizes})
    report.memory_left_out = {f"{suite.memory[-1].name}, torch": "does not fit"}
    captions: dict[str, str] = {}

    def keep(figure: object, path: Path, caption: Sequence[str]) -> Path:
        captions[path.name] = " ".join(caption)
        return path

    monkeypatch.setattr("bench.figures.save", keep)
    draw(report, tmp_path, "s")
    assert set(captions) == {f"s-scale-{x}.png" for x in ("rows", "width", "bag", "skew", "memory")}
    assert (
        "Without fbgemm (step at 60M, uniform; forward at 60M, uniform"
        in captions["s-scale-rows.png"]
    )
    assert "9.9 GB" in captions["s-scale-rows.png"]
    assert "does not fit" in captions["s-scale-memory.png"]
    assert "Without" not in captions["s-scale-width.png"]
