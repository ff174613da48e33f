"""Fake tensors and gradients of the operators, once for all backends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtl_kernels import _schema, backend
from amtl_kernels._arguments import (
    CLAMP,
    OFF,
    SUM,
    Bags,
    FewBits,
    Step,
    Tables,
    Wishes,
    clamped,
    in_groups,
    numbers_of,
    split_masks,
    widths_of,
)
from amtl_kernels._planned import Plan, unobserved

_NAMES = tuple(argument.name for argument in torch.ops.amtl.lookup.default._schema.arguments)


def _widths(tables: Tables, bits: Sequence[int]) -> list[int]:
    """Of every table's output."""
    if tables.dims:
        return list(tables.dims)
    blocks = iter(tables.blocks)
    every = zip(tables.block_counts, bits or [8] * len(tables.block_counts), strict=True)
    return [max(widths_of([next(blocks) for _ in range(n)], each)) for n, each in every]


def _fake_lookup(
    tables: Tables,
    masks: list[Tensor] | None,
    bags: Bags,
    bounds_check: int,
    sparse_grad: bool,
    few: FewBits | None,
) -> Tensor:
    widths = _widths(tables, few.bits if few else ())
    like = numbers_of(tables.blocks, few.steps[0] if few else None)
    if bags.offsets is None:
        return like.new_empty(*bags.indices.shape, widths[0])
    ends = bags.offsets.shape[0] - int(bags.include_last_offset)
    return like.new_empty(ends // len(widths), sum(widths))


def _fake_others(
    tables: Tables, bags: Bags, wishes: Wishes, few: FewBits | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of masks and of per-sample weights."""
    like = numbers_of(tables.blocks, few.steps[0] if few else None)
    psw = bags.per_sample_weights
    compute = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = 0
    if wishes.mask_grad and tables.row_groups:
        pairs = zip(tables.sizes, tables.blocks, strict=True)
        values = sum(sizes.shape[0] * block.shape[1] for sizes, block in pairs)
    weights = psw.shape[0] if wishes.psw_grad and psw is not None else 0
    return like.new_empty(values, dtype=compute), like.new_empty(weights)


def _fake_backward(
    tables: Tables, grad: Tensor, bags: Bags, weight_grad: bool, wishes: Wishes
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    rows, grads = [], []
    for block in tables.blocks:
        distinct = _looked_up() if weight_grad else 0
        rows.append(block.new_empty(distinct, dtype=torch.int64))
        grads.append(block.new_empty(distinct, block.shape[1]))
    return rows, grads, *_fake_others(tables, bags, wishes)


def _looked_up() -> Any:
    """How many distinct rows there are, which a graph learns when it runs.

    Past `new_dynamic_size()`, which without `capture_dynamic_output_shape_ops` refuses, for a graph
    to be broken in its place. No graph is broken in a backward: the whole forward would be left.
    What is behind it is PyTorch's own, so where that is not as it was, the public function has it.
    """
    context: Any = torch.library.get_ctx()
    allocate = getattr(torch._library.fake_impl, "allocate_size", None)
    shapes = getattr(context, "_shape_env", None)
    if allocate is None or shapes is None:
        return context.new_dynamic_size()
    return allocate(shapes)


def _fake_update(
    tables: Tables,
    grad: Tensor,
    bags: Bags,
    wishes: Wishes,
    groups_sorted: bool,
    step: Step,
    few: FewBits | None,
) -> tuple[Tensor, Tensor]:
    return _fake_others(tables, bags, wishes, few)


def row_gradient(rows: Tensor, grads: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
    """The gradient ``[N, D]`` of a block whose ``rows`` have one."""
    if not sparse:
        return grads.new_zeros(shape).index_copy_(0, rows, grads)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), grads, shape, is_coalesced=True, check_invariants=False
    )


def gradient_for(grad: Tensor) -> Tensor:
    """The gradient as the operators take it: its rows side by side, but on the CPU.

    There columns of a wider gradient, as ``torch.cat`` hands them back, are read where they are.
    """
    if grad.is_contiguous():
        return grad
    native = backend.native is not None and not backend._state.overrides
    apart = grad.dim() == 2 and grad.stride(1) == 1 and grad.stride(0) >= grad.shape[1]
    if native and apart and grad.is_cpu and type(grad) is Tensor:
        return grad
    return grad.contiguous()


def _save(
    ctx: Any,
    tables: Tables,
    masks: list[Tensor] | None,
    bags: Bags,
    bounds_check: int,
    sparse: bool,
    few: FewBits | None,
) -> None:
    indices = bags.indices
    if bounds_check == CLAMP:
        indices = clamped(indices, bags.offsets, tables.rows())
    steps = [] if few is None else few.steps
    ctx.lists = [len(tables.blocks), len(tables.sizes), len(tables.row_groups), len(steps)]
    ctx.save_for_backward(
        *(indices, bags.offsets, bags.per_sample_weights),
        *(*tables.blocks, *tables.sizes, *tables.row_groups, *steps),
    )
    ctx.tables = tables._replace(blocks=[], sizes=[], row_groups=[])
    ctx.pooled = bags[3:]
    ctx.mask_dtypes = [mask.dtype for mask in masks or ()]
    ctx.sparse = sparse
    ctx.few = few and few._replace(steps=[])


class _Gradients(NamedTuple):
    blocks: list[Tensor | None]
    masks: list[Tensor | None]
    per_sample_weights: Tensor | None


def _gradients(
    ctx: Any, grad: Tensor, blocks: Sequence[bool], masks: Sequence[bool], wants_psw: bool
) -> _Gradients:
    """The gradients that are wanted, of what :func:`_save` has saved."""
    saved = iter(ctx.saved_tensors)
    bags = Bags(next(saved), next(saved), next(saved), *ctx.pooled)
    weights, sizes, row_groups, steps = ([next(saved) for _ in range(n)] for n in ctx.lists)
    tables = ctx.tables._replace(blocks=weights, sizes=sizes, row_groups=row_groups)
    few = ctx.few and ctx.few._replace(steps=steps)
    of_psw = sample_gradient(grad, tables, bags, few) if few and wants_psw else None
    if of_psw is not None and not any(blocks):
        return _Gradients([None] * len(weights), [], of_psw)
    rows, grads, flat, psw = torch.ops.amtl.lookup_backward(
        *tables, gradient_for(grad), *bags, any(blocks), any(masks), wants_psw and not few
    )
    if wants_psw and not few:
        of_psw = psw
    of_blocks = [
        row_gradient(rows[c], grads[c], weight.shape, ctx.sparse) if blocks[c] else None
        for c, weight in enumerate(weights)
    ]
    of_masks: list[Tensor | None] = [None] * len(ctx.mask_dtypes)
    if any(masks):
        parts = split_masks(flat, sizes, [weight.shape[1] for weight in weights])
        every = zip(parts, ctx.mask_dtypes, masks, strict=True)
        of_masks = [part.to(dtype) if wanted else None for part, dtype, wanted in every]
    return _Gradients(of_blocks, of_masks, of_psw)


def sample_gradient(grad: Tensor, tables: Tables, bags: Bags, few: FewBits) -> Tensor:
    """The gradient ``[L]`` of per-sample weights, of what one table of few bits shows.

    The operators of the backward would take it of what is stored.
    """
    offsets, (padding,) = bags.offsets, bags.padding_idx
    assert offsets is not None
    number = offsets.shape[0] - int(bags.include_last_offset)
    positions = torch.arange(bags.indices.shape[0], device=grad.device, dtype=offsets.dtype)
    bag = torch.bucketize(positions, offsets, right=True) - 1
    # Past the last offset anything may be; where there is no bag, the table may have no row.
    within = (bag >= 0) & (bag < number)
    if not sum(block.shape[0] for block in tables.blocks):
        return torch.zeros(len(positions), dtype=grad.dtype, device=grad.device)
    plain = Bags(bags.indices.where(within, 0), None, None, SUM, [-1], False)
    values = torch.ops.amtl.lookup(*tables, [], *plain, OFF, True, *few)
    counted = within & (bags.indices != padding)
    # One more for what is in no bag.
    padded = torch.nn.functional.pad(grad.to(torch.float32), (0, 0, 0, 1))
    dots = (values.to(torch.float32) * padded[bag.clamp(0, number)]).sum(1)
    return dots.where(counted, 0).to(grad.dtype)


_save_values = in_groups(_save)


def _registered_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_values(ctx, *inputs)
    ctx.absent = {name for name, value in zip(_NAMES, inputs, strict=False) if value is None}


def _registered_backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
    # Arguments that are left at their defaults are not passed on.
    names = _NAMES[: len(ctx.needs_input_grad)]
    wants = dict(zip(names, ctx.needs_input_grad, strict=True))
    masks = () if "masks" in ctx.absent else wants["masks"]
    found = _gradients(ctx, grad, wants["blocks"], masks, wants["per_sample_weights"])
    _, sizes, row_groups, steps = ctx.lists
    # PyTorch takes an empty list of numbers for one of tensors.
    dims: list[None] | None = None if ctx.tables.dims else []
    lists: dict[str, object] = {
        "dims": dims,
        "sizes": [None] * sizes,
        "row_groups": [None] * row_groups,
        "steps": [None] * steps if steps else None,
    }
    named = {**lists, **found._asdict()}
    return tuple(None if name in ctx.absent else named.get(name) for name in names)


def forward(
    tables: Tables,
    masks: list[Tensor],
    bags: Bags,
    bounds_check: int,
    sparse: bool = True,
    few: FewBits | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The lookup alone, past the gradients that are registered with it."""
    if plan is not None and unobserved():
        planned = plan.bags(bags, bounds_check)
        if planned is not None:
            return planned
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = torch.ops.amtl.lookup(
            *tables, masks, *bags, bounds_check, sparse, *(few or ())
        )
    return out


_TWICE = (
    "lookups have no second derivatives, as of a penalty on gradients of a table "
    "(create_graph=True). Take gradients of what lookups give, rows = layer(ids) and "
    "torch.autograd.grad(loss, rows, create_graph=True); or train so before amtl.convert"
)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """As PyTorch's, whose error says nothing of lookups."""

    @functools.wraps(backward)
    def first(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, grad)
        if not (torch.is_grad_enabled() and grad.requires_grad):
            return found
        error: Any = torch._C._functions.DelayedError(_TWICE.encode(), len(found))
        again: tuple[Any, ...] = error(
            *(each if each is None else each.detach().requires_grad_() for each in found)
        )
        return again

    return first


class _Lookup(torch.autograd.Function):
    """What is registered with the operator, without PyTorch's search for tensors in its lists.

    These searches, in Python and for every call, cost more than a small lookup.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *learnable: Tensor | None) -> Tensor:
        _save(ctx, *call[:-1])
        return forward(*call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, wants_psw, *rest = ctx.needs_input_grad
        count = len(ctx.mask_dtypes)
        found = _gradients(ctx, grad, rest[count:], rest[:count], wants_psw)
        return (None, found.per_sample_weights, *found.masks, *found.blocks)


def lookup(
    tables: Tables,
    masks: list[Tensor],
    bags: Bags,
    bounds_check: int,
    sparse: bool,
    few: FewBits | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The operator with its gradients."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        traced: Tensor = torch.ops.amtl.lookup(
            *tables, masks, *bags, bounds_check, sparse, *(few or ())
        )
        return traced
    if torch.is_grad_enabled():
        learnable = (bags.per_sample_weights, *masks, *tables.blocks)
        if any(tensor is not None and tensor.requires_grad for tensor in learnable):
            call = (tables, masks, bags, bounds_check, sparse, few, plan)
            out: Tensor = _Lookup.apply(call, *learnable)
            return out
    return forward(tables, masks, bags, bounds_check, sparse, few, plan)


def register() -> None:
    """Registers fake implementations and gradients, once, when the package is imported."""
    fakes = {
        "lookup": in_groups(_fake_lookup),
        "lookup_backward": in_groups(_fake_backward),
        "lookup_update_": in_groups(_fake_update),
        "apply_": lambda *_: None,
    }
    for op, fake in fakes.items():
        torch.library.register_fake(f"amtl::{op}", fake, lib=_schema.LIBRARY)
    torch.library.register_autograd(
        "amtl::lookup",
        _registered_backward,
        setup_context=_registered_setup,
        lib=_schema.LIBRARY,
    )
