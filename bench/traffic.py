"""Bytes that the work has to move (DESIGN §5), and shares of a measured ceiling.

The counts say what an implementation can't avoid; caches may serve part of them, so a share above
one is possible where the table or the hot rows fit a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
        row_element: Bytes of a weight as a lookup reads it; 0: the same.
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
    row_element: float = 0


def forward_bytes(traffic: Traffic) -> float:
    """``4·L·k̄ + 4·B·D`` pooled, ``4·L·(k̄ + D)`` not pooled, and the indices."""
    rows = (traffic.row_element or traffic.element) * traffic.lookups * traffic.lookup_mean
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


def misses(ids: NDArray[np.int64], held: int) -> int:
    """How many of these accesses an empty cache of ``held`` entries misses, the oldest going first.

    Cost: a dictionary's step for each access.
    """
    cache: OrderedDict[Any, None] = OrderedDict()
    count = 0
    for each in ids.tolist():
        if each in cache:
            cache.move_to_end(each)
            continue
        count += 1
        cache[each] = None
        if len(cache) > held:
            cache.popitem(last=False)
    return count


def floor_bytes(
    traffic: Traffic,
    ids: NDArray[np.int64],
    bag_size: int,
    cache_bytes: int,
    work: Work,
    optimizer: Optimizer = "none",
) -> float:
    """Bytes of one call that have to come from or go to memory behind a cache.

    As :func:`useful_bytes`, but rows looked up again while a cache of that size still holds them
    cost nothing, nor do gradients of bags that sorted lookups come back to. What sorting moves is
    not counted.

    Args:
        traffic: What the call touches.
        ids: Rows looked up, in order.
        bag_size: Lookups of a bag.
        cache_bytes: Of a cache that holds nothing else.
        work: As there.
        optimizer: As there.
    """
    row = max(traffic.element * traffic.lookup_mean, 1.0)
    found = misses(ids, max(int(cache_bytes / row), 1))
    # Hot rows are long: what is missed is closer to the distinct rows than to all lookups.
    again = (found - traffic.distinct) / max(traffic.lookups - traffic.distinct, 1)
    mean = traffic.distinct_mean + again * (traffic.lookup_mean - traffic.distinct_mean)
    seen = replace(traffic, lookups=found, lookup_mean=mean)
    total = forward_bytes(seen) + traffic.index * (traffic.lookups - found)
    if work == "forward":
        return total
    bags = np.argsort(ids, kind="stable") // bag_size
    held = max(int(cache_bytes / (traffic.element * traffic.dim)), 1)
    read = replace(traffic, lookups=misses(bags, held), index=0)
    total += backward_bytes(read) + traffic.index * traffic.lookups
    if work == "step":
        total += update_bytes(traffic, optimizer)
    return total
