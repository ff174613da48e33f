"""The four operators: from the arguments of their schemas to tables and lookups, and to kernels.

One table or several, a call takes the same launches: behind the sort of a backward several tables
are one table in tiers (``lookups.py``), and a lookup in several has a program know its table. All
take vector loads only if the rows of all are aligned, and tiles of the widest.

Several tables share a launch if one pointer reaches all of them; else each has its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels._arguments import (
    Bags,
    FewBits,
    Step,
    Tables,
    Wishes,
    check_update_of_codes,
    in_groups,
)
from amtl_kernels.reference import code_parts, split_bags, split_tables
from amtl_kernels.triton import check
from amtl_kernels.triton.backward import gradients
from amtl_kernels.triton.codes import update_codes
from amtl_kernels.triton.lookup import gather, pool
from amtl_kernels.triton.lookups import Lookups, Several
from amtl_kernels.triton.optimizer import apply_
from amtl_kernels.triton.rules import check_states
from amtl_kernels.triton.tables import Table
from amtl_kernels.triton.update import update

_Result = TypeVar("_Result")


def _are_whole_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether all are of one type and whole elements apart."""
    if not tensors:
        return True
    first = tensors[0]
    size, start = first.element_size(), first.data_ptr()
    return all(
        t.dtype == first.dtype and t.is_contiguous() and (t.data_ptr() - start) % size == 0
        for t in tensors
    )


