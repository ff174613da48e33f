"""Every Triton kernel compiled for sm_90: registers, spills, 128-bit loads.

AMTL_SOAK=1 (`make soak`) compiles them for sm_80 and sm_100, too, and more of their forms: of
float16, of rows as wide as a tile and wider, and with all that is tried when a kernel is tuned.

Nothing runs: this is what can be said of the machine code without a GPU. The compilation happens in
two processes of its own, where the interpreter is off and the compiler's cache is empty.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
ARCHITECTURES = (80, 90, 100) if SOAK else (90,)

REGISTERS = {
    "apply_kernel": 64,
    "check_kernel": 64,
    "combine_groups_kernel": 64,
    "combine_rows_kernel": 64,
    "combine_update_kernel": 96,
    "counted_kernel": 64,
    "cut_kernel": 64,
    "gather_fwd_kernel": 64,
    "keys_kernel": 64,
    "pieces_kernel": 96,
    "pooled_fwd_kernel": 96,
    "reduce_rows_kernel": 96,
    "reduce_update_kernel": 96,
    "sample_grad_kernel": 64,
    "tell_kernel": 64,
    "tier_counts_kernel": 64,
}
"""Registers per thread at most, of any specialisation: at 64 a multiprocessor of 65,536 holds 1,024
threads, at 96 it holds 640, each with two to eight 16-byte loads in flight."""
FLAT_MASKS = 128
"""For the first passes where mask gradients of several tables are wanted: 512 threads."""


def ceiling(entry: dict[str, Any]) -> int:
    most = REGISTERS[entry["kernel"]]
    return FLAT_MASKS if most > 64 and entry["constants"].get("GROUP_TIERS") else most


def expected_vector_loads(entry: dict[str, Any]) -> int:
    """16-byte loads of the table or gradient in the PTX of a kernel whose rows are aligned.

    A tile is ``loads`` per thread; a loop unrolled by two holds them three times (two steps and the
    remainder).
    """
    c, threads = entry["constants"], 32 * entry["warps"]
    lanes = 4 if entry["dtype"] == "fp32" else 8
    tile = c.get("TILE") or c["BLOCK_D"] * (c.get("LANES") or c.get("R"))
    loads = max(1, tile // (threads * lanes))
    kernel = entry["kernel"]
    if c.get("BITS"):
        # Numbers are taken out of their bytes one by one.
        return 0
    if kernel == "gather_fwd_kernel":
        return loads
    if kernel == "pooled_fwd_kernel":
        return 3 * loads
    if kernel == "reduce_rows_kernel":
        return 3 * loads + (loads if c["WRITE_MASK"] else 0)
    if kernel == "reduce_update_kernel":
        return 4 * loads
    if kernel.startswith("combine_"):
        return 3
    if kernel == "apply_kernel":
        return 3 * loads
    return 2 * loads


def width(entry: dict[str, Any]) -> int | None:
    """Columns of a row, None for kernels that know of none."""
    found: int | None = entry["constants"].get("D")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton_cache")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    shares = 2
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "compile_kernels.py"),
                *map(str, (share, shares, *ARCHITECTURES)),
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(shares)
    ]
    entries: list[dict[str, Any]] = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        entries += json.loads(out)
    return entries


def describe(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True)


def test_every_kernel_is_compiled_for_every_architecture(report: list[dict[str, Any]]) -> None:
    found = defaultdict(set)
    for entry in report:
        found[entry["arch"]].add(entry["kernel"])
    assert {arch: sorted(kernels) for arch, kernels in found.items()} == {
        arch: sorted(REGISTERS) for arch in ARCHITECTURES
    }
    types = ("fp32", "bf16", "fp16") if SOAK else ("fp32", "bf16")
    main = [entry for entry in report if entry["arch"] == 90 and width(entry) == 64]
    dtypes = {(entry["kernel"], entry["dtype"]) for entry in main}
    for kernel in (
        "gather_fwd_kernel",
        "pooled_fwd_kernel",
        "reduce_rows_kernel",
        "reduce_update_kernel",
        "apply_kernel",
    ):
        assert {(kernel, t) for t in types} <= dtypes
    pooled = {
        (entry["dtype"], entry["constants"]["TABLES"] > 0, entry["constants"]["BITS"] > 0)
        for entry in main
        if entry["kernel"] == "pooled_fwd_kernel"
    }
    both = (False, True)
    floats = {(t, several, few) for t in types for several in both for few in both}
    assert pooled == floats | {("u8", False, True)}
    updates = {
        (e["dtype"], e["constants"]["RULE"], e["constants"]["ROUND"])
        for e in main
        if e["kernel"] == "reduce_update_kernel"
    }
    rounds = {"fp32": (False,), "fp16": (False, True), "bf16": (False, True)}
    assert updates == {(t, rule, r) for t in types for rule in range(4) for r in rounds[t]}


def test_nothing_spills(report: list[dict[str, Any]]) -> None:
    spilled = [describe(entry) for entry in report if entry["stack"] or entry["local"]]
    assert not spilled, "\n".join(spilled)


def test_registers_stay_under_their_ceilings(report: list[dict[str, Any]]) -> None:
    over = [describe(e) for e in report if e["registers"] > ceiling(e)]
    assert not over, "\n".join(over)
    assert all(e["ceiling"] == ceiling(e) for e in report)


def test_rows_are_loaded_in_16_bytes(report: list[dict[str, Any]]) -> None:
    """D = 64 and 1024, where rows start on 16 bytes: no prefix mask may split the loads."""
    aligned = [
        e for e in report if e["constants"].get("D") in (64, 1024) and e["kernel"] != "check_kernel"
    ]
    assert len(aligned) > 100
    scalar = [describe(e) for e in aligned if e["vector_loads"] < expected_vector_loads(e)]
    assert not scalar, "\n".join(scalar)


def test_state_of_a_row_is_read_by_all_before_it_is_written(report: list[dict[str, Any]]) -> None:
    """Warps that share a row each load its state, and one of them stores it: no race in between."""
    kernels = {"apply_kernel", "reduce_update_kernel", "combine_update_kernel"}
    entries = [e for e in report if e["kernel"] in kernels]
    assert {e["kernel"] for e in entries} == kernels
    racing = [describe(e) for e in entries if not e["barrier_before_store"]]
    assert not racing, "\n".join(racing)


def test_rows_are_stored_in_16_bytes(report: list[dict[str, Any]]) -> None:
    kernels = {
        "gather_fwd_kernel",
        "pooled_fwd_kernel",
        "reduce_rows_kernel",
        "reduce_update_kernel",
        "apply_kernel",
    }
    scalar = [
        describe(e)
        for e in report
        if e["kernel"] in kernels
        and width(e) == 64
        and e["constants"].get("SPLIT", 1) == 1
        and e["vector_stores"] == 0
    ]
    assert not scalar, "\n".join(scalar)
