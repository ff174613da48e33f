"""The three backward operators: sort, reduce, and the gradient of ``per_sample_weights``.

Each is a generator that stops where it needs integers of the device: it yields their tensor and
is sent their values. So the backwards of several tables wait once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from amtl_kernels.triton import launch
from amtl_kernels.triton.plan import Bags, find_bags, make_plan
from amtl_kernels.triton.reduce import reduce_rows
from amtl_kernels.triton.samples import sample_grad
from amtl_kernels.triton.tables import Table

CHUNK = 0
"""Lookups per piece at most; 0 lets the plan choose. Tests make it small, for the second pass."""


_Result = TypeVar("_Result")
Steps = Generator[Tensor, list[int], _Result]
"""Yields a small int64 tensor at most once, and is sent its values."""


def run_all(every: Iterable[Steps[_Result]]) -> list[_Result]:
    """Runs backwards side by side, with one wait for what all of them ask."""
    results: dict[int, _Result] = {}
    asking: list[tuple[int, Steps[_Result], Tensor]] = []
    for i, steps in enumerate(every):
        try:
            asking.append((i, steps, next(steps)))
        except StopIteration as stop:  # noqa: PERF203
            results[i] = stop.value
    if asking:
        wanted = [tensor for _, _, tensor in asking]
        values = iter(launch.read(wanted[0] if len(wanted) == 1 else torch.cat(wanted)))
    for i, steps, tensor in asking:
        try:
            steps.send([next(values) for _ in range(tensor.numel())])
        except StopIteration as stop:  # noqa: PERF203
            results[i] = stop.value
    return [results[i] for i in range(len(results))]


def _flat_grad(grad: Tensor, dim: int) -> Tensor:
    return grad.reshape(-1, dim).contiguous()


def _bags(
    flat: Tensor,
    offsets: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Bags | None:
    if offsets is None:
        return None
    return find_bags(flat, offsets, mode, padding_idx, include_last_offset)


def _dense_steps(
    table: Table,
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor | None,
    groups: int,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Row gradients, mask gradient and sample gradient of a dense table; empty if not asked for."""
    dim = table.dim
    flat = indices.reshape(-1).contiguous()
    grad = _flat_grad(grad, dim)
    bags = _bags(flat, offsets, mode, padding_idx, include_last_offset)
    rows = torch.empty(0, dtype=torch.int64, device=flat.device)
    grads = weight.new_empty(0, dim)
    mask = weight.new_empty(groups if mask_grad else 0, dim, dtype=torch.float32)
    psw = weight.new_empty(0)
    if (weight_grad or mask_grad) and flat.numel() == 0:
        mask.zero_()
    elif weight_grad or mask_grad:
        plan = make_plan(
            flat,
            table.rows,
            dim,
            padding_idx,
            bags,
            per_sample_weights,
            row_group if mask_grad else None,
            groups,
            weight_grad and mask_grad,
            CHUNK,
        )
        pieces, place = plan.most_pieces, None
        if weight_grad:
            distinct, pieces = plan.split_count((yield plan.counts[-1:])[0])
            rows = rows.new_empty(distinct)
            grads = weight.new_empty(distinct, dim)
            if mask_grad:
                place = plan.ascending_places(distinct)
        reduce_rows(
            grad,
            plan,
            pieces,
            table,
            weight,
            place,
            rows if weight_grad else None,
            grads if weight_grad else None,
            mask if mask_grad else None,
        )
    if psw_grad and bags is not None:
        psw = sample_grad(grad, table, flat, bags, padding_idx)
    return rows, grads, mask, psw


def masked_steps(
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
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Row gradients ``(rows [U], grads [U, D])`` and the gradient of ``per_sample_weights``."""
    rows, grads, _, psw = yield from _dense_steps(
        Table.by_rows(weight, row_dims),
        grad,
        weight,
        indices,
        offsets,
        None,
        0,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        weight_grad,
        False,
        psw_grad,
    )
    return rows, grads, psw


def adaptive_steps(
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
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """As :func:`masked_steps`, and the gradient of the soft mask.

    ``group_mask_grad[g, j] = sum of delta_j * weight[i, j]`` over the lookups of the rows ``i`` of
    group ``g`` and over all ``j``, masked ones too.
    """
    return _dense_steps(
        Table.by_groups(weight, row_group, group_dims, seed),
        grad,
        weight,
        indices,
        offsets,
        row_group,
        group_dims.shape[0],
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        weight_grad,
        mask_grad,
        psw_grad,
    )


def tiered_steps(
    grad: Tensor,
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    psw_grad: bool,
) -> Steps[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Row gradients of every tier, rows counted from the tier's start."""
    flat = indices.reshape(-1).contiguous()
    grad = _flat_grad(grad, embedding_dim)
    bags = _bags(flat, offsets, mode, padding_idx, include_last_offset)
    empty = torch.empty(0, dtype=torch.int64, device=flat.device)
    rows = [torch.empty_like(empty) for _ in blocks]
    grads = [block.new_empty(0, block.shape[1]) for block in blocks]
    psw = blocks[0].new_empty(0)
    table = Table.by_tiers(blocks, tier_ends, embedding_dim)
    if weight_grad and flat.numel():
        plan = make_plan(
            flat,
            table.rows,
            embedding_dim,
            padding_idx,
            bags,
            per_sample_weights,
            None,
            0,
            chunk=CHUNK,
        )
        below = (yield plan.count_rows_of_tiers(table.tiers))[: len(blocks)]
        counts = [end - start for start, end in zip([0, *below], below, strict=False)]
        grads = [b.new_empty(n, b.shape[1]) for b, n in zip(blocks, counts, strict=True)]
        all_rows = empty.new_empty(below[-1])
        # The kernel sees the gradients as tiers too, of the positions in the list of rows.
        out = Table.by_tiers(grads, below, embedding_dim, keep=False)
        reduce_rows(grad, plan, plan.most_pieces, out, blocks[0], None, all_rows, out.data, None)
        starts = [0, *tier_ends[:-1]]
        rows = list(torch._foreach_sub(all_rows.split(counts), starts))
    if psw_grad and bags is not None:
        psw = sample_grad(grad, table, flat, bags, padding_idx)
    return rows, grads, psw


def _operator(steps: Callable[..., Steps[_Result]]) -> Callable[..., _Result]:
    @functools.wraps(steps)
    def backward(*arguments: object) -> _Result:
        return run_all([steps(*arguments)])[0]

    return backward


OPERATORS: dict[str, Callable[..., object]] = {
    "masked_embedding_backward": _operator(masked_steps),
    "adaptive_embedding_backward": _operator(adaptive_steps),
    "tiered_embedding_backward": _operator(tiered_steps),
}
"""Operator name to implementation."""
