"""Lookups in several tables in one call, so that a model with 26 fields makes one.

The layout is that of FBGEMM's table-batched embeddings: ``T`` tables, ``B`` bags each, and bag
``b`` of table ``t`` holds ``indices[offsets[t * B + b] : offsets[t * B + b + 1]]``, rows of its own
table. The output has the tables' bags side by side, ``[B, D_0 + .. + D_(T-1)]``.

What the three functions share, beyond what ``amtl_kernels.ops`` says of all lookups:

- ``indices``: ``[L]`` int32 or int64, concatenated by table. Those past the last offset are
  ignored.
- ``offsets``: ``[T * B + 1]`` int32 or int64, starting at 0 and never decreasing.
- ``mode``: ``"sum"`` or ``"mean"``, of every table.
- ``per_sample_weights``: ``[L]`` in the type of the tables; only with ``"sum"``. Get a gradient.
- ``padding_idx``: a row of each table that counts for nothing: not in sums, means or gradients.
  One number is meant for every table; a list holds each table's own, None for none, as ``T``
  ``nn.EmbeddingBag`` would. Negative ones count from the end of their table.
- ``bounds_check``: what to do about an index outside its table. The IndexError names the table, and
  counts the position from the table's first index.
- ``optimizer``: one of ``amtl_kernels.optim`` that holds all tables in one group. The backward then
  updates the tables and leaves them without gradients (see ``amtl_kernels.fused``).
- Widths and numbers of rows may differ by table; type and device may not. Gradients of the tables
  are sparse.

On the CPU tables run in parallel, and a call is one sort and one walk a table.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amtl_kernels import _checks
from amtl_kernels._arguments import FOUND_BEFORE, Bags, FewBits, Tables, numbers_of
from amtl_kernels._calls import call
from amtl_kernels._checks import BoundsCheck, Mode
from amtl_kernels.optim import RowOptimizer

Padding = int | Sequence[int | None] | None


def _paddings(padding_idx: Padding, rows: Sequence[int]) -> list[int]:
    every = padding_idx if isinstance(padding_idx, Sequence) else [padding_idx] * len(rows)
    if len(every) != len(rows):
        raise ValueError(f"{len(every)} padding_idx for {len(rows)} tables")
    found = []
    for t, (padding, count) in enumerate(zip(every, rows, strict=True)):
        try:
            found.append(_checks.padding_of(padding, count))
        except (TypeError, ValueError) as error:  # noqa: PERF203
            raise type(error)(f"table {t}: {error}") from None
    return found


def check_bags(
    table: Tensor,
    rows: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    mode: str,
    per_sample_weights: Tensor | None,
    padding_idx: Padding,
) -> Bags:
    """Checks what the forms share, against one of the tables and the number of rows of each."""
    _checks.check_tensor(indices, "indices")
    _checks.check_tensor(offsets, "offsets")
    if indices.dim() != 1 or offsets.dim() != 1:
        raise ValueError("indices and offsets must be 1-D")
    if offsets.shape[0] < 1 or (offsets.shape[0] - 1) % len(rows):
        raise ValueError(f"offsets must hold {len(rows)} * B + 1 values, got {offsets.shape[0]}")
    paddings = _paddings(padding_idx, rows)
    return _checks.pooled(table, indices, offsets, mode, per_sample_weights, paddings, True)


def check_weights(weights: Sequence[Tensor], **others: Sequence[Tensor]) -> list[int]:
    """Checks dense tables, and that the other lists are as long; the rows of each table."""
    for name, values in {"weights": weights, **others}.items():
        _checks.check_list(values, name, "tensors")
    lengths = {name: len(other) for name, other in others.items()}
    if not weights or set(lengths.values()) != {len(weights)}:
        raise ValueError(f"{len(weights)} tables with {lengths}: one of each per table is needed")
    for t, weight in enumerate(weights):
        _checks.check_table(weight, f"weights[{t}]")
        if weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise ValueError(f"weights[{t}] differs from weights[0] in type or device")
    return [weight.shape[0] for weight in weights]


def check_row_dims(weights: Sequence[Tensor], row_dims: Sequence[Tensor]) -> list[Tensor]:
    """Checks the sizes of every table's rows."""
    return [
        _checks.check_sizes(sizes, f"row_dims[{t}]", weight.shape[0], weight.device, 1)
        for t, (weight, sizes) in enumerate(zip(weights, row_dims, strict=True))
    ]


