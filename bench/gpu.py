"""Proof and measurement on a GPU, in one command: ``python -m bench.gpu`` (or ``make gpu``).

In order: what machine this is; a build, where the checkout has no module with CUDA kernels; the
tests marked ``gpu`` (determinism, streams and CUDA graphs first, then the operators in CUDA, then
in Triton); compute-sanitizer over small cases; then timings (``bench.gpu_timings``). Needs torch
and pytest, no network; what is missing is named in the report and left out.

Everything fits in ten minutes: a stage has a limit, cut short where what follows would get less
than its reserve, and is ended with all of its processes when it reaches it. A stage that fails or
breaks hides no other. The report goes to ``bench/results/gpu-<card>.json`` and ``.md``, and is
written anew after every stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_timings import PLANS, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUDGET = 570.0


@dataclass
class Stage:
    """One stage's outcome: ``ok``, ``failed`` or ``left out``, and why."""

    name: str
    outcome: str
    seconds: float
    detail: str = ""


@dataclass
class Report:
    """Everything that is written."""

    environment: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    copy_bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def run(command: list[str], seconds: float, **options: Any) -> tuple[int, str]:
    """Exit code (124: out of time) and the end of the output.

    Out of time, the whole group of processes is killed: a child of the command that lived on would
    keep the pipe open, and the GPU.
    """
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,
            **options,
        )
    except FileNotFoundError as missing:
        return 127, str(missing)
    try:
        text, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        code = 124
    return code, text[-4000:]


def environment() -> dict[str, Any]:
    """Card, driver, versions; imports torch, which the caller has checked for."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for tool, command in {
        "driver": ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv"],
        "nvcc": ["nvcc", "--version"],
        "sanitizer": ["compute-sanitizer", "--version"],
    }.items():
        code, text = run(command, 20)
        found[tool] = text.strip().splitlines()[-1] if code == 0 and text.strip() else "missing"
    for package in ("triton", "fbgemm_gpu", "torchrec"):
        found[package] = "present" if importlib.util.find_spec(package) else "missing"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = getattr(properties, "L2_cache_size", 0)
        found["memory_bytes"] = properties.total_memory
    return found


def native_with_cuda() -> bool:
    """Whether a fresh process finds CUDA kernels in the built module."""
    check = "import amtl_kernels as a; n = a.build_info()['native']; print(n.get('cuda', n))"
    code, text = run([sys.executable, "-c", check], 60)
    return code == 0 and text.strip().splitlines()[-1].startswith("on")


def build(capability: str, seconds: float) -> tuple[str, str]:
    """Builds for this card, unless a module with CUDA kernels is there already."""
    if native_with_cuda():
        return "ok", "a module with CUDA kernels was there"
    if shutil.which("nvcc") is None:
        return "failed", "no nvcc, and no built module with CUDA kernels to use"
    environment = {
        **os.environ,
        "AMTL_CUDA": "on",
        "AMTL_TOOLS": "off",
        "MAX_JOBS": str(os.cpu_count() or 2),
        "CMAKE_ARGS": f"-DAMTL_CUDA_ARCHITECTURES={capability.replace('.', '')}-real",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, text = run(command, seconds, env=environment)
    if code or not native_with_cuda():
        return "failed", f"exit {code}\n{text[-1500:]}"
    return "ok", "built here"


def gpu_tests(folders: list[str], backends: str, seconds: float) -> tuple[str, str]:
    """The tests marked ``gpu`` in some folders, on some backends."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8:
        command += ["-n", "6"]
    environment = {**os.environ, "AMTL_TEST_BACKENDS": backends, "OMP_NUM_THREADS": "2"}
    code, text = run([*command, *folders], seconds, env=environment)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    # Exit code 5: nothing was collected, which proves nothing.
    return ("ok" if code == 0 else "failed"), (
        last if code == 0 else f"exit {code}\n{text[-2500:]}"
    )


