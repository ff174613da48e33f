"""Fewer rows than values: compositions of rows that values share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from amtl.peers.base import DoesNotFit, Facts, Part, Peer

_PRIME = 2_147_483_647


def _halvings(facts: Facts, width: int | None) -> list[int]:
    """Widths to try, the widest first; that one only if it is given."""
    if width is not None:
        return [width]
    return [facts.dim >> n for n in range(facts.dim.bit_length())]


class QuotientRemainder(Peer):
    """Quotient-remainder trick, Shi et al. 2019 (arXiv 1909.02107), section 2, algorithm 2.

    Value i of a field takes row `i mod m` of one table and row `i // m` of another: no two values
    share both. They are multiplied (the paper's best) or added.

    m is the largest that the budget allows, with one number of collisions `N_f / m` for all fields;
    a field that would save nothing has a row for each value (the paper's threshold). Rows of the
    quotient start near 1 when multiplied, so that the product starts as the remainder's row does.

    Args:
        facts: see `Peer`.
        operation: "mult" or "add".
        width: of the rows, zeros beyond; None: the widest of D, D/2, ... that fits.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"operation": ("mult", "add")}
    first: Tensor
    second: Tensor

    def __init__(self, facts: Facts, operation: str = "mult", width: int | None = None) -> None:
        super().__init__(facts)
        if operation not in ("mult", "add"):
            raise ValueError(f"operation must be mult or add, not {operation!r}")
        self.multiplies = operation == "mult"
        splits, self.width = _split(facts, _halvings(facts, width))
        first, second, taken, quotients = [], [], 0, 0
        for size, remainders in zip(facts.field_sizes, splits, strict=True):
            number = torch.arange(size)
            first.append(taken + number % remainders)
            taken += remainders
            if remainders == size:
                second.append(torch.full((size,), -1))
                continue
            second.append(quotients + number // remainders)
            quotients += -(-size // remainders)
        order = torch.argsort(facts.fields, stable=True)
        for name, values in (("first", first), ("second", second)):
            places = torch.empty(facts.rows, dtype=torch.int64)
            places[order] = torch.cat(values)
            self.register_buffer(name, places, persistent=False)
        self.remainder = self.row_table(taken, self.width)
        self.quotient = self.row_table(max(1, quotients), self.width, float(self.multiplies))
        self._quotients = quotients

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values = self.look_up(self.remainder, self.first[rows])
        second = self.second[rows]
        other = self.look_up(self.quotient, second.clamp(min=0))
        both = values * other if self.multiplies else values + other
        return self.padded(torch.where((second >= 0)[:, None], both, values))

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part((len(self.remainder) + self._quotients) * self.width, 32),
            Part(len(self.facts.field_sizes), 32),  # rows of each field
        ]


def _split(facts: Facts, widths: Sequence[int]) -> tuple[list[int], int]:
    """Rows of the remainder's table for each field, and their width."""
    sizes = torch.tensor(facts.field_sizes)
    spare = facts.budget - 4 * len(sizes)
    for width in widths:
        for collisions in range(1, math.isqrt(int(sizes.max())) + 2):
            rows = -(-sizes // collisions)
            saves = rows + -(-sizes // rows) < sizes
            rows = torch.where(saves, rows, sizes)
            total = int(rows.sum() + (-(-sizes // rows))[saves].sum())
            if 4 * total * width <= spare:
                return rows.tolist(), width
    raise DoesNotFit(f"quotients and remainders take more than {facts.budget:,} bytes")


class DoubleHash(Peer):
    """Frequency-based double hashing, Zhang et al. 2020 (arXiv 2007.14523): its hybrid method.

    The most frequent values have rows of their own (its frequency hashing). Every other one is the
    sum of two rows of a pool, at two independent hashes of its number (its double hashing).

    One pool for all fields, as all fields are one table here; the paper has one a feature.

    Args:
        facts: see `Peer`.
        frequent: share of the bytes for rows of their own.
        width: of the rows, zeros beyond; None: D, or the widest of D/2, ... with 64 rows.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"frequent": (0.5, 0.25, 0.75)}
    places: Tensor

    def __init__(self, facts: Facts, frequent: float = 0.5, width: int | None = None) -> None:
        super().__init__(facts)
        spare = facts.budget - 4 * len(facts.field_sizes)
        widths = _halvings(facts, width)
        self.width = next((w for w in widths if spare // (4 * w) >= 64), widths[-1])
        rows = min(spare // (4 * self.width), facts.rows)
        if rows < 2:
            raise DoesNotFit(f"two rows of {self.width} take more than {facts.budget:,} bytes")
        own = rows if rows == facts.rows else min(rows - 1, int(frequent * rows))
        pool = max(1, rows - own)
        number = torch.arange(facts.rows)
        generator = torch.Generator().manual_seed(facts.seed)
        factors = torch.randint(1, _PRIME, (2, 2), generator=generator)
        places = torch.stack([(a * (number + 1) + b) % _PRIME % pool + own for a, b in factors], 1)
        top = torch.argsort(facts.counts, descending=True, stable=True)[:own]
        places[top, 0] = torch.arange(own)
        places[top, 1] = -1
        self.register_buffer("places", places, persistent=False)
        self.weight = self.row_table(rows, self.width)

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        first, second = self.places[rows].unbind(1)
        other = self.look_up(self.weight, second.clamp(min=0))
        values = self.look_up(self.weight, first)
        return self.padded(values + other * (second >= 0)[:, None])

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(self.weight.numel(), 32),
            Part(len(self.facts.field_sizes), 32),  # frequent rows of each field
        ]
