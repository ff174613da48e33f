"""Bad indices, sizes and offsets: found by the device, reported by the host.

``bounds_check="raise"`` costs one small kernel and one synchronisation per lookup, since an error
can only be raised once the device has answered. ``"clamp"`` never waits: the lookup kernels clamp,
and the one warning comes with whichever later call finds the answer there. ``"off"`` costs nothing
and trusts the caller.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import ROWS, Lookups, bag_of, table_line
from amtl_kernels.triton.tables import Table, kept_size

_NONE = torch.iinfo(torch.int64).max


@triton.jit(
    do_not_specialize=["num_lookups", "num_rows", "num_offsets", "num_bags", "steps", "seed_mix"]
)
def check_kernel(
    index_ptr,
    offset_ptr,
    found_ptr,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_rows,
    num_offsets,
    num_bags,
    steps,
    HAS_OFFSETS: tl.constexpr,
    LAST_OFFSET: tl.constexpr,
    TABLES: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lowers ``found [3]`` (int64) to the first bad position: index, size of its row, offset.

    Grid (ceil(max(L, num_offsets) / BLOCK)); a minimum of integers is the same in any order.
    index [L], offset [num_offsets], whose last one ends the lookups if LAST_OFFSET. ``num_bags``
    are those of all tables.
    """
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    if TABLES > 0:
        bag = bag_of(at, offset_ptr, num_offsets, steps)
        valid = valid & (bag >= 0) & (bag < num_bags)
        table = tl.where(valid, bag // tl.maximum(num_bags // TABLES, 1), 0)
        num_rows = table_line(tables_ptr, table, ROWS, TABLES)
    elif LAST_OFFSET:
        valid = valid & (at < tl.load(offset_ptr + num_offsets - 1))
    row = tl.load(index_ptr + at, mask=valid, other=0).to(tl.int64)
    bad = valid & ((row < 0) | (row >= num_rows))
    first = tl.min(tl.where(bad, at, NONE), axis=0)
    if first != NONE:
        tl.atomic_min(found_ptr, first)
    if Q >= 0:
        known = valid & (row >= 0) & (row < num_rows)
        width, columns, sizes, groups = D, Q, 0, 0
        if TABLES > 0:
            width = tl.load(tiers_ptr + 2 * TIERS + table)
            sizes = tl.load(tiers_ptr + 3 * TIERS + table)
            groups = tl.load(tiers_ptr + 4 * TIERS + table)
            columns = tl.load(tiers_ptr + 5 * TIERS + table)
        size = kept_size(row, known, sizes_ptr, row_group_ptr, seed_mix, columns, sizes, groups, Q)
        bad = known & ((size < 0) | (size > width))
        first = tl.min(tl.where(bad, at, NONE), axis=0)
        if first != NONE:
            tl.atomic_min(found_ptr + 1, first)
    if HAS_OFFSETS:
        valid = at < num_offsets
        offset = tl.load(offset_ptr + at, mask=valid, other=0).to(tl.int64)
        before = tl.load(offset_ptr + at - 1, mask=valid & (at > 0), other=0).to(tl.int64)
        bad = valid & ((offset < before) | (offset > num_lookups) | ((at == 0) & (offset != 0)))
        first = tl.min(tl.where(bad, at, NONE), axis=0)
        if first != NONE:
            tl.atomic_min(found_ptr + 2, first)


def _find(lookups: Lookups, table: Table) -> Tensor:
    """[3]: what :func:`check_kernel` finds."""
    flat, bags = lookups.flat, lookups.bags
    found = torch.full((3,), _NONE, dtype=torch.int64, device=flat.device)
    offsets = 0 if bags is None else bags.offsets.numel()
    block = launch.flat_block()
    with launch.device_guard(flat):
        launch.launch(
            check_kernel,
            (launch.cdiv(max(flat.numel(), offsets), block),),
            flat,
            None if bags is None else bags.offsets,
            found,
            lookups.lines,
            *table.args,
            flat.numel(),
            table.rows,
            offsets,
            0 if bags is None else bags.number,
            0 if bags is None else bags.steps,
            HAS_OFFSETS=bags is not None,
            LAST_OFFSET=bags is not None and bags.is_closed,
            TABLES=lookups.tables,
            D=table.dim,
            Q=table.meta["Q"],
            TIERS=table.meta["TIERS"],
            BLOCK=block,
        )
    return found


def find(lookups: Lookups, table: Table, bounds_check: int) -> list[int] | None:
    """Looks for bad input as ``bounds_check`` says, before anything is written.

    Args:
        lookups: What is looked up.
        table: The table, or the tables.
        bounds_check: 0 off, 1 raise, 2 clamp.

    Returns:
        First position of a bad index, of a row with a bad size, and of a bad offset, each
        2^63 - 1 if there is none; None if all is well, or nobody waits for the answer.

    Raises:
        RuntimeError: ``raise`` while a CUDA graph is being captured.
    """
    flat, bags = lookups.flat, lookups.bags
    if launch.recorder is not None:
        _find(lookups, table)
        return None
    if bounds_check == reference.OFF:
        return None
    if bounds_check == reference.CLAMP and table.rows and flat.is_cuda:
        if flat.numel():
            _warn_later(lookups, table)
        return None
    if flat.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'bounds_check="raise" has to wait for the device, which a CUDA graph can\'t; capture '
            'with bounds_check="clamp" or "off"'
        )
    if flat.numel() == 0 and bags is None:
        return None
    found: list[int] = _find(lookups, table).tolist()
    return found if min(found) != _NONE else None


