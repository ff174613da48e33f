from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench import cli
from bench.cli import app
from bench.contenders import CONTENDERS
from bench.results import Comparison, Report
from bench.suites import GOALS, SUITES
from bench.tables import README_BEGIN, README_END


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    chosen = ["--only", "goals/forward", "--only", "goals/backward", "--only", "rowwise"]
    done = invoke("run", "--suite", "tiny", "--no-peaks", "--out", str(path), *chosen)
    assert done.exit_code == 0, done.output
    return path


def test_run_writes_a_complete_result(result: Path) -> None:
    report = Report.read(result)
    assert report.suite == "tiny"
    assert report.machine["versions"]["torch"]
    assert "unfinished" not in report.settings
    assert report.ceilings["1"]["copy"] > 0
    assert len(report.comparisons) == 10
    for comparison in report.comparisons:
        assert any(timing.ours for timing in comparison.timings.values()), comparison.left_out
        for timing in comparison.timings.values():
            assert len(timing.samples) >= 3
            assert timing.useful_bytes > 0
            assert timing.share > 0
    assert any("frozen pooled lookup" in goal["goal"] for goal in report.goals)


def test_what_is_stopped_leaves_what_it_measured(tmp_path: Path, monkeypatch) -> None:
    printed: list[str] = []

    def print_and_stop(comparison: Comparison) -> None:
        printed.append(comparison.name)
        if len(printed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_print_comparison", print_and_stop)
    path = tmp_path / "tiny.json"
    arguments = ("run", "--suite", "tiny", "--no-peaks", "--out", str(path))
    chosen = ("--only", "goals/forward", "--only", "goals/backward")
    assert invoke(*arguments, *chosen).exit_code != 0
    report = Report.read(path)
    assert [entry.name for entry in report.comparisons] == printed[:2]
    assert report.settings["unfinished"].startswith("2 of ")


def test_table_and_readme(result: Path, tmp_path: Path) -> None:
    text = invoke("table", str(result)).output
    assert "## Goals" in text
    assert "F.embedding_bag" in text
    assert "amtl frozen" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{README_BEGIN}\nold\n{README_END}\nafter\n")
    assert invoke("table", str(result), "--readme", str(readme)).exit_code == 0
    updated = readme.read_text()
    assert updated.startswith("before\n")
    assert updated.endswith("after\n")
    assert "old" not in updated
    assert "below 1× we are slower" in updated
    assert "| lookup | frozen | F.embedding_bag | 2k × 64 |" in updated
    readme.write_text("no markers")
    assert invoke("table", str(result), "--readme", str(readme)).exit_code == 2


def test_plot_draws_ratios_and_roofline(result: Path, tmp_path: Path) -> None:
    assert invoke("plot", str(result), "--out", str(tmp_path)).exit_code == 0
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["tiny-ratios.png", "tiny-roofline.png"]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in made)


def test_a_gpu_s_results_have_both_rooflines(result: Path, tmp_path: Path) -> None:
    content = json.loads(result.read_text())
    content["ceilings"] = {"cuda": {"copy": 3e12}}
    for comparison in content["comparisons"]:
        for timing in comparison["timings"].values():
            timing["useful_bytes"] = 2e5
            timing["facts"] |= {"floor_bytes": 1.25e5, "floor_share": 0.4321}
    edited = tmp_path / "gpu.json"
    edited.write_text(json.dumps(content))
    text = invoke("table", str(edited)).output
    assert "| bytes a lookup |" in text and "| MB behind the L2 | of copy ceiling |" in text
    assert "| 0.125 | 43% |" in text
    report = Report.read(edited)
    assert "MB behind" not in invoke("table", str(result)).output
    assert invoke("plot", str(edited), "--out", str(tmp_path)).exit_code == 0
    plotted = [tmp_path / f"{report.suite}-roofline.png", tmp_path / "gpu-roofline.png"]
    assert any(path.exists() for path in plotted)


def test_compare_of_a_file_with_itself_and_with_a_slower_one(result: Path, tmp_path: Path) -> None:
    assert invoke("compare", str(result), str(result)).exit_code == 0
    slow = json.loads(result.read_text())
    for comparison in slow["comparisons"]:
        for timing in comparison["timings"].values():
            samples = [1e-3, 1.001e-3, 1.002e-3, 1.003e-3]
            timing["samples"] = [value * (3 if timing["ours"] else 1) for value in samples]
    even = json.loads(json.dumps(slow))
    for comparison in even["comparisons"]:
        for timing in comparison["timings"].values():
            timing["samples"] = [1e-3, 1.001e-3, 1.002e-3, 1.003e-3]
    paths = []
    for name, content in (("even", even), ("slow", slow)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    done = invoke("compare", str(paths[0]), str(paths[1]))
    assert done.exit_code == 1
    assert "regression(s)" in done.output
    assert invoke("compare", str(paths[1]), str(paths[0])).exit_code == 0


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    assert invoke("run", "--suite", "nonsense").exit_code == 2
    assert invoke("run", "--suite", "tiny", "--only", "nothing-like-it").exit_code == 2
    assert invoke("run", "--suite", "quick", "--clock", "cpu").exit_code == 2
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert invoke("table", str(broken)).exit_code == 2
    assert invoke("table", str(tmp_path / "missing.json")).exit_code == 2


@pytest.mark.parametrize("name", sorted(SUITES))
def test_suites_have_distinct_names_and_known_contenders(name: str) -> None:
    suite = SUITES[name]()
    names = [case.name for case in suite.cases]
    assert len(set(names)) == len(names)
    for case in suite.cases:
        assert set(case.contenders) <= set(CONTENDERS)
        assert set(case.baselines) <= set(case.contenders)


@pytest.mark.parametrize("name", ["quick", "goals", "product", "few-bits", "gpu"])
def test_a_suite_covers_every_goal(name: str) -> None:
    cases = SUITES[name]().cases
    of_suite = {"product": {"product"}, "few-bits": {"int8", "int4", "int2"}, "gpu": {"GPU"}}
    groups = of_suite.get(name, {"goals", "product"})
    goals = [goal for goal in GOALS if goal.group in groups]
    assert goals
    for goal in goals:
        assert any(
            case.group == goal.group
            and (case.work, case.optimizer) == (goal.work, goal.optimizer)
            and goal.distribution in ("", case.distribution)
            and {goal.of, goal.against or goal.of} <= set(case.contenders)
            for case in cases
        ), goal


def test_the_quick_suite_stays_quick() -> None:
    suite = SUITES["quick"]()
    assert len(suite.cases) * suite.seconds < 150
