"""Proof and measurement on a GPU, in one command: ``python -m bench.gpu`` (or ``make gpu``).

In order: what machine this is; a build, where the checkout has none with CUDA; the tests marked
``gpu``; compute-sanitizer over small cases; then timings. Needs torch and pytest, no network; what
is missing is named in the report and left out. Every stage has its share of ten minutes. The report
goes to ``bench/results/gpu-<card>.json`` and ``.md``.

Timings are of cold caches (twice the L2 is written before every call), medians of CUDA-event times;
shares are the bytes that no implementation can avoid, over the time, over the bandwidth of a copy
measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUDGET = 600.0
# Tests set it to "cpu" to run everything but the timing without a GPU.
DEVICE = "cuda"


@dataclass
class Stage:
    """One stage's outcome: ``ok``, ``failed`` or ``left out``, and why."""

    name: str
    outcome: str
    seconds: float
    detail: str = ""


@dataclass
class Row:
    """One timing: what, on which case, by whom; seconds; useful bytes; share of the copy rate."""

    work: str
    case: str
    who: str
    seconds: float
    useful_bytes: float
    share: float


@dataclass
class Report:
    """Everything that is written."""

    environment: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    copy_bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def run(command: list[str], seconds: float, **options: Any) -> tuple[int, str]:
    """Exit code (124: out of time) and the end of the output."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, **options
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
        return 124, (text.decode() if isinstance(text, bytes) else text)[-2000:]
    except FileNotFoundError as missing:
        return 127, str(missing)
    return done.returncode, (done.stdout + done.stderr)[-4000:]


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
    code, text = run([sys.executable, "-c", check], 120)
    return code == 0 and text.strip().splitlines()[-1].startswith("on")


def build(capability: str) -> tuple[str, str]:
    """Builds for this card, unless a module with CUDA kernels is there already."""
    if native_with_cuda():
        return "ok", "a module with CUDA kernels was there"
    if shutil.which("nvcc") is None:
        return "failed", "no nvcc, and no built module with CUDA kernels to use"
    flags = f"-DAMTL_CUDA_ARCHITECTURES={capability.replace('.', '')}-real"
    environment = {
        **os.environ,
        "AMTL_CUDA": "on",
        "AMTL_TOOLS": "off",
        "MAX_JOBS": str(os.cpu_count() or 2),
        "CMAKE_ARGS": flags,
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, text = run(command, 240, env=environment)
    if code or not native_with_cuda():
        return "failed", text[-1500:]
    return "ok", "built here"


def gpu_tests(seconds: float) -> tuple[str, str]:
    """The suite with ``-m gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    code, text = run([*command, "tests/kernels", "tests/cuda", "tests/triton"], seconds)
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
        ops.masked_embedding(w, i, k, -1, 1)
        ops.adaptive_embedding_bag(w, i, o, g, s, w, p, 0, 3, False, 5, 1)
        ops.adaptive_embedding_backward(grad, w, i, o, g, s, p, 0, 3, False, 5, True, True, True)
        state = torch.zeros(v["n"], device="cuda")
        ops.adaptive_embedding_update_(
            w, [state], grad, i, o, g, s, None, 1, 3, False, 5, True, False, 2,
            [0.1, 1e-8, 0.0, 0.0, 0.0, 1.0])
        half = max(1, d // 2)
        blocks = [w[:200].contiguous(), w[200:, :half].contiguous()]
        ops.tiered_embedding_bag(blocks, [200, v["n"]], i, o, p, d, 0, -1, False, 1)
        ops.tiered_embedding_backward(grad, blocks, [200, v["n"]], i, o, p, d, 0, -1, False, True,
                                      True)
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


class Timer:
    """Cold-cache medians of CUDA-event times."""

    def __init__(self, l2_bytes: int) -> None:
        import torch

        self.torch = torch
        self.flush = torch.empty(max(2 * l2_bytes, 1 << 26) // 4, dtype=torch.int32, device=DEVICE)

    def __call__(self, function: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds of a call, after three to warm up."""
        cuda = self.torch.cuda
        for _ in range(3):
            function()
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            # The GPU is busy while the host enqueues: launch overhead stays out of the time.
            cuda._sleep(200_000)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[repeats // 2]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written per second by the best of two copies of 1 GiB."""
    torch = timer.torch
    a = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    b = torch.empty_like(a)
    return max(2 * 4 * a.numel() / timer(lambda: b.copy_(a), 10) for _ in range(2))


class Case:
    """A table in frequency order with 40 % of its size kept, and one batch of lookups."""

    def __init__(self, ids: str, dtype: str, rows: int, dim: int, bags: int, bag: int) -> None:
        import torch

        g = torch.Generator(device=DEVICE).manual_seed(1)
        self.name = f"{rows}x{dim} {dtype}, {bags} bags of {bag}, {ids}"
        self.torch, self.rows, self.dim, self.bags = torch, rows, dim, bags
        self.lookups = bags * bag
        kind = getattr(torch, dtype)
        uniform = torch.rand(self.lookups, generator=g, device=DEVICE, dtype=torch.float64)
        if ids == "zipf":
            # Inverse of the distribution function of a continuous Zipf law with exponent 1.05.
            power = -0.05
            top = float(rows + 1) ** power
            self.indices = ((1 + uniform * (top - 1)) ** (1 / power)).long() - 1
        else:
            self.indices = (uniform * rows).long()
        self.indices = self.indices.clamp(0, rows - 1)
        self.offsets = torch.arange(0, self.lookups, bag, device=DEVICE)
        rank = torch.arange(rows, device=DEVICE, dtype=torch.float64)
        sizes = (rank + 1) ** -0.3
        low, high = 0.0, 1e6
        for _ in range(60):
            middle = (low + high) / 2
            mean = (sizes * middle).clamp(1, dim).mean()
            low, high = (middle, high) if mean < 0.4 * dim else (low, middle)
        sizes = (sizes * low).round().clamp(1, dim).int()
        self.groups = 4096
        self.row_group = (rank**0.5 / rows**0.5 * self.groups).int().clamp(max=self.groups - 1)
        first = torch.searchsorted(self.row_group, torch.arange(self.groups, device=DEVICE).int())
        self.group_dims = sizes[first.clamp(max=rows - 1)].contiguous()
        self.row_dims = self.group_dims[self.row_group.long()]
        self.weight = torch.randn(rows, dim, generator=g, device=DEVICE).to(kind)
        self.grad = torch.randn(bags, dim, generator=g, device=DEVICE).to(kind)
        self.mask = torch.zeros(self.groups, dim, device=DEVICE)
        self.element = self.weight.element_size()
        self.kept = float(self.row_dims[self.indices].sum())
        distinct = self.indices.unique()
        self.distinct = distinct.numel()
        self.kept_distinct = float(self.row_dims[distinct].sum())
        width = ((self.row_dims.long() + 7) // 8 * 8).clamp(max=dim)
        order = width.sort(descending=True, stable=True).indices
        place = torch.empty_like(order)
        place[order] = torch.arange(rows, device=DEVICE)
        self.tier_indices = place[self.indices]
        values, counts = torch.unique_consecutive(width[order], return_counts=True)
        self.tier_ends = counts.cumsum(0).tolist()
        self.blocks = [
            torch.randn(n, w, device=DEVICE).to(kind)
            for n, w in zip(counts.tolist(), values.tolist(), strict=True)
        ]
        self.tier_kept = float(width[self.indices].sum())
        self.tier_distinct = float(width[distinct].sum())

    def bytes_of(self, work: str) -> float:
        """Bytes that the work must move (DESIGN: gather, pooled, search backward)."""
        lookups, dim = self.lookups, self.dim
        out = self.bags * dim
        return (
            self.element
            * {
                "gather": self.kept + lookups * dim,
                "pooled": self.kept + out,
                "frozen pooled": self.tier_kept + out,
                "search backward": lookups * dim + self.distinct * dim + self.kept_distinct,
                "search step": self.kept
                + out
                + lookups * dim
                + self.distinct * dim
                + 2 * self.kept_distinct,
                "frozen step": self.tier_kept + out + self.tier_kept + 2 * self.tier_distinct,
            }[work]
        )


HYPER = [0.01, 1e-8, 0.0, 0.0, 0.0, 1.0]
ROWWISE = 2


def ours(case: Case) -> dict[str, Callable[[], object]]:
    """This project's operators by kind of work."""
    ops = case.torch.ops.amtl
    c = case
    state = c.torch.zeros(c.rows, device=DEVICE)
    states = [c.torch.zeros(len(block), device=DEVICE) for block in c.blocks]
    group = (c.row_group, c.group_dims)
    bags = (0, -1, False)

    def pooled() -> object:
        return ops.adaptive_embedding_bag(
            c.weight, c.indices, c.offsets, *group, c.mask, None, *bags, 0, 0
        )

    def frozen() -> object:
        return ops.tiered_embedding_bag(
            c.blocks, c.tier_ends, c.tier_indices, c.offsets, None, c.dim, *bags, 0
        )

    def update() -> object:
        return ops.adaptive_embedding_update_(
            c.weight,
            [state],
            c.grad,
            c.indices,
            c.offsets,
            *group,
            None,
            *bags,
            0,
            True,
            False,
            ROWWISE,
            HYPER,
        )

    def frozen_update() -> object:
        return ops.tiered_embedding_update_(
            c.blocks,
            states,
            c.grad,
            c.tier_ends,
            c.tier_indices,
            c.offsets,
            None,
            c.dim,
            *bags,
            False,
            ROWWISE,
            HYPER,
        )

    return {
        "gather": lambda: ops.adaptive_embedding(c.weight, c.indices, *group, c.mask, 0, -1, 0),
        "pooled": pooled,
        "frozen pooled": frozen,
        "search backward": lambda: ops.adaptive_embedding_backward(
            c.grad, c.weight, c.indices, c.offsets, *group, None, *bags, 0, True, True, False
        ),
        "search step": lambda: (pooled(), update()),
        "frozen step": lambda: (frozen(), frozen_update()),
    }


def eager(case: Case) -> dict[str, Callable[[], object]]:
    """PyTorch without masks, and with the masks' equations."""
    torch, c = case.torch, case
    functional = torch.nn.functional

    def bag_backward() -> object:
        weight = c.weight.detach().requires_grad_()
        out = functional.embedding_bag(c.indices, weight, c.offsets, mode="sum", sparse=True)
        out.backward(c.grad)
        return weight.grad

    return {
        "gather": lambda: functional.embedding(c.indices, c.weight),
        "pooled": lambda: functional.embedding_bag(c.indices, c.weight, c.offsets, mode="sum"),
        "frozen pooled": lambda: functional.embedding_bag(
            c.indices, c.weight, c.offsets, mode="sum"
        ),
        "search backward": bag_backward,
    }


def equations(case: Case) -> Callable[[], object]:
    """Forward and backward of the masked lookup, written in PyTorch as anyone would."""
    torch, c = case.torch, case
    columns = torch.arange(c.dim, device=DEVICE)
    bag = torch.repeat_interleave(
        torch.arange(c.bags, device=DEVICE), c.lookups // c.bags, output_size=c.lookups
    )

    def lookup(weight: Any, mask: Any) -> Any:
        group = c.row_group[c.indices].long()
        hard = (columns < c.group_dims[group][:, None]).to(weight.dtype)
        soft = mask[group].to(weight.dtype)
        rows = torch.nn.functional.embedding(c.indices, weight, sparse=False) * (
            soft + (hard - soft).detach()
        )
        return torch.zeros(c.bags, c.dim, device=DEVICE, dtype=weight.dtype).index_add(0, bag, rows)

    return lookup


def equations_step(case: Case, lookup: Any) -> Callable[[], object]:
    c = case

    def call() -> object:
        weight = c.weight.detach().requires_grad_()
        mask = c.mask.detach().requires_grad_()
        lookup(weight, mask).backward(c.grad)
        return weight.grad, mask.grad

    return call


def fbgemm(case: Case) -> dict[str, Callable[[], object]]:
    """FBGEMM's table-batched embeddings without masks; raises ImportError where it is missing."""
    torch, c = case.torch, case
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kinds = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16}
    if c.weight.dtype not in kinds:
        raise ImportError("compared in float32 and float16 only")
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(c.rows, c.dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        weights_precision=kinds[c.weight.dtype],
        output_dtype=kinds[c.weight.dtype],
    )
    ends = torch.tensor([c.lookups], device=DEVICE)
    offsets = torch.cat([c.offsets, ends])

    def step() -> object:
        out = tables(c.indices, offsets)
        out.backward(c.grad)
        return out

    return {
        "pooled": lambda: tables(c.indices, offsets).detach(),
        "frozen pooled": lambda: tables(c.indices, offsets).detach(),
        "search step": step,
        "frozen step": step,
    }


def triton_backend(case: Case) -> dict[str, Callable[[], object]]:
    """This project's operators on its Triton kernels."""
    import amtl_kernels

    # Stays set until `measure` has timed what is returned here.
    amtl_kernels.set_backend("triton")
    return {work: f for work, f in ours(case).items() if "step" not in work}


PLANS = [
    ("zipf", "float32", 2_000_000, 64, 65_536, 20),
    ("uniform", "float32", 2_000_000, 64, 65_536, 20),
    ("zipf", "float16", 2_000_000, 64, 65_536, 20),
    ("uniform", "float32", 20_000_000, 64, 65_536, 20),
    ("uniform", "float32", 2_000_000, 64, 1_000_000, 1),
    ("zipf", "bfloat16", 2_000_000, 128, 65_536, 20),
    ("zipf", "float32", 2_000_000, 16, 65_536, 20),
]


def contenders(case: Case, with_equations: bool) -> dict[str, Callable[[], Any]]:
    """By name, what returns the calls to time; making them may raise."""
    makers: dict[str, Callable[[], Any]] = {
        "amtl CUDA": lambda: ours(case),
        "amtl Triton": lambda: triton_backend(case),
        "PyTorch, no mask": lambda: eager(case),
        "FBGEMM, no mask": lambda: fbgemm(case),
    }
    if with_equations:
        lookup = equations(case)
        work = "search backward"
        makers["PyTorch, equations"] = lambda: {work: equations_step(case, lookup)}
        makers["torch.compile, equations"] = lambda: {
            work: equations_step(case, case.torch.compile(lookup))
        }
    return makers


def measure_case(
    report: Report, case: Case, timer: Callable[[Any], float], deadline: float, equations: bool
) -> None:
    """One case by every contender; who is missing or fails is named and left out."""
    import amtl_kernels

    for who, make in contenders(case, equations).items():
        try:
            for work, function in make().items():
                if time.monotonic() > deadline:
                    report.left_out[f"{who}: {work}, {case.name}"] = "out of time"
                    continue
                seconds = timer(function)
                useful = case.bytes_of(work)
                share = useful / seconds / report.copy_bandwidth
                report.rows.append(Row(work, case.name, who, seconds, useful, share))
        except Exception as error:
            # A peer that fails must not cost the rest their measurement.
            report.left_out[f"{who}, {case.name}"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            amtl_kernels.set_backend("auto")


def measure(report: Report, deadline: float) -> tuple[str, str]:
    """All cases until the time is up; what is left out is named."""
    import torch

    timer = Timer(report.environment.get("l2_bytes", 0) or 1 << 26)
    report.copy_bandwidth = copy_bandwidth(timer)
    for plan in PLANS:
        if time.monotonic() > deadline:
            report.left_out[str(plan)] = "out of time"
            continue
        measure_case(report, Case(*plan), timer, deadline, plan == PLANS[0])
        torch.cuda.empty_cache()
    failed = [what for what in report.left_out if what.startswith("amtl")]
    return ("failed" if failed else "ok"), "; ".join(failed)


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


def main() -> int:
    """Runs the stages; 0 if none failed, 3 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="time for everything")
    options = parser.parse_args()
    began = time.monotonic()
    report = Report()

    def left(share: float) -> float:
        return max(20.0, min(share, began + options.seconds - 15 - time.monotonic()))

    def stage(name: str, call: Callable[[], tuple[str, str]]) -> bool:
        start = time.monotonic()
        outcome, detail = call()
        report.stages.append(Stage(name, outcome, time.monotonic() - start, detail))
        print(f"{name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
        return outcome != "failed"

    report.environment = environment()
    if "card" not in report.environment:
        print("No CUDA GPU is visible to PyTorch here; nothing was proved or measured.")
        print(json.dumps(report.environment, indent=1))
        return 3
    if stage("build", lambda: build(report.environment["capability"])):
        stage("tests", lambda: gpu_tests(left(150)))
        for tool in ("memcheck", "racecheck", "initcheck"):
            stage(f"compute-sanitizer {tool}", lambda tool=tool: sanitizer(tool, left(45)))
        stage("timings", lambda: measure(report, began + options.seconds - 20))
    path = write(report, options.out)
    print(path.read_text())
    return int(any(s.outcome == "failed" for s in report.stages))


if __name__ == "__main__":
    sys.exit(main())