SMALL_CASES = """
import torch, amtl_kernels
v = dict(n=500, d=17, l=2000, b=100)
for dtype in (torch.float32, torch.bfloat16):
    for d in (1, 17, 64, 160):
        w = torch.randn(v["n"], d, device="cuda").to(dtype)
        i = (torch.rand(v["l"], device="cuda") ** 4 * v["n"]).long().clamp(max=v["n"] - 1)
        o = torch.arange(0, v["l"], v["l"] // v["b"], device="cuda")
        k = torch.randint(1, d + 1, (v["n"],), device="cuda", dtype=torch.int32)
        g = torch.randint(0, 9, (v["n"],), device="cuda", dtype=torch.int32)
        s = torch.randint(1, d + 1, (9, 4), device="cuda", dtype=torch.int32)
        p = torch.randn(v["l"], device="cuda").to(dtype)
        grad = torch.randn(v["b"], d, device="cuda").to(dtype)
        ops = torch.ops.amtl
        rows = ([w], [1], [], [k], [], 0)
        groups = ([w], [1], [], [s], [g], 5)
        ops.lookup(*rows, [], i, None, None, 0, [-1], False, 1, True)
        ops.lookup(*groups, [w], i, o, p, 0, [3], False, 1, True)
        ops.lookup_backward(grad, *groups, i, o, p, 0, [3], False, True, True, True)
        state = torch.zeros(v["n"], device="cuda")
        ops.lookup_update_(
            *groups, grad, i, o, None, 1, [3], False, True, False, False, [state], 2,
            [0.1, 1e-8, 0.0, 0.0, 0.0, 1.0])
        # Adam, its steps counted in device memory; groups in order; weights rounded at random.
        moments = [torch.zeros(v["n"], d, device="cuda") for _ in range(2)]
        counter = torch.ones((), dtype=torch.int64, device="cuda")
        ordered = ([w], [1], [], [s], [g.sort().values], 5)
        ops.lookup_update_(
            *ordered, grad, i, o, None, 0, [3], False, True, False, True, [*moments, counter], 3,
            [0.1, 1e-8, 0.0, 0.9, 0.99, 1.0, 1.0])
        found, grads, _, _ = ops.lookup_backward(
            grad, *rows, i, o, None, 0, [-1], False, True, False, False)
        ops.apply_([w], found, grads, moments, 3, [0.1, 1e-8, 0.0, 0.9, 0.99, 2.0])
        half = max(1, d // 2)
        blocks = [w[:200].contiguous(), w[200:, :half].contiguous()]
        tiers = (blocks, [2], [d], [], [], 0)
        ops.lookup(*tiers, [], i, o, p, 0, [-1], False, 1, True)
        ops.lookup_backward(grad, *tiers, i, o, p, 0, [-1], False, True, False, True)
        # Both tables in one call, of the same bags.
        both = ([w, *blocks], [1, 2], [], [], [], 0)
        twice = (torch.cat([i, i]), torch.cat([o, o + v["l"], o.new_tensor([2 * v["l"]])]))
        pair = torch.cat([grad, grad], 1)
        bags = (*twice, None, 0, [-1, -1], True)
        ops.lookup(*both, [], *bags, 1, True)
        ops.lookup_backward(pair, *both, *bags, True, False, False)
torch.cuda.synchronize()
print("done")
"""


def sanitizer(tool: str, seconds: float) -> tuple[str, str]:
    """compute-sanitizer's ``tool`` over small cases of every operator."""
    if shutil.which("compute-sanitizer") is None:
        return "left out", "no compute-sanitizer on this machine"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
    # PyTorch's allocator would hide reads past an allocation inside of a larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, text = run([*command, sys.executable, "-c", SMALL_CASES], seconds, env=environment)
    ok = code == 0 and "done" in text
    return ("ok" if ok else "failed"), ("no findings" if ok else f"exit {code}\n{text[-2000:]}")


