"""Bytes that the work has to move (DESIGN §5), and shares of a measured ceiling.

The counts say what an implementation can't avoid; caches may serve part of them, so a share above
one is possible where the table or the hot rows fit a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Work = Literal["forward", "backward", "step"]
Optimizer = Literal["none", "sgd", "rowwise_adagrad", "adagrad", "adam"]


@dataclass(frozen=True)
class Traffic:
    """What one call touches.

    Attributes:
        lookups: Lookups, L.
        distinct: Distinct rows among them, U.
        outputs: Output rows: bags, or L where nothing is pooled.
        dim: Width of the output, D.
        lookup_mean: Kept dimensions, mean over lookups.
        distinct_mean: Kept dimensions, mean over the distinct rows.
        element: Bytes of a weight.
        index: Bytes of an index.
        mask_gradient: Whether the backward also reads whole rows for the mask gradient.
    """

    lookups: int
    distinct: int
    outputs: int
    dim: int
    lookup_mean: float
    distinct_mean: float
    element: int = 4
    index: int = 8
    mask_gradient: bool = False


def forward_bytes(traffic: Traffic) -> float:
    """``4·L·k̄ + 4·B·D`` pooled, ``4·L·(k̄ + D)`` not pooled, and the indices."""
    rows = traffic.element * traffic.lookups * traffic.lookup_mean
    written = traffic.element * traffic.outputs * traffic.dim
    return rows + written + traffic.index * traffic.lookups


def backward_bytes(traffic: Traffic) -> float:
    """``4·L·D + 4·U·D + 4·U·k̄`` with a mask gradient, ``4·L·D + 4·U·k̄`` without.

    The incoming gradient once per lookup, whole rows for the mask gradient, and the row gradient.
    """
    incoming = traffic.element * traffic.lookups * traffic.dim
    rows = traffic.element * traffic.distinct * traffic.dim if traffic.mask_gradient else 0
    row_gradient = traffic.element * traffic.distinct * traffic.distinct_mean
    return incoming + rows + row_gradient + traffic.index * traffic.lookups


def update_bytes(traffic: Traffic, optimizer: Optimizer) -> float:
    """Weights read and written, the gradient read, state read and written."""
    kept = traffic.distinct * traffic.distinct_mean
    if optimizer == "none":
        return 0.0
    moment = 2.0 * 4 * kept
    rowwise = 2.0 * 4 * traffic.distinct
    state = {"sgd": 0.0, "rowwise_adagrad": rowwise, "adagrad": moment, "adam": 2 * moment}
    return 3 * traffic.element * kept + state[optimizer]


def useful_bytes(traffic: Traffic, work: Work, optimizer: Optimizer = "none") -> float:
    """Bytes of one call.

    Args:
        traffic: What the call touches.
        work: ``"backward"`` and ``"step"`` include the forward.
        optimizer: Of a step.
    """
    total = forward_bytes(traffic)
    if work in ("backward", "step"):
        total += backward_bytes(traffic)
    if work == "step":
        total += update_bytes(traffic, optimizer)
    return total
