"""Several tables in one call: one launch looks up all of them.

What tells the tables apart is a small table on the device, one column for each, kept for the next
call with the same tensors.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels import reference, reference_tables
from amtl_kernels.triton import check, launch
from amtl_kernels.triton.lookups import bag_of
from amtl_kernels.triton.tables import (
    clamp_row,
    distance,
    first_with_memory,
    hash_column,
    load_prefix,
    mix_seed,
    size_columns,
)

MASKED = tl.constexpr(0)
ADAPTIVE = tl.constexpr(1)
TIERED = tl.constexpr(2)
ROWS, DIM, COLUMN, PADDING, DATA, SIZES, GROUPS, COLUMNS, FIRST_TIER, LAST_TIER = (
    tl.constexpr(i) for i in range(10)
)
FIELDS = 10
"""Lines of the table of tables, [FIELDS, T] int64: rows, width, first output column, padding row or
-1; where data, sizes and row groups start, counted from the first table's; columns of the sizes;
first and last tier."""


@triton.jit
def table_field(tables_ptr, table, FIELD: tl.constexpr, T: tl.constexpr):
    """A line of the table of tables, for tables of any shape."""
    return tl.load(tables_ptr + FIELD * T + table)


@triton.jit
def size_in(
    table,
    row,
    live,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    seed_mix,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """Stored size (int32) of rows [R] of dense tables, of one or one each; 0 where not ``live``."""
    at = row
    if KIND == ADAPTIVE:
        groups = table_field(tables_ptr, table, GROUPS, T)
        at = tl.load(row_group_ptr + groups + row, mask=live, other=0).to(tl.int64)
        columns = table_field(tables_ptr, table, COLUMNS, T)
        at = at * columns + hash_column(row, seed_mix, columns)
    at += table_field(tables_ptr, table, SIZES, T)
    return tl.load(sizes_ptr + at, mask=live, other=0).to(tl.int32)


@triton.jit
def locate_in(
    table,
    row,
    live,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    KIND: tl.constexpr,
    T: tl.constexpr,
    TIERS: tl.constexpr,
    VEC: tl.constexpr,
):
    """First value (int64) and stored size (int32) of rows [R] of the one ``table``."""
    if KIND == TIERED:
        first_tier = table_field(tables_ptr, table, FIRST_TIER, T)
        last_tier = table_field(tables_ptr, table, LAST_TIER, T)
        tier = tl.zeros_like(row) + first_tier
        for c in tl.range(first_tier, last_tier):
            tier += (row >= tl.load(tiers_ptr + c)).to(tl.int64)
        width = tl.load(tiers_ptr + 2 * TIERS + tier)
        first = tl.load(tiers_ptr + TIERS + tier) + row * width
        size = tl.where(live, width, 0).to(tl.int32)
    else:
        first = table_field(tables_ptr, table, DATA, T)
        first = first + row * table_field(tables_ptr, table, DIM, T)
        size = size_in(table, row, live, tables_ptr, sizes_ptr, row_group_ptr, seed_mix, KIND, T)
    if VEC > 1:
        # Here and not after the call, whose result loses the hint in Triton 3.6.
        first = tl.multiple_of(first, VEC)
    return first, size


@triton.jit(do_not_specialize=["seed_mix", "num_lookups", "num_bags"])
def pooled_tables_fwd_kernel(
    table_ptr,
    index_ptr,
    offset_ptr,
    weight_ptr,
    out_ptr,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_bags,
    CLAMP_ROWS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
    TIERS: tl.constexpr,
    STRIDE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
):
    """``pooled_fwd_kernel`` for several tables: a lane sums a bag in the order of its lookups.

    Grid (ceil(B / R), T, ceil(widest / BLOCK_D)). index [L], offset [T * B + 1], weight [L] -> out
    [B, STRIDE], each table in its own columns.
    """
    table = tl.program_id(1)
    dim = table_field(tables_ptr, table, DIM, T).to(tl.int32)
    cols = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = bag < num_bags
    at = table.to(tl.int64) * num_bags + bag
    start = tl.load(offset_ptr + at, mask=valid, other=0).to(tl.int64)
    end = tl.load(offset_ptr + at + 1, mask=valid, other=0).to(tl.int64)
    start = tl.maximum(start, 0)
    length = (tl.minimum(end, num_lookups) - start).to(tl.int32)
    rows = table_field(tables_ptr, table, ROWS, T)
    padding = table_field(tables_ptr, table, PADDING, T)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    count = tl.zeros([R], tl.int32)
    for step in tl.range(0, tl.max(length, axis=0), loop_unroll_factor=2):
        live = step < length
        row = tl.load(index_ptr + start + step, mask=live, other=0).to(tl.int64)
        if CLAMP_ROWS:
            row = clamp_row(row, rows)
        if HAS_PADDING:
            live = live & (row != padding)
        first, size = locate_in(
            table,
            row,
            live,
            tables_ptr,
            sizes_ptr,
            row_group_ptr,
            tiers_ptr,
            seed_mix,
            KIND,
            T,
            TIERS,
            VEC,
        )
        size = tl.minimum(tl.maximum(size, 0), dim)
        values = load_prefix(table_ptr, first, size, cols, VEC).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + start + step, mask=live, other=0.0).to(tl.float32)
            values = values * weight[:, None]
        total += values
        count += live.to(tl.int32)
    if IS_MEAN:
        total = total * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    column = tl.load(tables_ptr + COLUMN * T + table)
    if VEC > 1:
        column = tl.multiple_of(column, VEC)
    bound = (dim + (VEC - 1)) // VEC * VEC
    tl.store(
        out_ptr + bag[:, None] * STRIDE + column + cols[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < bound),
    )


@triton.jit(do_not_specialize=["seed_mix", "num_lookups", "num_offsets", "num_bags", "steps"])
def check_tables_kernel(
    index_ptr,
    offset_ptr,
    found_ptr,
    tables_ptr,
    sizes_ptr,
    row_group_ptr,
    tiers_ptr,
    seed_mix,
    num_lookups,
    num_offsets,
    num_bags,
    steps,
    KIND: tl.constexpr,
    T: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lowers ``found`` [2] to the first position of a bad index; of a bad size or offset.

    Grid (ceil(max(L, num_offsets) / BLOCK)). index [L], offset [num_offsets].
    """
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bag = bag_of(at, offset_ptr, num_offsets, steps)
    live = (at < num_lookups) & (bag >= 0) & (bag < num_offsets - 1)
    table = tl.where(live, bag // tl.maximum(num_bags, 1), 0)
    row = tl.load(index_ptr + at, mask=live, other=0).to(tl.int64)
    outside = live & ((row < 0) | (row >= table_field(tables_ptr, table, ROWS, T)))
    first = tl.min(tl.where(outside, at, NONE), axis=0)
    if first != NONE:
        tl.atomic_min(found_ptr, first)
    offset = tl.load(offset_ptr + at, mask=at < num_offsets, other=0).to(tl.int64)
    before = tl.load(offset_ptr + at - 1, mask=(at > 0) & (at < num_offsets), other=0).to(tl.int64)
    bad = (offset < before) | (offset > num_lookups) | ((at == 0) & (offset != 0))
    bad = bad & (at < num_offsets)
    if KIND != TIERED:
        known = live & (outside == 0)
        size = size_in(table, row, known, tables_ptr, sizes_ptr, row_group_ptr, seed_mix, KIND, T)
        wrong = (size < 0) | (size > table_field(tables_ptr, table, DIM, T))
        bad = bad | (known & wrong)
    first = tl.min(tl.where(bad, at, NONE), axis=0)
    if first != NONE:
        tl.atomic_min(found_ptr + 1, first)


def _anchored(tensors: Sequence[Tensor]) -> tuple[Tensor | None, list[int]]:
    """The first tensor that has memory, and values from its start to each one's."""
    if not tensors:
        return None, []
    anchor = first_with_memory(tensors)
    return anchor, [distance(t, anchor) for t in tensors]


def _reachable(tensors: Sequence[Tensor]) -> bool:
    """Whether all are of one type and whole elements apart."""
    size, start = tensors[0].element_size(), tensors[0].data_ptr()
    return all(
        t.dtype == tensors[0].dtype and t.is_contiguous() and (t.data_ptr() - start) % size == 0
        for t in tensors
    )


class _Tables:
    """Several tables as the kernels see them."""

    def __init__(
        self,
        kind: int,
        data: Sequence[Tensor],
        rows: Sequence[int],
        dims: Sequence[int],
        padding: Sequence[int],
        *,
        sizes: Sequence[Tensor] = (),
        row_groups: Sequence[Tensor] = (),
        tier_counts: Sequence[int] = (),
        tier_ends: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        count = len(rows)
        none = [0] * count
        starts = list(itertools.accumulate(dims, initial=0))
        self.padding, self.stride, self.widest = padding, starts[-1], max(dims)
        self.count, self.dtype, self.device = count, data[0].dtype, data[0].device
        last = list(itertools.accumulate(tier_counts)) or none
        first = [end - n for end, n in zip(last, tier_counts or none, strict=True)]
        columns = [size_columns(t) for t in sizes] or none
        self.anchor, distances = _anchored(data)
        sizes_anchor, of_sizes = _anchored(sizes)
        groups_anchor, of_groups = _anchored(row_groups)
        tiers = None
        if kind == TIERED.value:
            widths = [block.shape[1] for block in data]
            begins = []
            for t, n in enumerate(tier_counts):
                begins += [0, *tier_ends[first[t] : first[t] + n - 1]]
            base = [d - b * w for d, b, w in zip(distances, begins, widths, strict=True)]
            tiers = launch.constant([list(tier_ends), base, widths], self.device)
            distances = none
        lines = [
            list(rows),
            list(dims),
            starts[:-1],
            list(padding),
            distances,
            of_sizes or none,
            of_groups or none,
            columns,
            first,
            [end - 1 for end in last],
        ]
        assert len(lines) == FIELDS
        self.args = (
            launch.constant(lines, self.device),
            sizes_anchor,
            groups_anchor,
            tiers,
            mix_seed(seed),
        )
        self.meta = {"KIND": kind, "T": count, "TIERS": len(tier_ends)}
        widths = [block.shape[1] for block in data] if tiers is not None else list(dims)
        self.vector = min(
            launch.vector(width, block) if block.numel() else 16 // block.element_size()
            for width, block in zip(widths, data, strict=True)
        )
        if any(dim % self.vector for dim in dims):
            self.vector = 1

    def find_bad(self, indices: Tensor, offsets: Tensor, bags: int) -> Tensor:
        """[2]: first position of a bad index, and of a bad size or offset."""
        found = torch.full((2,), check._NONE, dtype=torch.int64, device=indices.device)
        block = launch.flat_block()
        launch.launch(
            check_tables_kernel,
            (launch.cdiv(max(indices.numel(), offsets.numel()), block),),
            indices,
            offsets,
            found,
            *self.args,
            indices.numel(),
            offsets.numel(),
            bags,
            offsets.numel().bit_length(),
            **self.meta,
            BLOCK=block,
        )
        return found

    def describe_bad_index(self, indices: Tensor, offsets: Tensor, bags: int) -> Tensor:
        """[3]: first position of a bad index, its value, the rows of its table."""
        found = self.find_bad(indices, offsets, bags)[:1]
        at = found.clamp(max=indices.numel() - 1)
        bag = torch.searchsorted(offsets, at.to(offsets.dtype), right=True) - 1
        table = (bag // max(bags, 1)).clamp(0, self.count - 1)
        return torch.cat([found, indices[at].to(torch.int64), self.args[0][0][table]])


def _is_fine(tables: _Tables, indices: Tensor, offsets: Tensor, bags: int, bounds: int) -> bool:
    """Whether the one launch may run; if not, single-table lookups say what is wrong, or clamp."""
    if launch.recorder is not None:
        tables.find_bad(indices, offsets, bags)
        return True
    if bounds == reference.OFF:
        return True
    if bounds == reference.CLAMP and indices.is_cuda:
        if indices.numel():
            pass
        return True
    return launch.read(tables.find_bad(indices, offsets, bags)) == [check._NONE] * 2


def _pool(
    tables: _Tables,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    bounds_check: int,
) -> Tensor | None:
    """All bags of all tables, or None where something is wrong with the input."""
    indices, offsets = indices.contiguous(), offsets.contiguous()
    bags = (offsets.numel() - 1) // tables.count
    block = launch.block_d(tables.widest)
    lanes = max(1, launch.tile(tables.widest if tables.vector > 1 else 1) // block)
    with launch.device_guard(indices):
        if not _is_fine(tables, indices, offsets, bags, bounds_check):
            return None
        out = torch.empty(bags, tables.stride, dtype=tables.dtype, device=tables.device)
        launch.launch(
            pooled_tables_fwd_kernel,
            (launch.cdiv(bags, lanes), tables.count, launch.cdiv(tables.widest, block)),
            tables.anchor,
            indices,
            offsets,
            None if per_sample_weights is None else per_sample_weights.contiguous(),
            out,
            *tables.args,
            indices.numel(),
            bags,
            CLAMP_ROWS=bounds_check == reference.CLAMP,
            HAS_PADDING=any(row >= 0 for row in tables.padding),
            HAS_WEIGHTS=per_sample_weights is not None,
            IS_MEAN=mode == reference.MEAN,
            **tables.meta,
            STRIDE=tables.stride,
            VEC=tables.vector,
            BLOCK_D=block,
            R=lanes,
        )
    return out


def masked_embedding_bag_tables(
    weights: Sequence[Tensor],
    row_dims: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    bounds_check: int,
) -> Tensor:
    """``masked_embedding_bag`` of every table, side by side."""
    out = None
    if _reachable(weights) and _reachable(row_dims):
        rows, dims = [w.shape[0] for w in weights], [w.shape[1] for w in weights]
        tables = _Tables(MASKED.value, weights, rows, dims, padding_idx, sizes=row_dims)
        out = _pool(tables, indices, offsets, per_sample_weights, mode, bounds_check)
    if out is None:
        out = reference_tables.masked_embedding_bag_tables(
            list(weights),
            list(row_dims),
            indices,
            offsets,
            per_sample_weights,
            mode,
            list(padding_idx),
            bounds_check,
        )
    return out


def adaptive_embedding_bag_tables(
    weights: Sequence[Tensor],
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    group_masks: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    seed: int,
    bounds_check: int,
) -> Tensor:
    """``adaptive_embedding_bag`` of every table, side by side."""
    out = None
    if _reachable(weights) and _reachable(row_groups) and _reachable(group_dims):
        rows, dims = [w.shape[0] for w in weights], [w.shape[1] for w in weights]
        tables = _Tables(
            ADAPTIVE.value,
            weights,
            rows,
            dims,
            padding_idx,
            sizes=group_dims,
            row_groups=row_groups,
            seed=seed,
        )
        out = _pool(tables, indices, offsets, per_sample_weights, mode, bounds_check)
    if out is None:
        out = reference_tables.adaptive_embedding_bag_tables(
            list(weights),
            list(row_groups),
            list(group_dims),
            list(group_masks),
            indices,
            offsets,
            per_sample_weights,
            mode,
            list(padding_idx),
            seed,
            bounds_check,
        )
    return out


def tiered_embedding_bag_tables(
    blocks: Sequence[Tensor],
    tier_counts: Sequence[int],
    tier_ends: Sequence[int],
    embedding_dims: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    bounds_check: int,
) -> Tensor:
    """``tiered_embedding_bag`` of every table, side by side."""
    out = None
    if _reachable(blocks):
        rows = [tier_ends[last - 1] for last in itertools.accumulate(tier_counts)]
        tables = _Tables(
            TIERED.value,
            blocks,
            rows,
            embedding_dims,
            padding_idx,
            tier_counts=tier_counts,
            tier_ends=tier_ends,
        )
        out = _pool(tables, indices, offsets, per_sample_weights, mode, bounds_check)
    if out is None:
        out = reference_tables.tiered_embedding_bag_tables(
            list(blocks),
            list(tier_counts),
            list(tier_ends),
            list(embedding_dims),
            indices,
            offsets,
            per_sample_weights,
            mode,
            list(padding_idx),
            bounds_check,
        )
    return out


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding_bag_tables": masked_embedding_bag_tables,
    "adaptive_embedding_bag_tables": adaptive_embedding_bag_tables,
    "tiered_embedding_bag_tables": tiered_embedding_bag_tables,
}
"""Operator name to implementation."""
