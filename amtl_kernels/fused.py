"""Lookups whose backward updates the table: no gradient of the table is ever stored.

Each function is its namesake in ``amtl_kernels`` with one more argument, an optimizer of
``amtl_kernels.optim`` that holds the table. ``backward()`` applies the update to a row as
soon as the row's gradient is summed, so that weight and state pass through the cache once;
``table.grad`` stays None, and a later ``optimizer.step()`` finds nothing to do for the table (and
updates the optimizer's other parameters as usual). Learning rate and state are the optimizer's own:
schedulers, ``state_dict`` and checkpoints work as they do without fusing.

The gradient is not rounded to the table's type before the update, and the kept prefix is the row's
size, where a separate step ends at the last non-zero gradient. What the caller gives up:
gradients cannot be accumulated over several backwards, nor clipped by a norm over all parameters.
Several lookups in one table within one backward update it one after the other. The functions are
for eager mode; ``torch.compile`` breaks the graph at them.

On a GPU a step waits for nothing but the bounds check of its lookup (``bounds_check="off"`` leaves
that out), so it can be captured into a CUDA graph: warm up with a step first, which makes the state
and looks whether ``row_group`` is in order, and give the optimizer ``capturable=True``. Row-wise
Adagrad on rows of more than 6,144 columns is the exception: it makes row gradients, whose number
the host must know.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amtl_kernels import tables
from amtl_kernels._fused_calls import (
    Adaptive,
    Bags,
    Masked,
    SeveralTables,
    Tiered,
    first_block,
    run,
    run_tables,
)
from amtl_kernels.ops import BoundsCheck, Mode
from amtl_kernels.optim import RowOptimizer


def masked_embedding(
    weight: Tensor,
    indices: Tensor,
    row_dims: Tensor,
    *,
    optimizer: RowOptimizer,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.masked_embedding` whose backward updates ``weight``.

    Args:
        weight: ``[N, D]`` table, a parameter of ``optimizer``.
        indices: Rows, any shape.
        row_dims: ``[N]`` kept sizes.
        optimizer: What updates the table.
        padding_idx: A row that is not updated.
        bounds_check: What to do about an index out of range.

    Returns:
        ``indices.shape + [D]``.

    Raises:
        ValueError: ``weight`` is not a parameter of ``optimizer``; else as the namesake.
    """
    bags = Bags.plain(weight, indices)
    return run(Masked(weight, optimizer, row_dims, bags, padding_idx, bounds_check), None, None)


