"""Lets the tests of ``tests/kernels`` run on the Triton backend.

On a GPU as it is; elsewhere only where ``TRITON_INTERPRET=1`` was set before Triton was imported,
which ``test_interpreter.py`` does in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))


def backends() -> list[dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        return []
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.install()
        # It takes its time: tens of milliseconds a block of a kernel.
        at_most = {"max_lookups": 120 if quick_interpreter.SOAK else 60, "max_dim": 129}
        return [{"name": "triton", "device": "cpu", "examples": 6, **at_most}]
    if torch.cuda.is_available():
        return [{"name": "triton", "device": "cuda", "late": True}]
    return []
