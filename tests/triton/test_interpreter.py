"""Triton kernels on CPU tensors: the shared tests of ``tests/kernels`` and those of this folder.

In processes of their own, since the interpreter has to be asked for before Triton is imported, and
since an access out of bounds would take the test process with it. About a thirtieth of the cases of
each test, one at least; AMTL_SOAK=1 (`make soak`) runs all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")

SUITES = {"shared": ["tests/kernels", "-k", "triton"], "own": ["tests/triton/interpreted"]}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Both suites, side by side, and where each writes."""
    environment = dict(os.environ)
    environment |= {
        "TRITON_INTERPRET": "1",
        "AMTL_TEST_BACKENDS": "triton",
        "AMTL_TEST_EVERY": "1" if SOAK else "30",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }
    started = {}
    for name, arguments in SUITES.items():
        log = tmp_path_factory.mktemp(name) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
                env=environment,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started[name] = (process, log)
    return started


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the same tests run on the GPU itself, as tests/kernels"
)
@pytest.mark.parametrize("suite", SUITES)
def test_under_the_interpreter(suite: str, running: dict[str, tuple[Any, Path]]) -> None:
    process, log = running[suite]
    code = process.wait()
    written = log.read_text()
    assert code == 0, written[-8000:]
    assert " passed" in written
