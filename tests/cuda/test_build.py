"""A module built with CUDA kernels imports where PyTorch has no CUDA, with every operator in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .building import ROOT, built, has_cuda_kernels

PROGRAM = """
import sys

# Else Triton answers for what the module lacks.
sys.modules["triton"] = None

import torch
import amtl_kernels as ak
from amtl_kernels import _schema
from kernel_cases import call, in_order
from torch._subclasses import FakeTensorMode

native = ak.build_info()["native"]
assert native["cuda"].startswith("on"), native
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [
    f"{op} on {key}"
    for op in _schema.SCHEMAS
    for key in ("CPU", "CUDA")
    if not has_kernel(f"amtl::{op}", key)
]
assert not missing, missing

weight = torch.randn(5, 6)
dims = torch.full((5,), 6, dtype=torch.uint8)
indices = torch.tensor([4, 0, 2])
assert torch.equal(ak.masked_embedding(weight, indices, dims), weight[indices])

with FakeTensorMode():
    # Without autograd, which asks PyTorch for a GPU.
    weight = torch.empty(5, 6, device="cuda")
    dims = torch.empty(5, dtype=torch.uint8, device="cuda")
    indices = torch.empty(3, dtype=torch.int64, device="cuda")
    offsets = torch.empty(5, dtype=torch.int64, device="cuda")
    of = call([weight, weight], indices, sizes=[dims, dims], offsets=offsets)
    of.grad = out = of.look_up()
    assert out.device.type == "cuda" and out.shape == (2, 12), out
    backward = in_order("lookup_backward", of.backward(weight_grad=False))
    rows, grads, masks, psw = torch.ops.amtl.lookup_backward(*backward)
    assert len(rows) == 2 and rows[0].device.type == "cuda" and grads[1].shape == (0, 6)
    assert masks.shape == psw.shape == (0,)
print("fine")
"""


def build(folder: Path) -> None:
    """The package in `folder`, with a native module that has CUDA kernels."""
    shutil.copytree(
        ROOT / "amtl_kernels",
        folder / "amtl_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    module, _ = built()
    shutil.copy(module, folder / "amtl_kernels")


@pytest.mark.slow
@pytest.mark.skipif(
    not has_cuda_kernels() and shutil.which("nvcc") is None,
    reason="no CUDA compiler: put nvcc (CUDA 13) on PATH, or build with AMTL_CUDA=on",
)
def test_a_cuda_build_imports_without_cuda(tmp_path: Path) -> None:
    folder = ROOT
    if not has_cuda_kernels():
        folder = tmp_path
        build(folder)
    path = os.pathsep.join(map(str, (folder, ROOT / "tests" / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
