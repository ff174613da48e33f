"""What tests of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import amtl_kernels as ak
from bench import gpu


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The operators on simulated devices, as in a rehearsal."""
    pytest.importorskip("amtl_kernels._tools", reason="build with AMTL_TOOLS=on")
    before = str(ak.build_info()["backend"])
    monkeypatch.setenv("AMTL_BACKEND", before)
    gpu.Setting(True, tmp_path).backend("cuda")
    yield
    ak.set_backend(before)
