"""The host simulator: correct kernels pass, and each planted bug is named for what it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .building import CSRC, SANITIZERS, build_program, fingerprint, made_of

VARIANTS = {
    "assembly": ["-O1"],
    "ucontext": ["-O1", "-DHOSTSIM_UCONTEXT"],
    # Optimized, it takes twice as long to build for runs of hundredths of a second.
    "sanitized": ["-O0", *SANITIZERS],
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


@pytest.mark.every(5)
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


def test_programs_are_built_anew_for_what_they_are_made_of(tmp_path: Path) -> None:
    """Neither more, which takes minutes of nvcc, nor less, which tests what was there before."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    folders = {path.parent.relative_to(CSRC).as_posix() for path in made_of(kernels)}
    # The simulator by a condition in platform.cuh.
    assert folders == {"cuda", "kernels", "hostsim", "hostsim/include"}
    (tmp_path / "deep.h").write_text("int deep;\n")
    (tmp_path / "direct.h").write_text('  #  include "deep.h"\n')
    (tmp_path / "other.h").write_text("int other;\n")
    source = tmp_path / "program.cpp"
    source.write_text('#include <vector>\n#include "direct.h"\n')

    def changed_by(name: str) -> bool:
        """Whether another fingerprint follows from a change of a file."""
        before = fingerprint([source], [])
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        return fingerprint([source], []) != before

    changes = ("program.cpp", "direct.h", "deep.h", "other.h")
    assert [changed_by(name) for name in changes] == [True, True, True, False]
    assert fingerprint([source], ["-O1"]) != fingerprint([source], [])


def test_what_a_program_is_made_of_is_what_the_compiler_says() -> None:
    for source in [*(CSRC / "hostsim").glob("*.cpp"), Path(__file__).with_name("planted_bugs.cpp")]:
        command = [os.environ.get("CXX", "g++"), "-std=c++20", f"-I{CSRC}", "-MM", str(source)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = {Path(each).resolve() for each in told.replace("\\\n", " ").split()[1:]}
        assert len(files) > 1 and files <= made_of([source])
