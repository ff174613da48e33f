"""A sample of the operators under AddressSanitizer and UndefinedBehaviorSanitizer.

The module is built a second time with both; Python then runs in a process of its own with the
sanitizers' runtime loaded first. NumPy's buffers are heap blocks of their exact size, so a read one
element past a table is found even where the simulator's own bounds would not see it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .building import CACHE, CSRC, ROOT, SANITIZERS, fingerprint

SAMPLE = """
import sys
import torch
from hostsim import simulated as sim
from hostsim.test_kernels import Batch, RULES, test_fused_step_of_a_tiered_table
from hostsim.test_kernels import test_a_list_of_tables_has_no_races
from hostsim.test_kernels import test_fused_step_of_a_dense_table
from hostsim.test_kernels import test_nonsense_is_never_followed
from hostsim.test_rounding import test_updates_round_as_the_reference_does

if "plant" in sys.argv:
    # A buffer that claims one row more than it has.
    table = sim.dense(torch.zeros(4, 8), row_dims=torch.full((5,), 8, dtype=torch.int32))
    table["rows"] = 5
    import numpy as np
    out = np.zeros((1, 8), dtype=np.float32)
    sim.tools.watch_bounds(False)
    sim.tools.lookup("float32", table, {"indices": np.array([4])}, out)
    sys.exit("the planted overflow went unnoticed")

for dtype in (torch.float32, torch.bfloat16):
    for dim in (1, 8, 17, 24, 129):
        batch = Batch(dim, dtype, dim=dim, lookups=120, columns=3, sorted_groups=dim % 8 == 0)
        batch.adaptive_backward(sim.adaptive_embedding_backward, False)
        args = (batch.indices, batch.offsets, batch.row_group, batch.group_dims)
        sim.adaptive_embedding_bag(batch.weight, *args, batch.weight, batch.psw, 1, 2, False, 5, 1)
        sim.masked_embedding(batch.weight, batch.indices, batch.row_dims, -1, 1)
    for form in ("masked", "adaptive", "tiered"):
        test_a_list_of_tables_has_no_races(form, dtype, (5, 1, 9))
    for rule in RULES:
        test_fused_step_of_a_tiered_table(rule, dtype=dtype, widths=(17, 5, 1), device_tiers=False)
    for widths in ((129, 64, 1), (300, 100, 8)):
        test_fused_step_of_a_tiered_table("rowwise_adagrad", dtype, widths, False)
    for masks in ("sorted", "unsorted"):
        test_fused_step_of_a_dense_table("rowwise_adagrad", dtype, 264, masks)
for dtype in (torch.float16, torch.bfloat16):
    test_updates_round_as_the_reference_does("adam", dtype, 7)
test_nonsense_is_never_followed()
print("clean")
"""


def build_sanitized_module() -> Path:
    import pybind11

    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    flags += [f"-I{CSRC}", f"-I{pybind11.get_include()}", *SANITIZERS]
    flags += [f"-I{sysconfig.get_paths()['include']}"]
    sources = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "sort"]
    sources += sorted((CSRC / "pybind").glob("*.cpp")) + sorted((CSRC / "hostsim").glob("*.cpp"))
    compiler = os.environ.get("CXX", "g++")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "sanitized.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = CACHE / f"sanitized-{fingerprint(sources, flags)}"
        folder.mkdir(exist_ok=True)
        module = folder / "_tools.so"
        if module.exists():
            return module

        def build(source: Path) -> str:
            target = folder / f"{source.parent.name}_{source.stem}.o"
            command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            return str(target)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(build, sources))
        partial = folder / "_tools.partial"
        command = [compiler, "-shared", *SANITIZERS, *objects, "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(module)
        return module


def run_sample(*arguments: str) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "AMTL_TOOLS_MODULE": str(build_sanitized_module()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", SAMPLE, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_operators_are_clean() -> None:
    result = run_sample()
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip().endswith("clean")


@pytest.mark.slow
def test_a_planted_overflow_is_found() -> None:
    result = run_sample("plant")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
