"""Bad indices, sizes and offsets: found by the device, reported by the host.

A check costs two small kernels and no wait: the lookup kernels clamp, the second kernel of a check
writes what the first has found into memory of the host, and the next call that finds it there
raises or warns, as ``amtl_kernels.synchronize`` does. On CPU tensors, under the interpreter, the
call itself does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import collections
import functools
from dataclasses import dataclass
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference
from amtl_kernels._arguments import FOUND_BEFORE
from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import ROWS, Lookups, bag_of, table_line
from amtl_kernels.triton.tables import Table, kept_size

_NONE = torch.iinfo(torch.int64).max
_INDEX, _SIZE, _OFFSET = 1, 2, 3
SLOTS = 256
"""Checks that may be under way at once, and captured into CUDA graphs in all."""


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


@triton.jit(do_not_specialize=["slot", "num_rows", "num_bags"])
def tell_kernel(
    found_ptr,
    index_ptr,
    offset_ptr,
    tables_ptr,
    told_ptr,
    slot,
    num_rows,
    num_bags,
    HAS_OFFSETS: tl.constexpr,
    TABLES: tl.constexpr,
    CLAMPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Tells the host of what :func:`check_kernel` has found. One program.

    A bad index goes before a bad size, unless it is clamped and so worth a warning only.

    -> told [6, SLOTS] int64, in column ``slot``: what (1 an index, 2 a size, 3 an offset, 0
    nothing), table, position among its table's or of the offset, the index or offset there, the
    offset before, rows of the table.
    """
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    told_ptr += slot
    bad_index = tl.load(found_ptr)
    bad_size = tl.load(found_ptr + 1)
    bad_offset = tl.load(found_ptr + 2)
    if HAS_OFFSETS:  # noqa: SIM102
        if bad_offset != NONE:
            tl.store(told_ptr + 2 * SLOTS, bad_offset)
            tl.store(told_ptr + 3 * SLOTS, tl.load(offset_ptr + bad_offset).to(tl.int64))
            before = tl.load(offset_ptr + bad_offset - 1, mask=bad_offset > 0, other=0)
            tl.store(told_ptr + 4 * SLOTS, before.to(tl.int64))
            tl.store(told_ptr, 3)
    is_index = bad_index != NONE
    if CLAMPS:
        is_index = is_index & (bad_size == NONE)
    position = tl.where(is_index, bad_index, bad_size)
    if (bad_offset == NONE) & (position != NONE):
        start = position * 0
        table = position * 0
        rows = start + num_rows
        if TABLES > 0:
            for t in range(1, TABLES):
                begin = tl.load(offset_ptr + t * (num_bags // TABLES)).to(tl.int64)
                later = begin <= position
                table = tl.where(later, t, table)
                start = tl.where(later, begin, start)
            rows = table_line(tables_ptr, table, ROWS, TABLES)
        tl.store(told_ptr + 1 * SLOTS, table)
        tl.store(told_ptr + 2 * SLOTS, position - start)
        tl.store(told_ptr + 3 * SLOTS, tl.load(index_ptr + position).to(tl.int64))
        tl.store(told_ptr + 5 * SLOTS, rows)
        tl.store(told_ptr, tl.where(is_index, 1, 2))


@dataclass(frozen=True)
class _Asked:
    """What the host knows of a check that the device may yet answer."""

    clamps: bool
    lookups: int
    dims: tuple[int, ...]
    late: bool

    def answer(self, what: int, table: int, at: int, value: int, before: int, rows: int) -> None:
        """Raises or warns of what was told."""
        if what == _OFFSET:
            if at == 0:
                self._fail(f"offsets must start at 0, but offsets[0] is {value}")
            if value < before:
                self._fail(
                    f"offsets must not decrease, but offsets[{at}] = {value} is smaller than "
                    f"offsets[{at - 1}] = {before}"
                )
            self._fail(
                f"offsets must end within the {self.lookups} indices, but offsets[{at}] is {value}"
            )
        if what == _INDEX and self.clamps and rows:
            reference.warn_clamped(value, at, rows)
            return
        which = f"table {table}: " if len(self.dims) > 1 else ""
        if what == _INDEX:
            message = f"index {value} at position {at} is out of range for a table of {rows} rows"
            raise IndexError(f"{which}{message}{self._whence}")
        self._fail(
            f"{which}the row at position {at} of the indices has a kept size outside "
            f"0..{self.dims[table]}"
        )

    @property
    def _whence(self) -> str:
        return f"\n{FOUND_BEFORE}" if self.late else ""

    def _fail(self, message: str) -> NoReturn:
        raise ValueError(message + self._whence)


class _Findings:
    """Memory of the host that the device writes to: a column for every check under way."""

    def __init__(self, pinned: bool) -> None:
        self.told = torch.zeros(6, SLOTS, dtype=torch.int64, pin_memory=pinned)
        self._seen = self.told.numpy()
        self._free = collections.deque(range(SLOTS))
        self._asked: dict[int, _Asked] = {}

    def slot(self, asked: _Asked, captured: bool) -> int:
        """Where to tell of a check. One that a CUDA graph repeats keeps its place for good."""
        if not self._free:
            raise RuntimeError(
                f"{SLOTS} checked lookups were captured into CUDA graphs, which is all that there "
                'is room for; capture further ones with bounds_check="off"'
            )
        slot = self._free.popleft()
        if not captured:
            self._free.append(slot)
        self._asked[slot] = asked
        return slot

    def raise_found(self) -> None:
        """Raises or warns of what was told by now."""
        if not self._seen[0].any():
            return
        if self.told.is_pinned():
            # What was found stands there as a whole once its kernel has ended.
            torch.cuda.synchronize()
        found = [(slot, self._seen[:, slot].tolist()) for slot in self._seen[0].nonzero()[0]]
        self._seen[0] = 0
        for slot, values in found:
            self._asked[slot].answer(*values)


@functools.cache
def _findings(device: str) -> _Findings:
    return _Findings(device == "cuda")


def _known(device: torch.device) -> _Findings:
    if device.type == "cuda" and _capturing() and not _findings.cache_info().currsize:
        raise RuntimeError(
            "checks of bounds need memory that a CUDA graph capture cannot take: call a lookup "
            "once before the first capture"
        )
    return _findings(device.type)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def raise_found(like: Tensor) -> None:
    """Raises, or warns of, what lookups before have found, as far as they have run.

    Args:
        like: Any tensor on the kind of device that was looked up on.

    Raises:
        IndexError: An index was outside its table (raise), or the table had no rows (clamp).
        ValueError: A size was outside ``0..D``, or offsets not monotone from 0 to at most L.
    """
    if launch.recorder is None and _findings.cache_info().currsize and not _capturing():
        _findings(like.device.type).raise_found()


def check(lookups: Lookups, table: Table, bounds_check: int) -> None:
    """Has the device look for bad input; on CPU tensors answers before anything is written.

    Args:
        lookups: What is looked up.
        table: The table, or the tables.
        bounds_check: 0 off, 1 raise, 2 clamp.

    Raises:
        IndexError: See :func:`raise_found`.
        ValueError: Likewise.
    """
    flat, bags, several = lookups.indices, lookups.bags, lookups.several
    if bounds_check == reference.OFF and launch.recorder is None:
        return
    if (flat if bags is None else bags.offsets).numel() == 0:
        return
    dims = (table.dim,) if several is None else tuple(several.dims)
    asked = _Asked(bounds_check == reference.CLAMP, flat.numel(), dims, flat.is_cuda)
    if launch.recorder is None:
        findings = _known(flat.device)
        told, slot = findings.told, findings.slot(asked, flat.is_cuda and _capturing())
    else:
        told, slot = torch.empty(6, SLOTS, dtype=torch.int64, device=flat.device), 0
    found = torch.full((3,), _NONE, dtype=torch.int64, device=flat.device)
    offsets = 0 if bags is None else bags.offsets.numel()
    block = launch.flat_block()
    number = 0 if bags is None else bags.number
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
            number,
            0 if bags is None else bags.steps,
            HAS_OFFSETS=bags is not None,
            LAST_OFFSET=bags is not None and bags.is_closed,
            TABLES=lookups.tables,
            D=table.dim,
            Q=table.meta["Q"],
            TIERS=table.meta["TIERS"],
            BLOCK=block,
        )
        launch.launch(
            tell_kernel,
            (1,),
            found,
            flat,
            None if bags is None else bags.offsets,
            lookups.lines,
            told,
            slot,
            table.rows,
            number,
            HAS_OFFSETS=bags is not None,
            TABLES=lookups.tables,
            CLAMPS=asked.clamps,
            SLOTS=SLOTS,
        )
    if not flat.is_cuda:
        raise_found(flat)
