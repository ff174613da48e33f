"""Fake tensors and gradients of the operators, once for all backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amtl_kernels import _schema
from amtl_kernels._calls import CLAMP, Bags, Tables, clamped, split_masks

_TABLES = len(Tables._fields)
_BAGS = len(Bags._fields)
_NAMES = tuple(argument.name for argument in torch.ops.amtl.lookup.default._schema.arguments)


def _widths(tables: Tables) -> list[int]:
    """Of every table's output."""
    if tables.dims:
        return list(tables.dims)
    blocks = iter(tables.blocks)
    return [max(next(blocks).shape[1] for _ in range(n)) for n in tables.block_counts]


def _fake_lookup(*arguments: Any) -> Tensor:
    tables = Tables(*arguments[:_TABLES])
    bags = Bags(*arguments[_TABLES + 1 : _TABLES + 1 + _BAGS])
    widths, like = _widths(tables), tables.blocks[0]
    if bags.offsets is None:
        return like.new_empty(*bags.indices.shape, widths[0])
    ends = bags.offsets.shape[0] - int(bags.include_last_offset)
    return like.new_empty(ends // len(widths), sum(widths))


def _fake_others(
    tables: Tables, bags: Bags, mask_grad: bool, psw_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of masks and of per-sample weights."""
    like, psw = tables.blocks[0], bags.per_sample_weights
    compute = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = 0
    if mask_grad and tables.row_groups:
        pairs = zip(tables.sizes, tables.blocks, strict=True)
        values = sum(sizes.shape[0] * block.shape[1] for sizes, block in pairs)
    weights = psw.shape[0] if psw_grad and psw is not None else 0
    return like.new_empty(values, dtype=compute), like.new_empty(weights)


def _fake_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    tables = Tables(*arguments[1 : 1 + _TABLES])
    bags = Bags(*arguments[1 + _TABLES : 1 + _TABLES + _BAGS])
    weight_grad, mask_grad, psw_grad = arguments[-3:]
    rows, grads = [], []
    for block in tables.blocks:
        distinct = torch.library.get_ctx().new_dynamic_size() if weight_grad else 0
        rows.append(block.new_empty(distinct, dtype=torch.int64))
        grads.append(block.new_empty(distinct, block.shape[1]))
    return rows, grads, *_fake_others(tables, bags, mask_grad, psw_grad)


def _fake_update(*arguments: Any) -> tuple[Tensor, Tensor]:
    bags = Bags(*arguments[_TABLES + 1 : _TABLES + 1 + _BAGS])
    mask_grad, psw_grad = arguments[_TABLES + 1 + _BAGS : _TABLES + 3 + _BAGS]
    return _fake_others(Tables(*arguments[:_TABLES]), bags, mask_grad, psw_grad)


def row_gradient(rows: Tensor, grads: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
    """The gradient ``[N, D]`` of a block whose ``rows`` have one."""
    if not sparse:
        return grads.new_zeros(shape).index_copy(0, rows, grads)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), grads, shape, is_coalesced=True, check_invariants=False
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tables, masks = Tables(*inputs[:_TABLES]), inputs[_TABLES]
    bags = Bags(*inputs[_TABLES + 1 : _TABLES + 1 + _BAGS])
    bounds_check, ctx.sparse = inputs[-2:]
    indices = bags.indices
    if bounds_check == CLAMP:
        indices = clamped(indices, bags.offsets, tables.rows())
    ctx.lists = [len(tables.blocks), len(tables.sizes), len(tables.row_groups)]
    ctx.save_for_backward(
        *(indices, bags.offsets, bags.per_sample_weights),
        *(*tables.blocks, *tables.sizes, *tables.row_groups),
    )
    ctx.tables = tables._replace(blocks=[], sizes=[], row_groups=[])
    ctx.pooled = bags[3:]
    ctx.mask_dtypes = [mask.dtype for mask in masks]


def _backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
    saved = iter(ctx.saved_tensors)
    bags = Bags(next(saved), next(saved), next(saved), *ctx.pooled)
    blocks, sizes, row_groups = ([next(saved) for _ in range(n)] for n in ctx.lists)
    tables = ctx.tables._replace(blocks=blocks, sizes=sizes, row_groups=row_groups)
    wants = dict(zip(_NAMES, ctx.needs_input_grad, strict=True))
    wanted, wanted_masks = list(wants["blocks"]), list(wants["masks"])
    wants_psw = wants["per_sample_weights"]
    rows, grads, flat, psw = torch.ops.amtl.lookup_backward(
        grad.contiguous(), *tables, *bags, any(wanted), any(wanted_masks), wants_psw
    )
    found: dict[str, object] = {
        # PyTorch takes an empty list of numbers for one of tensors.
        "dims": None if tables.dims else [],
        "sizes": [None] * len(sizes),
        "row_groups": [None] * len(row_groups),
        "per_sample_weights": psw if wants_psw else None,
        "masks": [None] * len(ctx.mask_dtypes),
    }
    found["blocks"] = [
        row_gradient(rows[c], grads[c], block.shape, ctx.sparse) if wanted[c] else None
        for c, block in enumerate(blocks)
    ]
    if any(wanted_masks):
        parts = split_masks(flat, sizes, [block.shape[1] for block in blocks])
        every = zip(parts, ctx.mask_dtypes, wanted_masks, strict=True)
        found["masks"] = [part.to(dtype) if asked else None for part, dtype, asked in every]
    return tuple(found.get(name) for name in _NAMES)


def register() -> None:
    """Registers fake implementations and gradients, once, when the package is imported."""
    fakes = {
        "lookup": _fake_lookup,
        "lookup_backward": _fake_backward,
        "lookup_update_": _fake_update,
        "apply_": lambda *_: None,
    }
    for op, fake in fakes.items():
        torch.library.register_fake(f"amtl::{op}", fake, lib=_schema.LIBRARY)
    torch.library.register_autograd(
        "amtl::lookup", _backward, setup_context=_setup, lib=_schema.LIBRARY
    )
