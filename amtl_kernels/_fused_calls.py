"""The calls behind ``amtl_kernels.fused``: a forward, and the update that its backward makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from amtl_kernels import ops
from amtl_kernels._autograd_tables import CLAMP, clamp_to_tables, split_masks
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


class Lookup:
    """One call: its forward, and the update that its backward makes."""

    def __init__(self, tables: Sequence[Tensor], optimizer: RowOptimizer, indices: Tensor) -> None:
        if not isinstance(optimizer, RowOptimizer):
            raise TypeError(f"optimizer must be of amtl_kernels.optim, got {ops._kind(optimizer)}")
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
        ctx: Any, call: Lookup, mask: Tensor | None, psw: Tensor | None, *tables: Tensor
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


class Bags:
    """The indices of a call and their pooling; ``offsets`` None is a plain lookup."""

    def __init__(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
        mode: int = 0,
        last: bool = False,
    ) -> None:
        self.indices, self.offsets, self.weights = indices, offsets, weights
        self.mode, self.last = mode, last

    @staticmethod
    def plain(table: Tensor, indices: Tensor, name: str = "weight") -> Bags:
        """No pooling; ``name`` is the table's in errors."""
        ops._check_tensor(table, name)
        return Bags(ops._check_indices(indices, table.device))

    @staticmethod
    def pooled(
        table: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        mode: str,
        per_sample_weights: Tensor | None,
        include_last_offset: bool,
        name: str = "weight",
    ) -> Bags:
        """Bags, checked; ``name`` is the table's in errors."""
        ops._check_tensor(table, name)
        bags = ops._bags(table, indices, offsets, mode, per_sample_weights, include_last_offset)
        return Bags(*bags)

    def used(self, rows: int, bounds_check: int) -> Tensor:
        """The indices as the forward used them."""
        return self.indices.clamp(0, rows - 1) if bounds_check == 2 else self.indices


def first_block(blocks: Sequence[Tensor]) -> Tensor:
    """The block that stands for a table in tiers."""
    ops._check_list(blocks, "blocks", "tensors")
    if not blocks:
        raise ValueError("blocks must hold at least one tensor")
    return blocks[0]


class Masked(Lookup):
    """A lookup in one table with sizes given row by row."""

    def __init__(
        self,
        weight: Tensor,
        optimizer: RowOptimizer,
        row_dims: Tensor,
        bags: Bags,
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


class Adaptive(Lookup):
    """A lookup in one table with sizes by group, and the gradient of the groups' mask."""

    def __init__(
        self,
        weight: Tensor,
        optimizer: RowOptimizer,
        groups: tuple[Tensor, Tensor, Tensor],
        bags: Bags,
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


class Tiered(Lookup):
    """A lookup in one table of frozen tiers."""

    def __init__(
        self,
        blocks: Sequence[Tensor],
        optimizer: RowOptimizer,
        tier_ends: Sequence[int],
        bags: Bags,
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


class SeveralTables(Lookup):
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
    def forward(
        ctx: Any, call: SeveralTables, psw: Tensor | None, *masks_and_tables: Tensor
    ) -> Tensor:
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


def run_tables(call: SeveralTables) -> Tensor:
    psw = call.bags.per_sample_weights
    out: Tensor = _UpdateTables.apply(call, psw, *call.masks, *call.tables)
    return out


def run(call: Lookup, mask: Tensor | None, psw: Tensor | None) -> Tensor:
    out: Tensor = _Update.apply(call, mask, psw, *call.tables)
    return out
