"""What every call starts from: lookups, their bags, and which of several tables each is in.

Several tables are put one after another: their rows and groups are numbered on from table to table,
so that everything behind the sort treats them as one table in tiers (``tables.py``), in as many
launches. Only here does a lookup ask which table it is in.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels._arguments import MEAN, Bags
from amtl_kernels.triton import launch
from amtl_kernels.triton.tables import distances, first_with_memory, padded_table

ROWS, PADDING, COLUMN, WIDTH, FIRST_ROW, FIRST_GROUP, GROUPS, FIRST_TIER, LAST_TIER = (
    tl.constexpr(i) for i in range(9)
)
"""Lines of :class:`Several`'s table, [9, T] int64."""

NUMBERS = ["num_lookups", "num_rows", "num_offsets", "num_bags", "padding_idx", "limit", "steps"]
"""Integers that kernels are not compiled for."""


@triton.jit
def lower_bound(ptr, count, wanted, steps, stride):
    """First position of ``ptr[0 : count * stride : stride]`` that holds ``wanted`` or more.

    ``wanted`` (int64) has any shape, the result (int32) too; ``steps`` is at least the bit length
    of ``count``. Stays inside the array also where it is not sorted.
    """
    low = (wanted - wanted).to(tl.int32)
    high = low + count
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = low < high
        value = tl.load(ptr + middle * stride, mask=open_, other=0).to(tl.int64)
        right = open_ & (value < wanted)
        high = tl.where(right, high, middle)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit
def bag_of(at, offset_ptr, num_offsets, steps):
    """Bag of the lookups ``at`` (int64): the last one that starts there or before, or -1."""
    return lower_bound(offset_ptr, num_offsets, at + 1, steps, 1).to(tl.int64) - 1


@triton.jit
def table_line(tables_ptr, table, LINE: tl.constexpr, TABLES: tl.constexpr):
    """A line of :class:`Several`'s table for tables of any shape, which must exist."""
    return tl.load(tables_ptr + LINE * TABLES + table)


