"""The public lookups. Semantics follow ``torch.nn.functional.embedding`` and ``embedding_bag``.

Names used in the docstrings: ``N`` rows, ``D`` columns, ``G`` groups, ``Q`` size columns, ``L``
lookups (``indices.numel()``), ``B`` bags, ``U`` distinct rows among the lookups, ``k_i`` the kept
size of row ``i``, ``k_mean`` its mean over the lookups.

What all of them share:

- Weights are float32, float16 or bfloat16 (the reference backend also takes float64) and
  contiguous. Sums accumulate in float32 and are rounded once.
- A row of size 0 keeps nothing: it is zeros, counted in a bag's mean like any other, and no update
  touches it or its state; the mask gradient it adds to is that of any row.
- Indices are int32 or int64 of any shape, offsets either of the two; no index is negative.
  Positions past the last offset are ignored, whatever is there.
- Results are the same from run to run, bit for bit, on one processor or one model of GPU. Sums are
  taken in an order that depends on shapes alone, so two models differ only where their compiled
  code rounds differently; nobody has compared two.
- ``bounds_check``: ``"raise"`` (an IndexError naming value, position and N), ``"clamp"`` (into
  ``0..N-1``, with one warning per process) or ``"off"`` (the caller vouches for indices, offsets,
  sizes and groups: a GPU looks at none of them). On a CPU a lookup raises before it returns. On a
  GPU, whatever the kernels, no lookup waits: bad indices are moved into range (and get no gradient
  unless they were to be clamped), bad offsets and sizes are cut to what exists, and the error or
  warning comes with the first call of this package that finds it known,
  ``amtl_kernels.synchronize()`` at the latest. That first call does nothing else, but updates that
  ran before it have happened. Lookups captured into a CUDA graph are checked at every replay; one
  lookup must have run before the capture.
- ``sparse=True`` gives the table a coalesced sparse COO gradient with ``U`` rows, and nothing of
  size ``N * D`` is allocated; ``sparse=False`` gives a dense ``[N, D]`` gradient, for optimizers
  that refuse sparse ones.
- ``steps`` and ``bits``: a table of tiers may be one of few bits. Its numbers have codes ``u`` in
  ``0..2**bits - 1`` of 2, 4, 8 or 16 bits, which stand for ``(u - half) * step`` with ``half =
  (2**bits - 1) / 2``, computed in float32 in this order.

  - Blocks of uint8 ``[n_c, w_c * bits / 8]`` hold the codes, the first in a byte's lowest bits; a
    code of 16 bits is two bytes, the lower one first, at any address. The output is float32, and so
    are ``per_sample_weights``. Such a table has no gradient: without ``optimizer`` it is a
    constant. :class:`~amtl_kernels.optim.SGD` and :class:`~amtl_kernels.optim.RowwiseAdagrad`
    update it in the backward: a looked-up row is decoded, updated as one of floats, and encoded
    again, each number ``x`` as one of the two codes around it: ``floor(p) + 1`` with probability
    ``p - floor(p)``, else ``floor(p)``, of ``p = clamp(x / step + half, 0, 2 * half)``. So the mean
    is kept, and updates far below a step size still add up (ALPT, arXiv 2212.05735). The random
    bits are a hash of the row in its block, the column and the optimizer's step: results repeat bit
    for bit. A NaN becomes code 0.
  - Blocks of floats are rounded as they are read: a number ``x`` becomes what its code ``u =
    clamp(round(x / step + half), 0, 2 * half)`` stands for, in float32 and with ties to even; zeros
    behind a row stay zeros, a NaN stays NaN. Gradients pass straight through, as if nothing had
    been rounded, with ``optimizer`` as without.

  ``steps`` holds a step size for each tier, ``[C]``, or, with ``step_ends``, for parts of them:
  ``step_ends[p]`` is the first row after part ``p``, and every tier ends with a part. Gradients of
  ``per_sample_weights`` are those of the rounded numbers; several tables of few bits give none.
- ``optimizer``: one of ``amtl_kernels.optim`` that holds the table. The backward then updates the
  table and leaves it without a gradient (``amtl_kernels.fused`` says what that means); ``sparse``
  has no effect.
- An argument of another kind than asked for is a TypeError that names it.
- ``torch.compile(fullgraph=True)`` traces them, gradients included. They can be differentiated
  once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amtl_kernels._arguments import Tables
from amtl_kernels._calls import call
from amtl_kernels._checks import (
    BoundsCheck,
    Mode,
    bounds_of,
    check_groups,
    check_indices,
    check_sizes,
    check_table,
    padding_of,
    plain,
    pooled,
)
from amtl_kernels.optim import RowOptimizer
from amtl_kernels.tiered import TieredTable


def masked_embedding(
    weight: Tensor,
    indices: Tensor,
    row_dims: Tensor,
    *,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """Looks rows up and keeps a prefix of each: ``e_i * m_i`` of the paper's mask (section 3.2).

    ``out[.., j] = weight[i, j] if j < row_dims[i] else 0``; the gradient of ``weight`` is the sum
    of the incoming gradients over the lookups of a row, masked alike.

    Args:
        weight: ``[N, D]`` table.
        indices: Rows, any shape, int32 or int64.
        row_dims: ``[N]`` uint8 or int32, kept size of each row, in ``0..D``.
        padding_idx: A row that gets no gradient; its value is looked up as usual.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradient of ``weight`` is sparse (see the module).
        optimizer: What updates ``weight`` in the backward, if anything does (see the module).

    Returns:
        ``indices.shape + [D]`` in the type of ``weight``.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, or a size is outside ``0..D``.

    Cost: ``O(L * D)``; moves ``L * (k_mean + D)`` values and ``L`` sizes.
    """
    check_table(weight)
    indices = check_indices(indices, weight.device)
    row_dims = check_sizes(row_dims, "row_dims", weight.shape[0], weight.device, 1)
    bags = plain(indices, padding_of(padding_idx, weight.shape[0]))
    tables = Tables([weight], [1], sizes=[row_dims])
    return call(tables, [], bags, bounds_of(bounds_check), sparse, optimizer)


def masked_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """Looks rows up, keeps a prefix of each and pools them by bag.

    ``out[b] = sum over the lookups p of bag b of s_p * (m_i * weight[i])``, ``i = indices[p]``;
    ``s`` are the per-sample weights, or one over the bag's length for ``mode="mean"``.

    Args:
        weight: ``[N, D]`` table.
        indices: ``[L]`` rows, or ``[B, l]`` for bags of equal length (then ``offsets`` is None).
        offsets: ``[B]`` first position of every bag (``[B + 1]`` with ``include_last_offset``),
            int32 or int64, starting at 0 and never decreasing. Empty bags give zeros.
        row_dims: ``[N]`` uint8 or int32, kept size of each row, in ``0..D``.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices`` and type of ``weight``; only with ``"sum"``. Gets
            a gradient.
        padding_idx: A row that counts for nothing: not in sums, means or gradients.
        include_last_offset: Whether ``offsets`` end with the end of the last bag; positions past
            that end are ignored.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradient of ``weight`` is sparse (see the module).
        optimizer: What updates ``weight`` in the backward, if anything does (see the module).

    Returns:
        ``[B, D]`` in the type of ``weight``.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, offsets are not in order, or a size is
            outside ``0..D``.

    Cost: ``O(L * k_mean + B * D)``; moves ``L * k_mean + B * D`` values and ``L`` sizes.
    """
    check_table(weight)
    padding = [padding_of(padding_idx, weight.shape[0])]
    weights = (per_sample_weights, padding, include_last_offset)
    bags = pooled(weight, indices, offsets, mode, *weights)
    row_dims = check_sizes(row_dims, "row_dims", weight.shape[0], weight.device, 1)
    tables = Tables([weight], [1], sizes=[row_dims])
    return call(tables, [], bags, bounds_of(bounds_check), sparse, optimizer)


def adaptive_embedding(
    weight: Tensor,
    indices: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    *,
    seed: int = 0,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """Looks rows up under masks that are being learned.

    Row ``i`` keeps ``k_i = group_dims[row_group[i]]`` values, or, when ``group_dims`` has ``Q``
    columns, ``group_dims[row_group[i], q]`` with ``q`` in ``0..Q-1`` a hash of ``seed`` and ``i``
    (``reference.hash_columns``): the same row has the same size in forward and backward. The values
    of ``group_mask`` are ignored in the forward: it is the soft mask of the straight-through
    estimator, and receives

    ``d out / d group_mask[g, j] = sum of delta_j * weight[i, j]``

    over the lookups of the rows of group ``g`` and over all ``j``, masked ones too, which is what
    lets a row grow again (section 3.3 of the paper).

    Args:
        weight: ``[N, D]`` table.
        indices: Rows, any shape, int32 or int64.
        row_group: ``[N]`` int32, group of each row, in ``0..G-1``.
        group_dims: ``[G]`` or ``[G, Q]`` uint8 or int32, kept sizes, in ``0..D``.
        group_mask: ``[G, D]`` floating-point soft mask; gets the mask gradient.
        seed: Chooses the size column of each row; any 64-bit integer.
        padding_idx: A row that gets no gradient, nor does its mask; its value is looked up as
            usual.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradient of ``weight`` is sparse (see the module).
        optimizer: What updates ``weight`` in the backward, if anything does (see the module).

    Returns:
        ``indices.shape + [D]`` in the type of ``weight``.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, or a group or size is out of its range.

    Cost: ``O(L * D)`` forward; the backward moves ``L * D + U * (D + k_mean)`` values, and sorts
    the ``L`` lookups by row.
    """
    check_table(weight)
    indices = check_indices(indices, weight.device)
    groups, sizes = check_groups(weight, row_group, group_dims, group_mask)
    bags = plain(indices, padding_of(padding_idx, weight.shape[0]))
    tables = Tables([weight], [1], sizes=[sizes], row_groups=[groups], seed=seed)
    return call(tables, [group_mask], bags, bounds_of(bounds_check), sparse, optimizer)


def adaptive_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    seed: int = 0,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
) -> Tensor:
    """:func:`adaptive_embedding`, pooled by bag as in :func:`masked_embedding_bag`.

    In the mask gradient, ``delta`` is what reaches a lookup: the bag's gradient times the
    lookup's per-sample weight, or over the bag's length for ``mode="mean"``.

    Args:
        weight: ``[N, D]`` table.
        indices: ``[L]`` rows, or ``[B, l]`` for bags of equal length (then ``offsets`` is None).
        offsets: ``[B]`` first position of every bag (``[B + 1]`` with ``include_last_offset``).
        row_group: ``[N]`` int32, group of each row, in ``0..G-1``.
        group_dims: ``[G]`` or ``[G, Q]`` uint8 or int32, kept sizes, in ``0..D``.
        group_mask: ``[G, D]`` floating-point soft mask; gets the mask gradient.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices`` and type of ``weight``; only with ``"sum"``.
        padding_idx: A row that counts for nothing: not in sums, means or gradients.
        include_last_offset: Whether ``offsets`` end with the end of the last bag.
        seed: Chooses the size column of each row; any 64-bit integer.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradient of ``weight`` is sparse (see the module).
        optimizer: What updates ``weight`` in the backward, if anything does (see the module).

    Returns:
        ``[B, D]`` in the type of ``weight``.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, offsets are not in order, or a group or
            size is out of its range.

    Cost: ``O(L * k_mean + B * D)`` forward; backward as :func:`adaptive_embedding`.
    """
    check_table(weight)
    padding = [padding_of(padding_idx, weight.shape[0])]
    weights = (per_sample_weights, padding, include_last_offset)
    bags = pooled(weight, indices, offsets, mode, *weights)
    groups, sizes = check_groups(weight, row_group, group_dims, group_mask)
    tables = Tables([weight], [1], sizes=[sizes], row_groups=[groups], seed=seed)
    return call(tables, [group_mask], bags, bounds_of(bounds_check), sparse, optimizer)


def tiered_embedding(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    *,
    embedding_dim: int | None = None,
    padding_idx: int | None = None,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
    steps: Tensor | None = None,
    bits: int | None = None,
    step_ends: Sequence[int] | None = None,
) -> Tensor:
    """Looks rows up in a frozen table that is stored as tiers of equal width.

    Row ``i`` lives in the tier ``c`` with ``tier_ends[c-1] <= i < tier_ends[c]``, at
    ``blocks[c][i - tier_ends[c-1]]``; the output is that, followed by zeros. The row number tells
    the tier, so no size is read, and of a tier of no columns nothing at all.

    Args:
        blocks: Tables ``[n_c, w_c]`` with ``0 <= w_c <= D``, same type and device.
        tier_ends: First row after each tier; the last is ``N``.
        indices: Rows, any shape, int32 or int64.
        embedding_dim: ``D``, width of the output; the widest block's by default.
        padding_idx: A row that gets no gradient; its value is looked up as usual.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradients of the blocks are sparse (see the module).
        optimizer: What updates the blocks in the backward, if anything does (see the module).
        steps: Of a table of few bits, step sizes: float32 ``[C]`` or ``[P]`` (see the module).
        bits: Of a table of few bits, the bits of a code: 2, 4, 8 or 16.
        step_ends: First row after each of ``P`` parts with a step size; by default tiers are parts.

    Returns:
        ``indices.shape + [D]`` in the type of the blocks; float32 of codes.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit.

    Cost: ``O(L * D)``; moves ``L * (w_mean + D)`` values.
    """
    table = TieredTable.of(blocks, tier_ends, embedding_dim, steps, bits, step_ends)
    return table.embedding(
        indices,
        padding_idx=padding_idx,
        bounds_check=bounds_check,
        sparse=sparse,
        optimizer=optimizer,
    )


def tiered_embedding_bag(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: Mode = "sum",
    per_sample_weights: Tensor | None = None,
    embedding_dim: int | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    bounds_check: BoundsCheck = "raise",
    sparse: bool = True,
    optimizer: RowOptimizer | None = None,
    steps: Tensor | None = None,
    bits: int | None = None,
    step_ends: Sequence[int] | None = None,
) -> Tensor:
    """:func:`tiered_embedding`, pooled by bag as in :func:`masked_embedding_bag`.

    Args:
        blocks: Tables ``[n_c, w_c]`` with ``0 <= w_c <= D``, same type and device.
        tier_ends: First row after each tier; the last is ``N``.
        indices: ``[L]`` rows, or ``[B, l]`` for bags of equal length (then ``offsets`` is None).
        offsets: ``[B]`` first position of every bag (``[B + 1]`` with ``include_last_offset``).
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: Shape of ``indices`` and type of the blocks; only with ``"sum"``.
        embedding_dim: ``D``, width of the output; the widest block's by default.
        padding_idx: A row that counts for nothing: not in sums, means or gradients.
        include_last_offset: Whether ``offsets`` end with the end of the last bag.
        bounds_check: What to do about an index outside ``0..N-1`` (see the module).
        sparse: Whether the gradients of the blocks are sparse (see the module).
        optimizer: What updates the blocks in the backward, if anything does (see the module).
        steps: Of a table of few bits, step sizes: float32 ``[C]`` or ``[P]`` (see the module).
        bits: Of a table of few bits, the bits of a code: 2, 4, 8 or 16.
        step_ends: First row after each of ``P`` parts with a step size; by default tiers are parts.

    Returns:
        ``[B, D]`` in the type of the blocks; float32 of codes.

    Raises:
        IndexError: An index is out of range and ``bounds_check="raise"``.
        ValueError: Shapes, types or devices do not fit, or offsets are not in order.

    Cost: ``O(L * w_mean + B * D)``; moves ``L * w_mean + B * D`` values.
    """
    table = TieredTable.of(blocks, tier_ends, embedding_dim, steps, bits, step_ends)
    return table.embedding_bag(
        indices,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        bounds_check=bounds_check,
        sparse=sparse,
        optimizer=optimizer,
    )
