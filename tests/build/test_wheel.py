"""A wheel built here is one file for every Python and holds what it should."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMOKE = """
import torch, amtl_kernels, amtl
assert amtl_kernels.__file__.startswith({target!r}), amtl_kernels.__file__
assert "error" not in amtl_kernels.build_info()["native"], amtl_kernels.build_info()
weight = torch.randn(5, 6)
dims = torch.tensor([6, 4, 3, 2, 1], dtype=torch.uint8)
indices = torch.tensor([4, 0, 2])
kept = torch.arange(6) < dims[indices][:, None]
out = amtl_kernels.masked_embedding(weight, indices, dims)
torch.testing.assert_close(out, weight[indices] * kept, rtol=0, atol=0)
"""


UNOPTIMIZED = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"]
"""A third of the time, and what is in a wheel does not depend on it."""


IN_THE_OLDEST = {
    *("STABLE_TORCH_LIBRARY_IMPL", "TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"),
    "TORCH_TARGET_VERSION",
}
"""Macros that the headers of torch 2.11 have. `TORCH_TARGET_VERSION` hides newer functions of a
newer torch, and no newer macros."""


def test_sources_use_no_macro_that_the_oldest_torch_lacks() -> None:
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    used = {
        name
        for path in sources
        for name in re.findall(r"\b(?:STABLE|STD|TORCH|AOTI)_[A-Z0-9_]+\b", path.read_text())
    }
    assert used == IN_THE_OLDEST


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("CXX=no-such-thing", "The set-up needs a C++17 compiler (g++): install that first."),
        ("PYTHON=no-such-thing", "There is no no-such-thing here: PYTHON=... names another."),
    ],
)
def test_the_set_up_says_first_what_is_lacking(given: str, told: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    command = ["make", "-C", str(ROOT), f"{venv}/.torch", f"VENV={venv}", given]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode
    assert told in made.stdout + made.stderr
    assert not venv.exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, useless = (tmp_path_factory.mktemp(name) for name in ("wheel", "useless"))
    path = os.environ["PATH"]
    if find_spec("cmake") and find_spec("ninja"):
        # A fresh machine has no others, and one that is not fresh may have older ones.
        for tool in ("cmake", "ninja"):
            (useless / tool).write_text("#!/bin/sh\nexit 1\n")
            (useless / tool).chmod(0o755)
        path = f"{useless}{os.pathsep}{path}"
    given = {"AMTL_CUDA": "off", "CMAKE_ARGS": shlex.join(UNOPTIMIZED), "PATH": path}
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"),
            *("--no-deps", "--wheel-dir", str(folder), str(ROOT)),
        ],
        check=True,
        env={**os.environ, **given},
        timeout=600,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("amtl_kernels/_C.abi3.so", "amtl_kernels/py.typed", "amtl/py.typed"):
        assert expected in names
    assert "amtl/data/__init__.py" in names
    roots = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert roots == {"amtl", "amtl_command", "amtl_kernels", f"amtl_kernels-{version}.dist-info"}


@pytest.mark.slow
def test_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--target", str(target), str(wheel)),
        ],
        check=True,
        timeout=300,
    )
    subprocess.run(
        [sys.executable, "-c", SMOKE.format(target=str(target))],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        timeout=120,
    )
