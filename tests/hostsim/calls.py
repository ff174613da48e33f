"""Calls of the operators on the simulated device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_calls import RULES, applying, call, step
from kernel_cases import Call, expected, in_order

from . import simulator as sim

__all__ = ["RULES", "Call", "applying", "call", "flatten", "in_double", "run", "step"]


def run(op: str, arguments: Mapping[str, Any], room: Mapping[str, Any] | None = None) -> Any:
    """Calls an operator on the simulated device, or in another room."""
    operators = sim.IMPLEMENTATIONS if room is None else room
    return operators[op](*in_order(op, dict(arguments)))


def in_double(op: str, arguments: Mapping[str, Any]) -> Any:
    """The reference's answer, computed in float64."""
    return expected(op, in_order(op, dict(arguments)))


def flatten(results: Any) -> list[Tensor]:
    """Every tensor of an operator's results."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flatten(result)]
