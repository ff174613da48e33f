"""Backwards and fused updates of several tables, in as many launches as those of one.

Behind the sort several tables are one table in tiers (``lookups.py``), so nothing here depends on
their number. All take vector loads only if the rows of all are aligned, and tiles of the widest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from amtl_kernels.triton import backward, update
from amtl_kernels.triton.lookups import Lookups, Several
from amtl_kernels.triton.tables import Table


def _of_one_type(sizes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sizes as they are or, if their types differ, as int32 in memory that all share."""
    if len({each.dtype for each in sizes}) == 1:
        return sizes
    flat = torch.cat([each.reshape(-1).to(torch.int32) for each in sizes])
    parts = flat.split([each.numel() for each in sizes])
    return [part.view(each.shape) for part, each in zip(parts, sizes, strict=True)]


def _dense(
    grad: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[Tensor],
    row_groups: Sequence[Tensor],
    seed: int,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
) -> tuple[Lookups, Table]:
    """The lookups in tables with sizes by row or by group, and the tables."""
    several = Several.of(
        grad,
        [weight.shape[0] for weight in weights],
        [weight.shape[1] for weight in weights],
        padding_idx,
        [1] * len(weights),
        row_groups,
        [each.shape[0] for each in sizes] if row_groups else [],
    )
    table = Table.by_tables(weights, _of_one_type(sizes), row_groups, seed)
    lookups = Lookups.of_tables(grad, several, indices, offsets, per_sample_weights, mode)
    return lookups, table


def _tiered(
    grad: Tensor,
    blocks: Sequence[Tensor],
    tier_counts: Sequence[int],
    tier_ends: Sequence[int],
    embedding_dims: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
) -> tuple[Lookups, Table]:
    """The lookups in tables in tiers, and the tables: their tiers in a row."""
    last = list(itertools.accumulate(tier_counts))
    rows = [tier_ends[end - 1] for end in last]
    first_row = itertools.accumulate(rows[:-1], initial=0)
    ends = [
        first + end
        for first, count, stop in zip(first_row, tier_counts, last, strict=True)
        for end in tier_ends[stop - count : stop]
    ]
    several = Several.of(grad, rows, embedding_dims, padding_idx, tier_counts)
    table = Table.by_tiers(blocks, ends, max(embedding_dims))
    lookups = Lookups.of_tables(grad, several, indices, offsets, per_sample_weights, mode)
    return lookups, table


def masked_embedding_bag_tables_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    row_dims: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``masked_embedding_backward`` of every table."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _dense(grad, weights, row_dims, [], 0, *bags)
    rows, grads, _, psw = backward.gradients(lookups, table, weights, weight_grad, False, psw_grad)
    return rows, grads, psw


def adaptive_embedding_bag_tables_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    seed: int,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """``adaptive_embedding_backward`` of every table; mask gradients flat, table after table."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _dense(grad, weights, group_dims, row_groups, seed, *bags)
    return backward.gradients(lookups, table, weights, weight_grad, mask_grad, psw_grad)


def tiered_embedding_bag_tables_backward(
    grad: Tensor,
    blocks: Sequence[Tensor],
    tier_counts: Sequence[int],
    tier_ends: Sequence[int],
    embedding_dims: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``tiered_embedding_backward`` of every table; one entry per block of all tables."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _tiered(grad, blocks, tier_counts, tier_ends, embedding_dims, *bags)
    rows, grads, _, psw = backward.gradients(lookups, table, blocks, weight_grad, False, psw_grad)
    return rows, grads, psw


def masked_embedding_bag_tables_update_(
    weights: Sequence[Tensor],
    row_dims: Sequence[Tensor],
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> Tensor:
    """``masked_embedding_update_`` of every table."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _dense(grad, weights, row_dims, [], 0, *bags)
    return update.step(lookups, table, weights, state, False, psw_grad, optimizer, hyper)[1]


def adaptive_embedding_bag_tables_update_(
    weights: Sequence[Tensor],
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    seed: int,
    mask_grad: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """``adaptive_embedding_update_`` of every table; mask gradients flat, table after table."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _dense(grad, weights, group_dims, row_groups, seed, *bags)
    return update.step(lookups, table, weights, state, mask_grad, psw_grad, optimizer, hyper)


def tiered_embedding_bag_tables_update_(
    blocks: Sequence[Tensor],
    tier_counts: Sequence[int],
    tier_ends: Sequence[int],
    embedding_dims: Sequence[int],
    state: Sequence[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: Sequence[int],
    psw_grad: bool,
    optimizer: int,
    hyper: Sequence[float],
) -> Tensor:
    """``tiered_embedding_update_`` of every table."""
    bags = (indices, offsets, per_sample_weights, mode, padding_idx)
    lookups, table = _tiered(grad, blocks, tier_counts, tier_ends, embedding_dims, *bags)
    return update.step(lookups, table, blocks, state, False, psw_grad, optimizer, hyper)[1]


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding_bag_tables_backward": masked_embedding_bag_tables_backward,
    "adaptive_embedding_bag_tables_backward": adaptive_embedding_bag_tables_backward,
    "tiered_embedding_bag_tables_backward": tiered_embedding_bag_tables_backward,
    "masked_embedding_bag_tables_update_": masked_embedding_bag_tables_update_,
    "adaptive_embedding_bag_tables_update_": adaptive_embedding_bag_tables_update_,
    "tiered_embedding_bag_tables_update_": tiered_embedding_bag_tables_update_,
}
"""Operator name to implementation."""
