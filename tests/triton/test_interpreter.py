"""Triton kernels on CPU tensors: the shared tests of ``tests/kernels`` and those of this folder.

In processes of their own, since the interpreter has to be asked for before Triton is imported, and
since an access out of bounds would take the test process with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the same tests run on the GPU itself, as tests/kernels"
)
@pytest.mark.parametrize(
    "arguments",
    [["tests/kernels", "-k", "triton"], ["tests/triton/interpreted"]],
    ids=["shared", "own"],
)
def test_under_the_interpreter(arguments: list[str]) -> None:
    environment = dict(os.environ)
    environment |= {
        "TRITON_INTERPRET": "1",
        "AMTL_TEST_BACKENDS": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
