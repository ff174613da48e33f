"""Fake tensors and gradients of the lookups in several tables, once for the three of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amtl_kernels import _schema
from amtl_kernels._autograd import fake_psw, fake_rows, row_gradient

CLAMP = 2


def _tables_of(arguments: dict[str, Any]) -> list[Tensor]:
    tables: list[Tensor] = arguments["weights" if "weights" in arguments else "blocks"]
    return tables


def rows_of(arguments: dict[str, Any]) -> list[int]:
    """Rows of each table, from a call's arguments by name."""
    if "weights" in arguments:
        return [weight.shape[0] for weight in arguments["weights"]]
    rows, last = [], -1
    for count in arguments["tier_counts"]:
        last += count
        rows.append(arguments["tier_ends"][last])
    return rows


def clamp_to_tables(indices: Tensor, offsets: Tensor, rows: Sequence[int]) -> Tensor:
    """The indices as a forward with ``bounds_check="clamp"`` uses them."""
    bags = (offsets.shape[0] - 1) // len(rows)
    if bags == 0:
        return indices
    positions = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    table = torch.bucketize(positions, offsets[bags::bags].contiguous(), right=True)
    last = torch.tensor([n - 1 for n in rows], device=indices.device, dtype=indices.dtype)
    return indices.clamp(min=0).minimum(last[table.clamp(max=len(rows) - 1)])


def split_masks(flat: Tensor, group_dims: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The mask gradients ``[G_t, D_t]`` in the flat one."""
    sizes = [sizes.shape[0] * dim for sizes, dim in zip(group_dims, dims, strict=True)]
    return [part.view(-1, dim) for part, dim in zip(flat.split(sizes), dims, strict=True)]


class _Op:
    """An operator's arguments by name."""

    def __init__(self, name: str) -> None:
        self.call = getattr(torch.ops.amtl, name).default
        self.names = tuple(argument.name for argument in self.call._schema.arguments)

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, arguments, strict=True))


def _fake_forward(op: _Op) -> Callable[..., Tensor]:
    def fake(*arguments: Any) -> Tensor:
        a = op.named(arguments)
        tables = _tables_of(a)
        dims = a.get("embedding_dims", [table.shape[1] for table in tables])
        return tables[0].new_empty((a["offsets"].shape[0] - 1) // len(dims), sum(dims))

    return fake


def _fake_gradients(op: _Op) -> Callable[..., Any]:
    """Of a backward, or of an update, which returns the same without rows and their gradients."""

    def fake(*arguments: Any) -> Any:
        a = op.named(arguments)
        tables = _tables_of(a)
        found: list[Any] = []
        if "weight_grad" in a:
            pairs = [fake_rows(table, a["weight_grad"]) for table in tables]
            found += [[rows for rows, _ in pairs], [grads for _, grads in pairs]]
        if "mask_grad" in a:
            groups = zip(tables, a["group_dims"], strict=True)
            flat = sum(table.shape[1] * dims.shape[0] for table, dims in groups)
            compute = torch.float64 if tables[0].dtype == torch.float64 else torch.float32
            found.append(tables[0].new_empty(flat if a["mask_grad"] else 0, dtype=compute))
        found.append(fake_psw(tables[0], a["per_sample_weights"], a["psw_grad"]))
        return found[0] if len(found) == 1 else tuple(found)

    return fake


def _register_gradient(name: str) -> None:
    forward, back = _Op(name), _Op(f"{name}_backward")
    table_name = "blocks" if "blocks" in forward.names else "weights"
    lists = [n for n in (table_name, "row_dims", "row_groups", "group_dims") if n in forward.names]
    numbers = ("tier_counts", "tier_ends", "embedding_dims", "mode", "padding_idx", "seed")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a = forward.named(inputs)
        if a["bounds_check"] == CLAMP:
            a["indices"] = clamp_to_tables(a["indices"], a["offsets"], rows_of(a))
        tensors = [a["indices"], a["offsets"], a["per_sample_weights"]]
        ctx.save_for_backward(*tensors, *(tensor for name in lists for tensor in a[name]))
        ctx.tables = len(a[table_name])
        ctx.numbers = {name: a[name] for name in numbers if name in a}
        ctx.mask_dtypes = [mask.dtype for mask in a.get("group_masks", ())]

    def backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
        a = dict(ctx.numbers, grad=grad.contiguous())
        a["indices"], a["offsets"], a["per_sample_weights"], *saved = ctx.saved_tensors
        for i, name in enumerate(lists):
            a[name] = list(saved[i * ctx.tables : (i + 1) * ctx.tables])
        wants = forward.named(ctx.needs_input_grad)
        tables, wants_tables = a[table_name], list(wants[table_name])
        a["weight_grad"] = any(wants_tables)
        a["mask_grad"] = any(wants.get("group_masks", ()))
        a["psw_grad"] = wants["per_sample_weights"]
        rows, grads, *masks, psw = back.call(*(a[name] for name in back.names))
        found: dict[str, Any] = {name: [None] * ctx.tables for name in lists}
        found[table_name] = [
            row_gradient(rows[t], grads[t], table.shape, False) if wants_tables[t] else None
            for t, table in enumerate(tables)
        ]
        if ctx.mask_dtypes:
            found["group_masks"] = [None] * ctx.tables
        if a["mask_grad"]:
            parts = split_masks(masks[0], a["group_dims"], [table.shape[1] for table in tables])
            found["group_masks"] = [
                part.to(dtype) if wanted else None
                for part, dtype, wanted in zip(
                    parts, ctx.mask_dtypes, wants["group_masks"], strict=True
                )
            ]
        found["per_sample_weights"] = psw if a["psw_grad"] else None
        return tuple(found.get(name) for name in forward.names)

    torch.library.register_autograd(
        f"amtl::{name}", backward, setup_context=setup, lib=_schema.LIBRARY
    )


def register() -> None:
    """Registers fake implementations and gradients, once, when the package is imported."""
    for name in _schema.TABLE_LOOKUPS:
        fakes = {name: _fake_forward(_Op(name))}
        fakes |= {op: _fake_gradients(_Op(op)) for op in (f"{name}_backward", f"{name}_update_")}
        for op, fake in fakes.items():
            torch.library.register_fake(f"amtl::{op}", fake, lib=_schema.LIBRARY)
        _register_gradient(name)
