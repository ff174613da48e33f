"""Proof and measurement on a GPU: ``python -m bench gpu`` (or ``make gpu``).

Stages in the order of their worth, each in a process of its own that is killed at its limit, each
with a result file that is written as soon as it ends: a stage that fails, crashes or hangs costs
itself alone. Runs in pieces: ``--minutes 10 --resume`` goes on where the last piece ended, and
``--stages`` picks some. Needs torch; pytest and hypothesis for the tests; no network. What is
missing is named and left out.

``--dry-run`` rehearses all of it without a GPU: the host simulator stands for the CUDA kernels, the
interpreter for Triton's, and nothing that is timed means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import stages
from bench.files import write_aside
from bench.setting import ROOT, Setting
from bench.stages import LeftOutError, Result, Save, Stage

RESULTS = ROOT / "runs" / "gpu"
NO_GPU = 3


def command(arguments: Sequence[str], **options: Any) -> tuple[int, str]:
    """Exit code and output of a command; 127 where there is none. Ends with its stage."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", check=False, **options
        )
    except FileNotFoundError as missing:
        return 127, str(missing)
    return done.returncode, done.stdout + done.stderr


# --- Stages --------------------------------------------------------------------------------------


def environment(setting: Setting, save: Save) -> None:
    """Card, driver, clocks, versions."""
    import torch

    from bench import device

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for tool, arguments in {
        "driver": ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv"],
        "nvcc": ["nvcc", "--version"],
        "cmake": ["cmake", "--version"],
        "sanitizer": ["compute-sanitizer", "--version"],
    }.items():
        code, text = command(arguments, timeout=20)
        lines = text.strip().splitlines()
        found[tool] = lines[0 if tool == "cmake" else -1] if code == 0 and lines else "missing"
    for package in ("triton", "fbgemm_gpu", "torchrec", "pytest", "hypothesis", "xdist"):
        found[package] = "present" if importlib.util.find_spec(package) else "missing"
    if setting.dry:
        found["card"] = "none: a dry run"
    elif not torch.cuda.is_available():
        save(found)
        raise RuntimeError("no CUDA GPU is visible to PyTorch here")
    else:
        properties = torch.cuda.get_device_properties(0)
        found["card"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = getattr(properties, "L2_cache_size", 0)
        found["memory_bytes"] = properties.total_memory
        found["state"] = device.state()
    save(found)


def native_status() -> str:
    """What a fresh process says of CUDA in the built module, and for which architectures."""
    check = (
        "import amtl_kernels as a; n = a.build_info()['native'];"
        "print(n.get('cuda', n), 'for', n.get('cuda_architectures'))"
    )
    code, text = command([sys.executable, "-c", check], cwd=ROOT, timeout=60)
    return text.strip().splitlines()[-1] if code == 0 and text.strip() else "off: no module"


def covers(architectures: str, capability: str) -> bool:
    """Whether code for ``80-real 90-virtual`` and the like runs on a card of ``90``."""
    card = int(capability)
    for each in architectures.split():
        number, _, kind = each.partition("-")
        if not number.isdigit():
            continue
        built = int(number)
        same_major = built // 10 == card // 10 and built <= card
        if (kind != "virtual" and same_major) or (kind != "real" and built <= card):
            return True
    return False


def build(setting: Setting, save: Save) -> None:
    """Takes the module that is there, if its code runs on this card; else builds with CMake alone.

    The unmasked kernel of ``bench/peer`` is built beside it, or named as missing.
    """
    if setting.dry:
        setting.backend("cuda")
        save({"ran": "the host simulator, built before"})
        return
    import torch

    from bench.contenders.peer import MODULE

    card = "".join(str(part) for part in torch.cuda.get_device_capability(0))
    folder = ROOT / "build" / f"gpu-{card}"
    jobs = str(len(os.sched_getaffinity(0)))
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder)),
        *(["-GNinja"] if shutil.which("ninja") else []),
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DAMTL_CUDA=on",
        "-DAMTL_TOOLS=OFF",
        f"-DAMTL_CUDA_ARCHITECTURES={card}-real",
    ]

    def make(*targets: str) -> str:
        """The end of the output if something failed, else nothing."""
        every = [f"--target={target}" for target in targets]
        for step in (configure, ["cmake", "--build", str(folder), "--parallel", jobs, *every]):
            code, text = command(step)
            if code:
                return f"{' '.join(step[:3])} ended with {code}\n{text[-3000:]}"
        return ""

    status, started = native_status(), time.monotonic()
    found: dict[str, Any] = {"ran": "prebuilt", "module": status}
    if not (status.startswith("on") and covers(status.rpartition(" for ")[2], card)):
        found = {"ran": "CMake", "before": status}
        save(found)
        wrong = make("_C")
        if wrong:
            raise RuntimeError(wrong)
        found |= {"module": native_status(), "seconds": round(time.monotonic() - started, 1)}
    save(found)
    if not found["module"].startswith("on"):
        raise RuntimeError(f"the module that was built says: {found['module']}")
    if not MODULE.exists():
        save({**found, "peer": make("tbe").splitlines()[:1] or "built"})


