"""Bytes that the work has to move (``docs/benchmarks.md``), and shares of a measured ceiling.

The counts say what an implementation can't avoid; caches may serve part of them, so a share above
one is possible where the table or the hot rows fit a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Work = Literal["forward", "backward", "step"]
Optimizer = Literal["none", "sgd", "rowwise_adagrad", "adagrad", "adam"]

# A GPU's memory moves no less, nor a CPU's.
SECTOR = 32
LINE = 64


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


def row_bytes(traffic: Traffic, work: Work, optimizer: Optimizer = "none") -> float:
    """Of :func:`useful_bytes` those of tables and states, which lie wherever the ids point.

    The others are streams: ids, outputs and gradients.

    Args:
        traffic: What the call touches.
        work: As of :func:`useful_bytes`.
        optimizer: As there.
    """
    total = (traffic.row_element or traffic.element) * traffic.lookups * traffic.lookup_mean
    if work in ("backward", "step") and traffic.mask_gradient:
        total += traffic.element * traffic.distinct * traffic.dim
    if work == "step":
        gradient = traffic.element * traffic.distinct * traffic.distinct_mean
        total += update_bytes(traffic, optimizer) - gradient
    return total


def ceiling_seconds(
    useful: float, rows: float, ceilings: Mapping[str, float], *, at_random: bool
) -> float:
    """What a call would take at a machine's own rates.

    Args:
        useful: From :func:`useful_bytes`.
        rows: From :func:`row_bytes`.
        ceilings: Bytes per second of that machine: ``copy``, and ``rows`` for those of rows.
        at_random: Whether rows are far apart and all alike (uniform ids); else hot ones stay in a
            cache and everything counts as a stream.
    """
    slow = rows if at_random else 0.0
    return slow / ceilings["rows"] + (useful - slow) / ceilings["copy"]


@dataclass(frozen=True)
class Layout:
    """Where the rows of one call's lookups lie; bytes, each table from an address of its own.

    Attributes:
        rows: Number of each lookup's row, in the order in which rows lie, ``[L]``.
        begin: Its first byte, ``[L]``.
        kept: Bytes of it that the lookup reads, ``[L]``.
        stored: Bytes of the whole row, ``[L]``.
        told: First bytes of what tells its size, ``[L]`` for each table that is asked for that.
    """

    rows: NDArray[np.int64]
    begin: NDArray[np.int64]
    kept: NDArray[np.int64]
    stored: NDArray[np.int64]
    told: Sequence[NDArray[np.int64]] = ()

    def distinct(self) -> Layout:
        """Of each row once, as they lie."""
        rows, first = np.unique(self.rows, return_index=True)
        return Layout(rows, self.begin[first], self.kept[first], self.stored[first])


@dataclass(frozen=True)
class _Reads:
    """Accesses in order.

    Attributes:
        keys: What is read.
        sectors: That it takes.
        turns: The lookup or row it is for.
        first: Whether no sector of the same memory range comes before it.
    """

    keys: NDArray[np.int64]
    sectors: NDArray[np.int64]
    turns: NDArray[np.int64]
    first: NDArray[np.bool_]


def misses(
    keys: NDArray[np.int64], sizes: NDArray[np.int64], room: int, chunks: int = 1024
) -> NDArray[np.bool_]:
    """Which accesses a cache misses that is empty at first, ``[n]``.

    It drops what has not been used for longest. Exact for up to twice ``chunks`` accesses; of more,
    those of one ``chunks``-th count as made at once, so that sizes used within it drop nothing.

    Args:
        keys: What is accessed, in order, ``[n]``.
        sizes: What it takes in the cache, the same for each access to a key, ``[n]``.
        room: What the cache holds.
        chunks: Cost: a NumPy step for each.
    """
    length = max(keys.size // chunks, 1)
    order = keys.argsort(kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    # The chunk of each access, and that of the access before to the same.
    now = np.arange(keys.size) // length
    before = np.full(keys.size, -1)
    before[order[again + 1]] = now[order[again]]
    counts = before != now
    before, size = before[counts], sizes[counts]
    ends = np.bincount(now[counts]).cumsum()
    # By chunk: what has been used in it and not since.
    used = np.zeros(ends.size, dtype=np.int64)
    hits = np.zeros(before.size, dtype=bool)
    start = 0
    for chunk, end in enumerate(ends):
        here, needed = before[start:end], size[start:end]
        since = used[::-1].cumsum()[::-1] - used
        known = here >= 0
        hits[start:end] = known & (since[here] + needed <= room)
        np.subtract.at(used, here[known], needed[known])
        used[chunk] += needed.sum()
        start = end
    found = counts.copy()
    found[counts] = ~hits
    return found


def _reads(begin: NDArray[np.int64], size: NDArray[np.int64], region: int, sector: int) -> _Reads:
    """Sectors of memory ranges; one access for each range if none shares a sector with another."""
    first = begin // sector
    count = np.where(size > 0, (begin + size - 1) // sector - first + 1, 0)
    turns = np.arange(begin.size)
    if not (begin % sector).any():
        taken = count > 0
        keys = (first + (region << 48))[taken]
        return _Reads(keys, count[taken], turns[taken], np.ones(keys.size, dtype=bool))
    turns = turns.repeat(count)
    within = np.arange(turns.size) - (count.cumsum() - count).repeat(count)
    keys = first.repeat(count) + within + (region << 48)
    return _Reads(keys, np.ones_like(keys), turns, within == 0)


def _in_turns(reads: Sequence[_Reads]) -> _Reads:
    """All of them, those of one lookup after those of the lookup before."""
    turns = np.concatenate([each.turns for each in reads])
    order = turns.argsort(kind="stable")
    return _joined(reads, order)


def _joined(reads: Sequence[_Reads], order: Any = slice(None)) -> _Reads:
    parts = zip(*(dataclasses.astuple(each) for each in reads), strict=True)
    return _Reads(*(np.concatenate(part)[order] for part in parts))


def _state_reads(layout: Layout, element: int, optimizer: Optimizer, sector: int) -> list[_Reads]:
    """Floats of an optimizer: one a row, or as many as the row has numbers."""
    if optimizer == "rowwise_adagrad":
        return [_reads(4 * layout.rows, np.full_like(layout.rows, 4), _STATE, sector)]
    moments = {"adagrad": 1, "adam": 2}.get(optimizer, 0)
    begin, kept = layout.begin // element * 4, layout.kept // element * 4
    return [_reads(begin, kept, _STATE + moment, sector) for moment in range(moments)]


_TABLE, _GRADIENT, _STATE, _TOLD = 0, 1, 2, 4


@dataclass(frozen=True)
class Floor:
    """Bytes of one call that have to come from or go to memory behind a cache.

    Attributes:
        streams: Ids, outputs and row gradients, one after the other.
        apart: Sectors that lie wherever the ids point: rows, what tells their sizes, states, and
            the gradients of bags.
        places: Memory ranges that ``apart`` is read in: their number.
    """

    streams: float
    apart: float
    places: int

    @property
    def total(self) -> float:
        """Of both kinds."""
        return self.streams + self.apart

    def seconds(self, ceilings: Mapping[str, float]) -> float:
        """What a CPU would take at its own rates, if sectors are lines.

        A line somewhere else takes longer than the next ones, which need no page of their own:
        ``lines`` is measured in rows of one and ``rows`` in rows of four.

        Args:
            ceilings: Bytes per second: ``copy``, ``rows`` and ``lines``.
        """
        place = LINE / ceilings["lines"]
        further = max(4 * LINE / ceilings["rows"] - place, 0.0) / 3
        rest = max(self.apart / LINE - self.places, 0.0)
        return self.streams / ceilings["copy"] + self.places * place + rest * further


def floor(
    traffic: Traffic,
    layout: Layout,
    bag_size: int,
    cache_bytes: int,
    work: Work,
    optimizer: Optimizer = "none",
    sector: int = SECTOR,
) -> Floor:
    """What one call has to move behind a cache.

    What is read passes a cache of that size, empty at first, which drops the sectors that
    have not been used for longest (:func:`misses`): row by row what tells its size and the
    kept part of it, then gradients of bags in the order of the sorted rows, and at last each row
    that was looked up with its optimizer's state. What is written counts once. Row gradients count
    where the caller gets them, not on their way to an optimizer, nor does what sorting moves.

    Args:
        traffic: What the call touches.
        layout: Where that lies.
        bag_size: Lookups of a bag; 1 where nothing is pooled.
        cache_bytes: Of the cache; it holds nothing else.
        work: As of :func:`useful_bytes`.
        optimizer: As there.
        sector: What memory moves at least, bytes.
    """
    told = [
        _reads(begin, np.ones_like(begin), _TOLD + table, sector)
        for table, begin in enumerate(layout.told)
    ]
    reads = [_in_turns([*told, _reads(layout.begin, layout.kept, _TABLE, sector)])]
    streams = float(traffic.index * traffic.lookups)
    streams += traffic.element * traffic.outputs * traffic.dim
    written = 0
    if work != "forward":
        row = traffic.element * traffic.dim
        bags = np.argsort(layout.rows, kind="stable") // bag_size
        reads.append(_reads(row * bags, np.full_like(bags, row), _GRADIENT, sector))
        once = layout.distinct()
        # In two parts, for the first is what the lookup has read.
        prefix = _reads(once.begin, once.kept, _TABLE, sector)
        at_turn = [prefix] if traffic.mask_gradient or work == "step" else []
        if traffic.mask_gradient:
            past = -(-once.kept // sector) * sector
            rest = np.maximum(once.stored - past, 0)
            at_turn.append(_reads(once.begin + past, rest, _TABLE, sector))
        if work == "step":
            state = _state_reads(once, traffic.element, optimizer, sector)
            at_turn += state
            for each in (prefix, *state):
                # Rows that share a sector come one after the other: it is written once.
                _, first = np.unique(each.keys, return_index=True)
                written += int(each.sectors[first].sum())
        if at_turn:
            reads.append(_in_turns(at_turn))
        if work == "backward":
            streams += float(once.stored.sum())
    every = _joined(reads)
    lost = misses(every.keys, every.sectors, cache_bytes // sector)
    moved = int(every.sectors[lost].sum()) + written
    return Floor(streams, float(sector * moved), int(every.first[lost].sum()))
