"""Bad indices, sizes and offsets: found by the device, reported by the host.

``bounds_check="raise"`` costs one small kernel and one synchronisation per lookup, since an error
can only be raised once the device has answered. ``"clamp"`` never waits: the lookup kernels clamp,
and the one warning comes with whichever later call finds the answer there. ``"off"`` costs nothing
and trusts the caller.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels.triton import launch
from amtl_kernels.triton.tables import Table, kept_size

_NONE = torch.iinfo(torch.int64).max


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "num_offsets", "seed_mix"])
def check_kernel(
    index_ptr,
    offset_ptr,
    found_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_rows,
    num_offsets,
    HAS_SIZES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    LAST_OFFSET: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lowers ``found [3]`` (int64) to the first bad position: index, size of its row, offset.

    Grid (ceil(max(L, num_offsets) / BLOCK)); a minimum of integers is the same in any order.
    index [L], offset [num_offsets], whose last one ends the lookups if LAST_OFFSET.
    """
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    if LAST_OFFSET:
        valid = valid & (at < tl.load(offset_ptr + num_offsets - 1))
    row = tl.load(index_ptr + at, mask=valid, other=0).to(tl.int64)
    bad = valid & ((row < 0) | (row >= num_rows))
    first = tl.min(tl.where(bad, at, NONE), axis=0)
    if first != NONE:
        tl.atomic_min(found_ptr, first)
    if HAS_SIZES:
        known = valid & (row >= 0) & (row < num_rows)
        size = kept_size(row, known, sizes_ptr, row_group_ptr, seed_mix, Q, 0, 0, Q)
        bad = known & ((size < 0) | (size > D))
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


def _find(table: Table, flat: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    found = torch.full((3,), _NONE, dtype=torch.int64, device=flat.device)
    block = 1 << 15 if launch.INTERPRETED else 1024
    count = max(flat.numel(), 0 if offsets is None else offsets.numel())
    with launch.device_guard(flat):
        launch.launch(
            check_kernel,
            (launch.cdiv(count, block),),
            flat,
            offsets,
            found,
            *table.args,
            flat.numel(),
            table.rows,
            0 if offsets is None else offsets.numel(),
            HAS_SIZES=table.meta["TIERS"] == 0,
            HAS_OFFSETS=offsets is not None,
            LAST_OFFSET=include_last_offset,
            D=table.dim,
            Q=table.meta["Q"],
            BLOCK=block,
        )
    return found


def lookups(
    table: Table,
    flat: Tensor,
    bounds_check: int,
    offsets: Tensor | None = None,
    include_last_offset: bool = False,
) -> None:
    """Answers bad input as ``bounds_check`` says, before anything is written.

    Args:
        table: The table looked up.
        flat: Indices [L], int32 or int64.
        bounds_check: 0 off, 1 raise, 2 clamp.
        offsets: Bag offsets, or None.
        include_last_offset: Whether lookups end with the last of them.

    Raises:
        IndexError: An index is outside the table (raise), or the table has no rows (clamp).
        ValueError: A size is outside ``0..D``, or the offsets are not monotone from 0 to at most L.
        RuntimeError: ``raise`` while a CUDA graph is being captured.
    """
    if launch.recorder is not None:
        _find(table, flat, offsets, include_last_offset)
        return
    if bounds_check == reference.OFF:
        return
    if bounds_check == reference.CLAMP and table.rows and flat.is_cuda:
        if flat.numel():
            warn_later(lambda: _describe(table, flat, offsets, include_last_offset))
        return
    refuse_capture(flat)
    if flat.numel() == 0 and offsets is None:
        return
    index, size, offset = _find(table, flat, offsets, include_last_offset).tolist()
    if offset != _NONE and offsets is not None:
        reference.check_offsets(offsets, flat.numel())
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


def refuse_capture(flat: Tensor) -> None:
    """Raises where a check that waits is about to be captured in a CUDA graph."""
    if flat.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'bounds_check="raise" has to wait for the device, which a CUDA graph can\'t; capture '
            'with bounds_check="clamp" or "off"'
        )


def _describe(
    table: Table, flat: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> Tensor:
    """[3]: position of the first bad index, its value, the rows of its table."""
    found = _find(table, flat, offsets, include_last_offset)[:1]
    value = flat[found.clamp(max=flat.numel() - 1)].to(torch.int64)
    return torch.cat([found, value, torch.full_like(found, table.rows)])


_answers: list[tuple[torch.cuda.Event, Tensor]] = []


def warn_later(describe: Callable[[], Tensor]) -> None:
    """Warns about a clamped index once the device has told of it, without waiting for that.

    Args:
        describe: Launches the search; see :func:`_describe` for what it returns.
    """
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
    answer.copy_(describe(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _answers.append((event, answer))
