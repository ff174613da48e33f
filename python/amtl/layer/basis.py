"""Principal components: coordinates in which a prefix of each row keeps most of a trained table.

A table that was trained for itself has no order among its D numbers, and cutting rows off loses
what happened to stand last. With `W = Z B`, rows of Z are held, cut off and rounded, and lookups
show `z B`: B has the eigenvectors of `sum_i q_i w_i w_i^T`, q_i the counts, by falling eigenvalue,
so that of all the tables of so many columns the first ones of Z are closest to W (Eckart and Young
1936), a row as important as it is often looked up. Each column of Z is scaled to one variance,
because numbers of few bits have one step size for all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amtl.layer.tiers import MOMENTA

PRINCIPAL = "principal"

BITS = 8
"""Of a number, unless others are asked for: of 4 bits the error is larger than what is cut off."""

_DEAR = 0.25
"""Share of a table's bytes that its basis may take."""
_ROWS = 1 << 16
"""That are multiplied at a time."""
_FAINT = 1e-4
"""Of the largest deviation: columns below that stay as small as they are."""


def principal_basis(weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of a table, weighted by counts.

    Args:
        weight: [N, D].
        counts: [N]; if all are zero, rows count alike.

    Returns:
        `B` float64 [D, D] with rows by falling variance, and its inverse; columns of `W B^-1` have
        one mean square. O(N * D^2).

    Raises:
        ValueError: numbers that are not finite.
    """
    dim = weight.shape[1]
    moments = torch.zeros(dim, dim, dtype=torch.float64, device=weight.device)
    looked_up = counts.to(weight.device, torch.float64)
    if not bool(looked_up.any()):
        looked_up = torch.ones_like(looked_up)
    for rows, often in zip(weight.split(_ROWS), looked_up.split(_ROWS), strict=True):
        part = rows.float()
        moments += (part.T @ (part * often[:, None].float())).double()
    if not bool(moments.isfinite().all()):
        raise ValueError("numbers that are not finite have no components")
    variances, vectors = torch.linalg.eigh(moments)
    deviations, vectors = variances.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if not bool(deviations[0] > 0):
        identity = torch.eye(dim, dtype=torch.float64, device=weight.device)
        return identity, identity
    # Which of two opposite vectors comes out differs between machines.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    scales = deviations.clamp(min=_FAINT * float(deviations[0])) / deviations.square().mean().sqrt()
    return scales[:, None] * vectors.T, vectors / scales


def multiply(table: Tensor, matrix: Tensor) -> None:
    """`table [N, D] @ matrix [D, D]`, in place."""
    factor = matrix.to(table.device, torch.float32)
    for rows in table.split(_ROWS):
        rows.copy_(rows.float() @ factor)


def turn_states(optimizers: list[Optimizer], table: nn.Parameter, matrix: Tensor) -> None:
    """What optimizers know of a table [N, D], where its gradients are multiplied from now on.

    Momenta as gradients are; sums of squares as if the numbers of a row were independent; what has
    another shape stays.
    """
    for optimizer in optimizers:
        for key, value in (optimizer.state.get(table) or {}).items():
            if isinstance(value, Tensor) and value.shape == table.shape:
                multiply(value, matrix if key in MOMENTA else matrix.square())


def bears_basis(weight: Tensor, budget: float | None) -> bool:
    """Whether a table [N, D] of this budget, a share of its bytes, has them for a basis."""
    return budget is None or weight.shape[1] <= _DEAR * budget * len(weight)


def pay_for_bases(
    chosen: Mapping[nn.Module, dict[str, Any]], weight_of: Callable[[nn.Module], Tensor]
) -> list[nn.Module]:
    """The tables that lose numbers and whose budgets bear a basis, which is taken from these.

    Args:
        chosen: options of each table, with a "budget" of its own and "bits".
        weight_of: the table [N, D].
    """
    found = []
    for module, options in chosen.items():
        budget, weight = options["budget"], weight_of(module)
        rows, dim = weight.shape
        width = 8 * weight.itemsize
        bits = options.get("bits")
        full = (bits if isinstance(bits, int) else width) / width
        if not bears_basis(weight, budget) or (budget is not None and budget >= full):
            continue
        found.append(module)
        if budget is not None:
            options["budget"] = budget - dim / rows
    return found
