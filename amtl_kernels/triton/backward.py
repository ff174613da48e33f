"""The gradients of lookups: sort, reduce, and the gradient of ``per_sample_weights``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amtl_kernels._arguments import Wishes
from amtl_kernels.triton import launch
from amtl_kernels.triton.lookups import Lookups
from amtl_kernels.triton.plan import make_plan
from amtl_kernels.triton.reduce import reduce_rows
from amtl_kernels.triton.samples import sample_grad
from amtl_kernels.triton.tables import Table


def gradients(
    lookups: Lookups,
    table: Table,
    weights: Sequence[Tensor],
    weight_grad: bool,
    wishes: Wishes,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of one table or several; waits once, for how many distinct rows there are.

    Args:
        lookups: What was looked up, and the incoming gradient.
        table: The table, or the tables.
        weights: Its one tensor, or those of its tiers or tables.
        weight_grad: Whether row gradients are wanted.
        wishes: The other gradients wanted; tables without groups have none of masks.

    Returns:
        Rows [U] and gradients [U, D] of each of ``weights``, mask gradients (flat, fp32) and the
        gradient of per-sample weights [L]; all of 0 rows where they are not wanted.
    """
    masks = lookups.mask_gradients(table.dim, wishes.mask_grad)
    mask = masks if masks.numel() else None
    none = torch.empty(0, dtype=torch.int64, device=lookups.indices.device)
    rows = [torch.empty_like(none) for _ in weights]
    grads = [weight.new_empty(0, weight.shape[1]) for weight in weights]
    if lookups.indices.numel() == 0:
        if mask is not None:
            mask.zero_()
    elif weight_grad or mask is not None:
        plan = make_plan(lookups, table, mask is not None, weight_grad and mask is not None)
        places = all_rows = out = None
        if weight_grad:
            ends = plan.count_rows(table.tiers)[: len(weights)]
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            all_rows = none.new_empty(ends[-1])
            rows = list(all_rows.split(counts))
            grads = [
                weight.new_empty(count, weight.shape[1])
                for weight, count in zip(weights, counts, strict=True)
            ]
            if mask is not None:
                places = plan.ascending_places(ends[-1])
            if table.tiers is None:
                vector = launch.vector(table.dim, grads[0])
                out = Table(grads[0], ends[-1], table.dim, vector=vector)
            else:
                # The kernel sees the gradients as tiers too, of the positions in the list of rows.
                out = Table.by_tiers(grads, ends, table.dim, keep=False)
        reduce_rows(lookups, plan, table, places, all_rows, out, mask)
    return rows, grads, masks, sample_grad(lookups, table, wishes.psw_grad)
