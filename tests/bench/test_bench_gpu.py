"""The GPU command without a GPU: a rehearsal of every stage, and what a bad one costs: itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import amtl_kernels as ak
from bench import device, gpu, gpu_step, stages
from bench.contenders import CONTENDERS
from bench.runner import Runner
from bench.suites import gpu_cases

ROOT = Path(__file__).resolve().parents[2]
# In place of compute-sanitizer: its options, then the program, which it runs.
SANITIZER = """#!/bin/sh
[ "$1" = --version ] && { echo stand-in; exit; }
[ "$1 $3 $4" = "--tool --error-exitcode 3" ] || exit 9
echo "watched by $2"
shift 4
exec "$@"
"""
SPOILED = {"tests-operators": "fail", "timings-00": "crash", "timings-04": "hang"}


def command(
    out: Path, *arguments: str, tools: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, with a folder of programs that it finds first."""
    path = os.pathsep.join([*([str(tools)] if tools else []), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sanitizer(tmp_path: Path) -> Path:
    """A folder with a program that stands for compute-sanitizer."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    return tools


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """By the stage's name, in the order of their files."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {each["name"]: each for each in found}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is there: python -m bench gpu is the test"
)
def test_a_rehearsal_runs_every_stage_and_bad_ones_cost_only_themselves(
    tmp_path: Path, sanitizer: Path
) -> None:
    pytest.importorskip("amtl_kernels._tools", reason="build with AMTL_TOOLS=on")
    pytest.importorskip("triton")
    spoils = [f"--spoil={name}={way}" for name, way in SPOILED.items()]
    done = command(tmp_path, "--dry-run", *spoils, tools=sanitizer)
    assert done.returncode == 1, done.stderr
    found = results(tmp_path)
    every = gpu.all_stages(gpu.Setting(True, tmp_path))
    # Nothing is left for the card that was not rehearsed.
    assert [s.name for s in every] == [s.name for s in gpu.all_stages(gpu.Setting(False, tmp_path))]
    assert list(found) == [stage.name for stage in every]
    bad = {"fail": "failed", "crash": "failed", "hang": "killed"}
    wanted = {name: bad[way] for name, way in SPOILED.items()}
    wanted = {stage.name: "ok" for stage in every} | wanted
    assert {name: each["outcome"] for name, each in found.items()} == wanted, done.stdout
    # What they had saved is there however they ended; why, too.
    assert found["tests-operators"]["data"] == found["timings-04"]["data"] == {"so far": 1}
    assert "spoiled" in found["tests-operators"]["detail"]
    assert "SIGABRT" in found["timings-00"]["detail"]
    assert found["timings-04"]["seconds"] < 10
    # The rehearsal of the kernels misses none.
    sources = (ROOT / "csrc" / "kernels").glob("*.cuh")
    kernels = {k for path in sources for k in re.findall(r"(\w+_kernel)\(", path.read_text())}
    ran = " ".join(found["smoke"]["data"]["kernels"])
    assert kernels and kernels <= set(re.findall(r"\w+_kernel", ran))
    assert set(found["smoke"]["data"]["calls"].values()) == {"ok"}
    assert set(found["triton-smoke"]["data"]["calls"].values()) == {"ok"}
    for tool in ("memcheck", "synccheck"):
        assert found[f"sanitizer-{tool}"]["data"] == {"exit": 0, "ended": True}
    cases = {n: each["data"] for n, each in found.items() if "comparison" in each["data"]}
    assert len(cases) == len([stage for stage in every if "timings" in stage.name]) - 1
    timed = {name: data["comparison"]["timings"] for name, data in cases.items()}
    assert {"tbe", "torch", "amtl_frozen"} <= set(timed["timings-03"])
    assert {"tbe", "eager", "amtl_search_fused"} <= set(timed["timings-14"])
    for timing in (each for case in timed.values() for each in case.values()):
        assert timing["facts"]["floor_bytes"] > 0 and timing["facts"]["bytes_per_lookup"] > 0
        # A simulator's time is no share of a card's.
        assert timing["share"] == 0 and "floor_share" not in timing["facts"]
    assert found["training-step"]["data"]["replay_seconds"] > 0
    report = (tmp_path / "report.md").read_text()
    assert "| timings-04 | killed |" in report and "## failed: tests-operators" in report
    assert "A dry run: times are the simulator's" in report and "behind the L2" in report
    assert "A dry run: times are the simulator's" in done.stdout and "%" not in report

    # Another piece of the run: what has ended well is left as it is.
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    again = command(tmp_path, "--dry-run", "--resume", "--stages", "smoke,timings-04,build")
    assert again.stdout.startswith("timings-04: ok"), again.stdout
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    changed = {name for name in after if after[name] != before[name]}
    assert {name.partition("-")[2] for name in changed} == {"timings-04.json"}


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("echo done; exit 3", "memcheck ended with 3"),
        # As where the program that it watches is killed.
        ("exit 0", "never got to its end"),
        ("", "no compute-sanitizer"),
    ],
)
def test_what_a_sanitizer_finds_or_never_sees_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, told: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    with pytest.raises((RuntimeError, stages.LeftOutError), match=told):
        gpu.sanitizer(gpu.Setting(True, tmp_path), lambda data: None, tool="memcheck")


