from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.compare import compare_reports
from bench.results import Comparison, Report, ResultFormatError, Timing

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def make_report(seed: int, *, slower: float = 1.0, machine: float = 1.0) -> Report:
    generator = np.random.default_rng(seed)
    comparisons = []
    for number in range(8):
        shared = machine * generator.lognormal(0, 0.2, 50)
        ours = 1e-3 * shared * generator.lognormal(0, 0.05, 50)
        peer = 5e-3 * shared * generator.lognormal(0, 0.05, 50)
        if number == 3:
            ours = ours * slower
        comparisons.append(
            Comparison(
                {"name": f"case{number}", "group": "goals"},
                {
                    "amtl_search": Timing("ours", True, ours.tolist(), 100, 1e6),
                    "fbgemm": Timing("peer", False, peer.tolist(), 100, 1e6),
                },
                baselines=["fbgemm"],
            )
        )
    return Report("test", {"cpu": "x"}, comparisons=comparisons)


def test_flags_a_planted_regression_and_nothing_else() -> None:
    outcome = compare_reports(make_report(1), make_report(2, slower=1.2))
    assert [change.case for change in outcome.regressions] == ["case3"]
    assert outcome.regressions[0].contender == "amtl_search"
    assert outcome.regressions[0].change.value == pytest.approx(1.2, abs=0.06)


@pytest.mark.parametrize("seed", range(6))
def test_noise_and_a_slower_machine_are_no_regression(seed: int) -> None:
    old, new = make_report(10 + seed), make_report(50 + seed, machine=3.0)
    outcome = compare_reports(old, new)
    assert outcome.regressions == []
    assert all(change.relative_to == "fbgemm" for change in outcome.changes)


def test_an_improvement_is_no_regression() -> None:
    outcome = compare_reports(make_report(1), make_report(2, slower=0.7))
    assert outcome.regressions == []
    assert [c.case for c in outcome.changes if c.verdict == "faster"] == ["case3"]


def test_a_summary_keeps_what_tables_read_and_cannot_be_compared(tmp_path: Path) -> None:
    whole = make_report(1)
    whole.summarised().summarised().write(tmp_path / "summary.json")
    whole.write(tmp_path / "whole.json")
    summary, read = Report.read(tmp_path / "summary.json"), Report.read(tmp_path / "whole.json")
    for short, long in zip(summary.comparisons, read.comparisons, strict=True):
        for name, timing in long.timings.items():
            told = dataclasses.astuple(short.timings[name].summary)
            assert told == pytest.approx(dataclasses.astuple(timing.summary), rel=1e-4)
            assert short.timings[name].samples == [] and len(timing.samples) == 50
        ours, known = (c.ratio("amtl_search", "fbgemm") for c in (short, long))
        assert ours is not None and known is not None
        assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(known), rel=1e-4)
    assert (tmp_path / "summary.json").stat().st_size < (tmp_path / "whole.json").stat().st_size / 2
    for pair in ((summary, whole), (whole, summary)):
        with pytest.raises(ResultFormatError, match="samples are gone"):
            compare_reports(*pair)


def test_committed_results_are_summaries() -> None:
    """They are read by people and tables; raw samples would be most of the repository."""
    reports = {path.name: Report.read(path) for path in RESULTS.rglob("*-cpu-*.json")}
    assert len(reports) > 5
    timings = {
        name: [timing for entry in report.comparisons for timing in entry.timings.values()]
        for name, report in reports.items()
    }
    assert not [name for name, every in timings.items() if any(t.samples for t in every)]


def test_missing_and_rejected_cases_are_named() -> None:
    old, new = make_report(1), make_report(2)
    new.comparisons.pop(0)
    new.comparisons[0].rejected = "busy"
    outcome = compare_reports(old, new)
    assert outcome.missing == ["case0: amtl_search", "case1: amtl_search (a rejected run)"]
    assert compare_reports(new, old).added == ["case0"]


def test_a_result_file_survives_the_round_trip(tmp_path: Path) -> None:
    report = make_report(1)
    report.ceilings = {"2": {"copy": 3e10}}
    report.goals = [{"goal": "x", "ratio": 0.5, "reached": True}]
    path = tmp_path / "deep" / "result.json"
    report.write(path)
    again = Report.read(path)
    assert again.comparisons[2].timings["fbgemm"].samples == pytest.approx(
        report.comparisons[2].timings["fbgemm"].samples, rel=1e-4
    )
    assert (again.ceilings, again.goals) == (report.ceilings, report.goals)
    assert list(tmp_path.rglob("*.part")) == []
    # One line a list of samples, or a committed file would have a line a number.
    assert len(path.read_text().splitlines()) < 400


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"format": 99}', "\x00\xff"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ResultFormatError):
        Report.read(path)
