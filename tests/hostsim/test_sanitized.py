"""A sample of the operators under AddressSanitizer and UndefinedBehaviorSanitizer.

The tool module is built a second time with both; Python then runs in a process of its own with the
sanitizers' runtime loaded first. Tensors are heap blocks of their exact size, so a read one element
past a table is found even where the simulator's own bounds would not see it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .building import CACHE, ROOT

SAMPLE = """
import sys
import torch
from hostsim import simulator as sim
from hostsim.calls import run
from hostsim.test_errors import CHANGES, KINDS, outcome
from hostsim.test_kernels import draw, search, test_fused_step_of_a_tiered_table
from hostsim.test_kernels import test_more_tiers_than_travel_with_a_launch
from hostsim.test_kernels import test_a_list_of_tables_has_no_races
from hostsim.test_kernels import test_fused_step_of_a_dense_table
from hostsim.test_kernels import test_nonsense_is_never_followed
from hostsim.test_rounding import test_updates_round_as_the_reference_does
from kernel_cases import RULES, call

if "plant" in sys.argv:
    # A table that claims one row more than it has.
    import numpy as np
    short = np.lib.stride_tricks.as_strided(np.zeros((4, 8), dtype=np.float32), (5, 8))
    with sim.simulation(watch_bounds=False):
        sizes = [torch.full((5,), 8).int()]
        of = call([torch.from_numpy(short)], torch.tensor([4]), sizes=sizes)
        run("lookup", of.lookup(bounds_check=0))
    sys.exit("the planted overflow went unnoticed")

for dtype in (torch.float32, torch.bfloat16):
    # Of two bytes only what is laid out otherwise.
    narrow = dtype is torch.bfloat16
    for dim in (17, 24) if narrow else (1, 8, 17, 24, 129):
        batch = draw(dim, dtype, dim=dim, lookups=120, columns=3, sorted_groups=dim % 8 == 0)
        run("lookup_backward", search(batch).backward())
        means = search(batch, per_sample_weights=None, pooling=1, padding_idx=[2])
        run("lookup", means.lookup())
        run("lookup", batch.call("masked", False).lookup())
    for form in ("tiered",) if narrow else ("masked", "adaptive", "tiered"):
        test_a_list_of_tables_has_no_races(form, dtype, (5, 1, 9))
    for rule in ["adam"] if narrow else RULES:
        test_fused_step_of_a_tiered_table(rule, dtype=dtype, widths=(17, 5, 0))
    for widths in ((129, 64, 1), (300, 0, 8)):
        test_fused_step_of_a_tiered_table("rowwise_adagrad", dtype, widths)
    for masks in ("promised", "unsorted"):
        test_fused_step_of_a_dense_table("rowwise_adagrad", dtype, 264, masks)
test_updates_round_as_the_reference_does("adam", torch.bfloat16, 7)
for bits in (2, 4, 8, 16):
    g, byte = torch.Generator().manual_seed(bits), max(1, bits // 8)
    shapes = ((5, 7), (3, 3), (4, 1))
    blocks = [
        torch.randint(0, 256, (n, w * byte), generator=g, dtype=torch.uint8) for n, w in shapes
    ]
    dim = blocks[0].shape[1] * 8 // bits
    few = {"dims": [dim], "steps": [torch.rand(3, generator=g) + 0.1], "bits": [bits]}
    rows, offsets = torch.randint(0, 12, (60,), generator=g), torch.arange(0, 61, 3)
    means = {"offsets": offsets, "pooling": 1, "padding_idx": [2], "include_last_offset": True}
    for bags in ({}, means):
        of = call(blocks, rows, **few, **bags)
        of.grad = torch.ones_like(run("lookup", of.lookup(bounds_check=0)))
        for rule in ("sgd", "rowwise_adagrad"):
            hyper = [0.1, 1e-8, 0.01, 0.0, 0.0, 1.0]
            run("lookup_update_", of.update(rule, hyper, blocks=blocks))
test_more_tiers_than_travel_with_a_launch(rule="adam", pooled=True)
test_nonsense_is_never_followed()
# A refusal must not read what is missing.
for changes in CHANGES.values():
    for kind in KINDS:
        outcome(sim.IMPLEMENTATIONS[kind[0]], kind, changes)
print("clean")
"""


def build_sanitized_module() -> Path:
    """The tool module, built anew where a source has changed."""
    folder = CACHE / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", f"-S{ROOT}", f"-B{folder}", "-GNinja", f"-DAMTL_OUTPUT_DIR={folder}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DAMTL_TOOLS=ON", "-DAMTL_SANITIZE=ON", "-DAMTL_CUDA=off"]
    configure += ["-DCMAKE_CXX_FLAGS=-DAMTL_WITHOUT_FLOAT16"]
    build = ["cmake", "--build", str(folder), "--target", "_tools", "--parallel", "2"]
    with (CACHE / "sanitized.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, build):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    (module,) = folder.glob("_tools*.so")
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
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:handle_sigill=1",
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
