"""Every operator in plain PyTorch: the meaning that all backends are tested against.

The functions take the arguments of the operator of the same name (``amtl_kernels._schema``), in
the same order, on any device and for any floating-point type; float64 is computed in float64, the
rest in float32 with one rounding at the end. Written to be read, not to be fast: everything is
gathered per lookup, ``O(L * D)`` memory for ``L`` lookups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from amtl_kernels._arguments import (
    ADAGRAD,
    ADAM,
    CLAMP,
    MEAN,
    OFF,
    RAISE,
    ROWWISE_ADAGRAD,
    SGD,
    SUM,
    Step,
    Wishes,
    are_codes,
    check_few_bits,
    check_update_of_codes,
    parts_of,
    widths_of,
)
from amtl_kernels.reference_updates import (
    CodePart,
    compute_type,
    kept_prefix,
    update,
    update_codes,
)
from amtl_kernels.rounding import decode_codes, mix, row_term

__all__ = [
    "ADAGRAD",
    "ADAM",
    "CLAMP",
    "MEAN",
    "OFF",
    "ROWWISE_ADAGRAD",
    "SGD",
    "kept_prefix",
]

_Result = TypeVar("_Result")


def hash_columns(rows: Tensor, seed: int, columns: int) -> Tensor:
    """Which of the ``columns`` size columns each row takes under ``seed``.

    An integer hash (two multiply-xorshift rounds) of row and seed, scaled to ``0..columns-1``. It
    is the same on every backend, and the same in forward and backward, because no floating-point
    number takes part.

    Args:
        rows: Row numbers, any integer type and shape.
        seed: Any 64-bit integer.
        columns: Number of columns ``Q >= 1``.

    Returns:
        int64 tensor of the shape of ``rows``.
    """
    return (mix(row_term(rows, seed)) * columns) >> 32


def warn_clamped(value: int, position: int, rows: int) -> None:
    """Warns once per process about an index that ``bounds_check="clamp"`` moved into range."""
    global _warned_clamped
    if not _warned_clamped:
        _warned_clamped = True
        warnings.warn(
            f"index {value} at position {position} is out of range for a table of {rows} rows and "
            f"was clamped; this is said once",
            RuntimeWarning,
            stacklevel=2,
        )


_warned_clamped = False


def check_indices(indices: Tensor, rows: int, bounds_check: int) -> Tensor:
    """The flat indices as int64, checked against ``rows`` as ``bounds_check`` says."""
    flat = indices.reshape(-1).to(torch.int64)
    if bounds_check == OFF:
        return flat
    bad = ((flat < 0) | (flat >= rows)).nonzero()
    if bad.numel():
        position = int(bad[0])
        value = int(flat[position])
        if bounds_check == RAISE or rows == 0:
            raise IndexError(
                f"index {value} at position {position} is out of range for a table of {rows} rows"
            )
        warn_clamped(value, position, rows)
        flat = flat.clamp(0, rows - 1)
    return flat


def check_offsets(offsets: Tensor, lookups: int) -> None:
    """Raises ValueError unless ``offsets`` start at 0, never decrease and end within the input."""
    if offsets.numel() == 0:
        return
    values = offsets.to(torch.int64)
    if int(values[0]) != 0:
        raise ValueError(f"offsets must start at 0, but offsets[0] is {int(values[0])}")
    falls = (values[1:] < values[:-1]).nonzero()
    if falls.numel():
        i = int(falls[0]) + 1
        raise ValueError(
            f"offsets must not decrease, but offsets[{i}] = {int(values[i])} is smaller than "
            f"offsets[{i - 1}] = {int(values[i - 1])}"
        )
    if int(values[-1]) > lookups:
        raise ValueError(
            f"offsets must end within the {lookups} indices, but offsets[{values.numel() - 1}] is "
            f"{int(values[-1])}"
        )


def _in_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """The flat indices of all bags: those past the last offset are never looked at."""
    flat = indices.reshape(-1)
    if offsets is None:
        return flat
    check_offsets(offsets, flat.numel())
    if include_last_offset:
        return flat[: int(offsets[-1])]
    return flat if offsets.numel() else flat[:0]


def _bag_of_lookup(offsets: Tensor, lookups: int, include_last_offset: bool) -> tuple[Tensor, int]:
    """The bag of every position (-1: there are none) and the number of bags."""
    bags = offsets.numel() - int(include_last_offset)
    positions = torch.arange(lookups, device=offsets.device)
    return torch.searchsorted(offsets.to(torch.int64), positions, right=True) - 1, bags


def _check_sizes(sizes: Tensor, dim: int) -> Tensor:
    bad = ((sizes < 0) | (sizes > dim)).nonzero()
    if bad.numel():
        position = int(bad[0])
        raise ValueError(f"size {int(sizes[position])} at position {position} is outside 0..{dim}")
    return sizes


def _adaptive_sizes(
    rows: Tensor, row_group: Tensor, group_dims: Tensor, seed: int, dim: int
) -> Tensor:
    """Kept sizes of ``rows``: one per group, or one per group and hashed column."""
    group, groups = row_group[rows].to(torch.int64), group_dims.shape[0]
    bad = ((group < 0) | (group >= groups)).nonzero()
    if bad.numel():
        position = int(bad[0])
        raise ValueError(
            f"row_group {int(group[position])} of row {int(rows[position])} is outside "
            f"0..{groups - 1}"
        )
    if group_dims.dim() == 1:
        return _check_sizes(group_dims[group].to(torch.int64), dim)
    column = hash_columns(rows, seed, group_dims.shape[1])
    return _check_sizes(group_dims[group, column].to(torch.int64), dim)


def _keep_prefix(values: Tensor, sizes: Tensor) -> Tensor:
    """``values [M, D]`` with everything past ``sizes [M]`` set to zero, NaN and Inf included."""
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.where(columns < sizes[:, None], values, torch.zeros_like(values))


def _mean_scale(bag: Tensor, bags: int, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / number of counted lookups`` of each bag; 1 for an empty one."""
    counts = torch.zeros(bags, dtype=torch.int64, device=bag.device)
    counts.index_add_(0, bag[counted], torch.ones_like(bag[counted]))
    return 1.0 / counts.clamp(min=1).to(dtype)


