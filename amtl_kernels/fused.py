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
Adagrad on rows wider than a warp (128 columns of float32, 256 of 16 bits) is the exception: it
makes row gradients, whose number the host must know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from amtl_kernels import ops, tables
from amtl_kernels._autograd_tables import CLAMP, clamp_to_tables, split_masks
from amtl_kernels.ops import BoundsCheck, Mode
from amtl_kernels.optim import RowOptimizer
from amtl_kernels.tables import TableBags

# Tensor to its version and whether it was found never to fall.
_orders = WeakTensorKeyDictionary()


def _never_falls(row_group: Tensor) -> bool:
    """Whether groups are in order along the rows: looked at once for each version of the tensor.

    The look waits for the GPU, so while a CUDA graph is captured the answer is no unless known.
    """
    if row_group.is_inference():
        return False
    version, sorted_ = _orders.get(row_group, (None, False))
    if version != row_group._version:
        if row_group.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        sorted_ = bool((row_group[1:] >= row_group[:-1]).all())
        _orders[row_group] = (row_group._version, sorted_)
    return bool(sorted_)


class _Lookup:
    """One call: its forward, and the update that its backward makes."""

    def __init__(self, tables: Sequence[Tensor], optimizer: RowOptimizer, indices: Tensor) -> None:
        self.tables = list(tables)
        self.optimizer = optimizer
        self.indices = indices
        # Fails now rather than in the backward.
        optimizer.check_owns(self.tables)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def update(
        self, grad: Tensor, mask_grad: bool, psw_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        raise NotImplementedError


class _Update(torch.autograd.Function):
    """Connects a call to the graph through all that may need a gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: _Lookup, mask: Tensor | None, psw: Tensor | None, *tables: Tensor
    ) -> Tensor:
        ctx.call = call
        ctx.mask_dtype = None if mask is None else mask.dtype
        return call.forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, wants_mask, wants_psw, *_ = ctx.needs_input_grad
        mask, psw = ctx.call.update(grad.contiguous(), wants_mask, wants_psw)
        mask = mask.to(ctx.mask_dtype) if wants_mask and mask is not None else None
        return (None, mask, psw if wants_psw else None, *[None] * len(ctx.call.tables))


class _Bags:
    """The pooling of a call; ``offsets`` None is a plain lookup."""

    def __init__(
        self,
        table: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        mode: str | None,
        per_sample_weights: Tensor | None,
        include_last_offset: bool,
    ) -> None:
        if mode is None:
            self.indices = ops._check_indices(indices, table.device)
            self.offsets, self.weights, self.mode, self.last = None, None, 0, False
            return
        self.indices, self.offsets, self.weights, self.mode, self.last = ops._bags(
            table, indices, offsets, mode, per_sample_weights, include_last_offset
        )

    def used(self, rows: int, bounds_check: int) -> Tensor:
        """The indices as the forward used them."""
        return self.indices.clamp(0, rows - 1) if bounds_check == 2 else self.indices


class _Masked(_Lookup):
    def __init__(
        self,
        weight: Tensor,
        optimizer: RowOptimizer,
        row_dims: Tensor,
        bags: _Bags,
        padding_idx: int | None,
        bounds_check: str,
    ) -> None:
        super().__init__([weight], optimizer, bags.indices)
        ops._check_table(weight)
        self.row_dims = ops._check_sizes(row_dims, "row_dims", weight.shape[0], weight.device, 1)
        self.bags, self.bounds = bags, ops._bounds(bounds_check)
        self.padding = ops._padding(padding_idx, weight.shape[0])

    def forward(self) -> Tensor:
        b, weight = self.bags, self.tables[0]
        if b.offsets is None:
            out = torch.ops.amtl.masked_embedding(
                weight, b.indices, self.row_dims, self.padding, self.bounds
            )
        else:
            out = torch.ops.amtl.masked_embedding_bag(
                weight,
                b.indices,
                b.offsets,
                self.row_dims,
                b.weights,
                b.mode,
                self.padding,
                b.last,
                self.bounds,
            )
        return out

    def update(
        self, grad: Tensor, mask_grad: bool, psw_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        b, weight = self.bags, self.tables[0]
        number, state, hyper = self.optimizer.fused_update(self.tables)
        psw = torch.ops.amtl.masked_embedding_update_(
            weight,
            state,
            grad,
            b.used(weight.shape[0], self.bounds),
            b.offsets,
            self.row_dims,
            b.weights,
            b.mode,
            self.padding,
            b.last,
            psw_grad,
            number,
            hyper,
        )
        return None, psw


class _Adaptive(_Lookup):
    def __init__(
        self,
        weight: Tensor,
        optimizer: RowOptimizer,
        groups: tuple[Tensor, Tensor, Tensor],
        bags: _Bags,
        seed: int,
        padding_idx: int | None,
        bounds_check: str,
    ) -> None:
        super().__init__([weight], optimizer, bags.indices)
        ops._check_table(weight)
        self.row_group, self.group_dims = ops._check_groups(weight, *groups)
        self.mask = groups[2]
        self.bags, self.seed, self.bounds = bags, seed, ops._bounds(bounds_check)
        self.padding = ops._padding(padding_idx, weight.shape[0])

    def forward(self) -> Tensor:
        b, weight = self.bags, self.tables[0]
        groups = (self.row_group, self.group_dims, self.mask)
        if b.offsets is None:
            out = torch.ops.amtl.adaptive_embedding(
                weight, b.indices, *groups, self.seed, self.padding, self.bounds
            )
        else:
            out = torch.ops.amtl.adaptive_embedding_bag(
                weight,
                b.indices,
                b.offsets,
                *groups,
                b.weights,
                b.mode,
                self.padding,
                b.last,
                self.seed,
                self.bounds,
            )
        return out

    def update(
        self, grad: Tensor, mask_grad: bool, psw_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        b, weight = self.bags, self.tables[0]
        number, state, hyper = self.optimizer.fused_update(self.tables)
        # The CPU kernels work in any order.
        groups_sorted = mask_grad and self.row_group.is_cuda and _never_falls(self.row_group)
        mask, psw = torch.ops.amtl.adaptive_embedding_update_(
            weight,
            state,
            grad,
            b.used(weight.shape[0], self.bounds),
            b.offsets,
            self.row_group,
            self.group_dims,
            b.weights,
            b.mode,
            self.padding,
            b.last,
            self.seed,
            mask_grad,
            psw_grad,
            number,
            hyper,
            groups_sorted,
        )
        return mask, psw


class _Tiered(_Lookup):
    def __init__(
        self,
        blocks: Sequence[Tensor],
        optimizer: RowOptimizer,
        tier_ends: Sequence[int],
        bags: _Bags,
        embedding_dim: int | None,
        padding_idx: int | None,
        bounds_check: str,
    ) -> None:
        super().__init__(blocks, optimizer, bags.indices)
        self.dim = ops._check_tiers(blocks, tier_ends, embedding_dim)
        self.tier_ends = list(tier_ends)
        self.bags, self.bounds = bags, ops._bounds(bounds_check)
        self.padding = ops._padding(padding_idx, self.tier_ends[-1])

    def forward(self) -> Tensor:
        b = self.bags
        if b.offsets is None:
            out = torch.ops.amtl.tiered_embedding(
                self.tables, self.tier_ends, b.indices, self.dim, self.padding, self.bounds
            )
        else:
            out = torch.ops.amtl.tiered_embedding_bag(
                self.tables,
                self.tier_ends,
                b.indices,
                b.offsets,
                b.weights,
                self.dim,
                b.mode,
                self.padding,
                b.last,
                self.bounds,
            )
        return out

    def update(
        self, grad: Tensor, mask_grad: bool, psw_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        b = self.bags
        number, state, hyper = self.optimizer.fused_update(self.tables)
        psw = torch.ops.amtl.tiered_embedding_update_(
            self.tables,
            state,
            grad,
            self.tier_ends,
            b.used(self.tier_ends[-1], self.bounds),
            b.offsets,
            b.weights,
            self.dim,
            b.mode,
            self.padding,
            b.last,
            psw_grad,
            number,
            hyper,
        )
        return None, psw


class _Tables(_Lookup):
    """A call of several tables: the operators' arguments before and after the masks and state."""

    def __init__(
        self,
        op: str,
        optimizer: RowOptimizer,
        tables: Sequence[Tensor],
        described: tuple[Any, ...],
        rows: Sequence[int],
        bags: TableBags,
        bounds_check: str,
        masks: Sequence[Tensor] = (),
        seed: Sequence[int] = (),
    ) -> None:
        super().__init__(tables, optimizer, bags.indices)
        self.op, self.described, self.rows, self.bags = op, described, rows, bags
        self.bounds, self.masks, self.seed = ops._bounds(bounds_check), list(masks), seed

    def forward(self) -> Tensor:
        masks = [self.masks] if self.masks else []
        arguments = (*self.described, *masks, *self.bags.arguments(), *self.seed, self.bounds)
        out: Tensor = getattr(torch.ops.amtl, self.op)(self.tables, *arguments)
        return out

    def update_tables(
        self, grad: Tensor, mask_grad: bool, psw_grad: bool
    ) -> tuple[list[Tensor], Tensor]:
        number, state, hyper = self.optimizer.fused_update(self.tables)
        indices, *bags = self.bags.arguments()
        if self.bounds == CLAMP:
            indices = clamp_to_tables(indices, self.bags.offsets, self.rows)
        wants = (mask_grad, psw_grad) if self.masks else (psw_grad,)
        update = getattr(torch.ops.amtl, f"{self.op}_update_")
        found = update(
            *(self.tables, *self.described, state, grad, indices, *bags, *self.seed),
            *(*wants, number, hyper),
        )
        if not self.masks:
            return [], found
        flat, psw = found
        if not mask_grad:
            return [], psw
        return split_masks(flat, self.described[1], [t.shape[1] for t in self.tables]), psw


class _UpdateTables(torch.autograd.Function):
    """As :class:`_Update`, with one mask for each table, or none."""

    @staticmethod
    def forward(ctx: Any, call: _Tables, psw: Tensor | None, *masks_and_tables: Tensor) -> Tensor:
        ctx.call = call
        return call.forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call = ctx.call
        _, wants_psw, *rest = ctx.needs_input_grad
        wanted = rest[: len(call.masks)]
        found, psw = call.update_tables(grad.contiguous(), any(wanted), wants_psw)
        masks = [None] * len(call.masks)
        if found:
            pairs = zip(found, call.masks, wanted, strict=True)
            masks = [got.to(mask.dtype) if wants else None for got, mask, wants in pairs]
        return (None, psw if wants_psw else None, *masks, *[None] * len(call.tables))


def _run_tables(call: _Tables) -> Tensor:
    psw = call.bags.per_sample_weights
    out: Tensor = _UpdateTables.apply(call, psw, *call.masks, *call.tables)
    return out


def _run(call: _Lookup, mask: Tensor | None, psw: Tensor | None) -> Tensor:
    out: Tensor = _Update.apply(call, mask, psw, *call.tables)
    return out


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
    bags = _Bags(weight, indices, None, None, None, False)
    return _run(_Masked(weight, optimizer, row_dims, bags, padding_idx, bounds_check), None, None)


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
    bags = _Bags(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    call = _Masked(weight, optimizer, row_dims, bags, padding_idx, bounds_check)
    return _run(call, None, bags.weights)


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
    bags = _Bags(weight, indices, None, None, None, False)
    groups = (row_group, group_dims, group_mask)
    call = _Adaptive(weight, optimizer, groups, bags, seed, padding_idx, bounds_check)
    return _run(call, group_mask, None)


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
    bags = _Bags(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    groups = (row_group, group_dims, group_mask)
    call = _Adaptive(weight, optimizer, groups, bags, seed, padding_idx, bounds_check)
    return _run(call, group_mask, bags.weights)


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
    bags = _Bags(blocks[0], indices, None, None, None, False)
    call = _Tiered(blocks, optimizer, tier_ends, bags, embedding_dim, padding_idx, bounds_check)
    return _run(call, None, None)


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
    bags = _Bags(blocks[0], indices, offsets, mode, per_sample_weights, include_last_offset)
    call = _Tiered(blocks, optimizer, tier_ends, bags, embedding_dim, padding_idx, bounds_check)
    return _run(call, None, bags.weights)


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
    return _run_tables(_Tables(op, optimizer, weights, described, rows, bags, bounds_check))


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
    return _run_tables(
        _Tables(op, optimizer, weights, described, rows, bags, bounds_check, masks, [seed])
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
    call = _Tables(op, optimizer, flat, tuple(described), tiers.rows, bags, bounds_check)
    return _run_tables(call)
