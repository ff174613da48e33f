"""The operators as the host simulator runs them: the signatures of `amtl_kernels.reference`.

Every function runs the launchers and kernels of ``csrc/cuda`` and ``csrc/kernels`` over the memory
of CPU tensors. Outputs are full of NaN before the call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amtl_kernels import reference


def _load() -> Any:
    path = os.environ.get("AMTL_TOOLS_MODULE")
    if path is None:
        return importlib.import_module("amtl_kernels._tools")
    spec = importlib.util.spec_from_file_location("_tools", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _load()

RAISE, CLAMP = 1, 2
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; 16-bit floats as their bits."""
    assert tensor.is_contiguous()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.detach().view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().numpy()


def tensor_of(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A tensor over what the tool module returned."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(dtype)
    return torch.from_numpy(values)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that must be written before it is worth anything."""
    return torch.full(shape, math.nan, dtype=dtype)


def dense(
    weight: Tensor,
    row_dims: Tensor | None = None,
    row_group: Tensor | None = None,
    group_dims: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A dense table as the tool module takes it."""
    table: dict[str, Any] = {
        "weight": array(weight),
        "rows": weight.shape[0],
        "dim": weight.shape[1],
        "seed": seed,
    }
    if row_dims is not None:
        table["row_dims"] = array(row_dims)
    if row_group is not None and group_dims is not None:
        table["row_group"] = array(row_group)
        table["group_dims"] = array(group_dims)
        table["groups"] = group_dims.shape[0]
        table["columns"] = group_dims.shape[1] if group_dims.dim() == 2 else 1
    return table


def tiered(
    blocks: list[Tensor], tier_ends: list[int], embedding_dim: int, device_tiers: bool = False
) -> dict[str, Any]:
    """A tiered table as the tool module takes it."""
    return {
        "blocks": [array(block) for block in blocks],
        "widths": [block.shape[1] for block in blocks],
        "tier_ends": list(tier_ends),
        "dim": embedding_dim,
        "device_tiers": device_tiers,
    }


def lookups(
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mode: int = 0,
    padding_idx: int = -1,
    include_last_offset: bool = False,
) -> dict[str, Any]:
    """The lookups of a call as the tool module takes them."""
    call: dict[str, Any] = {"indices": array(indices.reshape(-1)), "padding_idx": padding_idx}
    if offsets is not None:
        call["offsets"] = array(offsets.to(indices.dtype))
        call["bags"] = offsets.numel() - int(include_last_offset)
        call["include_last_offset"] = include_last_offset
        call["mode"] = mode
    if per_sample_weights is not None:
        call["per_sample_weights"] = array(per_sample_weights)
    return call


def answer_report(call: dict[str, Any], report: np.ndarray, rows: int, bounds_check: int) -> None:
    """Says what the torch binding says about what a kernel has reported."""
    index, offset, size = (int(v) for v in report)
    if index >= 0:
        value = int(call["indices"][index])
        if bounds_check == RAISE or rows == 0:
            raise IndexError(
                f"index {value} at position {index} is out of range for a table of {rows} rows"
            )
        reference.warn_clamped(value, index, rows)
    if offset >= 0:
        reference.check_offsets(torch.from_numpy(call["offsets"]), len(call["indices"]))
        raise AssertionError("the kernel found a wrong offset where there is none")
    if size >= 0:
        raise ValueError(f"the size at position {size} is outside of the row")


def _forward(
    table: dict[str, Any],
    call: dict[str, Any],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bounds_check: int,
    rows: int,
) -> Tensor:
    out = poisoned(math.prod(shape[:-1]), shape[-1], dtype=dtype)
    report = np.full(3, -1, dtype=np.int64)
    if bounds_check:
        call["report"] = report
    tools.lookup(NAMES[dtype], table, call, array(out))
    answer_report(call, report, rows, bounds_check)
    return out.reshape(shape)


def masked_embedding(
    weight: Tensor, indices: Tensor, row_dims: Tensor, padding_idx: int, bounds_check: int
) -> Tensor:
    shape = (*indices.shape, weight.shape[1])
    table = dense(weight, row_dims=row_dims)
    return _forward(table, lookups(indices), weight.dtype, shape, bounds_check, weight.shape[0])


def masked_embedding_bag(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_dims=row_dims)
    shape = (call["bags"], weight.shape[1])
    return _forward(table, call, weight.dtype, shape, bounds_check, weight.shape[0])


def adaptive_embedding(
    weight: Tensor,
    indices: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    seed: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    table = dense(weight, row_group=row_group, group_dims=group_dims, seed=seed)
    shape = (*indices.shape, weight.shape[1])
    return _forward(table, lookups(indices), weight.dtype, shape, bounds_check, weight.shape[0])


def adaptive_embedding_bag(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_group=row_group, group_dims=group_dims, seed=seed)
    shape = (call["bags"], weight.shape[1])
    return _forward(table, call, weight.dtype, shape, bounds_check, weight.shape[0])


def tiered_embedding(
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    embedding_dim: int,
    padding_idx: int,
    bounds_check: int,
    device_tiers: bool = False,
) -> Tensor:
    table = tiered(blocks, tier_ends, embedding_dim, device_tiers)
    shape = (*indices.shape, embedding_dim)
    return _forward(table, lookups(indices), blocks[0].dtype, shape, bounds_check, tier_ends[-1])


def tiered_embedding_bag(
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
    device_tiers: bool = False,
) -> Tensor:
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = tiered(blocks, tier_ends, embedding_dim, device_tiers)
    shape = (call["bags"], embedding_dim)
    return _forward(table, call, blocks[0].dtype, shape, bounds_check, tier_ends[-1])


def psw_gradient(
    table: dict[str, Any], call: dict[str, Any], grad: Tensor, dtype: torch.dtype, asked: bool
) -> Tensor:
    if not asked:
        return torch.empty(0, dtype=dtype)
    out = poisoned(len(call["indices"]), dtype=dtype)
    tools.psw_grad(NAMES[dtype], table, call, array(grad), array(out))
    return out


def masked_embedding_backward(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_dims=row_dims)
    grad = grad.reshape(-1, weight.shape[1])
    rows = torch.empty(0, dtype=torch.int64)
    grads = torch.empty(0, weight.shape[1], dtype=weight.dtype)
    if weight_grad:
        result = tools.backward(NAMES[weight.dtype], table, call, array(grad), {})
        rows = tensor_of(result["rows"], torch.int64)
        grads = tensor_of(result["grads"], weight.dtype)
    return rows, grads, psw_gradient(table, call, grad, weight.dtype, psw_grad)


def adaptive_embedding_backward(
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
    groups_sorted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_group=row_group, group_dims=group_dims, seed=seed)
    grad = grad.reshape(-1, weight.shape[1])
    rows = torch.empty(0, dtype=torch.int64)
    grads = torch.empty(0, weight.shape[1], dtype=weight.dtype)
    group_grad = poisoned(
        group_dims.shape[0] if mask_grad else 0, weight.shape[1], dtype=torch.float32
    )
    if weight_grad or mask_grad:
        wishes: dict[str, Any] = {"need_rows": weight_grad, "groups_sorted": groups_sorted}
        if mask_grad:
            wishes["group_grad"] = array(group_grad)
        result = tools.backward(NAMES[weight.dtype], table, call, array(grad), wishes)
        if weight_grad:
            rows = tensor_of(result["rows"], torch.int64)
            grads = tensor_of(result["grads"], weight.dtype)
    return rows, grads, group_grad, psw_gradient(table, call, grad, weight.dtype, psw_grad)


def tiered_embedding_backward(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = tiered(blocks, tier_ends, embedding_dim)
    dtype = blocks[0].dtype
    grad = grad.reshape(-1, embedding_dim)
    rows = [torch.empty(0, dtype=torch.int64) for _ in blocks]
    grads = [block.new_empty(0, block.shape[1]) for block in blocks]
    if weight_grad and len(call["indices"]):
        result = tools.backward(NAMES[dtype], table, call, array(grad), {})
        rows = [tensor_of(r, torch.int64) for r in result["rows"]]
        grads = [tensor_of(g, dtype) for g in result["grads"]]
    return rows, grads, psw_gradient(table, call, grad, dtype, psw_grad)


RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam")


def update(rule: str, step: int = 1, **values: Any) -> dict[str, Any]:
    """An optimizer step as the tool module takes it; states as tensors."""
    result: dict[str, Any] = {"rule": rule, "seed": step}
    for name, value in values.items():
        result[name] = array(value) if isinstance(value, Tensor) else value
    if rule == "adam":
        result["step_size"] = values["lr"] / (1 - values["beta1"] ** step)
        result["second_scale"] = 1 / math.sqrt(1 - values["beta2"] ** step)
    return result


def _apply(
    rule: str,
    weight: Tensor,
    states: tuple[Tensor, ...],
    rows: Tensor,
    grads: Tensor,
    rounding_seed: int | None,
    step: int = 1,
    **hyper: float,
) -> None:
    call = update(rule, step, **dict(zip(("first", "second"), states, strict=False)), **hyper)
    call["narrow_state"] = bool(states) and states[0].dtype != torch.float32
    if rounding_seed is not None:
        call |= {"stochastic_rounding": True, "seed": rounding_seed}
    tools.apply_update(NAMES[weight.dtype], dense(weight), call, array(rows), array(grads))


def apply_sgd_(
    weight: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    _apply("sgd", weight, (), rows, grads, rounding_seed, lr=lr, weight_decay=weight_decay)


def apply_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
    rule: str = "adagrad",
) -> None:
    hyper = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    _apply(rule, weight, (state_sum,), rows, grads, rounding_seed, **hyper)


apply_rowwise_adagrad_ = functools.partial(apply_adagrad_, rule="rowwise_adagrad")


def apply_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grads: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    _apply("adam", weight, (exp_avg, exp_avg_sq), rows, grads, rounding_seed, step, **hyper)


def _fused(
    table: dict[str, Any],
    dtype: torch.dtype,
    call: dict[str, Any],
    grad: Tensor,
    state: list[Tensor],
    optimizer: int,
    hyper: list[float],
    wishes: dict[str, Any],
) -> None:
    lr, eps, weight_decay, beta1, beta2, step, *stochastic = hyper
    moments = (0, 1, 1, 2)[optimizer]
    tables = len(table.get("blocks", "1"))
    states: dict[str, Any] = {}
    for i in range(moments):
        mine = [array(s) for s in state[i : tables * moments : moments]]
        name = ("first", "second")[i]
        states |= {"tier_" + name: mine} if "blocks" in table else {name: mine[0]}
    if len(state) > tables * moments:
        # What the host would have computed must not be used.
        states |= {"counter": array(state[-1].reshape(1))}
        step = 10**6
    values = update(
        RULES[optimizer],
        int(step),
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        stochastic_rounding=any(stochastic),
        **states,
    )
    flat = array(grad.reshape(-1, table["dim"]))
    tools.backward_update(NAMES[dtype], table, call, flat, values, wishes)


def masked_embedding_update_(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_dims=row_dims)
    psw = psw_gradient(table, call, grad, weight.dtype, psw_grad)
    _fused(table, weight.dtype, call, grad, state, optimizer, hyper, {})
    return psw


def adaptive_embedding_update_(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = dense(weight, row_group=row_group, group_dims=group_dims, seed=seed)
    psw = psw_gradient(table, call, grad, weight.dtype, psw_grad)
    mask = poisoned(group_dims.shape[0] if mask_grad else 0, weight.shape[1], dtype=torch.float32)
    wishes: dict[str, Any] = {"read_header": True, "groups_sorted": groups_sorted}
    if mask_grad:
        wishes["group_grad"] = array(mask)
    _fused(table, weight.dtype, call, grad, state, optimizer, hyper, wishes)
    return mask, psw


def tiered_embedding_update_(
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
    call = lookups(indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    table = tiered(blocks, tier_ends, embedding_dim)
    psw = psw_gradient(table, call, grad, blocks[0].dtype, psw_grad)
    _fused(table, blocks[0].dtype, call, grad, state, optimizer, hyper, {})
    return psw


@contextlib.contextmanager
def simulation(
    seed: int = 0,
    thread_order: str = "random",
    track_races: bool = False,
    track_traffic: bool = False,
) -> Iterator[None]:
    """Sets how the simulator runs, for a while."""
    tools.configure(seed, thread_order, track_races, track_traffic)
    try:
        yield
    finally:
        tools.configure()


IMPLEMENTATIONS = {name: globals()[name] for name in reference.IMPLEMENTATIONS if name in globals()}
"""Operator name to the simulated operator."""