def smoke(setting: Setting, save: Save, *, backend: str) -> None:
    """Every kernel once, against the reference."""
    from bench import gpu_smoke

    os.environ["AMTL_TRITON_AUTOTUNE"] = "0"
    setting.backend(backend)
    kinds = {"cuda": gpu_smoke.EVERY_KIND, "triton": gpu_smoke.COMPILED_KINDS}[backend]
    found: dict[str, str] = {}

    def note(name: str, what: str) -> None:
        found[name] = what
        save({"calls": found})

    kinds = gpu_smoke.SIMULATED_KINDS if setting.dry else kinds
    gpu_smoke.run(setting.device, note, kinds=kinds, check=True)
    if setting.dry and backend == "cuda":
        import amtl_kernels._tools as tools

        save({"calls": found, "kernels": sorted(tools.launch_counts())})
    wrong = [f"{name}: {what}" for name, what in found.items() if what != "ok"]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    print(f"{len(found)} calls are right")


class _Progress:
    """A pytest plugin that saves which tests have passed, so that a kill does not take it along.

    Every two seconds at most; the end of the log, in the detail of a result, has the rest.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self._next = 0.0
        self._found: dict[str, list[str]] = {"running": [], "failed": [], "passed": []}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._found["running"].append(nodeid)
        self._tell()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.nodeid not in self._found["failed"]:
            self._found["failed"].append(report.nodeid)
        elif report.passed and report.when == "call":
            self._found["passed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self._found["running"]:
            self._found["running"].remove(nodeid)
        self._tell()

    def _tell(self) -> None:
        if time.monotonic() >= self._next:
            self._save(dict(self._found))
            self._next = time.monotonic() + 2

    def ended(self, **more: Any) -> None:
        """Saves everything, and more."""
        self._save({**more, **self._found})


def tests(
    setting: Setting, save: Save, *, folders: Sequence[str], backend: str, rehearsed: Sequence[str]
) -> None:
    """Tests of some folders on one backend; in a rehearsal, those few of ``rehearsed``."""
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            raise LeftOutError(f"{package} is not installed")
    os.environ["OMP_NUM_THREADS"] = "2"
    os.environ["AMTL_TEST_EXAMPLES"] = "5" if backend == "triton" else "40"
    os.environ["AMTL_TRITON_AUTOTUNE"] = "0"
    name = {"cuda": "hostsim", "triton": "triton"}[backend] if setting.dry else backend
    os.environ["AMTL_TEST_BACKENDS"] = name
    if setting.dry and backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(ROOT)
    arguments = ["-v", "-p", "no:cacheprovider"]
    if setting.dry:
        arguments += rehearsed
    else:
        arguments += ["-m", "gpu", *folders]
        if importlib.util.find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8:
            arguments += ["-n", "6"]
    import pytest

    progress = _Progress(save)
    code = int(pytest.main(arguments, plugins=[progress]))
    progress.ended(exit=code, backend=name)
    # 5: nothing was collected, which proves nothing.
    if code:
        raise RuntimeError(f"pytest ended with {code}")


def _clocked(setting: Setting, seconds: float) -> tuple[Any, dict[str, Any]]:
    """A runner for this place, and what it says of the place."""
    from bench import device
    from bench.plan import Budget
    from bench.runner import Runner

    l2 = "flushed" if setting.flush else "as the call before left it, on other ids"
    if setting.dry:
        budget = Budget(seconds, minimal_rounds=1, maximal_rounds=1, shortest_sample=0.0)
        budget = dataclasses.replace(budget, warm_calls=1)
        # No copy rate: shares of one by simulated kernels would look like results.
        return Runner(budget=budget, cache_bytes=1024), {"cache_bytes": 1024, "l2": l2}
    budget = Budget(seconds, minimal_rounds=10, maximal_rounds=100)
    runner, ceilings = device.runner(budget, flush=setting.flush)
    found = {"copy_bandwidth": ceilings["cuda"]["copy"], "cache_bytes": runner.cache_bytes}
    return runner, {**found, "l2": l2, "before": device.state()}


def timings(
    setting: Setting, save: Save, *, number: int, backend: str = "cuda", tuned: bool = False
) -> None:
    """One case of the suite ``gpu``, by everybody; on Triton by ours alone."""
    import torch

    from bench import device
    from bench.suites import gpu_cases

    os.environ["AMTL_TRITON_AUTOTUNE"] = str(int(tuned))
    setting.backend(backend)
    case = gpu_cases()[number]
    if setting.dry:
        small = {"rows": 60, "dim": 8, "bags": 4, "tables": min(case.tables, 2)}
        small["bag_size"] = min(case.bag_size, 3)
        case = dataclasses.replace(case, device="cpu", threads=1, **small)
    names = case.contenders
    if backend == "triton":
        names = tuple(name for name in names if name.startswith("amtl"))
    if setting.dry:
        # The simulator and the interpreter are slow, and not what a rehearsal is about.
        names = tuple(name for name in names if name in _REHEARSED[backend])
    case = dataclasses.replace(case, contenders=names)
    runner, found = _clocked(setting, 0.001 if setting.dry else 4.0)
    result = runner.run(case)
    for timing in result.timings.values():
        timing.samples = [float(f"{value:.5g}") for value in timing.samples]
        timing.facts["seconds"] = float(f"{timing.summary.median:.5g}")
    if not setting.dry:
        found["after"] = device.state()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    save({**found, "case": case.name, "comparison": dataclasses.asdict(result)})
    if not any(timing.ours for timing in result.timings.values()):
        raise RuntimeError(f"nothing of ours was timed: {result.left_out}")
    print(f"{len(result.timings)} timed")


def training(setting: Setting, save: Save) -> None:
    """One whole training step, captured into a CUDA graph and replayed."""
    from bench import gpu_step

    setting.backend("cuda")
    gpu_step.measure(setting.device, save, simulated=setting.dry)


def sanitizer(setting: Setting, save: Save, *, tool: str) -> None:
    """compute-sanitizer's ``tool`` over the calls of the smoke stage."""
    if shutil.which("compute-sanitizer") is None:
        raise LeftOutError("no compute-sanitizer on this machine")
    # PyTorch's allocator would hide reads past an allocation inside of a larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    calls = ["--tool", tool, "--error-exitcode", "3", sys.executable, "-m", "bench.gpu_smoke"]
    calls += ["--dry-run"] if setting.dry else []
    code, text = command(["compute-sanitizer", *calls], cwd=ROOT, env=environment)
    print(text[-3500:])
    ended = text.rstrip().endswith("done") or "\ndone\n" in text
    save({"exit": code, "ended": ended})
    if code:
        raise RuntimeError(f"compute-sanitizer {tool} ended with {code}")
    if not ended:
        raise RuntimeError("what compute-sanitizer watched never got to its end")


