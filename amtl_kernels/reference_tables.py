"""Several tables in one call, in plain PyTorch: the single-table operators side by side.

The functions take the arguments of the operator of the same name (``amtl_kernels._schema``). Each
table is looked up by whatever backend answers the single-table operators, so this is also how a
backend without kernels of its own for several tables does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from amtl_kernels.reference import check_offsets, split_state, update_rows

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Bags:
    """The bags of one table: its indices, offsets ``[B + 1]`` that start at 0, weights, padding."""

    table: int
    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    padding: int


def split_bags(
    tables: int,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    padding_idx: list[int],
) -> Iterator[Bags]:
    """Every table's own bags."""
    check_offsets(offsets, indices.numel())
    bags = (offsets.numel() - 1) // tables
    for t in range(tables):
        mine = offsets[t * bags : (t + 1) * bags + 1]
        part = slice(int(mine[0]), int(mine[-1]))
        weights = None if per_sample_weights is None else per_sample_weights[part].contiguous()
        begins = (mine - mine[0]).contiguous()
        yield Bags(t, indices[part].contiguous(), begins, weights, padding_idx[t])


def split_tiers(
    blocks: list[Tensor], tier_counts: list[int], tier_ends: list[int]
) -> list[tuple[list[Tensor], list[int]]]:
    """Every table's own blocks and ends."""
    tables, first = [], 0
    for count in tier_counts:
        part = slice(first, first + count)
        tables.append((blocks[part], tier_ends[part]))
        first += count
    return tables


def _for_each(table: Callable[[Bags], _Result], every: Iterator[Bags]) -> list[_Result]:
    """Every table's result; errors name the table."""
    results = []
    for bags in every:
        try:
            results.append(table(bags))
        except (IndexError, ValueError) as error:  # noqa: PERF203
            raise type(error)(f"table {bags.table}: {error}") from None
    return results


def _one_by_one(
    backward: Callable[[Tensor, Bags], tuple[Any, ...]],
    grad: Tensor,
    dims: list[int],
    every: Iterator[Bags],
    psw_grad: bool,
    per_sample_weights: Tensor | None,
) -> tuple[list[tuple[Any, ...]], Tensor]:
    """Every table's results, and the gradient of all per-sample weights."""
    columns = grad.split(dims, 1)
    results = _for_each(lambda b: backward(columns[b.table].contiguous(), b), every)
    if not psw_grad or per_sample_weights is None:
        return results, grad.new_empty(0)
    psw = torch.zeros_like(per_sample_weights)
    found = torch.cat([result[-1] for result in results])
    psw[: found.numel()] = found
    return results, psw


def masked_embedding_bag_tables(
    weights: list[Tensor],
    row_dims: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    bounds_check: int,
) -> Tensor:
    """``masked_embedding_bag`` of every table, side by side."""
    op = torch.ops.amtl.masked_embedding_bag

    def lookup(b: Bags) -> Tensor:
        t, pooled = b.table, (b.weights, mode, b.padding, True, bounds_check)
        out: Tensor = op(weights[t], b.indices, b.offsets, row_dims[t], *pooled)
        return out

    every = split_bags(len(weights), indices, offsets, per_sample_weights, padding_idx)
    return torch.cat(_for_each(lookup, every), 1)


def adaptive_embedding_bag_tables(
    weights: list[Tensor],
    row_groups: list[Tensor],
    group_dims: list[Tensor],
    group_masks: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    seed: int,
    bounds_check: int,
) -> Tensor:
    """``adaptive_embedding_bag`` of every table, side by side."""
    op = torch.ops.amtl.adaptive_embedding_bag

    def lookup(b: Bags) -> Tensor:
        t, pooled = b.table, (b.weights, mode, b.padding, True, seed, bounds_check)
        groups = (row_groups[t], group_dims[t], group_masks[t])
        out: Tensor = op(weights[t], b.indices, b.offsets, *groups, *pooled)
        return out

    every = split_bags(len(weights), indices, offsets, per_sample_weights, padding_idx)
    return torch.cat(_for_each(lookup, every), 1)


