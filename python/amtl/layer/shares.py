"""What a budget is spent on: how many bits a number has, and what each of several tables gets.

A table of a few values that are looked up all the time costs next to nothing, and a share of its
own would take from it what the whole model needs. So one law goes for the rows of all tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amtl.errors import together
from amtl.layer.budget import BudgetError, check_share, is_number
from amtl.layer.laws import make_law
from amtl.layer.options import SearchOptions
from amtl.layer.rounding import PART_BYTES, spared_bytes, step_groups, unit

_ROUNDS = 64

AUTO = "auto"
_ALL_IN_8 = 0.3
"""Budget from which on 8 bits hold every number, step sizes included, of any table."""
_LITTLE = 0.01
"""Share of a budget that is next to nothing."""
_NARROW = 2
"""Numbers of a row that are all kept where others have enough to give."""


@dataclass(frozen=True)
class Demand:
    """A table that shares a budget.

    Attributes:
        counts: int64 [N], training counts.
        dim: D.
        itemsize: bytes of a number of the table's type.
        field_sizes: rows of each field in it.
        bits: of a stored number, if they are worth it; None for those of its type.
    """

    counts: Tensor
    dim: int
    itemsize: int
    field_sizes: Sequence[int]
    bits: int | None


def automatic_bits(
    budget: float | None, weights: Sequence[Tensor], options: Mapping[str, Any]
) -> list[int | None]:
    """The bits of each table: those asked for; for "auto", the default, those that lose least.

    These are 8 where they hold every number of all tables, else 4: below 12.5 % rows get narrower,
    too. 8 where tiers of 4 are no whole bytes, and where 4, which leave the last number of an odd
    row out, would hold fewer of them or save next to nothing. None, numbers of the table's own
    type, where all of these fit, and where few bits are not to be had: sizes that are learned,
    other types than float32, no rows, no budget. Counts do not matter, so that a state finds the
    bits that it has.

    Args:
        budget: share of the bytes of all tables.
        weights: the tables [N, D].
        options: of `SearchOptions`, as far as they were given.
    """
    bits: int | None = options.get("bits", AUTO)
    if bits != AUTO:
        return [bits] * len(weights)
    if budget is None or budget >= 1 or options.get("parametrization", "rule") != "rule":
        return [None] * len(weights)
    numbers = sum(weight.numel() for weight in weights)
    in_8 = numbers + PART_BYTES * len(weights) <= 4 * budget * numbers
    tier_width = options.get("tier_width") or 2

    def of(weight: Tensor) -> int | None:
        if weight.dtype != torch.float32 or not len(weight):
            return None
        dim = weight.shape[1]
        more = dim % 2 == 0 or 4 * budget * dim < dim - 1
        return 4 if more and tier_width % 2 == 0 and budget < _ALL_IN_8 and not in_8 else 8

    bits_of = [of(weight) for weight in weights]
    return _in_8_where_odd(bits_of, weights, 4 * budget * numbers)


def options_of_table(
    weight: Tensor, counts: Tensor, field_sizes: Sequence[int], options: Mapping[str, Any]
) -> SearchOptions:
    """The options of a table with a budget of its own; see `automatic_bits`.

    Args:
        weight: the table [N, D].
        counts: int64 [N], training counts.
        field_sizes: rows of each field in it.
        options: of `SearchOptions`, as far as they were given.

    Raises:
        ValueError: an option out of range, or bits of a table without rows.
    """
    budget = options.get("budget", SearchOptions.budget)
    (bits,) = automatic_bits(budget if is_number(budget) else None, [weight], options)
    found = SearchOptions(**{**options, "bits": bits})
    if bits is None:
        return found
    if not len(weight):
        raise ValueError("a table without rows has no step sizes: bits must be None")
    if options.get("bits", AUTO) != AUTO:
        return found
    demand = Demand(counts, weight.shape[1], weight.element_size(), field_sizes, bits)
    return _worth(demand, found, _step_groups(demand, found))


def _in_8_where_odd(
    bits: list[int | None], weights: Sequence[Tensor], allowed: float
) -> list[int | None]:
    """These bits, of tables [N, D] of floats; 8 in small ones that 4 take the last number from."""
    taken = sum(
        len(weight) * (weight.shape[1] - weight.shape[1] % 2) / 2
        if each == 4
        else weight.nbytes / 4
        for each, weight in zip(bits, weights, strict=True)
    )
    spare = max(0.0, allowed - taken) + _LITTLE * allowed
    odd = [i for i, each in enumerate(bits) if each == 4 and weights[i].shape[1] % 2]
    for i in sorted(odd, key=lambda i: weights[i].numel()):
        rows, dim = weights[i].shape
        spare -= rows * (dim + 1) / 2
        if spare < 0:
            break
        bits[i] = 8
    return bits


def common_bits(bits: Sequence[int | None]) -> int | None:
    """Bits that all of these tables can have, if they have to have the same."""
    if None in bits:
        return None
    return max(each for each in bits if each is not None) if bits else None


def split_budget(demands: Sequence[Demand], options: SearchOptions) -> list[SearchOptions]:
    """The options of each table such that all together meet the budget of `options`.

    The law of `options` with one shift for the rows of all tables, so that equal counts get equal
    shares of D in every table. Bytes count, step sizes included; rows so narrow that a step size
    may cost what few bits save keep numbers of their own type.

    Args:
        demands: the tables.
        options: with a budget of all tables together.

    Returns:
        `options` of every table, each with a budget of its own. O(sum of N log N).

    Raises:
        BudgetError: the smallest sizes take more than the budget.
        ValueError: see `SearchOptions.grid`.
    """
    budget = options.budget
    if budget is None:
        return [options] * len(demands)
    if len(demands) == 1:
        return [_worth(demands[0], options, _step_groups(demands[0], options))]
    check_share(budget)
    every = [_Table(demand, options) for demand in demands]
    whole = sum(table.whole for table in every)
    allowed = budget * whole * (1 + 1e-12)
    if sum(table.by_law for table in every) <= allowed:
        return [table.sharing(table.by_law) for table in every]
    narrow = [table for table in every if table.narrow]
    least = sum(table.frugal for table in narrow)
    if len(narrow) == len(every) or 2 * least > allowed:
        narrow, least = [], 0.0
    tables = [table for table in every if table not in narrow]
    stored = {table: table.frugal for table in narrow}
    stored |= _by_law(tables, options, allowed - least, whole)
    return [table.sharing(stored[table]) for table in every]


_gathered: ContextVar[list[float] | None] = ContextVar("gathered", default=None)


@contextmanager
def nothing_gathered() -> Iterator[list[float]]:
    """Of layers made meanwhile, what they would warn of: who makes several knows their names."""
    found: list[float] = []
    token = _gathered.set(found)
    try:
        yield found
    finally:
        _gathered.reset(token)


def tell_of_nothing(share: float, budget: float | None, stacklevel: int) -> None:
    """Warns of a table made by itself whose rows with a share of the lookups keep no numbers."""
    gathered = _gathered.get()
    if gathered is not None:
        gathered.append(share)
        return
    warnings.warn(
        f"at budget={budget:g} rows with {share:.0%} of the lookups keep no numbers: "
        "give the table a larger budget, or all tables of the model one (amtl.convert)",
        stacklevel=stacklevel,
    )


def tell_of_nothing_in(
    tables: Mapping[str, float], budget: float | Mapping[str, float | None] | None, alone: bool
) -> None:
    """Warns of tables of one model of which rows with these shares of the lookups keep nothing.

    Args:
        tables: the shares, by name.
        budget: as `amtl.convert` was given it.
        alone: no other table shares it.
    """
    if not tables:
        return
    share = f"rows with {'up to ' if len(tables) > 1 else ''}{max(tables.values()):.0%}"
    if isinstance(budget, Mapping) or budget is None or alone:
        given = "" if isinstance(budget, Mapping) or budget is None else f"at budget={budget:g} "
        advice = "give it more, or all tables of the model one budget"
    else:
        given = f"at budget={budget:g} of all tables together, "
        advice = (
            "leave such tables out (names=...), which costs next to nothing where they are "
            "small, or take a larger budget"
        )
    named = "" if "" in tables else f"{together(list(tables))}: "
    warnings.warn(
        f"{named}{given}{share} of the lookups keep no numbers: {advice}",
        stacklevel=3,
    )


def _by_law(
    tables: Sequence[_Table], options: SearchOptions, allowed: float, whole: float
) -> dict[_Table, float]:
    """Bytes of each table, from one shift for the rows of all."""

    def fits(shift: float) -> bool:
        return sum(table.bytes(shift) for table in tables) <= allowed

    low = min(table.lowest for table in tables)
    high = max(table.highest for table in tables)
    if not fits(low):
        least = sum(table.bytes(low) for table in tables)
        raise BudgetError(
            f"budget={options.budget} cannot be reached by {len(tables)} tables together: their "
            f"smallest rows take {least:.0f} of {whole:.0f} bytes. Raise the budget, lower "
            "min_dim, granularity or tier_width, or set min_dim=0"
        )
    if fits(high):
        low = high
    else:
        shares = _all_numbers(tables, allowed)
        if shares is not None:
            return dict(zip(tables, shares, strict=True))
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {table: table.bytes(low) for table in tables}


def _all_numbers(tables: Sequence[_Table], allowed: float) -> list[float] | None:
    """Bytes of each table where all numbers fit, though not a step size for each group of rows.

    By the law some table would leave out numbers for these, and keep the order of its rows, which
    takes more than both. So the last rows of the larger tables save what is short
    (`where_they_are`), and these have one step size a field.

    Args:
        tables: which share a budget.
        allowed: bytes of all.

    Returns:
        None where numbers do not fit, or the last rows cannot save so much.
    """
    order = sorted(range(len(tables)), key=lambda i: tables[i].frugal)
    shares = [table.frugal for table in tables]
    spare = sum(table.spare for table in tables) - (sum(shares) - allowed)
    if spare < 0:
        return None
    whole = set()
    for i in order[:-1]:
        # Of few rows the law leaves numbers out for a step size or two.
        more = tables[i].by_law - tables[i].frugal
        if more + tables[i].spare <= spare:
            whole.add(i)
            shares[i] += more
            spare -= more + tables[i].spare
    for i in reversed(order):
        if i not in whole:
            short = max(0.0, sum(shares) - allowed)
            shares[i] -= min(short, tables[i].spare)
    return shares


def _step_groups(demand: Demand, options: SearchOptions) -> Tensor | None:
    """What may share a step size; None where there is none."""
    if demand.bits is None:
        return None
    groups = options.groups(demand.counts.cpu(), demand.field_sizes)
    return step_groups(groups.counts, groups.fields)


def _worth(demand: Demand, options: SearchOptions, steps: Tensor | None) -> SearchOptions:
    """With the table's bits, unless step sizes, one a magnitude of the count, cost what they save.

    Rows of less than a byte take one, so that they are of 8 bits.
    """
    rows, bits, most = len(demand.counts), demand.bits, 0
    if bits is not None and demand.dim < unit(bits):
        bits = 8
    if steps is not None:
        most = steps.unique().numel()
    saved = rows * demand.dim * (demand.itemsize - (bits or 0) / 8)
    if bits is not None and saved > PART_BYTES * most:
        return replace(options, bits=bits)
    return replace(options, bits=None, masters=True)


class _Table:
    """What one table stores at a shift that all of them share."""

    def __init__(self, demand: Demand, options: SearchOptions) -> None:
        groups = options.groups(demand.counts.cpu(), demand.field_sizes)
        self._steps = step_groups(groups.counts, groups.fields)
        self._options = options = _worth(demand, options, self._steps)
        grid = options.grid(demand.dim, demand.itemsize)
        self._grid = grid
        self._number = demand.itemsize if options.bits is None else options.bits / 8
        self.whole = len(demand.counts) * demand.dim * demand.itemsize
        self._rows = groups.rows_per_group().to(torch.float64)
        weights = torch.ones(groups.num_fields, dtype=torch.float64)
        if options.field_weights is not None and len(options.field_weights) == len(weights):
            weights = torch.tensor(options.field_weights, dtype=torch.float64)
        law = make_law(options.parametrization, grid, options.capacity_bits, options.init_exponent)
        logs = torch.log(weights[groups.fields])
        self._score = law.start(groups.counts.to(torch.float64), logs)
        self._thresholds = torch.tensor(law.thresholds, dtype=torch.float64)
        self._stored = torch.tensor(grid.stored, dtype=torch.float64)
        few, many = map(float, self._score.aminmax()) if len(self._score) else (0.0, 0.0)
        first, last = (law.thresholds[0], law.thresholds[-1]) if law.thresholds else (0.0, 0.0)
        # Shifts at which nobody gets more than the smallest size, and everybody gets D.
        self.lowest, self.highest = first - many - 1, last - few + 1
        # All numbers, with all step sizes and with one a field; what the last rows may save.
        numbers = len(demand.counts) * grid.widest * self._number
        self.by_law = self.bytes(self.highest)
        self.frugal = numbers + (PART_BYTES * groups.num_fields if options.bits else 0)
        if self.frugal <= self.by_law - numbers:
            # Sizes are settled by the law, which has to be able to pay for its step sizes.
            self.frugal = self.by_law
        # Rows of a number or two, which to leave out costs more than they take; and one is not
        # worth less than one of many, of which the law leaves out the last.
        few = options.bits is not None and 2 * self.frugal <= 4 * len(demand.counts)
        self.narrow = few or grid.widest <= _NARROW
        spares = options.bits is not None and grid.widest > unit(options.bits)
        self.spare = spared_bytes(len(demand.counts), options.bits or 8) if spares else 0

    def bytes(self, shift: float) -> float:
        """Stored, step sizes included."""
        level = torch.searchsorted(self._thresholds - shift, self._score, right=True)
        stored = self._stored[level]
        parts = 0
        if self._options.bits is not None:
            key = self._steps * (self._grid.dim + 1) + stored.to(torch.int64)
            parts = int(key[stored > 0].unique().numel())
        return float((stored * self._rows).sum()) * self._number + parts * PART_BYTES

    def sharing(self, stored: float) -> SearchOptions:
        """The table's options, with so many bytes of the budget."""
        # Nothing is less than a number, and a budget of 0 is none.
        share = max(stored, self._number / 2) / max(self.whole, 1)
        return replace(self._options, budget=min(1.0, share), tier_width=self._grid.tier_width)