_REHEARSED = {
    "cuda": (
        *("tbe", "torch", "eager", "fbgemm"),
        *("amtl_search_fused", "amtl_tables_fused", "amtl_frozen"),
    ),
    "triton": ("amtl_frozen_fused", "amtl_masked"),
}
_CUDA_REHEARSED = ("tests/kernels/test_errors.py", "-k", "hostsim and size_outside")
_STREAMS_REHEARSED = ("tests/hostsim/test_streams.py", "-k", "captured_lookup or clamped_index")
_TRITON_REHEARSED = ("tests/kernels/test_errors.py", "-k", "triton and empty_table")


def all_stages(setting: Setting) -> list[Stage]:
    """Everything, by worth."""
    from bench.suites import gpu_cases

    def stage(name: str, limit: float, work: Callable[..., None], **options: Any) -> Stage:
        needs = options.pop("needs", "")
        return Stage(name, limit, functools.partial(work, setting, **options), needs)

    native = {"needs": "build"}
    of_cuda = {"backend": "cuda", "needs": "build"}
    found = [
        stage("environment", 60, environment),
        stage("build", 400, build, needs="environment"),
        stage("smoke", 60, smoke, **of_cuda),
        stage(
            *("tests-streams", 120, tests),
            **{**of_cuda, "folders": ["tests/cuda"], "rehearsed": _STREAMS_REHEARSED},
        ),
        stage(
            *("tests-operators", 240, tests),
            **{**of_cuda, "folders": ["tests/kernels"], "rehearsed": _CUDA_REHEARSED},
        ),
    ]
    cases = gpu_cases()
    found += [stage(f"timings-{n:02}", 75, timings, number=n, **native) for n in range(len(cases))]
    found.append(stage("training-step", 90, training, **native))
    tools = ("memcheck", "synccheck")
    found += [stage(f"sanitizer-{tool}", 150, sanitizer, tool=tool, **native) for tool in tools]
    triton: dict[str, Any] = {"backend": "triton", "needs": "environment"}
    folders = ["tests/kernels", "tests/triton"]
    found.append(stage("triton-smoke", 150, smoke, **triton))
    found.append(
        stage("triton-tests", 400, tests, **triton, folders=folders, rehearsed=_TRITON_REHEARSED)
    )
    found += [stage(f"triton-timings-{n:02}", 120, timings, number=n, **triton) for n in (0, 2, 4)]
    found.append(stage("triton-autotune", 240, timings, number=3, tuned=True, **triton))
    return found