def masked_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.masked_embedding_bag` whose backward updates ``weight``.

    Args:
        weight: ``[N, D]`` table, a parameter of ``optimizer``.
        indices: ``[L]`` or ``[B, l]``.
        offsets: ``[B]``, or ``[B + 1]`` with ``include_last_offset``.
        row_dims: ``[N]`` kept sizes.
        optimizer: What updates the table.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices``; gets its gradient as usual.
        padding_idx: A row that counts for nothing.
        include_last_offset: Whether ``offsets`` end with the end of the last bag.
        bounds_check: What to do about an index out of range.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: ``weight`` is not a parameter of ``optimizer``; else as the namesake.
    """
    bags = Bags.pooled(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    call = Masked(weight, optimizer, row_dims, bags, padding_idx, bounds_check)
    return run(call, None, bags.weights)


def adaptive_embedding(
    weight: Tensor,
    indices: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    *,
    optimizer: RowOptimizer,
    seed: int = 0,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.adaptive_embedding` whose backward updates ``weight``.

    Args:
        weight: ``[N, D]`` table, a parameter of ``optimizer``.
        indices: Rows, any shape.
        row_group: ``[N]`` int32 groups.
        group_dims: ``[G]`` or ``[G, Q]`` kept sizes.
        group_mask: ``[G, D]`` soft mask; gets its gradient as usual.
        optimizer: What updates the table.
        seed: Chooses the size column of each row.
        padding_idx: A row that is not updated.
        bounds_check: What to do about an index out of range.

    Returns:
        ``indices.shape + [D]``.

    Raises:
        ValueError: ``weight`` is not a parameter of ``optimizer``; else as the namesake.
    """
    bags = Bags.plain(weight, indices)
    groups = (row_group, group_dims, group_mask)
    call = Adaptive(weight, optimizer, groups, bags, seed, padding_idx, bounds_check)
    return run(call, group_mask, None)


def adaptive_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    seed: int = 0,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.adaptive_embedding_bag` whose backward updates ``weight``.

    Args:
        weight: ``[N, D]`` table, a parameter of ``optimizer``.
        indices: ``[L]`` or ``[B, l]``.
        offsets: ``[B]``, or ``[B + 1]`` with ``include_last_offset``.
        row_group: ``[N]`` int32 groups.
        group_dims: ``[G]`` or ``[G, Q]`` kept sizes.
        group_mask: ``[G, D]`` soft mask; gets its gradient as usual.
        optimizer: What updates the table.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices``; gets its gradient as usual.
        padding_idx: A row that counts for nothing.
        include_last_offset: Whether ``offsets`` end with the end of the last bag.
        seed: Chooses the size column of each row.
        bounds_check: What to do about an index out of range.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: ``weight`` is not a parameter of ``optimizer``; else as the namesake.
    """
    bags = Bags.pooled(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    groups = (row_group, group_dims, group_mask)
    call = Adaptive(weight, optimizer, groups, bags, seed, padding_idx, bounds_check)
    return run(call, group_mask, bags.weights)


def tiered_embedding(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    *,
    optimizer: RowOptimizer,
    embedding_dim: int | None = None,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.tiered_embedding` whose backward updates the blocks.

    Args:
        blocks: Tables ``[n_c, w_c]``, parameters of one group of ``optimizer``.
        tier_ends: First row after each tier.
        indices: Rows, any shape.
        optimizer: What updates the blocks.
        embedding_dim: Width of the output; the widest block's by default.
        padding_idx: A row that is not updated.
        bounds_check: What to do about an index out of range.

    Returns:
        ``indices.shape + [D]``.

    Raises:
        ValueError: The blocks are not parameters of one group of ``optimizer``; else as the
            namesake.
    """
    bags = Bags.plain(first_block(blocks), indices, "blocks[0]")
    call = Tiered(blocks, optimizer, tier_ends, bags, embedding_dim, padding_idx, bounds_check)
    return run(call, None, None)


def tiered_embedding_bag(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    embedding_dim: int | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.tiered_embedding_bag` whose backward updates the blocks.

    Args:
        blocks: Tables ``[n_c, w_c]``, parameters of one group of ``optimizer``.
        tier_ends: First row after each tier.
        indices: ``[L]`` or ``[B, l]``.
        offsets: ``[B]``, or ``[B + 1]`` with ``include_last_offset``.
        optimizer: What updates the blocks.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices``; gets its gradient as usual.
        embedding_dim: Width of the output; the widest block's by default.
        padding_idx: A row that counts for nothing.
        include_last_offset: Whether ``offsets`` end with the end of the last bag.
        bounds_check: What to do about an index out of range.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: The blocks are not parameters of one group of ``optimizer``; else as the
            namesake.
    """
    first = first_block(blocks)
    weights = (per_sample_weights, include_last_offset)
    bags = Bags.pooled(first, indices, offsets, mode, *weights, "blocks[0]")
    call = Tiered(blocks, optimizer, tier_ends, bags, embedding_dim, padding_idx, bounds_check)
    return run(call, None, bags.weights)


def masked_embedding_bag_tables(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    row_dims: Sequence[Tensor],
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: tables.Padding = None,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.masked_embedding_bag_tables` whose backward updates the tables.

    Args:
        weights: ``T`` tables ``[N_t, D_t]``, parameters of one group of ``optimizer``.
        indices: ``[L]`` rows, concatenated by table.
        offsets: ``[T * B + 1]``.
        row_dims: ``T`` times ``[N_t]`` kept sizes.
        optimizer: What updates the tables.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; gets its gradient as usual.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        bounds_check: What to do about an index outside its table.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]``.

    Raises:
        ValueError: The tables are not parameters of one group of ``optimizer``; else as the
            namesake.
    """
    rows = tables.check_weights(weights, row_dims=row_dims)
    bags = tables.check_bags(
        weights[0], rows, indices, offsets, mode, per_sample_weights, padding_idx
    )
    described = (tables.check_row_dims(weights, row_dims),)
    op = "masked_embedding_bag_tables"
    return run_tables(SeveralTables(op, optimizer, weights, described, rows, bags, bounds_check))


def adaptive_embedding_bag_tables(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    group_masks: Sequence[Tensor],
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: tables.Padding = None,
    seed: int = 0,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.adaptive_embedding_bag_tables` whose backward updates the tables.

    Args:
        weights: ``T`` tables ``[N_t, D_t]``, parameters of one group of ``optimizer``.
        indices: ``[L]`` rows, concatenated by table.
        offsets: ``[T * B + 1]``.
        row_groups: ``T`` times ``[N_t]`` int32.
        group_dims: ``T`` times ``[G_t]`` or ``[G_t, Q_t]``.
        group_masks: ``T`` times ``[G_t, D_t]``; get their gradients as usual.
        optimizer: What updates the tables.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; gets its gradient as usual.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        seed: Chooses the size column of each row.
        bounds_check: What to do about an index outside its table.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]``.

    Raises:
        ValueError: The tables are not parameters of one group of ``optimizer``; else as the
            namesake.
    """
    rows = tables.check_weights(
        weights, row_groups=row_groups, group_dims=group_dims, group_masks=group_masks
    )
    bags = tables.check_bags(
        weights[0], rows, indices, offsets, mode, per_sample_weights, padding_idx
    )
    described = tables.check_groups(weights, row_groups, group_dims, group_masks)
    op, masks = "adaptive_embedding_bag_tables", group_masks
    return run_tables(
        SeveralTables(op, optimizer, weights, described, rows, bags, bounds_check, masks, [seed])
    )


def tiered_embedding_bag_tables(
    blocks: Sequence[Sequence[Tensor]],
    tier_ends: Sequence[Sequence[int]],
    indices: Tensor,
    offsets: Tensor,
    *,
    optimizer: RowOptimizer,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    embedding_dims: Sequence[int] | None = None,
    padding_idx: tables.Padding = None,
    bounds_check: BoundsCheck = "raise",
) -> Tensor:
    """:func:`amtl_kernels.tiered_embedding_bag_tables` whose backward updates the blocks.

    Args:
        blocks: For each table its tiers ``[n_c, w_c]``, all parameters of one group of
            ``optimizer``.
        tier_ends: For each table the first row after each tier.
        indices: ``[L]`` rows, concatenated by table.
        offsets: ``[T * B + 1]``.
        optimizer: What updates the blocks.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; gets its gradient as usual.
        embedding_dims: ``T`` widths; each table's widest block by default.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        bounds_check: What to do about an index outside its table.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]``.

    Raises:
        ValueError: The blocks are not parameters of one group of ``optimizer``; else as the
            namesake.
    """
    tiers = tables.check_tiers(blocks, tier_ends, embedding_dims)
    flat, *described = tiers.arguments()
    bags = tables.check_bags(
        flat[0], tiers.rows, indices, offsets, mode, per_sample_weights, padding_idx
    )
    op = "tiered_embedding_bag_tables"
    call = SeveralTables(op, optimizer, flat, tuple(described), tiers.rows, bags, bounds_check)
    return run_tables(call)
