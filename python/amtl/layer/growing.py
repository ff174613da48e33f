"""Rows that are new in a table that goes on training: where they lie, and what they begin as.

A table of several fields, and a collection, has the new rows of each field behind its own, so that
rows of the fields behind it move up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amtl.layer.tiers import TierPlan, holding
from amtl_kernels import empty_table


@dataclass(frozen=True)
class Growth:
    """Rows of each field before, and those that it gains.

    Attributes:
        rows: of each field; they add up to N.
        more: as many fields; they add up to n.
    """

    rows: tuple[int, ...]
    more: tuple[int, ...]

    @classmethod
    def between(cls, before: Sequence[int], after: Sequence[int]) -> Growth:
        """From rows of each field to others; where fields became one, from those of all."""
        if len(before) != len(after):
            before = [sum(before)]
        return cls(tuple(before), tuple(b - a for a, b in zip(before, after, strict=True)))

    @property
    def after(self) -> list[int]:
        """Rows of each field then."""
        return [a + b for a, b in zip(self.rows, self.more, strict=True)]

    @property
    def num_new(self) -> int:
        """The number n of new rows."""
        return sum(self.more)

    def numbers(self) -> Tensor:
        """The number that each row has then, int64 [N + n]: the rows of before, then new ones."""
        old, new, start = [], [], 0
        for rows, more in zip(self.rows, self.more, strict=True):
            old.append(torch.arange(start, start + rows))
            new.append(torch.arange(start + rows, start + rows + more))
            start += rows + more
        return torch.cat([*old, *new])

    def new_rows(self) -> Tensor:
        """Numbers of the new rows, int64 [n]."""
        return self.numbers()[sum(self.rows) :]

    def spread(self, values: Tensor) -> Tensor:
        """Values [N] of rows as those of all, [N + n]; zero of new ones."""
        spread = values.new_zeros(sum(self.after))
        spread[self.numbers()[: len(values)].to(values.device)] = values
        return spread


def with_new_rows(table: Tensor, growth: Growth) -> Tensor:
    """A table [N, D] with new rows: in each column the mean of the field's rows that reach it."""
    dim = table.shape[1]
    grown = empty_table(sum(growth.after), dim, dtype=table.dtype, device=table.device)
    start = 0
    for part, more in zip(table.split(growth.rows), growth.more, strict=True):
        end = start + len(part)
        grown[start:end] = part
        reach = (part != 0).sum(0).clamp(min=1)
        start = end + more
        grown[end:start] = (part.sum(0, dtype=torch.float32) / reach).to(table.dtype)
    return grown


def with_new_tier(plan: TierPlan, dim: int, growth: Growth) -> TierPlan:
    """A plan with the new rows, all of their numbers, in a tier of their own behind the others."""
    widths, ends = (*plan.widths, dim), (*plan.ends, plan.ends[-1] + growth.num_new)
    numbers = growth.numbers()
    placed = slice(plan.ends[-1]) if plan.order is None else plan.order.to(numbers.device)
    order: Tensor | None = torch.cat([numbers[: plan.num_rows][placed], growth.new_rows()])
    assert order is not None
    if torch.equal(order, torch.arange(sum(growth.after))):
        order = None
    elif plan.order is not None:
        order = order.to(plan.order.device)
    return TierPlan(widths, ends, order, sum(growth.after))


def begin_rows(
    optimizers: list[Optimizer], blocks: Sequence[nn.Parameter], rows: nn.Parameter
) -> None:
    """Give new rows [n, D] the sums that Adagrad begins with, where blocks have some.

    Without state rows count as zeros, which is what all others begin with.
    """
    for optimizer, group, first in holding(optimizers, blocks):
        start, state = group.get("initial_accumulator_value"), optimizer.state.get(first) or {}
        if start and "sum" in state:
            of_rows = state["sum"].ndim == 1 or state["sum"].shape[1] != first.shape[1]
            like = rows[:, 0] if of_rows else rows
            optimizer.state[rows] = {"sum": torch.full_like(like, start, requires_grad=False)}
