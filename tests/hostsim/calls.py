"""Calls of the operators on the simulated device, with the inputs of ``tests/kernels``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_cases import expected, in_order
from torch import Tensor

from . import simulator as sim


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