def _pool(
    values: Tensor,
    flat: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    """Pools masked rows ``values [L, D]`` into bags ``[B, D]``."""
    compute = compute_type(values.dtype)
    bag, bags = _bag_of_lookup(offsets, flat.numel(), include_last_offset)
    counted = (bag >= 0) & (flat != padding_idx)
    terms = values.to(compute)
    if per_sample_weights is not None:
        terms = terms * per_sample_weights[: flat.numel()].to(compute)[:, None]
    out = torch.zeros(bags, values.shape[1], dtype=compute, device=values.device)
    out = out.index_add(0, bag[counted], terms[counted])
    if pooling == MEAN:
        out = out * _mean_scale(bag, bags, counted, compute)[:, None]
    return out.to(values.dtype)


def to_few_bits(rows: Tensor, step: Tensor, bits: int) -> Tensor:
    """Numbers ``[M, w]`` of few bits, float32, of codes ``[M, w * bits / 8]`` or of others."""
    if rows.dtype == torch.uint8:
        return decode_codes(rows, step, bits)
    half = (2**bits - 1) / 2
    codes = torch.round(rows.to(torch.float32) / step + half).clamp(0, 2 * half)
    return (codes - half) * step


@dataclass(frozen=True)
class Table:
    """One table of a call: its blocks (of few bits, one a step size), and what is kept of a row."""

    blocks: list[Tensor]
    dim: int
    sizes: Tensor | None
    row_group: Tensor | None
    seed: int
    steps: Tensor | None = None
    bits: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of what is looked up."""
        return torch.float32 if are_codes(self.blocks) else self.blocks[0].dtype

    @property
    def widths(self) -> list[int]:
        """Numbers in a row of each block."""
        return widths_of(self.blocks, self.bits)

    @property
    def rows(self) -> int:
        """Of all blocks."""
        return sum(block.shape[0] for block in self.blocks)

    def slices(self) -> Iterator[tuple[Tensor, int, int]]:
        """Every block with its first row and the row after its last."""
        start = 0
        for block in self.blocks:
            yield block, start, start + block.shape[0]
            start += block.shape[0]

    def values(self, flat: Tensor) -> Tensor:
        """Whole rows ``[M, D]``, those of narrow blocks followed by zeros.

        Numbers of few bits are as precise as sums of them.
        """
        dtype = self.dtype if self.steps is None else compute_type(self.dtype)
        out = self.blocks[0].new_zeros(flat.numel(), self.dim, dtype=dtype)
        for c, (block, start, end) in enumerate(self.slices()):
            mine = ((flat >= start) & (flat < end)).nonzero()[:, 0]
            rows = block[flat[mine] - start]
            if self.steps is not None:
                rows = to_few_bits(rows, self.steps[c], self.bits).to(dtype)
            padded = torch.nn.functional.pad(rows, (0, self.dim - rows.shape[1]))
            out = out.index_copy(0, mine, padded)
        return out

    def kept(self, flat: Tensor) -> Tensor:
        """Kept sizes ``[M]`` of rows, int64."""
        if self.sizes is None:
            ends = torch.tensor([end for _, _, end in self.slices()], device=flat.device)
            widths = torch.tensor(self.widths, device=flat.device)
            return widths[torch.bucketize(flat, ends, right=True)]
        if self.row_group is None:
            return _check_sizes(self.sizes[flat].to(torch.int64), self.dim)
        return _adaptive_sizes(flat, self.row_group, self.sizes, self.seed, self.dim)


@dataclass(frozen=True)
class Bags:
    """The lookups in one table."""

    indices: Tensor
    offsets: Tensor | None
    per_sample_weights: Tensor | None
    pooling: int
    padding_idx: int
    include_last_offset: bool


def split_tables(
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int] | None,
    sizes: list[Tensor] | None,
    row_groups: list[Tensor] | None,
    seed: int,
    steps: list[Tensor] | None = None,
    bits: list[int] | None = None,
    step_ends: list[int] | None = None,
) -> list[Table]:
    """Every table on its own."""
    check_few_bits(blocks, block_counts, sizes, steps or [], bits or [], step_ends or [])
    tables, first, part = [], 0, 0
    for t, count in enumerate(block_counts):
        mine = list(blocks[first : first + count])
        first += count
        few = bits[t] if bits else 0
        dim = dims[t] if dims else max(widths_of(mine, few))
        if steps and step_ends:
            ends = step_ends[part : part + steps[t].numel()]
            part, mine = part + len(ends), [mine[c][rows] for c, rows in parts_of(mine, ends)]
        row_group = row_groups[t] if row_groups else None
        table = Table(mine, dim, sizes[t] if sizes else None, row_group, seed)
        tables.append(replace(table, steps=steps[t], bits=few) if steps else table)
    return tables


def code_parts(
    blocks: Sequence[Tensor], block_counts: Sequence[int], tables: Sequence[Table]
) -> list[CodePart]:
    """The parts of all tables of few bits, one after the other."""
    found, first = [], 0
    for count, table in zip(block_counts, tables, strict=True):
        ends = [end for _, _, end in table.slices()]
        assert table.steps is not None
        for p, (c, rows) in enumerate(parts_of(blocks[first : first + count], ends)):
            found.append(CodePart(first + c, rows.start, table.steps[p], table.bits))
        first += count
    return found


def check_bags(
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    tables: int,
    include_last_offset: bool,
) -> None:
    """Raises ValueError unless these arguments of lookups in so many tables go together."""
    if offsets is None and (tables > 1 or per_sample_weights is not None):
        what = "several tables" if tables > 1 else "per_sample_weights"
        raise ValueError(f"{what} need offsets")
    if tables > 1 and not include_last_offset:
        raise ValueError("several tables need include_last_offset")
    if per_sample_weights is not None and pooling != SUM:
        raise ValueError("per_sample_weights go with mode sum only")


def split_bags(
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: list[int],
    include_last_offset: bool,
) -> list[Bags]:
    """Every table's own lookups; offsets start at 0 in each."""
    tables = len(padding_idx)
    check_bags(offsets, per_sample_weights, pooling, tables, include_last_offset)
    if offsets is None or tables == 1:
        weights = per_sample_weights
        return [Bags(indices, offsets, weights, pooling, padding_idx[0], include_last_offset)]
    check_offsets(offsets, indices.numel())
    bags, every = (offsets.numel() - 1) // tables, []
    for t in range(tables):
        mine = offsets[t * bags : (t + 1) * bags + 1]
        part = slice(int(mine[0]), int(mine[-1]))
        weights = None if per_sample_weights is None else per_sample_weights[part].contiguous()
        begins = (mine - mine[0]).contiguous()
        padding = padding_idx[t]
        every.append(Bags(indices[part].contiguous(), begins, weights, pooling, padding, True))
    return every


def for_each(
    run: Callable[[int, Table, Bags], _Result], tables: list[Table], every: list[Bags]
) -> list[_Result]:
    """Every table's result; errors name the table if there are several."""
    results = []
    for t, (table, bags) in enumerate(zip(tables, every, strict=True)):
        try:
            results.append(run(t, table, bags))
        except (IndexError, ValueError) as error:  # noqa: PERF203
            if len(tables) == 1:
                raise
            raise type(error)(f"table {t}: {error}") from None
    return results


def lookup(
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int] | None,
    sizes: list[Tensor] | None,
    row_groups: list[Tensor] | None,
    seed: int,
    masks: list[Tensor] | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: list[int],
    include_last_offset: bool,
    bounds_check: int,
    sparse_grad: bool,
    steps: list[Tensor] | None = None,
    bits: list[int] | None = None,
    step_ends: list[int] | None = None,
) -> Tensor:
    """``out[.., j] = row[j]`` for ``j`` below the row's kept size, else 0; pooled by bag."""

    def forward(t: int, table: Table, bags: Bags) -> Tensor:
        used = _in_bags(bags.indices, bags.offsets, bags.include_last_offset)
        flat = check_indices(used, table.rows, bounds_check)
        values = _keep_prefix(table.values(flat), table.kept(flat))
        if bags.offsets is None:
            return values.reshape(*bags.indices.shape, table.dim).to(table.dtype)
        pooled = (bags.pooling, bags.padding_idx, bags.include_last_offset)
        out = _pool(values, flat, bags.offsets, bags.per_sample_weights, *pooled)
        return out.to(table.dtype)

    of_tables = (blocks, block_counts, dims, sizes, row_groups, seed, steps, bits, step_ends)
    tables = split_tables(*of_tables)
    every = split_bags(
        indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset
    )
    outs = for_each(forward, tables, every)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _incoming(
    grad: Tensor,
    flat: Tensor,
    offsets: Tensor | None,
    pooling: int,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient ``[L, D]`` that reaches each lookup before its own weight, and which count."""
    compute = compute_type(grad.dtype)
    counted = flat != padding_idx
    if offsets is None:
        return grad.reshape(flat.numel(), grad.shape[-1]).to(compute), counted
    bag, bags = _bag_of_lookup(offsets, flat.numel(), include_last_offset)
    counted = counted & (bag >= 0)
    if bags == 0:
        return grad.new_zeros(flat.numel(), grad.shape[1], dtype=compute), counted
    delta = grad.to(compute)[bag.clamp(min=0)]
    if pooling == MEAN:
        delta = delta * _mean_scale(bag, bags, counted, compute)[bag.clamp(min=0), None]
    return delta, counted


def _scale(delta: Tensor, per_sample_weights: Tensor | None) -> Tensor:
    if per_sample_weights is None:
        return delta
    return delta * per_sample_weights[: delta.shape[0]].to(delta.dtype)[:, None]


def _reduce_rows(delta: Tensor, flat: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows in ascending order and their summed gradients."""
    rows = flat[counted].sort().values.unique_consecutive()
    sums = torch.zeros(rows.numel(), delta.shape[1], dtype=delta.dtype, device=delta.device)
    return rows, sums.index_add(0, torch.searchsorted(rows, flat[counted]), delta[counted])


def _psw_grad(
    delta: Tensor, values: Tensor, sizes: Tensor, counted: Tensor, indices: Tensor
) -> Tensor:
    """``[L]`` products of gradients and kept prefixes, zero for padding and past the last bag."""
    dots = _keep_prefix(delta * values.to(delta.dtype), sizes).sum(1)
    out = values.new_zeros(indices.numel())
    out[: dots.numel()] = torch.where(counted, dots, torch.zeros_like(dots)).to(values.dtype)
    return out


@dataclass(frozen=True)
class _Gradients:
    rows: list[Tensor]
    grads: list[Tensor]
    sizes: list[Tensor]
    mask: Tensor
    psw: Tensor


def _gradients(
    grad: Tensor, table: Table, bags: Bags, weight_grad: bool, wishes: Wishes
) -> _Gradients:
    """Gradients of one table: ``mask[g, j] = sum of delta_j * row_j`` over all ``j``, flat.

    Those of rows are not rounded, and have their kept sizes beside them.
    """
    used = _in_bags(bags.indices, bags.offsets, bags.include_last_offset)
    flat = check_indices(used, table.rows, RAISE)
    pooled = (bags.pooling, bags.padding_idx, bags.include_last_offset)
    delta, counted = _incoming(grad, flat, bags.offsets, *pooled)
    rows = [flat.new_empty(0) for _ in table.blocks]
    widths = table.widths
    grads = [delta.new_empty(0, width) for width in widths]
    sizes = list(rows)
    mask, psw = torch.empty(0, dtype=delta.dtype, device=delta.device), grad.new_empty(0)
    if weight_grad or wishes.mask_grad:
        every, sums = _reduce_rows(_scale(delta, bags.per_sample_weights), flat, counted)
        if weight_grad:
            size = table.kept(every)
            kept = _keep_prefix(sums, size)
            for c, (_, start, end) in enumerate(table.slices()):
                mine = (every >= start) & (every < end)
                rows[c], sizes[c] = every[mine] - start, size[mine]
                grads[c] = kept[mine, : widths[c]]
        if wishes.mask_grad and table.sizes is not None and table.row_group is not None:
            products = sums * table.values(every).to(sums.dtype)
            masks = torch.zeros(
                table.sizes.shape[0], table.dim, dtype=sums.dtype, device=sums.device
            )
            mask = masks.index_add(0, table.row_group[every].to(torch.int64), products).flatten()
    if wishes.psw_grad:
        psw = _psw_grad(delta, table.values(flat), table.kept(flat), counted, bags.indices)
    return _Gradients(rows, grads, sizes, mask, psw)


def _gradients_of_all(
    grad: Tensor, tables: list[Table], every: list[Bags], weight_grad: bool, wishes: Wishes
) -> list[_Gradients]:
    """The gradients of every table, each by its columns of ``grad``."""
    columns = [grad]
    if len(tables) > 1:
        columns = [part.contiguous() for part in grad.split([table.dim for table in tables], 1)]
    return for_each(
        lambda t, table, bags: _gradients(columns[t], table, bags, weight_grad, wishes),
        tables,
        every,
    )


def _beside_rows(found: list[_Gradients], indices: Tensor, psw_grad: bool) -> tuple[Tensor, Tensor]:
    """The gradients of all masks, flat, and of all per-sample weights."""
    psw = found[0].psw
    if psw_grad and len(found) > 1:
        parts = torch.cat([one.psw for one in found])
        psw = parts.new_zeros(indices.numel())
        psw[: parts.numel()] = parts
    return torch.cat([one.mask for one in found]), psw


def lookup_backward(
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int] | None,
    sizes: list[Tensor] | None,
    row_groups: list[Tensor] | None,
    seed: int,
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: list[int],
    include_last_offset: bool,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Distinct rows ``[U]`` of every block, counted within it, with their gradients ``[U, w]``.

    Also the gradients of the soft masks, flat, and of ``per_sample_weights``, which is zero for
    padding and past the last bag.
    """
    tables = split_tables(blocks, block_counts, dims, sizes, row_groups, seed)
    every = split_bags(
        indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset
    )
    found = _gradients_of_all(grad, tables, every, weight_grad, Wishes(mask_grad, psw_grad))
    rows = [rows for one in found for rows in one.rows]
    grads = [grads for one in found for grads in one.grads]
    rounded = [g.to(block.dtype).contiguous() for g, block in zip(grads, blocks, strict=True)]
    return rows, rounded, *_beside_rows(found, indices, psw_grad)


def lookup_update_(
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int] | None,
    sizes: list[Tensor] | None,
    row_groups: list[Tensor] | None,
    seed: int,
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: list[int],
    include_last_offset: bool,
    mask_grad: bool,
    psw_grad: bool,
    groups_sorted: bool,
    state: list[Tensor],
    optimizer: int,
    hyper: list[float],
    steps: list[Tensor] | None = None,
    bits: list[int] | None = None,
    step_ends: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The optimizer's update by :func:`lookup_backward`'s gradients before they are rounded.

    The kept prefix is the row's size. Codes are updated as the numbers that they stand for, and
    rounded at random: see ``reference_updates.update_codes``.
    """
    tables = split_tables(
        blocks, block_counts, dims, sizes, row_groups, seed, steps, bits, step_ends
    )
    wishes, step = Wishes(mask_grad, psw_grad), Step(state, optimizer, hyper)
    if steps:
        check_update_of_codes(blocks, wishes, step)
    every = split_bags(
        indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset
    )
    found = _gradients_of_all(grad, tables, every, True, wishes)
    rows = [rows for one in found for rows in one.rows]
    grads = [grads for one in found for grads in one.grads]
    kept = [
        torch.arange(g.shape[1], device=g.device) < size[:, None]
        for g, size in zip(grads, (size for one in found for size in one.sizes), strict=True)
    ]
    if steps:
        parts = code_parts(blocks, block_counts, tables)
        update_codes(blocks, parts, rows, grads, kept, step)
    else:
        update(blocks, rows, grads, kept, step)
    return _beside_rows(found, indices, psw_grad)


def apply_(
    blocks: list[Tensor],
    rows: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    optimizer: int,
    hyper: list[float],
) -> None:
    """The optimizer's update of every block's ``rows``, up to their last non-zero gradient."""
    step = Step(state, optimizer, hyper)
    update(blocks, rows, grads, [kept_prefix(g) for g in grads], step)


IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "lookup": lookup,
    "lookup_backward": lookup_backward,
    "lookup_update_": lookup_update_,
    "apply_": apply_,
}
"""Operator name to reference."""
