"""The four operators over a list of tables, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from amtl_kernels.reference import (
    ADAM,
    RAISE,
    _adaptive_sizes,
    _check_sizes,
    _in_bags,
    _incoming,
    _keep_prefix,
    _pool,
    _psw_grad,
    _reduce_rows,
    _scale,
    apply_adagrad_,
    apply_adam_,
    apply_rowwise_adagrad_,
    apply_sgd_,
    check_indices,
    check_offsets,
)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Table:
    """One table of a call: its blocks, and how much of a row is kept."""

    blocks: list[Tensor]
    dim: int
    sizes: Tensor | None
    row_group: Tensor | None
    seed: int

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
        """Whole rows ``[M, D]``, those of narrow blocks followed by zeros."""
        out = self.blocks[0].new_zeros(flat.numel(), self.dim)
        for block, start, end in self.slices():
            mine = ((flat >= start) & (flat < end)).nonzero()[:, 0]
            missing = self.dim - block.shape[1]
            padded = torch.nn.functional.pad(block[flat[mine] - start], (0, missing))
            out = out.index_copy(0, mine, padded)
        return out

    def kept(self, flat: Tensor) -> Tensor:
        """Kept sizes ``[M]`` of rows, int64."""
        if self.sizes is None:
            ends = torch.tensor([end for _, _, end in self.slices()], device=flat.device)
            widths = torch.tensor([block.shape[1] for block in self.blocks], device=flat.device)
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
    dims: list[int],
    sizes: list[Tensor],
    row_groups: list[Tensor],
    seed: int,
) -> list[Table]:
    """Every table on its own."""
    tables, first = [], 0
    for t, count in enumerate(block_counts):
        mine = list(blocks[first : first + count])
        first += count
        dim = dims[t] if dims else max(block.shape[1] for block in mine)
        row_group = row_groups[t] if row_groups else None
        tables.append(Table(mine, dim, sizes[t] if sizes else None, row_group, seed))
    return tables


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


def _for_each(
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
    dims: list[int],
    sizes: list[Tensor],
    row_groups: list[Tensor],
    seed: int,
    masks: list[Tensor],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling: int,
    padding_idx: list[int],
    include_last_offset: bool,
    bounds_check: int,
    sparse_grad: bool,
) -> Tensor:
    """``out[.., j] = row[j]`` for ``j`` below the row's kept size, else 0; pooled by bag."""

    def forward(t: int, table: Table, bags: Bags) -> Tensor:
        used = _in_bags(bags.indices, bags.offsets, bags.include_last_offset)
        flat = check_indices(used, table.rows, bounds_check)
        values = _keep_prefix(table.values(flat), table.kept(flat))
        if bags.offsets is None:
            return values.reshape(*bags.indices.shape, table.dim)
        pooled = (bags.pooling, bags.padding_idx, bags.include_last_offset)
        return _pool(values, flat, bags.offsets, bags.per_sample_weights, *pooled)

    tables = split_tables(blocks, block_counts, dims, sizes, row_groups, seed)
    every = split_bags(
        indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset
    )
    outs = _for_each(forward, tables, every)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


@dataclass(frozen=True)
class _Gradients:
    rows: list[Tensor]
    grads: list[Tensor]
    mask: Tensor
    psw: Tensor


