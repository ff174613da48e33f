"""What every public lookup ends in: one call of the operators for a list of tables.

With an optimizer the backward of the call updates the tables; without one ``_autograd`` makes
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from amtl_kernels import _autograd
from amtl_kernels._arguments import (
    CLAMP,
    Bags,
    FewBits,
    Tables,
    Wishes,
    are_codes,
    check_rule_of_codes,
    clamped,
    split_masks,
)
from amtl_kernels._planned import Plan
from amtl_kernels.optim import RowOptimizer


def kind(value: object) -> str:
    """What a value is, as errors say it."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOaeio" else f"a {name}"


def refuse_transforms(what: str) -> None:
    """Raises RuntimeError within ``torch.func`` transforms, for which there are no rules."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{what} do not work under torch.func transforms (grad, vmap, jvp, ...): the operators "
            "have no rule for them. Use autograd (backward, torch.autograd.grad); indices of any "
            "shape are looked up in one call, without vmap"
        )


def call(
    tables: Tables,
    masks: Sequence[Tensor],
    bags: Bags,
    bounds_check: int,
    sparse: bool,
    optimizer: RowOptimizer | None,
    few: FewBits | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Looks up; arguments are those of the operator ``lookup``, checked by the caller.

    Args:
        tables: The tables.
        masks: Soft mask of each table, or none.
        bags: The lookups.
        bounds_check: The number of what to do about an index out of range.
        sparse: Whether gradients of the blocks are sparse.
        optimizer: What updates the blocks in the backward, if anything does.
        few: Of tables of few bits, what makes numbers of them.
        plan: What native code knows of the one table.

    Returns:
        The operator's result.

    Raises:
        RuntimeError: The call is within a ``torch.func`` transform.
        TypeError: ``optimizer`` is of another kind.
        ValueError: ``optimizer`` does not hold the blocks in one group, or a gradient is asked for
            that a table of few bits does not have.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms("lookups")
    if few is not None:
        _check_gradients(tables, bags, optimizer)
    if optimizer is None:
        return _autograd.lookup(tables, list(masks), bags, bounds_check, sparse, few, plan)
    check_optimizer(optimizer)
    # Fails now rather than in the backward.
    optimizer.check_owns(tables.blocks)
    fused = _Fused(tables, list(masks), bags, bounds_check, optimizer, few, plan)
    anchor: Tensor | None
    if few is not None and are_codes(tables.blocks):
        # Codes have no gradient that would lead to the backward.
        anchor = few.steps[0].new_empty(0).requires_grad_()
    else:
        # No block gets a gradient, so one leads there for all: each is a node of the graph.
        anchor = next((block for block in tables.blocks if block.requires_grad), None)
    updated: Tensor = _Update.apply(fused, anchor, bags.per_sample_weights, *masks)
    return updated


def _check_gradients(tables: Tables, bags: Bags, optimizer: RowOptimizer | None) -> None:
    if optimizer is not None and are_codes(tables.blocks):
        check_optimizer(optimizer)
        check_rule_of_codes(optimizer._number)
    psw, several = bags.per_sample_weights, len(tables.block_counts) > 1
    if several and psw is not None and psw.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "per_sample_weights get no gradient from several tables of few bits: detach() them"
        )


def check_optimizer(optimizer: object) -> None:
    """Raises TypeError unless it can update tables."""
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(f"optimizer must be of amtl_kernels.optim, got {kind(optimizer)}")


class _Fused(NamedTuple):
    """A call whose backward updates the tables."""

    tables: Tables
    masks: list[Tensor]
    bags: Bags
    bounds_check: int
    optimizer: RowOptimizer
    few: FewBits | None
    plan: Plan | None

    def update(self, grad: Tensor, wishes: Wishes) -> tuple[Tensor, Tensor]:
        tables, bags = self.tables, self.bags
        if self.bounds_check == CLAMP:
            used = clamped(bags.indices, bags.offsets, tables.rows())
            bags = bags._replace(indices=used)
        shown = None
        if wishes.psw_grad and self.few is not None:
            shown = _autograd.sample_gradient(grad, tables, bags, self.few)
            wishes = wishes._replace(psw_grad=False)
        step = self.optimizer.fused_update(tables.blocks)
        # The CPU kernels work in any order.
        groups_sorted = wishes.mask_grad and all(
            groups.is_cuda and _never_falls(groups) for groups in tables.row_groups
        )
        few = self.few if self.few is not None and are_codes(tables.blocks) else ()
        masks, psw = torch.ops.amtl.lookup_update_(
            *tables, grad, *bags, *wishes, groups_sorted, *step, *few
        )
        return masks, psw if shown is None else shown


class _Update(torch.autograd.Function):
    """Connects a call to the graph through all that may need a gradient."""

    @staticmethod
    def forward(ctx: Any, fused: _Fused, *learnable: Tensor | None) -> Tensor:
        ctx.fused = fused
        tables, masks, bags, bounds_check, _, few, plan = fused
        return _autograd.forward(tables, masks, bags, bounds_check, few=few, plan=plan)

    @staticmethod
    @_autograd.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        fused = ctx.fused
        _, _, wants_psw, *wanted = ctx.needs_input_grad
        flat, psw = fused.update(_autograd.gradient_for(grad), Wishes(any(wanted), wants_psw))
        masks: list[Tensor | None] = [None] * len(fused.masks)
        if any(wanted):
            dims = [block.shape[1] for block in fused.tables.blocks]
            parts = split_masks(flat, fused.tables.sizes, dims)
            every = zip(parts, fused.masks, wanted, strict=True)
            masks = [part.to(mask.dtype) if wants else None for part, mask, wants in every]
        return (None, None, psw if wants_psw else None, *masks)


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
