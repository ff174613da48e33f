"""Bad input that is told of late, as on a GPU: the interpreter's memory in place of a GPU's.

On a GPU nothing has to stand for it: ``tests/triton/test_gpu.py`` checks the same there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import late_findings

import amtl_kernels as ak
from amtl_kernels import _arguments
from amtl_kernels.triton import check

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="in the interpreter only: TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted",
)


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As where nothing has run yet when a lookup returns: returns what lets it run."""
    tell = check.raise_found
    monkeypatch.setattr(check._Asked, "_whence", f"\n{_arguments.FOUND_BEFORE}")
    monkeypatch.setattr(check, "raise_found", lambda like: None)
    # The operators ask at their beginning; only `tell` answers here.
    with ak.use_backend("triton"):
        yield lambda: tell(torch.empty(0))


def test_an_error_comes_later_and_once(late: Callable[[], None]) -> None:
    late_findings.errors_come_later_and_once("cpu", late)


def test_a_warning_does_too(late: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    late_findings.a_clamped_index_is_told_of_later("cpu", late, monkeypatch)


def test_checks_under_way_have_places_of_their_own(late: Callable[[], None]) -> None:
    """A graph repeats its check for ever, so its place goes to no other check."""
    findings = check._Findings(pinned=False)
    asked = check._Asked(clamps=False, lookups=1, dims=(4,), late=True)
    kept = findings.slot(asked, captured=True)
    others = {findings.slot(asked, captured=False) for _ in range(2 * check.SLOTS)}
    assert len(others) == check.SLOTS - 1 and kept not in others
    for _ in others:
        findings.slot(asked, captured=True)
    with pytest.raises(RuntimeError, match='with bounds_check="off"'):
        findings.slot(asked, captured=True)
