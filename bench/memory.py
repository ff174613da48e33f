"""Peak memory of a single step and the cost of importing, each in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench import binding

# glibc keeps freed memory for itself by default, which hides what a step takes.
_RETURN_EVERYTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def measure(case: dict[str, Any], contender: str) -> dict[str, Any]:
    """Peaks of one call of a contender, in bytes.

    Args:
        case: Fields of a :class:`bench.inputs.Case`.
        contender: Who makes the call.

    Returns:
        ``extra_bytes``: high-water mark of resident memory over what was resident before the call.
        ``allocator_bytes``: peak of what torch's allocator had given out during it.
        ``resident_bytes``: the high-water mark itself, table included.
        ``process_peak_bytes``: that of the whole process, its set-up included.
        ``table_bytes``: weights held by the contender.
        ``allowed_bytes``: what any implementation holds at the end or while it sorts.
    """
    text = binding.run_python(
        ["-m", "bench.memory", json.dumps(case), contender],
        environment=_RETURN_EVERYTHING,
    )
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def startup() -> dict[str, float]:
    """Seconds to import torch, and on top of it each package; medians of fresh processes."""
    code = (
        "import sys,time; import torch; t=time.perf_counter(); __import__(sys.argv[1]);"
        "print(time.perf_counter()-t)"
    )
    found = {"torch": _median(["-c", code.replace("import torch; ", ""), "torch"])}
    packages = {
        "amtl_kernels": "amtl_kernels",
        "amtl": "amtl",
        "fbgemm": "fbgemm_gpu.split_table_batched_embeddings_ops_training",
        "torchrec": "torchrec",
    }
    for name, module in packages.items():
        if importlib.util.find_spec(module.split(".")[0]) is not None:
            found[name] = _median(["-c", code, module])
    return found


def _median(arguments: list[str]) -> float:
    runs = [binding.run_python(arguments) for _ in range(3)]
    return statistics.median(float(run.strip().splitlines()[-1]) for run in runs)


def allocator_peak(call: Callable[[], object]) -> int:
    """Peak of bytes that torch's CPU allocator had given out during a call, beyond the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in kineto.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _main(arguments: list[str]) -> None:
    binding.settle()
    import torch

    from bench import machine
    from bench.contenders import CONTENDERS
    from bench.inputs import Case, make_problem

    case = Case.from_dict(json.loads(arguments[0]))
    contender = CONTENDERS[arguments[1]]
    torch.set_num_threads(case.threads)
    problem = make_problem(case, rotations=3)
    session = contender.prepare(problem)
    table = problem.weight.numel() * problem.weight.element_size()
    if contender.equations.sizes == "stored":
        blocks = problem.blocks(contender.equations.tier_width)
        table = sum(block.numel() * block.element_size() for block in blocks)
        problem.weight = torch.empty(0)
    session.call(0)
    session.call(1)
    allocator = allocator_peak(lambda: session.call(1))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    highest = machine.peak_resident_bytes()
    before = machine.resident_bytes()
    measured = machine.reset_peak_resident()
    session.call(2)
    peak = machine.peak_resident_bytes()

    distinct = torch.unique(problem.global_ids[2]).numel()
    lookups = problem.global_ids[2].numel()
    outputs = case.tables * case.bags * case.dim * 4
    # Two buffers of (row, position) pairs for a sort, the gradient of the rows, the output, and
    # the gradient of the soft mask.
    allowed = 16 * lookups + 4 * distinct * case.dim + outputs
    if contender.equations.mask_gradient:
        allowed += 4 * problem.group_mask.numel()
    print(
        json.dumps(
            {
                "case": case.name,
                "rows": case.rows,
                "dim": case.dim,
                "group": case.group,
                "contender": contender.name,
                "title": contender.title,
                "extra_bytes": peak - before if measured else None,
                "allocator_bytes": allocator,
                "resident_bytes": peak,
                "process_peak_bytes": max(highest, peak),
                "table_bytes": table,
                "allowed_bytes": allowed,
            }
        )
    )


if __name__ == "__main__":
    _main(sys.argv[1:])
