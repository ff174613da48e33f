"""Lets the tests of ``tests/kernels`` run on a GPU, with the CUDA kernels of this build."""

from __future__ import annotations

from typing import Any

import torch

import amtl_kernels


def backends() -> list[dict[str, Any]]:
    native = amtl_kernels.build_info()["native"]
    built = str(native.get("cuda", "")).startswith("on")  # type: ignore[attr-defined]
    if not (built and torch.cuda.is_available()):
        return []
    # Nothing to override: PyTorch's own dispatch finds the CUDA kernels.
    return [{"name": "cuda", "load": dict, "device": "cuda", "examples": 40, "late": True}]
