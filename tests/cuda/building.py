"""A module with CUDA kernels, built once per change of the sources, also under pytest-xdist.

Its kernels are optimized as they are in a release, so that their machine code can be read; C++ is
not. A module that has CUDA kernels already is taken as it is.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import amtl_kernels

ROOT = Path(__file__).resolve().parents[2]
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")


def has_cuda_kernels() -> bool:
    native = amtl_kernels.build_info()["native"]
    return str(native.get("cuda", "")).startswith("on")  # type: ignore[attr-defined]


# Compiling takes minutes an architecture.
ARCHITECTURES = (80, 90, 100) if SOAK else (90,)
WITH_FLOAT16 = SOAK or has_cuda_kernels()
"""Without it, compiling takes two thirds of the time; one type of 16 bits is always there."""
FOLDER = ROOT / "build" / "-".join(["cuda-tests", *map(str, ARCHITECTURES)])


def built() -> tuple[Path, list[Path]]:
    """The module, and the objects of its kernels for each of the architectures."""
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(FOLDER), "-GNinja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DAMTL_OUTPUT_DIR={FOLDER / 'out'}",
        "-DAMTL_CUDA=on",
        "-DAMTL_TOOLS=OFF",
        f"-DAMTL_CUDA_ARCHITECTURES={';'.join(f'{each}-real' for each in ARCHITECTURES)}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        "-DCMAKE_CUDA_FLAGS_DEBUG=-Werror all-warnings",
        f"-DCMAKE_CUDA_FLAGS={'' if WITH_FLOAT16 else '-DAMTL_WITHOUT_FLOAT16'}",
    ]
    jobs = os.environ.get("MAX_JOBS", "2")
    # CMake and Ninja may be those of the virtual environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(FOLDER), "--parallel", jobs]):
            done = subprocess.run(
                command,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    objects = (FOLDER / "CMakeFiles" / "amtl_cuda.dir").rglob("*.o")
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    # The folder keeps those of sources that are gone.
    return FOLDER / "out" / "_C.abi3.so", sorted(p for p in objects if p.stem in sources)
