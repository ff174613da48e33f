"""Compiles C++ programs for tests once per change of the sources, also under pytest-xdist."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = Path(os.environ.get("AMTL_TEST_CACHE", ROOT / "build" / "hostsim-tests"))
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def made_of(sources: list[Path]) -> set[Path]:
    """The sources, and what they include of ours, whoever includes it."""
    found: set[Path] = set()
    todo = list(sources)
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*["<](.*?)[">]', path.read_text(), re.MULTILINE):
            todo += [(folder / name).resolve() for folder in (path.parent, CSRC)]
    return found


def fingerprint(sources: list[Path], flags: list[str]) -> str:
    """A hash of everything that the result depends on but the compiler and its own headers."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(made_of(sources)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_program(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The path of a program made of `sources` and the simulator."""
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed to build the host simulator's tests"
    sources = [*sources, *sorted((CSRC / "hostsim").glob("*.cpp"))]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *flags]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = CACHE / f"{name}-{fingerprint(sources, flags)}"
        if not program.exists():
            for old in CACHE.glob(f"{name}-*"):
                old.unlink()
            partial = CACHE / f"{name}.partial"
            command = [compiler, *flags, *map(str, sources), "-o", str(partial)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            partial.rename(program)
    return program
