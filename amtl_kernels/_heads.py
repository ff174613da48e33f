"""What size heads compute while they learn, in native code: budgets over rows, twins, soft masks.

A few thousand numbers are what a head works on, and dozens of PyTorch's operations, each of which
costs more than that. All functions work on L heads, one below the other, and return None where
PyTorch's operations have to do it: on other devices, in other types, where a number is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amtl_kernels import backend


def fit(
    scores: Tensor, rows: Tensor, marks: Tensor, steps: Tensor, capacity: Tensor, tilts: bool
) -> Tensor | None:
    """The shifts, or tilts, of L tables; bit for bit what PyTorch's operations find.

    Args:
        scores: [L, G] of float64; logits [L, G, M] of float32 or float64 for tilts.
        rows: float64 [L, G].
        marks: thresholds, float64 [L, M]; for tilts sizes [M], of the type of the logits.
        steps: float64 [L, M], of thresholds; for tilts what is stored at each size.
        capacity: float64 [L].
        tilts: which of the two.
    """
    exact = (torch.float64, torch.float32) if tilts else (torch.float64,)
    if backend.native is None or scores.dtype not in exact or marks.dtype != scores.dtype:
        return None
    if not _lie_here(torch.float64, rows, steps, capacity):
        return None
    if not _lie_here(scores.dtype, scores, marks):
        return None
    out = scores.new_empty(len(scores))
    held = [tensor.contiguous() for tensor in (scores, rows, marks, steps, capacity, out)]
    addresses = [tensor.data_ptr() for tensor in held]
    kind = scores.itemsize if tilts else 0
    if backend.native.fit(kind, *addresses, *rows.shape, steps.shape[-1]):
        return out
    return None


def twins(
    numbers: Tensor,
    features: Tensor,
    gate: Tensor | None,
    widths: Tensor,
    grad: Tensor | None = None,
) -> Tensor | None:
    """Outputs of the branches fused by the gate, [L, G, M], or the gradient of their numbers.

    Args:
        numbers: float32 [L, P], of each branch, layer by layer, weight [out, in] and bias [out].
        features: float32 [L, G, F].
        gate: float32 [L, G], the share of the first branch of two; None for one branch.
        widths: int64, F, the hidden widths and M.
        grad: of the outputs; None for the outputs themselves. O(L * P * G) either way.
    """
    given = [tensor for tensor in (numbers, features, gate, grad) if tensor is not None]
    if backend.native is None or not _lie_here(torch.float32, *given):
        return None
    heads, groups, _ = features.shape
    out = numbers.new_empty((heads, groups, int(widths[-1])) if grad is None else numbers.shape)
    inputs = [
        None if tensor is None else tensor.contiguous()
        for tensor in (numbers, features, gate, widths, grad)
    ]
    *before, pulls = (0 if tensor is None else tensor.data_ptr() for tensor in inputs)
    done = backend.native.twins(*before, heads, groups, len(widths) - 1, pulls, out.data_ptr())
    return out if done else None


def kernel_mask_gradient(positions: Tensor, columns: Tensor, grad: Tensor) -> Tensor | None:
    """Gradient of the positions of soft masks `sigmoid(positions[..., None] - columns)`, [L, G].

    Args:
        positions: float32 [L, G].
        columns: float32 [L, D].
        grad: float32 [L, G, D], of the masks. O(L * G * D).
    """
    return _mask_gradient(0, positions, columns, grad, 0)


def softmax_mask_gradient(logits: Tensor, levels: Tensor, grad: Tensor) -> Tensor | None:
    """Gradient of logits whose softmax p makes soft masks `sum of p[k] over k >= levels`.

    Args:
        logits: float32 [L, G, M].
        levels: int64 [D], ascending, the first level that keeps a column.
        grad: float32 [L, G, D], of the masks. O(L * G * (M + D)).
    """
    return _mask_gradient(1, logits, levels, grad, logits.shape[-1])


def _mask_gradient(
    kind: int, positions: Tensor, columns: Tensor, grad: Tensor, levels: int
) -> Tensor | None:
    if backend.native is None or not _lie_here(torch.float32, positions, grad):
        return None
    if not _lie_here(torch.int64 if kind else torch.float32, columns):
        return None
    out = positions.new_empty(positions.shape)
    held = [tensor.contiguous() for tensor in (positions, columns, grad)]
    addresses = [tensor.data_ptr() for tensor in held]
    shape = *grad.shape, levels
    done = backend.native.mask_gradient(kind, *addresses, out.data_ptr(), *shape)
    return out if done else None


def draw_sizes(
    real: Tensor,
    sizes: Tensor,
    factors: Tensor,
    step: int,
    least: int,
    dim: int,
    rounds_down: bool,
) -> Tensor | None:
    """Sizes at quantiles of noise, [..., Q], bit for bit what PyTorch's operations find.

    Args:
        real: float32 [...], sizes that may be fractional.
        sizes: uint8 or int32 [...], as without noise; who keeps nothing keeps nothing.
        factors: float32 [Q], what they are multiplied by.
        step: sizes are multiples of it, or `dim`.
        least: the smallest size, of those that keep anything.
        dim: the largest.
        rounds_down: whether they are cut to a multiple or rounded to the nearest one.
    """
    if backend.native is None or not _lie_here(torch.float32, real, factors):
        return None
    if not _lie_here(sizes.dtype, sizes) or sizes.dtype not in (torch.uint8, torch.int32):
        return None
    out = sizes.new_empty((*real.shape, len(factors)))
    held = [tensor.contiguous() for tensor in (real, sizes, factors)]
    addresses = [tensor.data_ptr() for tensor in held]
    shape = real.numel(), len(factors)
    kind = int(rounds_down), sizes.itemsize
    done = backend.native.draw_sizes(*addresses, out.data_ptr(), *shape, step, least, dim, *kind)
    return out if done else None


def _lie_here(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether the memory of these is that of numbers of this type on the CPU."""
    return all(type(x) in _KINDS and x.is_cpu and x.dtype == dtype for x in tensors)


_KINDS = (Tensor, torch.nn.Parameter)