def _gradients(
    grad: Tensor, table: Table, bags: Bags, weight_grad: bool, mask_grad: bool, psw_grad: bool
) -> _Gradients:
    """Gradients of one table: ``mask[g, j] = sum of delta_j * row_j`` over all ``j``, flat."""
    used = _in_bags(bags.indices, bags.offsets, bags.include_last_offset)
    flat = check_indices(used, table.rows, RAISE)
    pooled = (bags.pooling, bags.padding_idx, bags.include_last_offset)
    delta, counted = _incoming(grad, flat, bags.offsets, *pooled)
    rows = [flat.new_empty(0) for _ in table.blocks]
    grads = [block.new_empty(0, block.shape[1]) for block in table.blocks]
    mask, psw = torch.empty(0, dtype=delta.dtype, device=delta.device), grad.new_empty(0)
    if weight_grad or mask_grad:
        every, sums = _reduce_rows(_scale(delta, bags.per_sample_weights), flat, counted)
        if weight_grad:
            kept = _keep_prefix(sums, table.kept(every))
            for c, (block, start, end) in enumerate(table.slices()):
                mine = (every >= start) & (every < end)
                rows[c] = every[mine] - start
                grads[c] = kept[mine, : block.shape[1]].to(block.dtype).contiguous()
        if mask_grad and table.sizes is not None and table.row_group is not None:
            products = sums * table.values(every).to(sums.dtype)
            masks = torch.zeros(
                table.sizes.shape[0], table.dim, dtype=sums.dtype, device=sums.device
            )
            mask = masks.index_add(0, table.row_group[every].to(torch.int64), products).flatten()
    if psw_grad:
        psw = _psw_grad(delta, table.values(flat), table.kept(flat), counted, bags.indices)
    return _Gradients(rows, grads, mask, psw)


def lookup_backward(
    grad: Tensor,
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int],
    sizes: list[Tensor],
    row_groups: list[Tensor],
    seed: int,
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
    columns = [grad]
    if len(tables) > 1:
        columns = [part.contiguous() for part in grad.split([table.dim for table in tables], 1)]
    found = _for_each(
        lambda t, table, bags: _gradients(
            columns[t], table, bags, weight_grad, mask_grad, psw_grad
        ),
        tables,
        every,
    )
    psw = found[0].psw
    if psw_grad and len(tables) > 1:
        parts = torch.cat([one.psw for one in found])
        psw = parts.new_zeros(indices.numel())
        psw[: parts.numel()] = parts
    return (
        [rows for one in found for rows in one.rows],
        [grads for one in found for grads in one.grads],
        torch.cat([one.mask for one in found]),
        psw,
    )


def lookup_update_(
    blocks: list[Tensor],
    block_counts: list[int],
    dims: list[int],
    sizes: list[Tensor],
    row_groups: list[Tensor],
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
) -> tuple[Tensor, Tensor]:
    """:func:`lookup_backward`, then :func:`apply_`, of whatever backend is set."""
    tables = (blocks, block_counts, dims, sizes, row_groups, seed)
    bags = (indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset)
    ops = torch.ops.amtl
    rows, grads, masks, psw = ops.lookup_backward(grad, *tables, *bags, True, mask_grad, psw_grad)
    ops.apply_(blocks, rows, grads, state, optimizer, hyper)
    return masks, psw


def apply_(
    blocks: list[Tensor],
    rows: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    optimizer: int,
    hyper: list[float],
) -> None:
    """The optimizer's update of every block's ``rows``; a counter in ``state`` is the step."""
    lr, eps, weight_decay, beta1, beta2, step, *stochastic = hyper
    moments = (0, 1, 1, 2)[optimizer]
    if len(state) == len(blocks) * moments + 1:
        step = int(state[-1])
    seed = int(step) if any(stochastic) else None
    rates: list[float] = [lr, *([eps] if optimizer else []), weight_decay]
    if optimizer == ADAM:
        rates = [int(step), lr, beta1, beta2, eps, weight_decay]
    for c, block in enumerate(blocks):
        mine = state[c * moments : (c + 1) * moments]
        _APPLY[optimizer](block, *mine, rows[c], grads[c], *rates, seed)


_APPLY: tuple[Callable[..., None], ...] = (
    apply_sgd_,
    apply_adagrad_,
    apply_rowwise_adagrad_,
    apply_adam_,
)
"""By the number of the optimizer."""

IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "lookup": lookup,
    "lookup_backward": lookup_backward,
    "lookup_update_": lookup_update_,
    "apply_": apply_,
}
"""Operator name to reference."""
