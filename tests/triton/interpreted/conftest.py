"""Tests of the Triton kernels beyond those shared by all backends (``tests/kernels``).

They run on a GPU where there is one, else in Triton's interpreter, for which
``tests/triton/test_interpreter.py`` starts a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = importlib.util.find_spec("triton") is not None and (
    INTERPRETED or torch.cuda.is_available()
)
if RUNNABLE and INTERPRETED:
    import quick_interpreter

    quick_interpreter.install()
collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, and integers with their largest value."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
