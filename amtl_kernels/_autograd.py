"""Fake tensors and gradients of the operators, once for all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amtl_kernels import _schema

_CLAMP = 2


def _bags(offsets: Tensor, include_last_offset: bool) -> int | torch.SymInt:
    return offsets.shape[0] - int(include_last_offset)


def _fake_flat(weight: Tensor, indices: Tensor, *rest: object) -> Tensor:
    return weight.new_empty(*indices.shape, weight.shape[1])


def _fake_masked_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    return weight.new_empty(_bags(offsets, include_last_offset), weight.shape[1])


def _fake_adaptive_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    bounds_check: int,
) -> Tensor:
    return weight.new_empty(_bags(offsets, include_last_offset), weight.shape[1])


def _fake_tiered(
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    embedding_dim: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    return blocks[0].new_empty(*indices.shape, embedding_dim)


def _fake_tiered_bag(
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    return blocks[0].new_empty(_bags(offsets, include_last_offset), embedding_dim)


_FAKE_LOOKUPS: dict[str, Callable[..., Tensor]] = {
    "masked_embedding": _fake_flat,
    "masked_embedding_bag": _fake_masked_bag,
    "adaptive_embedding": _fake_flat,
    "adaptive_embedding_bag": _fake_adaptive_bag,
    "tiered_embedding": _fake_tiered,
    "tiered_embedding_bag": _fake_tiered_bag,
}


def fake_rows(weight: Tensor, asked: bool) -> tuple[Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size() if asked else 0
    rows = weight.new_empty(distinct, dtype=torch.int64)
    return rows, weight.new_empty(distinct, weight.shape[1])


def fake_psw(weight: Tensor, per_sample_weights: Tensor | None, asked: bool) -> Tensor:
    if not asked or per_sample_weights is None:
        return weight.new_empty(0)
    return weight.new_empty(per_sample_weights.shape[0])


def _fake_masked_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (*fake_rows(weight, weight_grad), fake_psw(weight, per_sample_weights, psw_grad))


def _fake_adaptive_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups = group_dims.shape[0] if mask_grad else 0
    return (
        *fake_rows(weight, weight_grad),
        weight.new_empty(groups, weight.shape[1], dtype=compute),
        fake_psw(weight, per_sample_weights, psw_grad),
    )


def _fake_tiered_backward(
    grad: Tensor,
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    pairs = [fake_rows(block, weight_grad) for block in blocks]
    psw = fake_psw(blocks[0], per_sample_weights, psw_grad)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], psw


def _fake_masked_update(
    weight: Tensor,
    state: list[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
) -> Tensor:
    return fake_psw(weight, per_sample_weights, psw_grad)


def _fake_adaptive_update(
    weight: Tensor,
    state: list[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    mask_grad: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
    groups_sorted: bool = False,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups = group_dims.shape[0] if mask_grad else 0
    return (
        weight.new_empty(groups, weight.shape[1], dtype=compute),
        fake_psw(weight, per_sample_weights, psw_grad),
    )


def _fake_tiered_update(
    blocks: list[Tensor],
    state: list[Tensor],
    grad: Tensor,
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
) -> Tensor:
    return fake_psw(blocks[0], per_sample_weights, psw_grad)


_FAKE_BACKWARDS: dict[str, Callable[..., object]] = {
    "masked_embedding_update_": _fake_masked_update,
    "adaptive_embedding_update_": _fake_adaptive_update,
    "tiered_embedding_update_": _fake_tiered_update,
    "masked_embedding_backward": _fake_masked_backward,
    "adaptive_embedding_backward": _fake_adaptive_backward,
    "tiered_embedding_backward": _fake_tiered_backward,
}


def row_gradient(rows: Tensor, grads: Tensor, shape: torch.Size, dense: bool) -> Tensor:
    if dense:
        return grads.new_zeros(shape).index_copy(0, rows, grads)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), grads, shape, is_coalesced=True, check_invariants=False
    )


def _kept_indices(indices: Tensor, rows: int, bounds_check: int) -> Tensor:
    """The indices as the forward used them."""
    if bounds_check == _CLAMP:
        return indices.clamp(0, rows - 1)
    return indices


class _Call:
    """One lookup's arguments by name, whichever of the operators it is."""

    def __init__(self, op: str) -> None:
        schema = getattr(torch.ops.amtl, op).default._schema
        self.names = tuple(argument.name for argument in schema.arguments)
        self.tensors = tuple(
            name
            for name in self.names
            if name
            in {
                "weight",
                "indices",
                "offsets",
                "row_dims",
                "row_group",
                "group_dims",
                "per_sample_weights",
            }
        )

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = dict(zip(self.names, inputs, strict=True))
        weight = arguments.get("weight")
        rows = arguments["tier_ends"][-1] if weight is None else weight.shape[0]
        arguments["indices"] = _kept_indices(arguments["indices"], rows, arguments["bounds_check"])
        blocks = list(arguments.get("blocks", ()))
        ctx.save_for_backward(*(arguments[name] for name in self.tensors), *blocks)
        ctx.blocks = len(blocks)
        ctx.tier_ends = list(arguments.get("tier_ends", ()))
        ctx.embedding_dim = arguments.get("embedding_dim", 0)
        ctx.mode = arguments.get("mode", 0)
        ctx.padding_idx = arguments["padding_idx"]
        ctx.include_last_offset = arguments.get("include_last_offset", False)
        ctx.seed = arguments.get("seed", 0)
        mask = arguments.get("group_mask")
        ctx.mask_dtype = None if mask is None else mask.dtype

    def saved(self, ctx: Any) -> tuple[dict[str, Tensor | None], list[Tensor]]:
        saved = ctx.saved_tensors
        named = dict(zip(self.tensors, saved[: len(self.tensors)], strict=True))
        return named, list(saved[len(self.tensors) :])

    def gradients(self, **by_name: object) -> tuple[object, ...]:
        return tuple(by_name.get(name) for name in self.names)