@triton.jit
def row_in_table(
    row,
    bag,
    tables_ptr,
    num_rows,
    num_bags,
    padding_idx,
    HAS_BAGS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Whether lookups of rows ``row`` in bags ``bag`` get a gradient, and the table of each.

    Padding, no bag and no such row get none, and table 0.
    """
    table = tl.zeros_like(row)
    live = row >= 0
    if HAS_BAGS:
        live = live & (bag >= 0) & (bag < num_bags)
    if TABLES > 0:
        table = tl.where(live, bag // tl.maximum(num_bags // TABLES, 1), 0)
        num_rows = table_line(tables_ptr, table, ROWS, TABLES)
        padding_idx = table_line(tables_ptr, table, PADDING, TABLES)
    return live & (row < num_rows) & (row != padding_idx), table


@triton.jit
def gradient_row(bag, table, tables_ptr, num_bags, step, TABLES: tl.constexpr):
    """Row of the incoming gradient of bags ``bag``, or of several tables the vector it starts at.

    ``step`` is the number of vectors in a row of all tables side by side.
    """
    if TABLES > 0:
        of_table = bag - table * (num_bags // TABLES)
        bag = of_table * step + table_line(tables_ptr, table, COLUMN, TABLES)
    return bag


@triton.jit
def mean_scale(bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING):
    """fp32, one over the number of lookups of ``bag`` that count."""
    first = tl.load(offset_ptr + bag, mask=live, other=0).to(tl.int64)
    end = tl.load(offset_ptr + bag + 1, mask=live & (bag + 1 < num_offsets), other=num_lookups)
    first = tl.minimum(tl.maximum(first, 0), num_lookups)
    end = tl.minimum(tl.maximum(end.to(tl.int64), 0), num_lookups)
    if HAS_PADDING:
        first = tl.load(counted_ptr + first - 1, mask=live & (first > 0), other=0)
        end = tl.load(counted_ptr + end - 1, mask=live & (end > 0), other=0)
    return 1.0 / tl.maximum(end - first, 1).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def counted_kernel(
    index_ptr,
    offset_ptr,
    tables_ptr,
    out_ptr,
    num_lookups,
    num_offsets,
    num_bags,
    steps,
    TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 for a lookup that is not padding of its table. Grid (ceil(L / BLOCK)). -> out [L]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    row = tl.load(index_ptr + at, mask=valid, other=0).to(tl.int64)
    bag = bag_of(at, offset_ptr, num_offsets, steps)
    table = bag // tl.maximum(num_bags // TABLES, 1)
    table = tl.minimum(tl.maximum(table, 0), TABLES - 1)
    counts = row != table_line(tables_ptr, table, PADDING, TABLES)
    tl.store(out_ptr + at, counts.to(tl.int64), mask=valid)


@dataclass(frozen=True)
class Several:
    """Tables that share a call: what lookups have to know of theirs.

    Attributes:
        lines: [9, T] int64: rows, padding row or -1, first column and number of columns (in units
            of ``unit``) of the output, rows and groups of the tables before, where row groups
            start, counted from ``row_group``, and first and last tier.
        count: T.
        dims: Columns of each table's output.
        unit: Values of a vector of the output or its gradient.
        row_group: The first table's row groups, or None.
        groups: Groups of each table; none without row groups.
        has_padding: Whether any table has a padding row.
    """

    lines: Tensor
    count: int
    dims: Sequence[int]
    unit: int
    row_group: Tensor | None
    groups: Sequence[int]
    has_padding: bool

    @staticmethod
    def of(
        values: Tensor,
        rows: Sequence[int],
        dims: Sequence[int],
        padding_idx: Sequence[int],
        tier_counts: Sequence[int],
        row_groups: Sequence[Tensor] = (),
        groups: Sequence[int] = (),
    ) -> Several:
        """Tables of ``rows`` rows, ``dims`` columns of ``values`` and ``groups`` groups.

        ``values`` are the output, or the gradient of it. A dense table is one tier.
        """
        none = [0] * len(rows)
        unit = min(launch.vector(dim, values) for dim in set(dims))
        widths = [dim // unit for dim in dims]
        anchor = first_with_memory(row_groups) if row_groups else None
        starts = none if anchor is None else distances(row_groups, anchor)
        lines = [
            rows,
            padding_idx,
            _before(widths),
            widths,
            _before(rows),
            _before(groups) or none,
            starts,
            _before(tier_counts),
            [end - 1 for end in itertools.accumulate(tier_counts)],
        ]
        return Several(
            lines=launch.constant(lines, values.device),
            count=len(rows),
            dims=dims,
            unit=unit,
            row_group=anchor,
            groups=groups,
            has_padding=any(row >= 0 for row in padding_idx),
        )

    @property
    def stride(self) -> int:
        """Columns of all tables."""
        return sum(self.dims)

    @property
    def step(self) -> int:
        """The same in units of ``unit``."""
        return self.stride // self.unit

    @functools.cached_property
    def group_tiers(self) -> Tensor | None:
        """The table of tiers of a flat mask gradient, a group's row after the other; or None."""
        if self.row_group is None:
            return None
        pairs = list(zip(self.groups, self.dims, strict=True))
        begins = _before([groups * dim for groups, dim in pairs])
        firsts = zip(begins, _before(self.groups), self.dims, strict=True)
        bases = [begin - first * dim for begin, first, dim in firsts]
        ends = list(itertools.accumulate(self.groups))
        return padded_table([ends, bases, self.dims], self.lines.device)


def _before(counts: Sequence[int]) -> list[int]:
    """The sum of the ``counts`` before each."""
    return [end - count for end, count in zip(itertools.accumulate(counts), counts, strict=True)]


@dataclass(frozen=True)
class BagTable:
    """Which bag each lookup belongs to.

    Attributes:
        offsets: [number] or [number + 1] start of each bag.
        number: Number of bags, of all tables.
        mean: Whether a bag is divided by the lookups that count.
    """

    offsets: Tensor
    number: int
    mean: bool

    @property
    def is_closed(self) -> bool:
        """Whether the last offset says where the lookups end."""
        return self.offsets.numel() > self.number

    @property
    def steps(self) -> int:
        """Steps of the search for a lookup's bag."""
        return self.offsets.numel().bit_length()


def _resolved(bags: Bags) -> dict[str, Any]:
    """What kernels read of lookups, whatever they are in."""
    offsets, weights = bags.offsets, bags.per_sample_weights
    table = None
    if offsets is not None:
        number = max(offsets.numel() - int(bags.include_last_offset), 0)
        table = BagTable(offsets.contiguous(), number, bags.pooling == MEAN)
    return {
        "indices": bags.indices.reshape(-1).contiguous(),
        "bags": table,
        "per_sample_weights": None if weights is None else weights.reshape(-1).contiguous(),
    }


@dataclass(frozen=True)
class Lookups:
    """What is looked up, and where the output goes or the gradient of it came from.

    Attributes:
        values: Output or incoming gradient, [M, D] of bags or lookups; of several tables [B, all
            columns]. Contiguous.
        indices: [L].
        bags: Bags of a pooled lookup, else None.
        per_sample_weights: [L], or None.
        padding_idx: A row that counts for nothing, or -1; of several tables ``several`` knows.
        several: The tables, if these are several.
        row_group: int32 row groups of the table, or of the first of several; else None.
        groups: Number of groups.
    """

    values: Tensor
    indices: Tensor
    bags: BagTable | None
    per_sample_weights: Tensor | None
    padding_idx: int
    several: Several | None
    row_group: Tensor | None
    groups: int

    @staticmethod
    def of(
        values: Tensor, dim: int, bags: Bags, row_group: Tensor | None = None, groups: int = 0
    ) -> Lookups:
        """Lookups in a single table of ``dim`` columns."""
        return Lookups(
            values=values.reshape(-1, dim).contiguous(),
            **_resolved(bags),
            padding_idx=bags.padding_idx[0],
            several=None,
            row_group=row_group,
            groups=groups,
        )

    @staticmethod
    def of_tables(values: Tensor, several: Several, bags: Bags) -> Lookups:
        """Lookups in several tables, with the last offset included."""
        return Lookups(
            values=values.contiguous(),
            **_resolved(bags),
            padding_idx=-1,
            several=several,
            row_group=several.row_group,
            groups=sum(several.groups),
        )

    @functools.cached_property
    def counted(self) -> Tensor | None:
        """int64 [L], lookups up to here that are not padding; None where a mean counts all."""
        bags, indices, several = self.bags, self.indices, self.several
        if bags is None or not bags.mean or not self.has_padding:
            return None
        if several is None:
            return (indices != self.padding_idx).cumsum(0)
        flags = torch.empty(indices.numel(), dtype=torch.int64, device=indices.device)
        block = launch.flat_block()
        with launch.device_guard(indices):
            launch.launch(
                counted_kernel,
                (launch.cdiv(indices.numel(), block),),
                indices,
                bags.offsets,
                several.lines,
                flags,
                indices.numel(),
                bags.offsets.numel(),
                bags.number,
                bags.steps,
                TABLES=several.count,
                BLOCK=block,
            )
        return flags.cumsum(0)

    def mask_gradients(self, dim: int, wanted: bool) -> Tensor:
        """Memory for the mask gradients, fp32, a group's ``dim`` after the other; [0] if unwanted.

        Several tables have a ``dim`` each.
        """
        count = self.groups * dim
        if self.several is not None:
            pairs = zip(self.several.groups, self.several.dims, strict=False)
            count = sum(groups * width for groups, width in pairs)
        count = count if wanted else 0
        return torch.empty(count, dtype=torch.float32, device=self.indices.device)

    @property
    def has_padding(self) -> bool:
        """Whether there is a padding row."""
        return self.padding_idx >= 0 if self.several is None else self.several.has_padding

    @property
    def tables(self) -> int:
        """How kernels tell apart one table (0) and several."""
        return 0 if self.several is None else self.several.count

    @property
    def lines(self) -> Tensor | None:
        """What kernels read of several tables."""
        return None if self.several is None else self.several.lines

    @property
    def step(self) -> int:
        """See :class:`Several`."""
        return 0 if self.several is None else self.several.step

    def gradient_layout(self, dim: int) -> dict[str, int]:
        """Values per unit of ``Plan.source``, and per vector load of the gradient."""
        if self.several is not None:
            return {"GRAD_STEP": self.several.unit, "GRAD_VEC": self.several.unit}
        return {"GRAD_STEP": dim, "GRAD_VEC": launch.vector(dim, self.values)}
