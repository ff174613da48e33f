"""Budgets over rows in native code, which finds what PyTorch's operations find, bit for bit.

A few thousand comparisons are what a budget takes, and dozens of PyTorch's operations, each of
which costs more than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amtl_kernels import backend


def fit(
    scores: Tensor, rows: Tensor, marks: Tensor, steps: Tensor, capacity: Tensor, tilts: bool
) -> Tensor | None:
    """The shifts, or tilts, of L tables; None where PyTorch's operations have to find them.

    Args:
        scores: [L, G] of float64; logits [L, G, M] of float32 or float64 for tilts.
        rows: float64 [L, G].
        marks: thresholds, float64 [L, M]; for tilts sizes [M], of the type of the logits.
        steps: float64 [L, M], of thresholds; for tilts what is stored at each size.
        capacity: float64 [L].
        tilts: which of the two.
    """
    given = (scores, rows, marks, steps, capacity)
    exact = (torch.float64, torch.float32) if tilts else (torch.float64,)
    if backend.native is None or scores.dtype not in exact or marks.dtype != scores.dtype:
        return None
    if not all(type(tensor) is Tensor and tensor.is_cpu for tensor in given):
        return None
    if not all(tensor.dtype == torch.float64 for tensor in (rows, steps, capacity)):
        return None
    out = scores.new_empty(len(scores))
    held = [tensor.contiguous() for tensor in (*given, out)]
    addresses = [tensor.data_ptr() for tensor in held]
    kind = scores.itemsize if tilts else 0
    if backend.native.fit(kind, *addresses, *rows.shape, steps.shape[-1]):
        return out
    return None