def tiered_embedding_bag_tables(
    blocks: list[Tensor],
    tier_counts: list[int],
    tier_ends: list[int],
    embedding_dims: list[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    bounds_check: int,
) -> Tensor:
    """``tiered_embedding_bag`` of every table, side by side."""
    op = torch.ops.amtl.tiered_embedding_bag
    tables = split_tiers(blocks, tier_counts, tier_ends)

    def lookup(b: Bags) -> Tensor:
        t, pooled = b.table, (mode, b.padding, True, bounds_check)
        out: Tensor = op(*tables[t], b.indices, b.offsets, b.weights, embedding_dims[t], *pooled)
        return out

    every = split_bags(len(tables), indices, offsets, per_sample_weights, padding_idx)
    return torch.cat(_for_each(lookup, every), 1)


def masked_embedding_bag_tables_backward(
    grad: Tensor,
    weights: list[Tensor],
    row_dims: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``masked_embedding_backward`` of every table."""
    op = torch.ops.amtl.masked_embedding_backward

    def backward(delta: Tensor, b: Bags) -> tuple[Any, ...]:
        t, pooled = b.table, (b.weights, mode, b.padding, True, weight_grad, psw_grad)
        found: tuple[Any, ...] = op(delta, weights[t], b.indices, b.offsets, row_dims[t], *pooled)
        return found

    every = split_bags(len(weights), indices, offsets, per_sample_weights, padding_idx)
    dims = [weight.shape[1] for weight in weights]
    results, psw = _one_by_one(backward, grad, dims, every, psw_grad, per_sample_weights)
    return [r[0] for r in results], [r[1] for r in results], psw


def adaptive_embedding_bag_tables_backward(
    grad: Tensor,
    weights: list[Tensor],
    row_groups: list[Tensor],
    group_dims: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    seed: int,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """``adaptive_embedding_backward`` of every table; mask gradients flat, table after table."""
    op = torch.ops.amtl.adaptive_embedding_backward

    def backward(delta: Tensor, b: Bags) -> tuple[Any, ...]:
        t, groups = b.table, (row_groups[b.table], group_dims[b.table])
        pooled = (b.weights, mode, b.padding, True, seed, weight_grad, mask_grad, psw_grad)
        found: tuple[Any, ...] = op(delta, weights[t], b.indices, b.offsets, *groups, *pooled)
        return found

    every = split_bags(len(weights), indices, offsets, per_sample_weights, padding_idx)
    dims = [weight.shape[1] for weight in weights]
    results, psw = _one_by_one(backward, grad, dims, every, psw_grad, per_sample_weights)
    masks = torch.cat([r[2].flatten() for r in results])
    return [r[0] for r in results], [r[1] for r in results], masks, psw


def tiered_embedding_bag_tables_backward(
    grad: Tensor,
    blocks: list[Tensor],
    tier_counts: list[int],
    tier_ends: list[int],
    embedding_dims: list[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: list[int],
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``tiered_embedding_backward`` of every table; one entry per block of all tables."""
    op = torch.ops.amtl.tiered_embedding_backward
    tables = split_tiers(blocks, tier_counts, tier_ends)

    def backward(delta: Tensor, b: Bags) -> tuple[Any, ...]:
        t, pooled = b.table, (mode, b.padding, True, weight_grad, psw_grad)
        lookups = (b.indices, b.offsets, b.weights, embedding_dims[t])
        found: tuple[Any, ...] = op(delta, *tables[t], *lookups, *pooled)
        return found

    every = split_bags(len(tables), indices, offsets, per_sample_weights, padding_idx)
    results, psw = _one_by_one(backward, grad, embedding_dims, every, psw_grad, per_sample_weights)
    rows = [row for result in results for row in result[0]]
    return rows, [grads for result in results for grads in result[1]], psw


def _updating(op: str, tables: int, wants: int) -> Callable[..., Any]:
    """The fused form: the backward ``op``, then the optimizer's update of every table or block.

    Args:
        op: The lookup's name.
        tables: How many of its leading arguments describe the tables.
        wants: How many flags say which other gradients are wanted.
    """

    def update(*arguments: Any) -> Any:
        *described, state, grad = arguments[: tables + 2]
        *rest, optimizer, hyper = arguments[tables + 2 :]
        bags, flags = rest[:-wants], rest[-wants:]
        backward = getattr(torch.ops.amtl, f"{op}_backward")
        rows, grads, *others = backward(grad, *described, *bags, True, *flags)
        weights = described[0]
        states, hyper = split_state(len(weights), state, optimizer, hyper)
        for t, weight in enumerate(weights):
            update_rows(weight, states[t], rows[t], grads[t], optimizer, hyper)
        return others[0] if len(others) == 1 else tuple(others)

    return update


IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "masked_embedding_bag_tables": masked_embedding_bag_tables,
    "adaptive_embedding_bag_tables": adaptive_embedding_bag_tables,
    "tiered_embedding_bag_tables": tiered_embedding_bag_tables,
    "masked_embedding_bag_tables_backward": masked_embedding_bag_tables_backward,
    "adaptive_embedding_bag_tables_backward": adaptive_embedding_bag_tables_backward,
    "tiered_embedding_bag_tables_backward": tiered_embedding_bag_tables_backward,
    "masked_embedding_bag_tables_update_": _updating("masked_embedding_bag_tables", 2, 1),
    "adaptive_embedding_bag_tables_update_": _updating("adaptive_embedding_bag_tables", 3, 2),
    "tiered_embedding_bag_tables_update_": _updating("tiered_embedding_bag_tables", 4, 1),
}
"""Operator name to reference."""
