"""Backwards and fused updates of several tables in one call.

They sort and sum table by table. The host waits once for where each table's lookups start and, in a
backward, once for the distinct rows of all tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from amtl_kernels.reference_tables import Bags, split_tiers
from amtl_kernels.triton import backward, launch, update
from amtl_kernels.triton.rules import take_counter


def _split(
    count: int,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    padding_idx: Sequence[int],
) -> list[Bags]:
    """Every table's own bags. One wait."""
    bags = (offsets.numel() - 1) // count
    bounds = [0] * (count + 1)
    if bags:
        bounds = launch.read(offsets[::bags])
    parts = []
    for t, (start, end) in enumerate(itertools.pairwise(bounds)):
        begins = offsets[t * bags : (t + 1) * bags + 1] - start
        weights = None if per_sample_weights is None else per_sample_weights[start:end]
        parts.append(Bags(t, indices[start:end], begins, weights, padding_idx[t]))
    return parts


def _join_psw(found: Sequence[Tensor], per_sample_weights: Tensor | None, wanted: bool) -> Tensor:
    """The gradient of all per-sample weights, zero for those past the last bag."""
    joined = torch.cat(list(found))
    if wanted and per_sample_weights is not None:
        past = per_sample_weights.numel() - joined.numel()
        joined = torch.nn.functional.pad(joined, (0, past))
    return joined


def _columns(grad: Tensor, dims: Sequence[int]) -> list[Tensor]:
    return [part.contiguous() for part in grad.split(list(dims), 1)]


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
    columns = _columns(grad, [w.shape[1] for w in weights])
    results = backward.run_all(
        backward.masked_steps(
            columns[b.table],
            weights[b.table],
            b.indices,
            b.offsets,
            row_dims[b.table],
            b.weights,
            mode,
            b.padding,
            True,
            weight_grad,
            psw_grad,
        )
        for b in _split(len(weights), indices, offsets, per_sample_weights, padding_idx)
    )
    psw = _join_psw([r[2] for r in results], per_sample_weights, psw_grad)
    return [r[0] for r in results], [r[1] for r in results], psw


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
    columns = _columns(grad, [w.shape[1] for w in weights])
    results = backward.run_all(
        backward.adaptive_steps(
            columns[b.table],
            weights[b.table],
            b.indices,
            b.offsets,
            row_groups[b.table],
            group_dims[b.table],
            b.weights,
            mode,
            b.padding,
            True,
            seed,
            weight_grad,
            mask_grad,
            psw_grad,
        )
        for b in _split(len(weights), indices, offsets, per_sample_weights, padding_idx)
    )
    masks = torch.cat([r[2].flatten() for r in results])
    psw = _join_psw([r[3] for r in results], per_sample_weights, psw_grad)
    return [r[0] for r in results], [r[1] for r in results], masks, psw


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
    columns = _columns(grad, embedding_dims)
    tables = split_tiers(list(blocks), list(tier_counts), list(tier_ends))
    results = backward.run_all(
        backward.tiered_steps(
            columns[b.table],
            *tables[b.table],
            b.indices,
            b.offsets,
            b.weights,
            embedding_dims[b.table],
            mode,
            b.padding,
            True,
            weight_grad,
            psw_grad,
        )
        for b in _split(len(tables), indices, offsets, per_sample_weights, padding_idx)
    )
    psw = _join_psw([r[2] for r in results], per_sample_weights, psw_grad)
    return [r for found in results for r in found[0]], [g for r in results for g in r[1]], psw


def _states(
    state: Sequence[Tensor], counts: Sequence[int], optimizer: int, hyper: Sequence[float]
) -> tuple[list[Sequence[Tensor]], Sequence[float]]:
    """Each table's states, a few for every block it has, and ``hyper`` at the step counted."""
    state, hyper = take_counter(sum(counts), state, optimizer, hyper)
    each = len(state) // max(sum(counts), 1)
    ends = list(itertools.accumulate((n * each for n in counts), initial=0))
    return [state[a:b] for a, b in itertools.pairwise(ends)], hyper


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
    columns = _columns(grad, [w.shape[1] for w in weights])
    states, hyper = _states(state, [1] * len(weights), optimizer, hyper)
    psw = [
        update.masked_embedding_update_(
            weights[b.table],
            states[b.table],
            columns[b.table],
            b.indices,
            b.offsets,
            row_dims[b.table],
            b.weights,
            mode,
            b.padding,
            True,
            psw_grad,
            optimizer,
            hyper,
        )
        for b in _split(len(weights), indices, offsets, per_sample_weights, padding_idx)
    ]
    return _join_psw(psw, per_sample_weights, psw_grad)


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
    columns = _columns(grad, [w.shape[1] for w in weights])
    states, hyper = _states(state, [1] * len(weights), optimizer, hyper)
    results = [
        update.adaptive_embedding_update_(
            weights[b.table],
            states[b.table],
            columns[b.table],
            b.indices,
            b.offsets,
            row_groups[b.table],
            group_dims[b.table],
            b.weights,
            mode,
            b.padding,
            True,
            seed,
            mask_grad,
            psw_grad,
            optimizer,
            hyper,
        )
        for b in _split(len(weights), indices, offsets, per_sample_weights, padding_idx)
    ]
    masks = torch.cat([mask.flatten() for mask, _ in results])
    return masks, _join_psw([psw for _, psw in results], per_sample_weights, psw_grad)


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
    columns = _columns(grad, embedding_dims)
    tables = split_tiers(list(blocks), list(tier_counts), list(tier_ends))
    states, hyper = _states(state, tier_counts, optimizer, hyper)
    psw = []
    for b in _split(len(tables), indices, offsets, per_sample_weights, padding_idx):
        mine, ends = tables[b.table]
        psw.append(
            update.tiered_embedding_update_(
                mine,
                states[b.table],
                columns[b.table],
                ends,
                b.indices,
                b.offsets,
                b.weights,
                embedding_dims[b.table],
                mode,
                b.padding,
                True,
                psw_grad,
                optimizer,
                hyper,
            )
        )
    return _join_psw(psw, per_sample_weights, psw_grad)


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding_bag_tables_backward": masked_embedding_bag_tables_backward,
    "adaptive_embedding_bag_tables_backward": adaptive_embedding_bag_tables_backward,
    "tiered_embedding_bag_tables_backward": tiered_embedding_bag_tables_backward,
    "masked_embedding_bag_tables_update_": masked_embedding_bag_tables_update_,
    "adaptive_embedding_bag_tables_update_": adaptive_embedding_bag_tables_update_,
    "tiered_embedding_bag_tables_update_": tiered_embedding_bag_tables_update_,
}
"""Operator name to implementation."""