def test_all_but_triton_fits_into_45_minutes_whatever_it_takes(tmp_path: Path) -> None:
    """Pieces of 9.5 minutes waste up to half a stage each at their ends."""
    every = gpu.all_stages(gpu.Setting(False, tmp_path))
    before = [stage.limit for stage in every if not stage.name.startswith("triton")]
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert round(sum(before) / 60) == 40 and "all others together have 40." in page
    assert round(sum(stage.limit for stage in every) / 60) == 59 and "they would need\n59" in page
    assert 4 * 9.5 + 7 == 45 and "--minutes 7" in page
    listed = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()[:-1]]
    assert names == [stage.name for stage in every]


def test_peers_that_need_no_installation_stand_in_one_table() -> None:
    small = {"device": "cpu", "rows": 60, "bags": 4, "bag_size": 3}
    both = {"tbe", "compiled", "amtl_search_fused"}
    cases = [case for case in gpu_cases() if both <= set(case.contenders)]
    refused = [
        [CONTENDERS[name].refuses(dataclasses.replace(case, **small)) for name in both]
        for case in cases
    ]
    assert any(not any(reasons) for reasons in refused)


def test_without_a_gpu_nothing_is_tried(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = command(tmp_path)
    assert done.returncode == gpu.NO_GPU and "--dry-run rehearses" in done.stdout
    found = results(tmp_path)
    assert found.pop("environment")["outcome"] == "failed"
    assert {each["outcome"] for each in found.values()} == {"left out"}
    assert found["build"]["detail"] == "environment: failed"
    assert found["smoke"]["detail"] == "build: left out"


def test_the_report_has_both_rooflines_beside_the_time() -> None:
    facts = {"seconds": 2e-4, "bytes_per_lookup": 123.4, "floor_bytes": 1.5e8, "floor_share": 0.3}
    timing = {"title": "amtl search", "share": 0.25, "facts": facts}
    comparison = {"timings": {"amtl_search": timing}, "left_out": {"fbgemm": "absent\nhere"}}
    data = {"comparison": comparison, "copy_bandwidth": 2.5e12, "cache_bytes": 50 << 20}
    data["l2"] = "flushed"
    text = "\n".join(gpu.case_lines(stages.Result("timings-00", "ok", 1.0, 9.0, "", data)))
    assert "| amtl search | 200.0 | 123.4 | 25% | 150 | 30% |" in text
    assert "52,428,800 bytes" in text and "Copy: 2.50 TB/s" in text and "fbgemm: absent" in text


def test_a_stage_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = command(tmp_path, "--dry-run", "--stages", "smoke,timing-00")
    assert done.returncode == 2 and "no stage begins with 'timing-00'" in done.stderr
    assert not list(tmp_path.iterdir())
    # The page's are.
    page = (ROOT / "docs" / "gpu.md").read_text()
    asked = {name for names in re.findall(r"--stages ([\w,-]+)", page) for name in names.split(",")}
    every = [stage.name for stage in gpu.all_stages(gpu.Setting(False, tmp_path))]
    assert asked and all(any(name.startswith(each) for name in every) for each in asked)


STAGES = """
import json, os, subprocess, sys, time
from pathlib import Path
from bench import stages
from bench.stages import LeftOutError, Stage

def grandchild(save):
    process = subprocess.Popen(["sleep", "600"])
    save({"pid": process.pid})
    process.wait()

def absent(save):
    raise LeftOutError("no such thing here")

every = [
    Stage("fine", 30, lambda save: print("a\\nlast line")),
    Stage("hangs", 0.5, grandchild),
    Stage("absent", 30, absent),
    Stage("after absent", 30, lambda save: None, needs="absent"),
    Stage("long", 500, lambda save: None),
    Stage("short", 30, lambda save: None),
]
late = stages.run_all(every, Path(sys.argv[1]), seconds=40)
print(json.dumps(late))
"""


def test_time_boxes_and_what_stages_need(tmp_path: Path) -> None:
    program = [sys.executable, "-c", STAGES, str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # There was no time for it; what comes after has its turn.
    assert json.loads(done.stdout) == ["long"]
    found = results(tmp_path)
    assert list(found) == ["fine", "hangs", "absent", "after absent", "short"]
    assert found["fine"]["detail"] == "last line"
    assert found["hangs"]["outcome"] == "killed"
    # Nothing that a stage has started outlives it.
    with pytest.raises(ProcessLookupError):
        os.kill(found["hangs"]["data"]["pid"], 0)
    assert found["absent"]["detail"] == "no such thing here"
    assert found["after absent"]["detail"] == "absent: left out"
    assert stages.read(tmp_path / "none.json") is None


ORPHANS = """
import os, signal, subprocess, sys, time
from pathlib import Path
from bench import stages

def deaf(save):
    # As one that a driver has: no signal but a kill reaches it.
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    process = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
    grandchild = int(process.stdout.readline())
    save({"pids": [os.getpid(), os.getppid(), process.pid, grandchild]})
    time.sleep(600)

stages.run_all([stages.Stage("deaf", 600, deaf)], Path(sys.argv[1]))
"""


def runs(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def waits_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_stage_ends_with_the_harness_however_that_ends(tmp_path: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], cwd=ROOT)
    saved = tmp_path / "00-deaf.saved"
    try:
        assert waits_for(saved.exists)
        pids = json.loads(saved.read_text())["pids"]
        assert len(pids) == 4 and all(map(runs, pids)) and program.pid not in pids
    finally:
        program.kill()
        program.wait()
    try:
        assert waits_for(lambda: not any(map(runs, pids)))
    finally:
        for pid in filter(runs, pids):
            os.kill(pid, signal.SIGKILL)


UNKILLABLE = """
import json, os, signal, subprocess, sys
from pathlib import Path
from bench import stages
from bench.stages import Stage

kill, held = os.killpg, []

def driver_hangs(group, number):
    held.append(group)
    if group != held[0]:
        kill(group, number)

os.killpg, stages.PATIENCE = driver_hangs, 0.5
every = [
    Stage("hangs", 2, lambda save: subprocess.run(["sleep", "600"])),
    Stage("next", 30, lambda save: None),
]
try:
    stages.run_all(every, Path(sys.argv[1]))
finally:
    kill(held[0], signal.SIGKILL)
"""


def test_a_process_that_no_kill_ends_stops_no_other_stage(tmp_path: Path) -> None:
    program = [sys.executable, "-c", UNKILLABLE, str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["hangs"]["outcome"] == "killed" and found["next"]["outcome"] == "ok"
    assert "have not ended" in found["hangs"]["detail"] and found["next"]["detail"] == ""
    assert 2.5 <= found["hangs"]["seconds"] < 30


SLOW_TESTS = """
import time

def test_quick():
    pass

def test_wrong():
    assert False

def test_hangs():
    time.sleep(600)
"""

KILLED_TESTS = """
import functools, sys, time
from pathlib import Path
from bench import gpu, stages

folder = Path(sys.argv[1])

def until_it_hangs(child, seconds):
    log = folder / "00-tests.log"
    while not log.exists() or "test_hangs" not in log.read_text():
        time.sleep(0.05)

stages._wait = until_it_hangs
of = {"folders": [], "backend": "cuda", "rehearsed": [str(folder / "test_slow.py")]}
work = functools.partial(gpu.tests, gpu.Setting(True, folder), **of)
stages.run(stages.Stage("tests", 1, work), folder / "00-tests.json", 1)
"""


def test_a_killed_stage_of_tests_says_what_had_passed(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    program = [sys.executable, "-c", KILLED_TESTS, str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)["tests"]
    assert found["outcome"] == "killed"
    # What was saved last may be two seconds old; the end of the log is not.
    assert "test_slow.py::test_quick PASSED" in found["detail"]
    assert "test_slow.py::test_wrong FAILED" in found["detail"]
    assert found["detail"].endswith("test_slow.py::test_hangs")
    assert set(found["data"]) == {"running", "failed", "passed"}


@pytest.mark.parametrize(
    ("architectures", "card", "runs"),
    [
        ("80-real 90-real", "90", True),
        ("80-real", "86", True),
        ("86-real", "80", False),
        ("90-real", "100", False),
        ("80-real 90-virtual", "100", True),
        ("90-virtual", "80", False),
        ("90", "90", True),
        ("None", "90", False),
    ],
)
def test_prebuilt_code_is_taken_where_it_runs(architectures: str, card: str, runs: bool) -> None:
    assert gpu.covers(architectures, card) == runs


@pytest.mark.parametrize("prebuilt", [True, False])
@pytest.mark.parametrize("breaks", [True, False])
def test_it_builds_with_cmake_alone_what_is_not_there(
    prebuilt: bool, breaks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    status = ["on: nvcc 13.0 for 80-real 90-real" if prebuilt else "off: no module"]

    def run(arguments: list[str], **options: Any) -> tuple[int, str]:
        asked.append(arguments)
        if breaks:
            return 2, "an error"
        status[0] = "on: nvcc 13.0 for 90-real"
        return 0, ""

    monkeypatch.setattr(gpu, "command", run)
    monkeypatch.setattr(gpu, "native_status", lambda: status[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("bench.contenders.peer.MODULE", tmp_path / "tbe.so")
    saved: list[dict[str, Any]] = []
    setting = gpu.Setting(False, tmp_path)
    if breaks and not prebuilt:
        with pytest.raises(RuntimeError, match=r"cmake -S .* ended with 2"):
            gpu.build(setting, saved.append)
        assert saved[-1]["ran"] == "CMake"
        return
    gpu.build(setting, saved.append)
    assert saved[-1]["ran"] == ("prebuilt" if prebuilt else "CMake")
    assert all(step[0] == "cmake" for step in asked)
    targets = [each for step in asked for each in step if each.startswith("--target")]
    assert targets == ([] if prebuilt else ["--target=_C"]) + ([] if breaks else ["--target=tbe"])
    # A peer that does not build is named and costs nothing else.
    assert ("ended with 2" in saved[-1]["peer"][0]) if breaks else saved[-1]["peer"] == "built"


def training(monkeypatch: pytest.MonkeyPatch, what: str, share: float) -> list[dict[str, Any]]:
    """What a training stage saves whose replays leave other weights, by a share of them."""
    captured = gpu_step._captured

    def nudged(model: gpu_step._Model, device: str) -> Callable[[], None]:
        replay = captured(model, device)
        parts = {"tables": model.tables, "masks": model.masks}
        weights = parts.get(what) or [*model.network.parameters()]

        def call() -> None:
            replay()
            for weight in weights:
                weight.data.mul_(1 + share)

        return call

    monkeypatch.setattr(gpu_step, "_captured", nudged)
    saved: list[dict[str, Any]] = []
    try:
        gpu_step.measure("cpu", saved.append, simulated=True)
    except RuntimeError as error:
        saved.append({"error": str(error)})
    return saved


def test_a_network_may_round_in_other_ways(
    simulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, last = training(monkeypatch, "network", 1e-6)
    assert timed["replay_seconds"] > 0 and not any(timed["whole steps"]["same bits"].values())
    wanted = {"tables": True, "masks": True, "network": False}
    assert last["steps on given gradients"]["same bits"] == wanted


@pytest.mark.parametrize(
    ("what", "share", "error"),
    [
        ("network", 0.1, "replays of whole steps leave other weights: .*network by"),
        ("tables", 1e-6, "replays on given gradients leave other bits of tables, masks$"),
        ("masks", 1e-6, "replays on given gradients leave other bits of masks$"),
    ],
)
def test_other_weights_are_told_of_when_the_step_was_timed(
    simulator: None, monkeypatch: pytest.MonkeyPatch, what: str, share: float, error: str
) -> None:
    timed, compared, last = training(monkeypatch, what, share)
    assert timed["replay_seconds"] > 0 and set(compared) > set(timed)
    assert re.match(error, last["error"])


def test_a_training_step_that_waits_is_no_graph(
    simulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal's step runs as one that is captured: the simulator refuses a wait."""
    saved: list[dict[str, Any]] = []
    gpu_step.measure("cpu", saved.append, simulated=True)
    assert all(saved[-1]["steps on given gradients"]["same bits"].values())

    def waits(*arguments: Any, optimizer: Any) -> torch.Tensor:
        return ak.adaptive_embedding_bag_tables(*arguments)

    monkeypatch.setattr(ak.fused, "adaptive_embedding_bag_tables", waits)
    with pytest.raises(RuntimeError, match=r"how many distinct rows .* a CUDA graph capture"):
        gpu_step.measure("cpu", saved.append, simulated=True)


class Events:
    """Stands in for ``torch.cuda``: notes what a clock asks of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def _sleep(self, cycles: int) -> None:
        self.asked.append(cycles)

    def Event(self, enable_timing: bool) -> Any:
        asked = self.asked

        class Event:
            def record(self) -> None:
                asked.append("record")

            def synchronize(self) -> None:
                asked.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return 2.5

        return Event()


def test_the_clock_times_the_gpu_and_not_the_host() -> None:
    cuda = Events()
    clock = device.DeviceClock(1 << 20, cuda)

    def slow_host() -> None:
        cuda.asked.append("run")
        torch.randn(300, 300) @ torch.randn(300, 300)
        device.time.sleep(0.02)

    assert clock(slow_host) == 2.5e-3
    sleep, *rest = cuda.asked
    assert rest == ["record", "run", "record", "wait"]
    cuda.asked.clear()
    clock(slow_host)
    # The GPU waits for as long as the host takes to enqueue, and some more, at any clock.
    assert cuda.asked[0] > sleep and cuda.asked[0] / 2e9 > 0.02


@pytest.mark.parametrize(("chosen", "flushes"), [("flushed", 1), ("rotated", 0)])
def test_the_l2_is_flushed_where_that_is_chosen(
    chosen: str, flushes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[gpu.Setting] = []
    monkeypatch.setattr(gpu, "all_stages", lambda setting: found.append(setting) or [])
    gpu.main(["--list", "--l2", chosen, "--out", str(tmp_path)])
    clock = device.DeviceClock(1 << 20, Events(), flush=found[0].flush)
    reads: list[str] = []
    monkeypatch.setattr(torch.Tensor, "max", lambda tensor: reads.append("read"))
    clock(lambda: None)
    assert len(reads) == flushes
    asked: list[bool] = []

    def runner(budget: Any, *, flush: bool) -> Any:
        asked.append(flush)
        return Runner(), {"cuda": {"copy": 1.0}}

    monkeypatch.setattr(device, "runner", runner)
    _, told = gpu._clocked(found[0], 1.0)
    assert asked == [bool(flushes)] and ("flushed" in told["l2"]) == bool(flushes)
