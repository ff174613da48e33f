"""The GPU command without a GPU: its cases and contenders run on the CPU, its report is written."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import amtl_kernels
from bench import gpu, gpu_timings


@pytest.mark.no_poison
@pytest.mark.parametrize("ids", ["zipf", "uniform"])
def test_every_contender_runs(ids: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_timings, "DEVICE", "cpu")
    # Neither compiles nor runs without a GPU.
    monkeypatch.setattr(gpu_timings, "triton_backend", lambda case: {})
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def timer(function: Callable[[], object]) -> float:
        function()
        return 1e-3

    report = gpu.Report(environment={"card": "Test Card"})
    report.stages.append(gpu.Stage("tests", "failed", 1.0, "a\nb"))
    case = gpu_timings.Case(ids, "float32", 3_000, 16, 128, 20)
    assert int(case.row_dims.sum()) == pytest.approx(0.4 * 16 * 3_000, rel=0.1)
    part, timings = tmp_path / "part.json", gpu_timings.Timings(copy_bandwidth=1e12)

    def save() -> None:
        part.write_text(json.dumps(dataclasses.asdict(timings)))

    gpu_timings.measure_case(timings, case, timer, time.monotonic() + 60, ids == "zipf", save)
    gpu.adopt(report, part)
    peers = {what.split(",")[0] for what in report.left_out}
    assert peers <= {"FBGEMM", "TorchRec"}, report.left_out
    # Who is not installed is named, never dropped.
    timed = {row.who.split(",")[0] for row in report.rows}
    assert {"FBGEMM", "TorchRec"} <= peers | timed
    if find_spec("torchrec") is None:
        assert any("torchrec" in why for why in report.left_out.values())
    else:
        rows = {row.work for row in report.rows if row.who == "TorchRec, no mask"}
        assert rows == {"pooled", "frozen pooled", "search step", "frozen step"}
    works = {row.work for row in report.rows if row.who == "amtl CUDA"}
    assert works == {
        "gather",
        "pooled",
        "frozen pooled",
        "search backward",
        "search step",
        "frozen step",
    }
    assert all(row.useful_bytes > 0 for row in report.rows)
    text = gpu.write(report, tmp_path).read_text()
    assert "| pooled | amtl CUDA |" in text and "## Failed: tests" in text
    stored = json.loads((tmp_path / "gpu-test-card.json").read_text())
    assert len(stored["rows"]) == len(report.rows)


def test_equations_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the eager contender computes is what ours does, mask gradient included."""
    monkeypatch.setattr(gpu_timings, "DEVICE", "cpu")
    case = gpu_timings.Case("zipf", "float32", 200, 8, 32, 20)
    weight, mask = gpu_timings.equations_step(case, gpu_timings.equations(case))()
    rows, grads, group_grad, _ = gpu_timings.ours(case)["search backward"]()
    dense = torch.zeros_like(case.weight).index_copy(0, rows[0], grads[0])
    torch.testing.assert_close(weight, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask.flatten(), group_grad, rtol=1e-4, atol=1e-3)


def test_triton_is_timed_on_everything_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timings, "DEVICE", "cpu")
    monkeypatch.setattr(amtl_kernels, "set_backend", lambda name: None)
    case = gpu_timings.Case("zipf", "float32", 200, 8, 32, 20)
    assert set(gpu_timings.triton_backend(case)) == set(gpu_timings.ours(case))


def test_sanitizer_cases_run() -> None:
    """Their operators and arguments are right, so that a finding on a GPU is the kernels'."""
    script = gpu.SMALL_CASES.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    # The CPU kernels do not round 16-bit tables at random.
    with amtl_kernels.use_backend("reference"):
        exec(compile(script, "small cases", "exec"), {})


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")

    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 3
    assert "nothing was proved or measured" in capsys.readouterr().out


def test_out_of_time_ends_the_children_too() -> None:
    """A grandchild that holds the pipe would otherwise keep the run waiting for ever."""
    start = time.monotonic()
    code, text = gpu.run(["bash", "-c", "echo begun; sleep 60 & sleep 60; echo over"], 1.0)
    assert code == 124 and "begun" in text and "over" not in text
    assert time.monotonic() - start < 10
    assert gpu.run(["no such program"], 1.0)[0] == 127


def test_a_stage_that_breaks_hides_no_other(tmp_path: Path) -> None:
    report = gpu.Report(environment={"card": "Test Card"})

    def breaks() -> tuple[str, str]:
        raise RuntimeError("out of memory")

    assert not gpu.run_stage(report, "first", breaks, tmp_path)
    assert gpu.run_stage(report, "second", lambda: ("ok", ""), tmp_path)
    text = (tmp_path / "gpu-test-card.md").read_text()
    assert "| first | failed |" in text and "out of memory" in text and "| second | ok |" in text


def test_a_case_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it breaks for want of a GPU, in its own process."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(gpu, "PLANS", gpu.PLANS[:1])
    report = gpu.Report()
    outcome, detail = gpu.timings(report, 60)
    assert outcome == "failed" and "nothing of ours was timed" in detail
    assert "exit 1" in next(iter(report.left_out.values()))


@pytest.mark.parametrize("worst", [True, False])
def test_everything_fits_in_ten_minutes(
    worst: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every command runs into its limit, or takes five seconds; timings get their share."""
    now = [0.0]
    seconds: dict[str, float] = {}

    def fake(command: list[str], limit: float, **options: object) -> tuple[int, str]:
        text = " ".join(command)
        if "build_info" in text:
            now[0] += 5.0
            return 0, "on: nvcc" if "build" in seconds else "off"
        name = "timings" if "gpu_timings" in text else "build" if "setup.py" in text else text
        taken = limit if worst else 5.0
        now[0] += taken
        seconds[name] = seconds.get(name, 0.0) + taken
        return (124 if worst and name != "build" else 0), ""

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "run", fake)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    environment = {"card": "Test Card", "capability": "9.0"}
    monkeypatch.setattr(gpu, "environment", lambda: dict(environment))
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--out", str(tmp_path)])
    assert gpu.main() == 1, "nothing was timed"
    assert now[0] < 600
    if worst:
        assert seconds["timings"] > 120
    report = json.loads((tmp_path / "gpu-test-card.json").read_text())
    names = [stage["name"] for stage in report["stages"]]
    assert names[:2] == ["build", "tests: determinism, streams, graphs"]
    assert len(names) == 8 and names[-1] == "timings"