def _side_by_side(sizes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sizes as they are or, if no pointer reaches all, as int32 in memory that they share."""
    if _are_whole_apart(sizes):
        return sizes
    flat = torch.cat([each.reshape(-1).to(torch.int32) for each in sizes])
    parts = flat.split([each.numel() for each in sizes])
    return [part.view(each.shape) for part, each in zip(parts, sizes, strict=True)]


def _one(table: reference.Table, bags: Bags, values: Tensor) -> tuple[Lookups, Table]:
    """Lookups in one table, and the table; ``values`` are their output or its gradient."""
    blocks, sizes, row_group = table.blocks, table.sizes, table.row_group
    groups = 0
    if sizes is None:
        ends = list(itertools.accumulate(block.shape[0] for block in blocks))
        steps = None if table.steps is None else table.steps.contiguous()
        seen = Table.by_tiers(blocks, ends, table.dim, steps=steps, bits=table.bits)
    elif row_group is None:
        seen = Table.by_rows(blocks[0], sizes)
    else:
        seen, groups = Table.by_groups(blocks[0], row_group, sizes, table.seed), sizes.shape[0]
    return Lookups.of(values, table.dim, bags, row_group, groups), seen


@dataclass
class _Call:
    """The arguments that the operators share: a list of tables, and the lookups in them."""

    given: Tables
    bags: Bags
    few: FewBits | None = None

    def __post_init__(self) -> None:
        reference.check_bags(self.bags)

    @functools.cached_property
    def tables(self) -> list[reference.Table]:
        """Every table on its own, with a width that kernels may rely on."""
        tables = split_tables(self.given, self.few)
        for t, table in enumerate(tables):
            columns = table.blocks[0].shape[1]
            if table.sizes is not None and table.dim != columns:
                which = f"table {t}: " if len(tables) > 1 else ""
                raise ValueError(
                    f"{which}embedding_dim is {table.dim}, the table has {columns} columns"
                )
        return tables

    @property
    def widths(self) -> list[int]:
        """Columns of every table's output."""
        return [table.dim for table in self.tables]

    @property
    def shares_launches(self) -> bool:
        """Whether these are several tables that one launch reaches."""
        return (
            len(self.tables) > 1
            and (self.few is None or len(set(self.few.bits)) == 1)
            and _are_whole_apart(self.given.blocks)
            and _are_whole_apart(self.given.row_groups)
        )

    def together(self, values: Tensor) -> tuple[Lookups, Table]:
        """Lookups in several tables, and the tables."""
        sizes, row_groups = _side_by_side(self.given.sizes), self.given.row_groups
        # Of few bits a tier is what has one step size.
        blocks = [block for table in self.tables for block in table.blocks]
        several = Several.of(
            values,
            [table.rows for table in self.tables],
            self.widths,
            self.bags.padding_idx,
            [len(table.blocks) for table in self.tables],
            row_groups,
            [each.shape[0] for each in sizes] if row_groups else [],
        )
        if sizes:
            table = Table.by_tables(blocks, sizes, row_groups, self.given.seed)
        else:
            ends = list(itertools.accumulate(block.shape[0] for block in blocks))
            steps = torch.cat(list(self.few.steps)) if self.few else None
            bits = self.few.bits[0] if self.few else 0
            table = Table.by_tiers(blocks, ends, max(self.widths), steps=steps, bits=bits)
        return Lookups.of_tables(values, several, self.bags), table

    def each(self, run: Callable[[int, reference.Table, Bags], _Result]) -> list[_Result]:
        """What ``run`` returns of every table; errors name the table if there are several."""
        return reference.for_each(run, self.tables, split_bags(self.bags))

    def columns(self, grad: Tensor) -> Sequence[Tensor]:
        """Every table's incoming gradient."""
        return [grad] if len(self.tables) == 1 else grad.split(self.widths, 1)

    def join_sample_grads(self, parts: Sequence[Tensor], wanted: bool) -> Tensor:
        """The gradient of all per-sample weights, of those of every table; zero past the last."""
        found = torch.cat(list(parts))
        if not wanted:
            return found
        return torch.nn.functional.pad(found, (0, self.bags.indices.numel() - found.numel()))


def lookup(
    tables: Tables,
    masks: list[Tensor] | None,
    bags: Bags,
    bounds_check: int,
    sparse_grad: bool,
    few: FewBits | None = None,
) -> Tensor:
    """``out[.., j] = row[j]`` for ``j`` below the row's kept size, else 0; pooled by bag."""
    check.raise_found(bags.indices)
    call = _Call(tables, bags, few)
    # What is found out of range is told of when all is done: nothing may be read there.
    clamp = bounds_check != reference.OFF
    if call.shares_launches and _are_whole_apart(tables.sizes):
        assert bags.offsets is not None
        number = max(bags.offsets.numel() - 1, 0) // len(call.tables)
        out = tables.blocks[0].new_empty(number, sum(call.widths), dtype=call.tables[0].dtype)
        lookups, all_tables = call.together(out)
        check.check(lookups, all_tables, bounds_check)
        pool(lookups, all_tables, clamp)
        return out

    def run(t: int, given: reference.Table, mine: Bags) -> Tensor:
        shape = mine.indices.shape
        if mine.offsets is not None:
            shape = torch.Size([max(mine.offsets.numel() - int(mine.include_last_offset), 0)])
        out = given.blocks[0].new_empty(*shape, given.dim, dtype=given.dtype)
        lookups, table = _one(given, mine, out)
        check.check(lookups, table, bounds_check)
        if clamp and not table.rows:
            return out.zero_()
        (gather if mine.offsets is None else pool)(lookups, table, clamp)
        return out

    outs = call.each(run)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def lookup_backward(
    tables: Tables, grad: Tensor, bags: Bags, weight_grad: bool, wishes: Wishes
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Distinct rows ``[U]`` of every block, counted within it, with their gradients ``[U, w]``.

    Also the gradients of the soft masks, flat, and of ``per_sample_weights``. ``mask[g, j]`` is the
    sum of ``delta_j * row_j`` over the lookups of the rows of group ``g``, for all ``j``.
    """
    check.raise_found(bags.indices)
    call = _Call(tables, bags)
    if call.shares_launches:
        return gradients(*call.together(grad), tables.blocks, weight_grad, wishes)
    columns = call.columns(grad)
    found = call.each(
        lambda t, given, mine: gradients(
            *_one(given, mine, columns[t]), given.blocks, weight_grad, wishes
        )
    )
    if len(found) == 1:
        return found[0]
    rows, grads, mask_grads, psw = zip(*found, strict=True)
    return (
        [one for mine in rows for one in mine],
        [one for mine in grads for one in mine],
        torch.cat(mask_grads),
        call.join_sample_grads(psw, wishes.psw_grad),
    )


def lookup_update_(
    tables: Tables,
    grad: Tensor,
    bags: Bags,
    wishes: Wishes,
    groups_sorted: bool,
    step: Step,
    few: FewBits | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`lookup_backward` and the optimizer's update of the rows, kept prefixes only.

    Mask gradients are those of the weights before the update. Lookups are sorted by group and row
    in any case, so ``groups_sorted`` saves nothing here. Of codes the gradients of rows come first:
    their number is waited for.
    """
    check.raise_found(bags.indices)
    call = _Call(tables, bags, few)
    if few:
        check_update_of_codes(tables.blocks, wishes, step)
        return _step_of_codes(call, grad, step)
    if call.shares_launches:
        return update(*call.together(grad), tables.blocks, wishes, step)
    states, counter = check_states(step, tables.blocks)
    columns, rest = call.columns(grad), iter(states)

    def run(t: int, given: reference.Table, mine: Bags) -> tuple[Tensor, Tensor]:
        own = [one for _ in given.blocks for one in next(rest)]
        own += [] if counter is None else [counter]
        part = step._replace(state=own)
        return update(*_one(given, mine, columns[t]), given.blocks, wishes, part)

    found = call.each(run)
    if len(found) == 1:
        return found[0]
    mask_grads, psw = zip(*found, strict=True)
    return torch.cat(mask_grads), call.join_sample_grads(psw, wishes.psw_grad)


def _step_of_codes(call: _Call, grad: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    columns = call.columns(grad)

    def run(t: int, given: reference.Table, mine: Bags) -> tuple[list[Tensor], list[Tensor]]:
        # Rows as wide as their numbers, of which nothing is read.
        shapes = [
            grad.new_empty(1).expand(len(part), width)
            for part, width in zip(given.blocks, given.widths, strict=True)
        ]
        seen = replace(given, blocks=shapes, steps=None, bits=0)
        none = Wishes(mask_grad=False, psw_grad=False)
        rows, grads, _, _ = gradients(*_one(seen, mine, columns[t]), shapes, True, none)
        return rows, grads

    # All of them before any table changes.
    found = call.each(run)
    update_codes(
        call.given.blocks,
        code_parts(call.given, call.tables),
        [rows for of_table, _ in found for rows in of_table],
        [grads for _, of_table in found for grads in of_table],
        step,
    )
    return grad.new_empty(0, dtype=torch.float32), grad.new_empty(0)


OPERATORS: dict[str, Callable[..., object]] = {
    function.__name__: in_groups(function)
    for function in (lookup, lookup_backward, lookup_update_, apply_)
}
"""Operator name to implementation, all but that which raises what these have found, with the values
of the operator's schema one by one."""