# --- Report --------------------------------------------------------------------------------------


def case_lines(result: Result) -> list[str]:
    """The timings of a case as a table: measured, and beside it what it can be at best."""
    comparison, copy = result.data["comparison"], result.data.get("copy_bandwidth")
    if copy:
        lines = [f"Copy: {copy / 1e12:.2f} TB/s; {result.data.get('before')}."]
    else:
        lines = ["A dry run: times are the simulator's or the interpreter's; no share of a GPU."]
    cache = result.data["cache_bytes"]
    lines += [
        f"L2: {result.data['l2']}. Bytes that lookups ask for, and those that pass a cache of "
        f"{cache:,} bytes which is empty at first:",
        "",
        "| who | µs | bytes a lookup, no cache | of copy rate | MB behind the L2 | of copy rate |",
        "|---|---|---|---|---|---|",
    ]
    timed = comparison["timings"].values()
    for timing in sorted(timed, key=lambda timing: timing["facts"]["seconds"]):
        facts = timing["facts"]
        shares = (timing["share"], facts.get("floor_share", 0.0))
        asked, floor = (f"{share:.0%}" if copy else "none" for share in shares)
        cells = [
            *(timing["title"], f"{facts['seconds'] * 1e6:.1f}"),
            *(f"{facts['bytes_per_lookup']:.1f}", asked),
            *(f"{facts['floor_bytes'] / 1e6:.4g}", floor),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, why in comparison["left_out"].items():
        lines.append(f"\nWithout {name}: {why.splitlines()[0]}")
    return lines


def markdown(found: Sequence[Result]) -> str:
    """All results, to be read."""
    told = next((each.data for each in found if each.name == "environment"), {})
    lines = [
        f"# GPU report: {told.get('card', 'no GPU')}",
        "",
        f"torch {told.get('torch')}, Python {told.get('python')}, driver {told.get('driver')}, "
        f"triton {told.get('triton')}, fbgemm_gpu {told.get('fbgemm_gpu')}",
        "",
        "| stage | outcome | seconds | |",
        "|---|---|---|---|",
    ]
    for each in found:
        detail = each.detail.strip().splitlines()[-1][:120] if each.detail.strip() else ""
        ran = f"{each.data['ran']}; " if "ran" in each.data else ""
        cells = [each.name, each.outcome, f"{each.seconds:.0f}", ran + detail.replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    for each in found:
        if "comparison" in each.data:
            lines += ["", f"## {each.name}: {each.data['case']}", "", *case_lines(each)]
    for each in found:
        if each.outcome in ("failed", "killed"):
            lines += ["", f"## {each.outcome}: {each.name}", "", "```", each.detail[-2500:], "```"]
    return "\n".join(lines) + "\n"


def report(folder: Path, every: Sequence[Stage]) -> list[Result]:
    """Writes ``report.md`` of what lies in a folder; the results."""
    found = [stages.read(stages.path_of(folder, every, stage)) for stage in every]
    results = [result for result in found if result is not None]
    write_aside(folder / "report.md", markdown(results))
    return results


# --- Command line --------------------------------------------------------------------------------


def _spoiled(every: list[Stage], spoils: Sequence[str]) -> list[Stage]:
    """Stages that fail, crash or, for a second, hang instead of working, as tests ask."""

    def fail(save: Save) -> None:
        save({"so far": 1})
        raise RuntimeError("spoiled")

    def crash(save: Save) -> None:
        os.abort()

    def hang(save: Save) -> None:
        save({"so far": 1})
        subprocess.run(["sleep", "600"], check=False)

    ways = {"fail": fail, "crash": crash, "hang": hang}
    for each in spoils:
        name, _, way = each.partition("=")
        changes: dict[str, Any] = {"work": ways[way]} | ({"limit": 1.0} if way == "hang" else {})
        every = [dataclasses.replace(s, **changes) if s.name == name else s for s in every]
    return every


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs stages; 0 if none failed, 3 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--stages", default="", help="only these: beginnings of names, by commas")
    parser.add_argument("--resume", action="store_true", help="leave what has ended ok as it is")
    parser.add_argument("--minutes", type=float, default=9.5, help="for this piece")
    parser.add_argument(
        "--l2",
        choices=["flushed", "rotated"],
        default="flushed",
        help="before every run: emptied, or left as it is while the ids change",
    )
    parser.add_argument("--list", action="store_true", help="only list the stages")
    parser.add_argument("--spoil", action="append", default=[], help="NAME=fail|crash|hang; tests")
    options = parser.parse_args(arguments)
    # Forked with everything imported that most stages need, and no GPU touched. Symbolic shapes,
    # which FBGEMM and the tests ask for, take seconds.
    import torch
    import torch.fx.experimental.symbolic_shapes

    setting = Setting(options.dry_run, options.out.resolve(), options.l2 == "flushed")
    every = all_stages(setting)
    if options.list:
        for stage in every:
            print(f"{stage.limit:5.0f} s  {stage.name}")
        print(f"{sum(stage.limit for stage in every):5.0f} s  if each took all of its time")
        return 0
    wanted = [each for each in options.stages.split(",") if each]
    for each in wanted:
        if not any(stage.name.startswith(each) for stage in every):
            parser.error(f"no stage begins with {each!r}: --list has their names")
    every = _spoiled(every, options.spoil)
    assert not torch.cuda.is_initialized(), "stages cannot be forked off a process with a GPU"

    def notice(result: Result) -> None:
        print(f"{result.name}: {result.outcome} ({result.seconds:.0f} s)", flush=True)
        if "comparison" in result.data:
            print("\n".join(case_lines(result)), flush=True)

    out = options.out.resolve()
    late = stages.run_all(
        every,
        out,
        wanted=wanted,
        resume=options.resume,
        seconds=60 * options.minutes,
        notice=notice,
    )
    results = report(out, every)
    if late:
        print(f"no time for {', '.join(late)}: the same command with --resume goes on")
    print(f"{out / 'report.md'}")
    first = results[0] if results else None
    if first is not None and first.name == "environment" and first.outcome != "ok":
        print(json.dumps(first.data, indent=1))
        print("No CUDA GPU is visible to PyTorch here; --dry-run rehearses without one.")
        return NO_GPU
    return int(any(each.outcome in ("failed", "killed") for each in results))
