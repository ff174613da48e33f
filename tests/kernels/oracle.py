"""What lookups mean, one lookup and one row at a time, in float64.

Written from what `amtl_kernels.ops`, `tables`, `optim` and `fused` say, and from nothing else: it
shares no code with any backend, so that an error in the reference is not its own judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LOW = 0xFFFFFFFF


def column(row: int, seed: int, columns: int) -> int:
    """Which size column a row takes: two multiply-xorshift rounds of row and seed, scaled."""
    x = ((row ^ (row >> 32)) & _LOW) * 0x9E3779B1
    x += ((seed ^ (seed >> 32)) & _LOW) * 0x85EBCA77
    x &= _LOW
    x ^= x >> 16
    x = x * 0x85EBCA6B & _LOW
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _LOW
    x ^= x >> 16
    return x * columns >> 32


def numbers(codes: Sequence[int], step: float, bits: int) -> list[float]:
    """What a row of bytes stands for, the first code in a byte's lowest bits."""
    found = []
    if bits == 16:
        half = np.float32(32767.5)
        pairs = [low + 256 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
        return [float((np.float32(code) - half) * np.float32(step)) for code in pairs]
    for byte in codes:
        for _ in range(8 // bits):
            code, byte = byte % 2**bits, byte // 2**bits
            found.append(
                float((np.float32(code) - np.float32((2**bits - 1) / 2)) * np.float32(step))
            )
    return found


def rounded(values: Array, step: float, bits: int) -> Array:
    """The nearest numbers of so many bits, in float32; ties go to even codes."""
    half = np.float32((2**bits - 1) / 2)
    codes = np.rint(values.astype(np.float32) / np.float32(step) + half)
    found = (codes.clip(0, 2 * half) - half) * np.float32(step)
    return found.astype(np.float64)


@dataclass
class Table:
    """A table of any form: its rows, and how much of each is kept."""

    rows: Array  # [N, D]
    kept: list[int]
    rounded: Array | None = None  # what lookups show of the rows, where that is something else
    groups: list[int] | None = None
    group_count: int = 0
    padding: int | None = None
    fine: list[bool] = field(default_factory=list)  # of each row: its group and size exist

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def shown(self) -> Array:
        return self.rows if self.rounded is None else self.rounded


@dataclass
class Lookups:
    """The lookups in one table, bag by bag; not pooled, every bag is one lookup."""

    indices: list[int]
    ends: list[tuple[int, int]]
    pooled: bool
    mean: bool = False
    weights: Array | None = None
    clamp: bool = False

    def row(self, table: Table, position: int) -> int:
        index = self.indices[position]
        return min(max(index, 0), len(table.rows) - 1) if self.clamp else index

    def positions(self) -> list[int]:
        return [p for begin, end in self.ends for p in range(begin, end)]

    def bags(self, table: Table) -> list[list[tuple[int, int, float]]]:
        """Of each bag: position, row and factor of every lookup that counts."""
        found = []
        for begin, end in self.ends:
            bag = [(p, self.row(table, p)) for p in range(begin, end)]
            if self.pooled:
                bag = [(p, row) for p, row in bag if row != table.padding]
            factor = 1 / len(bag) if self.mean and bag else 1.0
            weights = self.weights
            found.append(
                [(p, row, factor if weights is None else float(weights[p])) for p, row in bag]
            )
        return found


def bad_index(table: Table, lookups: Lookups) -> tuple[int, int] | None:
    """The first index outside the table that is looked up: its value and position."""
    for p in lookups.positions():
        if not 0 <= lookups.indices[p] < len(table.rows):
            return lookups.indices[p], p
    return None


def bad_row(table: Table, lookups: Lookups) -> bool:
    """Whether a row is looked up whose size or group is none."""
    rows = [lookups.row(table, p) for p in lookups.positions()]
    return any(0 <= row < len(table.rows) and not table.fine[row] for row in rows)


def forward(table: Table, lookups: Lookups) -> Array:
    """The output ``[bags, D]``."""
    out = np.zeros((len(lookups.ends), table.dim))
    for b, bag in enumerate(lookups.bags(table)):
        for _, row, factor in bag:
            kept = table.kept[row]
            out[b, :kept] += factor * table.shown[row, :kept]
    return out


@dataclass
class Gradients:
    """Of one table: of the rows that count, of the soft mask, of per-sample weights."""

    rows: dict[int, Array]
    mask: Array
    weights: Array


def backward(table: Table, lookups: Lookups, grad: Array) -> Gradients:
    """What reaches everything from ``grad [bags, D]``."""
    found = Gradients({}, np.zeros((table.group_count, table.dim)), np.zeros(len(lookups.indices)))
    for delta, bag in zip(grad, lookups.bags(table), strict=True):
        for position, row, factor in bag:
            # Only a plain lookup has one in its bags: its value is used, and that is all.
            if row == table.padding:
                continue
            kept = table.kept[row]
            mine = found.rows.setdefault(row, np.zeros(table.dim))
            mine[:kept] += factor * delta[:kept]
            if table.groups is not None:
                found.mask[table.groups[row]] += factor * delta * table.rows[row]
            found.weights[position] = delta[:kept] @ table.shown[row, :kept]
    return found


@dataclass
class Rule:
    """An optimizer's hyperparameters; ``round_`` is to the type of the table."""

    name: str
    lr: float
    eps: float
    weight_decay: float
    betas: tuple[float, float]
    fused: bool
    round_: Callable[[Array], Array]


def update(
    rule: Rule, table: Table, state: list[Array], grads: dict[int, Array], step: int
) -> None:
    """One step of the rows that have gradients; ``state`` is ``[N, D]``, or ``[N]`` row-wise."""
    for row, full in grads.items():
        g = full if rule.fused else rule.round_(full)
        size = table.kept[row]
        if not rule.fused:
            size = max((j + 1 for j in range(table.dim) if g[j] != 0), default=0)
        if size == 0:
            continue
        w = table.rows[row, :size]
        g = g[:size] + rule.weight_decay * w
        if rule.name == "sgd":
            change = g
        elif rule.name == "adagrad":
            state[0][row, :size] += g * g
            change = g / (np.sqrt(state[0][row, :size]) + rule.eps)
        elif rule.name == "rowwise_adagrad":
            state[0][row] += sum(x * x for x in g) / size
            change = g / (math.sqrt(state[0][row]) + rule.eps)
        else:
            first, second = rule.betas
            mean, square = state[0][row, :size], state[1][row, :size]
            mean += (1 - first) * (g - mean)
            square += (1 - second) * (g * g - square)
            root = np.sqrt(square / (1 - second**step)) + rule.eps
            change = mean / (1 - first**step) / root
        table.rows[row, :size] = rule.round_(w - rule.lr * change)
