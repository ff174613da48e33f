"""Calls of the operators with tensors of a test's own, by the names of their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kernel_cases import Call
from torch import Tensor

RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam")
"""Optimizers by their number."""


def call(
    blocks: Sequence[Tensor],
    indices: Tensor,
    grad: Tensor | None = None,
    *,
    block_counts: Sequence[int] | None = None,
    dims: Sequence[int] = (),
    sizes: Sequence[Tensor] = (),
    row_groups: Sequence[Tensor] = (),
    seed: int = 0,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    pooling: int = 0,
    padding_idx: Sequence[int] = (-1,),
    include_last_offset: bool = False,
    groups_sorted: bool = False,
) -> Call:
    """A call of one table, or of as many as ``padding_idx`` has entries; not pooled, not padded.

    Its masks, which no operator reads, are the blocks.
    """
    counts = [1] * len(blocks) if sizes else [len(blocks)]
    return Call(
        tables={
            "blocks": list(blocks),
            "block_counts": counts if block_counts is None else list(block_counts),
            "dims": list(dims),
            "sizes": list(sizes),
            "row_groups": list(row_groups),
            "seed": seed,
        },
        masks=list(blocks) if row_groups else [],
        bags={
            "indices": indices,
            "offsets": offsets,
            "per_sample_weights": per_sample_weights,
            "pooling": pooling,
            "padding_idx": list(padding_idx),
            "include_last_offset": include_last_offset,
        },
        grad=torch.empty(0) if grad is None else grad,
        groups_sorted=groups_sorted,
    )


def step(
    of: Call,
    blocks: list[Tensor],
    state: list[Tensor],
    rule: str,
    hyper: Sequence[float],
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of ``lookup_update_`` that update ``blocks``, without other gradients."""
    mine = {"blocks": blocks, "state": state, "hyper": list(hyper)}
    return {
        **of.tables,
        "grad": of.grad,
        **of.bags,
        "mask_grad": False,
        "psw_grad": False,
        "groups_sorted": of.groups_sorted,
        "optimizer": RULES.index(rule),
        **mine,
        **changes,
    }


def applying(
    blocks: list[Tensor],
    rows: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    rule: str,
    hyper: Sequence[float],
) -> dict[str, Any]:
    """Arguments of ``apply_``."""
    mine = {"blocks": blocks, "rows": rows, "grads": grads, "state": state}
    return mine | {"optimizer": RULES.index(rule), "hyper": list(hyper)}
