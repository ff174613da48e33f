"""The GPU command without a GPU: its cases and contenders run on the CPU, its report is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import gpu


@pytest.mark.no_poison
@pytest.mark.parametrize("ids", ["zipf", "uniform"])
def test_every_contender_runs(ids: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    # Neither compiles nor runs without a GPU.
    monkeypatch.setattr(gpu, "triton_backend", lambda case: {})
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def timer(function: Callable[[], object]) -> float:
        function()
        return 1e-3

    report = gpu.Report(environment={"card": "Test Card"}, copy_bandwidth=1e12)
    report.stages.append(gpu.Stage("tests", "failed", 1.0, "a\nb"))
    case = gpu.Case(ids, "float32", 3_000, 16, 128, 20)
    assert int(case.row_dims.sum()) == pytest.approx(0.4 * 16 * 3_000, rel=0.1)
    gpu.measure_case(report, case, timer, time.monotonic() + 60, ids == "zipf")
    assert all(what.startswith("FBGEMM") for what in report.left_out), report.left_out
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
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    case = gpu.Case("zipf", "float32", 200, 8, 32, 20)
    weight, mask = gpu.equations_step(case, gpu.equations(case))()
    rows, grads, group_grad, _ = gpu.ours(case)["search backward"]()
    dense = torch.zeros_like(case.weight).index_copy(0, rows, grads)
    torch.testing.assert_close(weight, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask, group_grad, rtol=1e-4, atol=1e-3)


def test_sanitizer_cases_run() -> None:
    """Their operators and arguments are right, so that a finding on a GPU is the kernels'."""
    script = gpu.SMALL_CASES.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    exec(compile(script, "small cases", "exec"), {})


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")

    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 3
    assert "nothing was proved or measured" in capsys.readouterr().out
