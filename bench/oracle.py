"""What every contender must produce: the equations in float64, written without any of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.inputs import Problem, noise_columns
from bench.traffic import Layout

Sizes = Literal["all", "kept", "noisy", "stored"]

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# A single wrong row among a hundred thousand hides in a mean; so rows are looked at one by one,
# with room for the unluckiest rounding.
_ROW_SLACK = 50.0


class MismatchError(AssertionError):
    """A contender computes something else than its equations."""


def _numbers(values: Tensor) -> NDArray[np.int64]:
    found: NDArray[np.int64] = values.long().cpu().numpy()
    return found


@dataclass(frozen=True)
class Equations:
    """Which equations a contender claims to compute.

    Attributes:
        sizes: Kept sizes: ``"all"`` masks nothing, ``"kept"`` are the problem's sizes,
            ``"noisy"`` those under its size noise, ``"stored"`` the widths of its tiers.
        mask_gradient: Whether the straight-through gradient of the soft mask is part of it.
        tier_width: Of ``"stored"``.
    """

    sizes: Sizes
    mask_gradient: bool = False
    tier_width: int = 4

    def dims(self, problem: Problem, rows: Tensor) -> Tensor:
        """Sizes that the forward uses at ``rows`` of the concatenated tables, int64."""
        if self.sizes == "all":
            return torch.full_like(rows, problem.case.dim)
        if self.sizes == "stored":
            return problem.tiers(self.tier_width).widths[rows].long()
        return problem.dims_of(rows, noise=self.sizes == "noisy")

    def layout(self, problem: Problem, rows: Tensor, bits: int = 0) -> Layout:
        """Where lookups of ``rows`` of the concatenated tables find what they read.

        Args:
            problem: The problem.
            rows: Rows looked up, ``[L]``.
            bits: Of a number in a row; 0: as in the problem's table.
        """
        bits = bits or 8 * problem.weight.element_size()
        kept = _numbers(self.dims(problem, rows) * bits) + 7 >> 3
        if self.sizes == "stored":
            tiers = problem.tiers(self.tier_width)
            place = tiers.rank[rows]
            return Layout(_numbers(place), tiers.begins(bits)[_numbers(place)], kept, kept)
        stored = np.full_like(kept, problem.case.dim * bits + 7 >> 3)
        place, told = _numbers(rows), []
        if self.sizes == "noisy" or self.mask_gradient:
            group = problem.row_group[rows].long()
            entry = group
            if problem.group_dims.dim() == 2:
                columns = problem.group_dims.shape[1]
                entry = group * columns + noise_columns(rows, problem.seed, columns)
            told = [4 * place, problem.group_dims.element_size() * _numbers(entry)]
        elif self.sizes == "kept":
            told = [problem.row_dims.element_size() * place]
        return Layout(place, stored * place, kept, stored, told)


@dataclass(frozen=True)
class GivenSizes(Equations):
    """Equations of somebody who brings sizes of its own.

    Attributes:
        row_dims: Kept size of every row of the concatenated tables, ``[T·N]``.
    """

    row_dims: Tensor | None = None

    def dims(self, problem: Problem, rows: Tensor) -> Tensor:
        """Its sizes at ``rows``, int64."""
        assert self.row_dims is not None
        return self.row_dims[rows].long()


@dataclass
class Outcome:
    """Results of one call; what a kind of work does not produce stays None.

    Attributes:
        output: ``[T·B, D]``.
        row_gradient: Gradient of the distinct rows in ascending order, ``[U, D]``.
        mask_gradient: ``[G, D]``.
        update: Change of the distinct rows by one step from fresh optimizer state, ``[U, D]``.
    """

    output: Tensor
    row_gradient: Tensor | None = None
    mask_gradient: Tensor | None = None
    update: Tensor | None = None


def expected(problem: Problem, rotation: int, equations: Equations) -> Outcome:
    """The outcome of one call on id set ``rotation``, in float64.

    Cost: O(L·D) memory. Reads ``problem.weight`` as it is now.
    """
    case = problem.case
    ids = problem.global_ids[rotation]
    rows, inverse = torch.unique(ids, return_inverse=True)
    weight = problem.weight[rows].double()
    dims = equations.dims(problem, rows)
    columns = torch.arange(case.dim)
    mask = (columns < dims.unsqueeze(1)).double()
    # The padding of a tier is stored as zero, so a forward by stored width equals one by size.
    forward_mask = mask
    if equations.sizes == "stored":
        forward_mask = (columns < problem.dims_of(rows, noise=False).unsqueeze(1)).double()
    output = (weight * forward_mask)[inverse].view(-1, case.bag_size, case.dim).sum(1)
    if case.work == "forward":
        return Outcome(output)

    delta = problem.grad.double().repeat_interleave(case.bag_size, 0)
    whole = torch.zeros_like(weight).index_add_(0, inverse, delta)
    row_gradient = whole * mask
    mask_gradient = None
    if equations.mask_gradient:
        mask_gradient = torch.zeros(problem.group_mask.shape, dtype=torch.float64)
        mask_gradient.index_add_(0, problem.row_group[rows].long(), whole * weight)
    if case.work == "backward":
        return Outcome(output, row_gradient, mask_gradient)

    if case.optimizer == "sgd":
        step = row_gradient
    elif case.optimizer == "rowwise_adagrad":
        mean_square = row_gradient.square().sum(1, keepdim=True) / dims.clamp(min=1).unsqueeze(1)
        step = row_gradient / (mean_square.sqrt() + problem.eps)
    else:
        # Adam's first step is Adagrad's.
        step = row_gradient / (row_gradient.abs() + problem.eps)
    return Outcome(output, None, mask_gradient, -problem.learning_rate * step)


def compare(
    name: str, outcome: Outcome, wanted: Outcome, dtype: torch.dtype, *, tolerance: float = 0.0
) -> float:
    """Compares an outcome with what was wanted, whole and row by row.

    Args:
        name: Of the contender, for the message.
        outcome: What it produced; None where it can't show a part, but never its output.
        wanted: From :func:`expected`.
        dtype: Of the weights; sets the tolerance.
        tolerance: A larger one for contenders that round on purpose.

    Returns:
        The largest relative error found.

    Raises:
        MismatchError: Something differs, is missing or not finite.
    """
    limit = max(_TOLERANCE[dtype], tolerance)
    worst = 0.0
    for part in fields(Outcome):
        want, got = getattr(wanted, part.name), getattr(outcome, part.name)
        if want is None:
            continue
        if got is None:
            raise MismatchError(f"{name}: produced no {part.name}")
        if got.shape != want.shape:
            raise MismatchError(
                f"{name}: {part.name} is {tuple(got.shape)}, not {tuple(want.shape)}"
            )
        off = got.double() - want
        norm = want.norm().item()
        error = off.norm().item() / norm if norm else off.norm().item()
        typical = norm / max(want.shape[0], 1) ** 0.5
        row_error = off.norm(dim=1).max().item() / typical if typical else error
        # Written so that NaN fails too.
        if not (error <= limit and row_error <= _ROW_SLACK * limit):
            raise MismatchError(
                f"{name}: {part.name} is off by {error:.2g} overall and {row_error:.2g} in one "
                f"row, allowed are {limit:.2g} and {_ROW_SLACK * limit:.2g}"
            )
        worst = max(worst, error)
    return worst