def check_groups(
    weights: Sequence[Tensor],
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    group_masks: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Checks every table's groups: groups of rows, sizes of groups."""
    pairs = []
    for t, table in enumerate(zip(weights, row_groups, group_dims, group_masks, strict=True)):
        try:
            pairs.append(_checks.check_groups(*table))
        except (TypeError, ValueError) as error:  # noqa: PERF203
            raise type(error)(f"table {t}: {error}") from None
    return [groups for groups, _ in pairs], [sizes for _, sizes in pairs]


def check_tiers(
    blocks: Sequence[Sequence[Tensor]],
    tier_ends: Sequence[Sequence[int]],
    embedding_dims: Sequence[int] | None,
    steps: Sequence[Tensor] | None = None,
    bits: int | Sequence[int] | None = None,
    step_ends: Sequence[Sequence[int]] | None = None,
) -> tuple[Tables, FewBits | None]:
    """Checks every table's tiers, and concatenates them, and what makes numbers of few bits."""
    _checks.check_list(blocks, "blocks", "lists of tensors")
    _checks.check_list(tier_ends, "tier_ends", "lists of whole numbers")
    given: Sequence[int | None] = embedding_dims or [None] * len(blocks)
    _checks.check_list(given, "embedding_dims", "whole numbers")
    if not blocks or {len(tier_ends), len(given)} != {len(blocks)}:
        raise ValueError("one list of blocks, one of tier_ends and one width per table are needed")
    dims = []
    every_steps, every_bits, every_ends = _of_each(steps, bits, step_ends, len(blocks))
    few = FewBits([], [], None if step_ends is None else [])
    for t, (mine, ends, dim) in enumerate(zip(blocks, tier_ends, given, strict=True)):
        try:
            found = _checks.few_bits(mine, every_steps[t], every_bits[t], every_ends[t])
            dims.append(_checks.check_tiers(mine, ends, dim, every_bits[t]))
            if found is not None:
                few.steps.extend(found.steps)
                few.bits.extend(found.bits)
                if few.step_ends is not None:
                    few.step_ends.extend(found.step_ends or ())
        except (TypeError, ValueError) as error:
            raise type(error)(f"table {t}: {error}") from None
        if mine[0].dtype != blocks[0][0].dtype or mine[0].device != blocks[0][0].device:
            raise ValueError(f"table {t} differs from table 0 in type or device")
    tables = Tables(
        [block for mine in blocks for block in mine], [len(mine) for mine in blocks], dims
    )
    return tables, few if few.bits else None


def _of_each(
    steps: Sequence[Tensor] | None,
    bits: int | Sequence[int] | None,
    step_ends: Sequence[Sequence[int]] | None,
    count: int,
) -> tuple[Sequence[Tensor | None], Sequence[int | None], Sequence[Sequence[int] | None]]:
    """Step sizes, bits and ends of parts of each table."""
    every_steps: Sequence[Tensor | None] = [None] * count
    if steps is not None:
        _checks.check_list(steps, "steps", "tensors")
        every_steps = steps
    every_bits = bits if isinstance(bits, Sequence) else [bits] * count
    if len(every_steps) != count or len(every_bits) != count:
        raise ValueError(f"{len(every_steps)} steps and {len(every_bits)} bits for {count} tables")
    every_ends: Sequence[Sequence[int] | None] = [None] * count
    if step_ends is not None:
        _checks.check_list(step_ends, "step_ends", "lists of whole numbers")
        every_ends = step_ends
    if len(every_ends) != count:
        raise ValueError(f"{len(every_ends)} step_ends for {count} tables")
    return every_steps, every_bits, every_ends


# How errors begin that no table is named in.
_OF_ALL_TABLES = ("offsets", "the tables of a fused lookup")


def _call(
    tables: Tables,
    masks: Sequence[Tensor],
    bags: Bags,
    bounds_check: str,
    optimizer: RowOptimizer | None,
    few: FewBits | None = None,
) -> Tensor:
    """Looks up; the operators name a table in errors only where there are several."""
    arguments = (tables, masks, bags, _checks.bounds_of(bounds_check), True, optimizer, few)
    if len(tables.block_counts) > 1:
        return call(*arguments)
    try:
        return call(*arguments)
    except (IndexError, ValueError) as error:
        if str(error).startswith(_OF_ALL_TABLES) or str(error).endswith(FOUND_BEFORE):
            raise
        raise type(error)(f"table 0: {error}") from None


def masked_embedding_bag_tables(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    row_dims: Sequence[Tensor],
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: Padding = None,
    bounds_check: BoundsCheck = "raise",
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """:func:`masked_embedding_bag` of ``T`` tables in one call.

    Args:
        weights: ``T`` tables ``[N_t, D_t]``.
        indices: ``[L]`` rows, concatenated by table (see the module).
        offsets: ``[T * B + 1]``.
        row_dims: ``T`` times ``[N_t]`` uint8 or int32, kept sizes in ``0..D_t``.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; only with ``"sum"``. Gets a gradient.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        bounds_check: What to do about an index outside its table.
        optimizer: What updates the tables in the backward, if anything does.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]`` in the type of the tables.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, offsets are not in order, or a size is out
            of its range.

    Cost: that of ``T`` calls of :func:`masked_embedding_bag`, less their overhead.
    """
    rows = check_weights(weights, row_dims=row_dims)
    bags = check_bags(weights[0], rows, indices, offsets, mode, per_sample_weights, padding_idx)
    sizes = check_row_dims(weights, row_dims)
    tables = Tables(list(weights), [1] * len(weights), sizes=sizes)
    return _call(tables, [], bags, bounds_check, optimizer)


def adaptive_embedding_bag_tables(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    row_groups: Sequence[Tensor],
    group_dims: Sequence[Tensor],
    group_masks: Sequence[Tensor],
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: Padding = None,
    seed: int = 0,
    bounds_check: BoundsCheck = "raise",
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """:func:`adaptive_embedding_bag` of ``T`` tables in one call.

    Args:
        weights: ``T`` tables ``[N_t, D_t]``.
        indices: ``[L]`` rows, concatenated by table (see the module).
        offsets: ``[T * B + 1]``.
        row_groups: ``T`` times ``[N_t]`` int32.
        group_dims: ``T`` times ``[G_t]`` or ``[G_t, Q_t]`` uint8 or int32, sizes in ``0..D_t``.
        group_masks: ``T`` times ``[G_t, D_t]`` soft masks, which get their gradients (as views of
            one tensor).
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; only with ``"sum"``. Gets a gradient.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        seed: Chooses the size column of each row, in every table.
        bounds_check: What to do about an index outside its table.
        optimizer: What updates the tables in the backward, if anything does.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]`` in the type of the tables.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, offsets are not in order, or a group or
            size is out of its range.

    Cost: that of ``T`` calls of :func:`adaptive_embedding_bag`, less their overhead.
    """
    rows = check_weights(
        weights, row_groups=row_groups, group_dims=group_dims, group_masks=group_masks
    )
    groups, sizes = check_groups(weights, row_groups, group_dims, group_masks)
    bags = check_bags(weights[0], rows, indices, offsets, mode, per_sample_weights, padding_idx)
    counts = [1] * len(weights)
    tables = Tables(list(weights), counts, sizes=sizes, row_groups=groups, seed=seed)
    return _call(tables, group_masks, bags, bounds_check, optimizer)


def tiered_embedding_bag_tables(
    blocks: Sequence[Sequence[Tensor]],
    tier_ends: Sequence[Sequence[int]],
    indices: Tensor,
    offsets: Tensor,
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    embedding_dims: Sequence[int] | None = None,
    padding_idx: Padding = None,
    bounds_check: BoundsCheck = "raise",
    optimizer: RowOptimizer | None = None,
    steps: Sequence[Tensor] | None = None,
    bits: int | Sequence[int] | None = None,
    step_ends: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """:func:`tiered_embedding_bag` of ``T`` tables in one call.

    Args:
        blocks: For each table its tiers ``[n_c, w_c]`` with ``0 <= w_c <= D_t``.
        tier_ends: For each table the first row after each tier.
        indices: ``[L]`` rows, concatenated by table (see the module).
        offsets: ``[T * B + 1]``.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: ``[L]``; only with ``"sum"``. Gets a gradient.
        embedding_dims: ``T`` widths ``D_t``; each table's widest block by default.
        padding_idx: A row that counts for nothing: one for every table, or a list.
        bounds_check: What to do about an index outside its table.
        optimizer: What updates the tables in the backward, if anything does.
        steps: Of tables of few bits (``amtl_kernels.ops``), step sizes of each table: float32
            ``[C_t]``, or ``[P_t]`` with ``step_ends``.
        bits: Of tables of few bits, the bits of a code: 2, 4, 8 or 16, one number or each table's
            own.
        step_ends: For each table the first row after each part that has a step size.

    Returns:
        ``[B, D_0 + .. + D_(T-1)]`` in the type of the blocks; float32 of codes.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, or offsets are not in order.

    Cost: that of ``T`` calls of :func:`tiered_embedding_bag`, less their overhead.
    """
    tables, few = check_tiers(blocks, tier_ends, embedding_dims, steps, bits, step_ends)
    rows = [ends[-1] for ends in tier_ends]
    like = numbers_of(tables.blocks, None if few is None else few.steps[0])
    bags = check_bags(like, rows, indices, offsets, mode, per_sample_weights, padding_idx)
    return _call(tables, [], bags, bounds_check, optimizer, few)
