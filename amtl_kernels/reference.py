"""Every operator in plain PyTorch: the meaning that all backends are tested against.

The functions take the arguments of the operator of the same name (``amtl_kernels._schema``), in
the same order and in groups (``amtl_kernels._arguments``), on any device and for any floating-point
type; float64 is computed in float64, the rest in float32 with one rounding at the end. Written to
be read, not to be fast: everything is gathered per lookup, ``O(L * D)`` memory for ``L`` lookups.
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
    Bags,
    FewBits,
    Step,
    Tables,
    Wishes,
    are_codes,
    check_few_bits,
    check_update_of_codes,
    in_groups,
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


def _in_bags(bags: Bags) -> Tensor:
    """The flat indices of all bags: those past the last offset are never looked at."""
    flat, offsets = bags.indices.reshape(-1), bags.offsets
    if offsets is None:
        return flat
    check_offsets(offsets, flat.numel())
    if bags.include_last_offset:
        return flat[: int(offsets[-1])]
    return flat if offsets.numel() else flat[:0]


def _bag_of_lookup(flat: Tensor, bags: Bags) -> tuple[Tensor, int, Tensor]:
    """The bag of every lookup (-1: there are none), the number of bags, and who counts in one."""
    assert bags.offsets is not None
    number = bags.offsets.numel() - int(bags.include_last_offset)
    positions = torch.arange(flat.numel(), device=flat.device)
    bag = torch.searchsorted(bags.offsets.to(torch.int64), positions, right=True) - 1
    return bag, number, (bag >= 0) & (flat != bags.padding_idx[0])


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


def _pool(values: Tensor, flat: Tensor, bags: Bags) -> Tensor:
    """Pools masked rows ``values [L, D]`` into bags ``[B, D]``."""
    compute = compute_type(values.dtype)
    bag, number, counted = _bag_of_lookup(flat, bags)
    terms = _scale(values.to(compute), bags.per_sample_weights)
    out = torch.zeros(number, values.shape[1], dtype=compute, device=values.device)
    out = out.index_add(0, bag[counted], terms[counted])
    if bags.pooling == MEAN:
        out = out * _mean_scale(bag, number, counted, compute)[:, None]
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


def split_tables(tables: Tables, few: FewBits | None = None) -> list[Table]:
    """Every table on its own."""
    check_few_bits(tables, few)
    found, first, part = [], 0, 0
    for t, count in enumerate(tables.block_counts):
        mine = list(tables.blocks[first : first + count])
        first += count
        bits = few.bits[t] if few else 0
        dim = tables.dims[t] if tables.dims else max(widths_of(mine, bits))
        if few and few.step_ends:
            ends = few.step_ends[part : part + few.steps[t].numel()]
            part, mine = part + len(ends), [mine[c][rows] for c, rows in parts_of(mine, ends)]
        sizes = tables.sizes[t] if tables.sizes else None
        row_group = tables.row_groups[t] if tables.row_groups else None
        table = Table(mine, dim, sizes, row_group, tables.seed)
        found.append(replace(table, steps=few.steps[t], bits=bits) if few else table)
    return found


def code_parts(tables: Tables, every: Sequence[Table]) -> list[CodePart]:
    """The parts of all tables of few bits, one after the other."""
    found, first = [], 0
    for count, table in zip(tables.block_counts, every, strict=True):
        ends = [end for _, _, end in table.slices()]
        assert table.steps is not None
        for p, (c, rows) in enumerate(parts_of(tables.blocks[first : first + count], ends)):
            found.append(CodePart(first + c, rows.start, table.steps[p], table.bits))
        first += count
    return found


def check_bags(bags: Bags) -> None:
    """Raises ValueError unless these arguments of lookups go together."""
    several, weighted = len(bags.padding_idx) > 1, bags.per_sample_weights is not None
    if bags.offsets is None and (several or weighted):
        what = "several tables" if several else "per_sample_weights"
        raise ValueError(f"{what} need offsets")
    if several and not bags.include_last_offset:
        raise ValueError("several tables need include_last_offset")
    if weighted and bags.pooling != SUM:
        raise ValueError("per_sample_weights go with mode sum only")


def split_bags(bags: Bags) -> list[Bags]:
    """Every table's own lookups; offsets start at 0 in each."""
    check_bags(bags)
    tables, offsets = len(bags.padding_idx), bags.offsets
    if offsets is None or tables == 1:
        return [bags]
    check_offsets(offsets, bags.indices.numel())
    number, every = (offsets.numel() - 1) // tables, []
    for t in range(tables):
        mine = offsets[t * number : (t + 1) * number + 1]
        part = slice(int(mine[0]), int(mine[-1]))
        weights = bags.per_sample_weights
        own = bags._replace(
            indices=bags.indices[part].contiguous(),
            offsets=(mine - mine[0]).contiguous(),
            per_sample_weights=None if weights is None else weights[part].contiguous(),
            padding_idx=bags.padding_idx[t : t + 1],
        )
        every.append(own)
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
    tables: Tables,
    masks: list[Tensor] | None,
    bags: Bags,
    bounds_check: int,
    sparse_grad: bool,
    few: FewBits | None = None,
) -> Tensor:
    """``out[.., j] = row[j]`` for ``j`` below the row's kept size, else 0; pooled by bag."""

    def forward(t: int, table: Table, mine: Bags) -> Tensor:
        flat = check_indices(_in_bags(mine), table.rows, bounds_check)
        values = _keep_prefix(table.values(flat), table.kept(flat))
        if mine.offsets is None:
            return values.reshape(*mine.indices.shape, table.dim).to(table.dtype)
        return _pool(values, flat, mine).to(table.dtype)

    outs = for_each(forward, split_tables(tables, few), split_bags(bags))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _incoming(grad: Tensor, flat: Tensor, bags: Bags) -> tuple[Tensor, Tensor]:
    """The gradient ``[L, D]`` that reaches each lookup before its own weight, and which count."""
    compute = compute_type(grad.dtype)
    if bags.offsets is None:
        delta = grad.reshape(flat.numel(), grad.shape[-1]).to(compute)
        return delta, flat != bags.padding_idx[0]
    bag, number, counted = _bag_of_lookup(flat, bags)
    if number == 0:
        return grad.new_zeros(flat.numel(), grad.shape[1], dtype=compute), counted
    delta = grad.to(compute)[bag.clamp(min=0)]
    if bags.pooling == MEAN:
        delta = delta * _mean_scale(bag, number, counted, compute)[bag.clamp(min=0), None]
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
    flat = check_indices(_in_bags(bags), table.rows, RAISE)
    delta, counted = _incoming(grad, flat, bags)
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
    tables: Tables, grad: Tensor, bags: Bags, weight_grad: bool, wishes: Wishes
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Distinct rows ``[U]`` of every block, counted within it, with their gradients ``[U, w]``.

    Also the gradients of the soft masks, flat, and of ``per_sample_weights``, which is zero for
    padding and past the last bag.
    """
    found = _gradients_of_all(grad, split_tables(tables), split_bags(bags), weight_grad, wishes)
    rows = [rows for one in found for rows in one.rows]
    grads = [grads for one in found for grads in one.grads]
    pairs = zip(grads, tables.blocks, strict=True)
    rounded = [each.to(block.dtype).contiguous() for each, block in pairs]
    return rows, rounded, *_beside_rows(found, bags.indices, wishes.psw_grad)


def lookup_update_(
    tables: Tables,
    grad: Tensor,
    bags: Bags,
    wishes: Wishes,
    groups_sorted: bool,
    step: Step,
    few: FewBits | None = None,
) -> tuple[Tensor, Tensor]:
    """The optimizer's update by :func:`lookup_backward`'s gradients before they are rounded.

    The kept prefix is the row's size. Codes are updated as the numbers that they stand for, and
    rounded at random: see ``reference_updates.update_codes``.
    """
    every = split_tables(tables, few)
    if few:
        check_update_of_codes(tables.blocks, wishes, step)
    found = _gradients_of_all(grad, every, split_bags(bags), True, wishes)
    rows = [rows for one in found for rows in one.rows]
    grads = [grads for one in found for grads in one.grads]
    kept = [
        torch.arange(g.shape[1], device=g.device) < size[:, None]
        for g, size in zip(grads, (size for one in found for size in one.sizes), strict=True)
    ]
    if few:
        update_codes(tables.blocks, code_parts(tables, every), rows, grads, kept, step)
    else:
        update(tables.blocks, rows, grads, kept, step)
    return _beside_rows(found, bags.indices, wishes.psw_grad)


def apply_(blocks: list[Tensor], rows: list[Tensor], grads: list[Tensor], step: Step) -> None:
    """The optimizer's update of every block's ``rows``, up to their last non-zero gradient."""
    update(blocks, rows, grads, [kept_prefix(g) for g in grads], step)


IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    function.__name__: in_groups(function)
    for function in (lookup, lookup_backward, lookup_update_, apply_)
}
"""Operator name to reference, with the values of the operator's schema one by one."""
