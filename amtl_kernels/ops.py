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
from typing import Literal

import torch
from torch import Tensor

from amtl_kernels._arguments import Bags, FewBits, Tables, are_codes
from amtl_kernels._calls import call, kind
from amtl_kernels.optim import RowOptimizer

BoundsCheck = Literal["raise", "clamp", "off"]
Mode = Literal["sum", "mean"]

_BOUNDS = {"off": 0, "raise": 1, "clamp": 2}
_MODES = {"sum": 0, "mean": 1}
_INDEX_TYPES = (torch.int32, torch.int64)
_SIZE_TYPES = (torch.uint8, torch.int32)
_BITS = (2, 4, 8, 16)
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _fail(message: str) -> None:
    raise ValueError(message)


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}: torch.as_tensor makes one")


def _check_whole(value: object, name: str) -> None:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {kind(value)}")


def _check_list(values: object, name: str, items: str) -> None:
    if isinstance(values, (str, Tensor)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a list of {items}, got {kind(values)}")


def _check_table(weight: Tensor, name: str = "weight", codes: bool = False) -> None:
    _check_tensor(weight, name)
    if weight.dim() != 2:
        _fail(f"{name} must be [N, D], got shape {tuple(weight.shape)}")
    if codes:
        if weight.dtype != torch.uint8:
            _fail(f"{name} must be uint8, the type of codes, got {weight.dtype}")
    elif weight.dtype not in _WEIGHT_TYPES:
        _fail(f"{name} must be float32, float16 or bfloat16, got {weight.dtype}")
    if not weight.is_contiguous():
        _fail(f"{name} must be contiguous: a copy of a table is not made silently")


def _check_indices(indices: Tensor, device: torch.device) -> Tensor:
    _check_tensor(indices, "indices")
    if indices.dtype not in _INDEX_TYPES:
        _fail(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.device != device:
        _fail(f"indices are on {indices.device}, the table is on {device}")
    return indices.contiguous()


def _check_sizes(
    sizes: Tensor, name: str, leading: int | torch.SymInt, device: torch.device, dims: int
) -> Tensor:
    _check_tensor(sizes, name)
    if sizes.dtype not in _SIZE_TYPES:
        _fail(f"{name} must be uint8 or int32, got {sizes.dtype}")
    if not 1 <= sizes.dim() <= dims or sizes.shape[0] != leading:
        wanted = f"[{leading}]" if dims == 1 else f"[{leading}] or [{leading}, Q]"
        _fail(f"{name} must be {wanted}, got shape {tuple(sizes.shape)}")
    if sizes.device != device:
        _fail(f"{name} is on {sizes.device}, the table is on {device}")
    return sizes.contiguous()


def _check_groups(
    weight: Tensor, row_group: Tensor, group_dims: Tensor, group_mask: Tensor
) -> tuple[Tensor, Tensor]:
    _check_tensor(row_group, "row_group")
    _check_tensor(group_mask, "group_mask")
    if row_group.dtype != torch.int32:
        _fail(f"row_group must be int32, got {row_group.dtype}")
    if row_group.dim() != 1 or row_group.shape[0] != weight.shape[0]:
        _fail(f"row_group must be [{weight.shape[0]}], got shape {tuple(row_group.shape)}")
    if group_mask.dim() != 2 or group_mask.shape[1] != weight.shape[1]:
        _fail(f"group_mask must be [G, {weight.shape[1]}], got shape {tuple(group_mask.shape)}")
    if not group_mask.is_floating_point():
        _fail(f"group_mask must be floating-point, got {group_mask.dtype}")
    if row_group.device != weight.device or group_mask.device != weight.device:
        _fail(
            f"row_group is on {row_group.device} and group_mask on {group_mask.device}, the "
            f"table is on {weight.device}"
        )
    dims = _check_sizes(group_dims, "group_dims", group_mask.shape[0], weight.device, 2)
    return row_group.contiguous(), dims


def _widest(blocks: Sequence[Tensor], tier_ends: Sequence[int], codes: bool) -> int | None:
    """Most columns of a block; None unless it is plain that blocks and ends are as they should be.

    In the fewest calls a block: a layer has a dozen, and looks at them in every lookup.
    """
    first = blocks[0]
    if not isinstance(first, Tensor):
        return None
    dtype, device, start, widest = first.dtype, first.device, 0, 0
    if not codes and dtype not in _WEIGHT_TYPES:
        return None
    for block, end in zip(blocks, tier_ends, strict=True):
        if type(end) is not int or not isinstance(block, Tensor) or block.dtype is not dtype:
            return None
        shape = block.shape
        if len(shape) != 2 or shape[0] != end - start:
            return None
        if block.device != device or not block.is_contiguous():
            return None
        start, widest = end, max(widest, shape[1])
    return widest


def _find_fault(blocks: Sequence[Tensor], tier_ends: Sequence[int], codes: bool) -> None:
    """Raises what is wrong with blocks and their ends, if anything is."""
    start = 0
    for c, (block, end) in enumerate(zip(blocks, tier_ends, strict=True)):
        _check_table(block, f"blocks[{c}]", codes)
        _check_whole(end, f"tier_ends[{c}]")
        if block.shape[0] != end - start:
            _fail(f"blocks[{c}] has {block.shape[0]} rows, tier_ends say {end - start}")
        if block.dtype != blocks[0].dtype or block.device != blocks[0].device:
            _fail(f"blocks[{c}] differs from blocks[0] in dtype or device")
        start = end


def _check_tiers(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    embedding_dim: int | None,
    bits: int | None = None,
) -> int:
    _check_list(blocks, "blocks", "tensors")
    _check_list(tier_ends, "tier_ends", "whole numbers")
    if not blocks or len(blocks) != len(tier_ends):
        _fail(f"{len(blocks)} blocks and {len(tier_ends)} tier_ends: one end per block is needed")
    codes = bits is not None and isinstance(blocks[0], Tensor) and are_codes(blocks)
    widest = _widest(blocks, tier_ends, codes)
    if widest is None:
        _find_fault(blocks, tier_ends, codes)
        widest = max(block.shape[1] for block in blocks)
    if codes:
        widest = widest * 8 // (bits or 8)
    dim = widest if embedding_dim is None else embedding_dim
    _check_whole(dim, "embedding_dim")
    if dim < widest:
        _fail(f"embedding_dim is {dim}, but the widest tier has {widest} columns")
    if dim < 1:
        _fail("embedding_dim must be given, and at least 1, where no tier has any columns")
    return dim


def _check_few_bits(
    blocks: Sequence[Tensor],
    steps: Tensor | None,
    bits: int | None,
    step_ends: Sequence[int] | None,
) -> FewBits | None:
    if steps is None and bits is None:
        if step_ends is not None:
            _fail("step_ends need steps and bits")
        return None
    if steps is None or bits is None:
        raise ValueError("steps and bits go together: a table has both or neither")
    _check_whole(bits, "bits")
    if bits not in _BITS:
        _fail(f"bits must be 2, 4, 8 or 16, got {bits}")
    _check_tensor(steps, "steps")
    _check_list(blocks, "blocks", "tensors")
    if step_ends is not None:
        _check_list(step_ends, "step_ends", "whole numbers")
    parts = len(blocks if step_ends is None else step_ends)
    if steps.dtype != torch.float32 or steps.shape != (parts,):
        _fail(f"steps must be float32 [{parts}], got {steps.dtype} {tuple(steps.shape)}")
    if blocks and isinstance(blocks[0], Tensor) and steps.device != blocks[0].device:
        _fail(f"steps are on {steps.device}, the table is on {blocks[0].device}")
    ends = None if step_ends is None else list(step_ends)
    return FewBits([steps.detach().contiguous()], [int(bits)], ends)


def _numbers(blocks: Sequence[Tensor], steps: Tensor | None) -> Tensor:
    """What has the type of the output."""
    return blocks[0] if steps is None or not are_codes(blocks) else steps


def _padding(padding_idx: int | None, rows: int) -> int:
    if padding_idx is None:
        return -1
    _check_whole(padding_idx, "padding_idx")
    if not -rows <= padding_idx < rows:
        _fail(f"padding_idx {padding_idx} is outside a table of {rows} rows")
    return padding_idx + rows if padding_idx < 0 else padding_idx


def _bounds(bounds_check: str) -> int:
    if not isinstance(bounds_check, str) or bounds_check not in _BOUNDS:
        _fail(f"bounds_check must be 'raise', 'clamp' or 'off', got {bounds_check!r}")
    return _BOUNDS[bounds_check]


def _bags(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    padding_idx: list[int],
    include_last_offset: bool,
) -> Bags:
    """Pooled lookups, checked, of flat indices."""
    if not isinstance(mode, str) or mode not in _MODES:
        _fail(f"mode must be 'sum' or 'mean', got {mode!r}")
    indices = _check_indices(indices, table.device)
    if per_sample_weights is not None:
        _check_tensor(per_sample_weights, "per_sample_weights")
        if mode != "sum":
            _fail("per_sample_weights go with mode='sum' only, as in embedding_bag")
        if per_sample_weights.shape != indices.shape:
            _fail(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, indices "
                f"{tuple(indices.shape)}"
            )
        if per_sample_weights.dtype != table.dtype or per_sample_weights.device != table.device:
            _fail(
                f"per_sample_weights are {per_sample_weights.dtype} on "
                f"{per_sample_weights.device}, the table is {table.dtype} on {table.device}"
            )
        per_sample_weights = per_sample_weights.reshape(-1).contiguous()
    if indices.dim() == 2:
        if offsets is not None:
            _fail("2-D indices are bags of equal length: offsets must be None")
        # int64 whatever the indices are: there may be more of them than int32 can count.
        bags, length = indices.shape
        offsets = torch.arange(0, bags + 1, device=indices.device).mul_(length)
        indices = indices.reshape(-1)
        return Bags(indices, offsets, per_sample_weights, _MODES[mode], padding_idx, True)
    if indices.dim() != 1:
        _fail(f"indices must be 1-D with offsets, or 2-D, got shape {tuple(indices.shape)}")
    if offsets is None:
        raise ValueError("1-D indices need offsets")
    _check_tensor(offsets, "offsets")
    if offsets.dim() != 1 or offsets.dtype not in _INDEX_TYPES:
        _fail(
            f"offsets must be 1-D int32 or int64, got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    if offsets.device != table.device:
        _fail(f"offsets are on {offsets.device}, the table is on {table.device}")
    if include_last_offset and offsets.shape[0] == 0:
        _fail("include_last_offset needs at least one offset")
    pooling, offsets = _MODES[mode], offsets.contiguous()
    return Bags(indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset)


def _plain(indices: Tensor, padding: int) -> Bags:
    """Lookups without pooling."""
    return Bags(indices, None, None, 0, [padding], False)


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
    _check_table(weight)
    indices = _check_indices(indices, weight.device)
    row_dims = _check_sizes(row_dims, "row_dims", weight.shape[0], weight.device, 1)
    bags = _plain(indices, _padding(padding_idx, weight.shape[0]))
    tables = Tables([weight], [1], sizes=[row_dims])
    return call(tables, [], bags, _bounds(bounds_check), sparse, optimizer)


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
    _check_table(weight)
    padding = [_padding(padding_idx, weight.shape[0])]
    weights = (per_sample_weights, padding, include_last_offset)
    bags = _bags(weight, indices, offsets, mode, *weights)
    row_dims = _check_sizes(row_dims, "row_dims", weight.shape[0], weight.device, 1)
    tables = Tables([weight], [1], sizes=[row_dims])
    return call(tables, [], bags, _bounds(bounds_check), sparse, optimizer)


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
    _check_table(weight)
    indices = _check_indices(indices, weight.device)
    groups, sizes = _check_groups(weight, row_group, group_dims, group_mask)
    bags = _plain(indices, _padding(padding_idx, weight.shape[0]))
    tables = Tables([weight], [1], sizes=[sizes], row_groups=[groups], seed=seed)
    return call(tables, [group_mask], bags, _bounds(bounds_check), sparse, optimizer)


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
    _check_table(weight)
    padding = [_padding(padding_idx, weight.shape[0])]
    weights = (per_sample_weights, padding, include_last_offset)
    bags = _bags(weight, indices, offsets, mode, *weights)
    groups, sizes = _check_groups(weight, row_group, group_dims, group_mask)
    tables = Tables([weight], [1], sizes=[sizes], row_groups=[groups], seed=seed)
    return call(tables, [group_mask], bags, _bounds(bounds_check), sparse, optimizer)


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
    few = _check_few_bits(blocks, steps, bits, step_ends)
    dim = _check_tiers(blocks, tier_ends, embedding_dim, bits)
    indices = _check_indices(indices, blocks[0].device)
    bags = _plain(indices, _padding(padding_idx, tier_ends[-1]))
    tables = Tables(list(blocks), [len(blocks)], [dim])
    return call(tables, [], bags, _bounds(bounds_check), sparse, optimizer, few)


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
    few = _check_few_bits(blocks, steps, bits, step_ends)
    dim = _check_tiers(blocks, tier_ends, embedding_dim, bits)
    padding = [_padding(padding_idx, tier_ends[-1])]
    weights = (per_sample_weights, padding, include_last_offset)
    bags = _bags(_numbers(blocks, steps), indices, offsets, mode, *weights)
    tables = Tables(list(blocks), [len(blocks)], [dim])
    return call(tables, [], bags, _bounds(bounds_check), sparse, optimizer, few)