def timings(report: Report, seconds: float) -> tuple[str, str]:
    """Every case in a process of its own until the time is up; what is left out is named."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for number, plan in enumerate(PLANS):
            left = deadline - time.monotonic()
            if left < 15:
                report.left_out[str(plan)] = "out of time"
                continue
            part = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "bench.gpu_timings", str(number), "--part", str(part)]
            # Cases that hang must not eat the time of the rest.
            limit = min(left, 90.0 if number == 0 else 60.0)
            code, text = run([*command, "--seconds", str(limit - 10)], limit)
            adopt(report, part)
            if code:
                why = text.strip().splitlines()[-1] if text.strip() else ""
                report.left_out[f"amtl, the rest of {plan}"] = f"exit {code}: {why}"
    failed = [
        what
        for what, why in report.left_out.items()
        if what.startswith("amtl") and why != "out of time"
    ]
    if not any(row.who == "amtl CUDA" for row in report.rows):
        failed.append("nothing of ours was timed")
    return ("failed" if failed else "ok"), "; ".join(failed)


def adopt(report: Report, part: Path) -> None:
    """Takes over what the process of a case has written."""
    if not part.exists():
        return
    values = json.loads(part.read_text())
    report.rows += [Row(**row) for row in values["rows"]]
    report.left_out |= values["left_out"]
    report.copy_bandwidth = max(report.copy_bandwidth, values["copy_bandwidth"])


GOALS = {
    "gather": "≥ 85 %",
    "pooled": "≥ 75 %",
    "search step": "≥ 50 % (backward with optimizer), no slower than unmasked FBGEMM",
    "frozen step": "≥ 1.5 × unmasked FBGEMM",
}


def markdown(report: Report) -> str:
    """The report to be read."""
    e = report.environment
    lines = [
        f"# GPU report: {e.get('card', 'no GPU')}",
        "",
        f"torch {e.get('torch')}, Python {e.get('python')}, driver {e.get('driver')}, "
        f"triton {e.get('triton')}, fbgemm_gpu {e.get('fbgemm_gpu')}",
        "",
        "| stage | outcome | seconds | |",
        "|---|---|---|---|",
    ]
    for stage in report.stages:
        detail = stage.detail.splitlines()[0][:120] if stage.detail else ""
        lines.append(f"| {stage.name} | {stage.outcome} | {stage.seconds:.0f} | {detail} |")
    if report.rows:
        lines += ["", f"Copy: {report.copy_bandwidth / 1e12:.2f} TB/s. Caches cold, medians.", ""]
        for case in dict.fromkeys(row.case for row in report.rows):
            lines += [f"## {case}", "", "| work | who | µs | of copy rate |", "|---|---|---|---|"]
            for row in sorted(
                (r for r in report.rows if r.case == case), key=lambda r: (r.work, r.seconds)
            ):
                lines.append(
                    f"| {row.work} | {row.who} | {row.seconds * 1e6:.1f} | {row.share:.0%} |"
                )
            lines.append("")
        lines.append("Goals: " + "; ".join(f"{work} {goal}" for work, goal in GOALS.items()) + ".")
    if report.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {what}: {why.splitlines()[0]}" for what, why in report.left_out.items()]
    failed = [stage for stage in report.stages if stage.outcome == "failed"]
    for stage in failed:
        lines += ["", f"## Failed: {stage.name}", "", "```", stage.detail[-2000:], "```"]
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> Path:
    """Both files; returns the Markdown one."""
    folder.mkdir(parents=True, exist_ok=True)
    card = str(report.environment.get("card", "none")).lower().replace(" ", "-")
    text = folder / f"gpu-{card}.md"
    text.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    text.write_text(markdown(report))
    return text


class Clock:
    """Shares out the time of the whole run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds - 10

    def limit(self, share: float, reserve: float) -> float:
        """Seconds for a stage: ``share``, less where the stages after it need ``reserve``."""
        return max(15.0, min(share, self.end - time.monotonic() - reserve))


def stages(report: Report, clock: Clock) -> list[tuple[str, Callable[[], tuple[str, str]]]]:
    """Everything after the build, the cheapest and most telling first."""
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        (
            "tests: determinism, streams, graphs",
            lambda: gpu_tests(["tests/cuda"], "cuda", clock.limit(90, 330)),
        ),
        (
            "tests: CUDA operators",
            lambda: gpu_tests(["tests/kernels"], "cuda", clock.limit(120, 270)),
        ),
    ]

    def checked(tool: str, reserve: float) -> Callable[[], tuple[str, str]]:
        return lambda: sanitizer(tool, clock.limit(75, reserve))

    for tool, reserve in (("memcheck", 240.0), ("racecheck", 210.0), ("initcheck", 180.0)):
        checks.append((f"compute-sanitizer {tool}", checked(tool, reserve)))
    if importlib.util.find_spec("triton"):
        folders = ["tests/kernels", "tests/triton"]
        checks.append(
            (
                "tests: Triton operators",
                lambda: gpu_tests(folders, "triton", clock.limit(120, 140)),
            )
        )
    checks.append(("timings", lambda: timings(report, clock.limit(BUDGET, 0))))
    return checks


def run_stage(report: Report, name: str, call: Callable[[], tuple[str, str]], out: Path) -> bool:
    """Runs a stage and writes the report as it is then; a stage that breaks has failed."""
    start = time.monotonic()
    try:
        outcome, detail = call()
    except Exception as error:
        outcome, detail = "failed", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    report.stages.append(Stage(name, outcome, seconds, detail))
    print(f"{name}: {outcome} ({seconds:.0f} s)", flush=True)
    write(report, out)
    return outcome != "failed"


def main() -> int:
    """Runs the stages; 0 if none failed, 3 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="time for everything")
    options = parser.parse_args()
    clock = Clock(options.seconds)
    report = Report(environment=environment())
    if "card" not in report.environment:
        print("No CUDA GPU is visible to PyTorch here; nothing was proved or measured.")
        print(json.dumps(report.environment, indent=1))
        return 3
    capability = report.environment["capability"]
    if run_stage(report, "build", lambda: build(capability, clock.limit(200, 300)), options.out):
        for name, call in stages(report, clock):
            run_stage(report, name, call, options.out)
    print(write(report, options.out).read_text())
    return int(any(s.outcome == "failed" for s in report.stages))


if __name__ == "__main__":
    sys.exit(main())
