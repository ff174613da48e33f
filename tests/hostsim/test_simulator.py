"""The host simulator: correct kernels pass, and each planted bug is named for what it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .building import SANITIZERS, build_program

VARIANTS = {
    "assembly": ["-O1"],
    "ucontext": ["-O1", "-DHOSTSIM_UCONTEXT"],
    "sanitized": ["-O1", *SANITIZERS],
}
CORRECT = [
    "block_sum",
    "warp_ops",
    "dynamic_shared",
    "warp_exchange",
    "orders",
    "numeric_types",
    "traffic",
    "asynchronous_copy",
    "pitched_copy",
]
BUGS = {
    "deadlock": "deadlock",
    "early_exit": "divergent-barrier",
    "two_barriers": "divergent-barrier",
    "outside_mask": "outside-mask",
    "shuffle_source": "outside-mask",
    "exited_lane": "exited-lane|deadlock",
    "partial_warp": "outside-mask",
    "mismatched": "mismatched-collective",
    "stale_shared": "uninitialised-shared",
    "raw_dynamic": "uninitialised-shared",
    "shared_bounds": "shared-bounds",
    "missing_barrier": "race|uninitialised-shared",
    "reused_buffer": "race",
    "block_race": "race",
    "read_after_other_block": "race",
    "misaligned": "misaligned",
    "out_of_bounds": "out-of-bounds",
    "read_only": "read-only",
    "uninitialised_global": "uninitialised-global",
    "freed_memory": "out-of-bounds",
    "too_many_threads": "launch",
    "empty_grid": "launch",
}
HOST_BUGS = {
    "other_stream": "stream",
    "copy_out_of_bounds": "out-of-bounds",
    "uninitialised_copy": "uninitialised-global",
    "memset_of_an_input": "read-only",
}
SANITIZER_BUGS = {
    "heap_overflow": "heap-buffer-overflow",
    "stack_overflow": "out of bounds",
    "integer_overflow": "signed integer overflow",
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> tuple[str, Path]:
    name = str(request.param)
    return name, build_program(
        f"planted_bugs-{name}", [Path(__file__).with_name("planted_bugs.cpp")], VARIANTS[name]
    )


def run(program: Path, case: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, case, str(seed)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass(variant: tuple[str, Path], case: str) -> None:
    for seed in range(3):
        result = run(variant[1], case, seed)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout == "ok\n"


@pytest.mark.parametrize("case", [*BUGS, *HOST_BUGS])
def test_planted_bugs_are_caught(variant: tuple[str, Path], case: str) -> None:
    for seed in range(3):
        result = run(variant[1], case, seed)
        assert result.returncode == 0, result.stdout + result.stderr
        kind = result.stdout.split(":")[0]
        assert kind in (BUGS | HOST_BUGS)[case].split("|"), result.stdout
        if kind != "launch" and case in BUGS:
            assert "kernel (" in result.stdout
        assert "afterwards" not in result.stdout


@pytest.mark.parametrize("case", SANITIZER_BUGS)
def test_sanitizers_see_into_fibers(variant: tuple[str, Path], case: str) -> None:
    name, program = variant
    result = run(program, case, 0)
    if name == "sanitized":
        assert result.returncode != 0
        assert SANITIZER_BUGS[case] in result.stderr
    else:
        assert result.returncode == 0, "without sanitizers the planted access is survivable"