def _register_masked(op: str, suffix: str) -> None:
    call = _Call(op + suffix)
    weight_at = call.names.index("weight")
    psw_at = call.names.index("per_sample_weights") if op.endswith("bag") else None

    def backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
        t, _ = call.saved(ctx)
        weight = t["weight"]
        assert weight is not None
        wants_weight = ctx.needs_input_grad[weight_at]
        wants_psw = psw_at is not None and ctx.needs_input_grad[psw_at]
        rows, grads, psw = torch.ops.amtl.masked_embedding_backward(
            grad.contiguous(),
            weight,
            t["indices"],
            t.get("offsets"),
            t["row_dims"],
            t.get("per_sample_weights"),
            ctx.mode,
            ctx.padding_idx,
            ctx.include_last_offset,
            wants_weight,
            wants_psw,
        )
        dense = bool(suffix)
        return call.gradients(
            weight=row_gradient(rows, grads, weight.shape, dense) if wants_weight else None,
            per_sample_weights=psw if wants_psw else None,
        )

    torch.library.register_autograd(
        f"amtl::{op}{suffix}", backward, setup_context=call.setup, lib=_schema.LIBRARY
    )


def _register_adaptive(op: str, suffix: str) -> None:
    call = _Call(op + suffix)
    weight_at, mask_at = call.names.index("weight"), call.names.index("group_mask")
    psw_at = call.names.index("per_sample_weights") if op.endswith("bag") else None

    def backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
        t, _ = call.saved(ctx)
        weight = t["weight"]
        assert weight is not None
        wants_weight, wants_mask = ctx.needs_input_grad[weight_at], ctx.needs_input_grad[mask_at]
        wants_psw = psw_at is not None and ctx.needs_input_grad[psw_at]
        rows, grads, mask, psw = torch.ops.amtl.adaptive_embedding_backward(
            grad.contiguous(),
            weight,
            t["indices"],
            t.get("offsets"),
            t["row_group"],
            t["group_dims"],
            t.get("per_sample_weights"),
            ctx.mode,
            ctx.padding_idx,
            ctx.include_last_offset,
            ctx.seed,
            wants_weight,
            wants_mask,
            wants_psw,
        )
        dense = bool(suffix)
        return call.gradients(
            weight=row_gradient(rows, grads, weight.shape, dense) if wants_weight else None,
            group_mask=mask.to(ctx.mask_dtype) if wants_mask else None,
            per_sample_weights=psw if wants_psw else None,
        )

    torch.library.register_autograd(
        f"amtl::{op}{suffix}", backward, setup_context=call.setup, lib=_schema.LIBRARY
    )


def _register_tiered(op: str, suffix: str) -> None:
    call = _Call(op + suffix)
    psw_at = call.names.index("per_sample_weights") if op.endswith("bag") else None

    def backward(ctx: Any, grad: Tensor) -> tuple[object, ...]:
        t, blocks = call.saved(ctx)
        wanted = list(ctx.needs_input_grad[0])
        wants_psw = psw_at is not None and ctx.needs_input_grad[psw_at]
        rows, grads, psw = torch.ops.amtl.tiered_embedding_backward(
            grad.contiguous(),
            blocks,
            ctx.tier_ends,
            t["indices"],
            t.get("offsets"),
            t.get("per_sample_weights"),
            ctx.embedding_dim,
            ctx.mode,
            ctx.padding_idx,
            ctx.include_last_offset,
            any(wanted),
            wants_psw,
        )
        dense = bool(suffix)
        return call.gradients(
            blocks=[
                row_gradient(rows[c], grads[c], block.shape, dense) if wanted[c] else None
                for c, block in enumerate(blocks)
            ],
            per_sample_weights=psw if wants_psw else None,
        )

    torch.library.register_autograd(
        f"amtl::{op}{suffix}", backward, setup_context=call.setup, lib=_schema.LIBRARY
    )


def register() -> None:
    """Registers fake implementations and gradients, once, when the package is imported."""
    for op, fake in _FAKE_LOOKUPS.items():
        for suffix in ("", "_densegrad"):
            torch.library.register_fake(f"amtl::{op}{suffix}", fake, lib=_schema.LIBRARY)
    for op, fake_backward in _FAKE_BACKWARDS.items():
        torch.library.register_fake(f"amtl::{op}", fake_backward, lib=_schema.LIBRARY)
    for op in _schema.SCHEMAS:
        if op.startswith("apply_"):
            torch.library.register_fake(f"amtl::{op}", lambda *_: None, lib=_schema.LIBRARY)
    for suffix in ("", "_densegrad"):
        for bag in ("", "_bag"):
            _register_masked("masked_embedding" + bag, suffix)
            _register_adaptive("adaptive_embedding" + bag, suffix)
            _register_tiered("tiered_embedding" + bag, suffix)