def check(lookups: Lookups, table: Table, bounds_check: int) -> None:
    """Answers bad input to a single table as ``bounds_check`` says, before anything is written.

    Raises:
        IndexError: An index is outside the table (raise), or the table has no rows (clamp).
        ValueError: A size is outside ``0..D``, or the offsets are not monotone from 0 to at most L.
        RuntimeError: ``raise`` while a CUDA graph is being captured.
    """
    flat, bags = lookups.flat, lookups.bags
    found = find(lookups, table, bounds_check)
    if found is None:
        return
    index, size, offset = found
    if offset != _NONE and bags is not None:
        reference.check_offsets(bags.offsets, flat.numel())
    if index != _NONE:
        value = int(flat[index])
        if bounds_check == reference.RAISE or table.rows == 0:
            raise IndexError(
                f"index {value} at position {index} is out of range for a table of "
                f"{table.rows} rows"
            )
        reference.warn_clamped(value, index, table.rows)
    if size != _NONE:
        raise ValueError(
            f"the row at position {size} of the indices has a kept size outside 0..{table.dim}"
        )


def _describe(lookups: Lookups, table: Table) -> Tensor:
    """[3]: position of the first bad index, its value, the rows of its table."""
    found = _find(lookups, table)[:1]
    at = found.clamp(max=lookups.flat.numel() - 1)
    rows = torch.full_like(found, table.rows)
    bags, several = lookups.bags, lookups.several
    if bags is not None and several is not None:
        bag = torch.searchsorted(bags.offsets, at.to(bags.offsets.dtype), right=True) - 1
        which = (bag // max(bags.number // several.count, 1)).clamp(0, several.count - 1)
        rows = several.lines[ROWS.value][which]
    return torch.cat([found, lookups.flat[at].to(torch.int64), rows])


_answers: list[tuple[torch.cuda.Event, Tensor]] = []


def _warn_later(lookups: Lookups, table: Table) -> None:
    """Warns about a clamped index once the device has told of it, without waiting for that."""
    if reference._warned_clamped or torch.cuda.is_current_stream_capturing():
        return
    if _answers and _answers[0][0].query():
        _, answer = _answers.pop(0)
        position, value, rows = answer.tolist()
        if position != _NONE:
            reference.warn_clamped(value, position, rows)
            _answers.clear()
            return
    if _answers:
        return
    answer = torch.empty(3, dtype=torch.int64, pin_memory=True)
    answer.copy_(_describe(lookups, table), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _answers.append((event, answer))
