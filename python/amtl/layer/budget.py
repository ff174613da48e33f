"""The sizes a row may have, what they cost in storage, and how a budget over rows is met exactly.

Both solvers find one number shared by all groups such that the stored fraction over rows, tier
rounding included, is as close to the budget as its steps allow and never above it. Sums of whole
numbers in float64 are exact, and the solver compares the very numbers that later decide the sizes,
so "never above" holds without a tolerance. They are custom operators: opaque to torch.compile,
without a device synchronisation, in O(G log G + iterations * D log G) time.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amtl_kernels._heads import fit

# Search rounds times bits per round give 40 bits of the bracket, far below float32 steps of f.
_SHIFT_WAYS = 16
_SHIFT_ROUNDS = 10
_TILT_ROUNDS = 40


class BudgetError(ValueError):
    """The budget cannot be reached with the sizes that are allowed."""


def default_tier_width(dim: int, budget: float | None, itemsize: int) -> int:
    """Largest power of two <= min(16 bytes' worth, budget * D / 4), at least 1.

    Args:
        dim: D.
        budget: fraction of N * D, None for no budget.
        itemsize: bytes per weight.
    """
    limit = min(16 / itemsize, (1.0 if budget is None else budget) * dim / 4)
    return 1 << max(0, math.floor(math.log2(max(limit, 1))))


def is_number(value: object) -> bool:
    """Whether it is a real number; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_share(budget: float) -> None:
    """Raise ValueError unless `budget` is a fraction in (0, 1]."""
    if not is_number(budget) or not 0 < budget <= 1:
        raise no_share(budget)


def no_share(budget: object) -> ValueError:
    """What to raise where a budget is no fraction in (0, 1]: it says how to give bytes."""
    message = f"budget must be a fraction in (0, 1], got {budget!r}"
    if isinstance(budget, str) or (is_number(budget) and budget > 1):  # type: ignore[operator]
        message += (
            ": 12 % are 0.12, and 10 kB are 10_000 / sum(m.weight.nbytes for m in embeddings) of "
            "the embeddings that share it"
        )
    return ValueError(message)


@dataclass(frozen=True)
class SizeGrid:
    """The sizes a row may have: multiples of `granularity` from `min_dim` on, and D itself.

    Attributes:
        dim: D >= 1.
        min_dim: smallest size, 0..D; a row of size 0 stores nothing.
        granularity: step between sizes, 1..D.
        tier_width: frozen rows are stored in widths that are multiples of it (or D).
        whole: numbers that fill bytes, of which stored widths are multiples: a row of D numbers
            that is none is stored without its last ones.
    """

    dim: int
    min_dim: int = 0
    granularity: int = 1
    tier_width: int = 1
    whole: int = 1

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {self.dim}")
        for name in ("min_dim", "granularity", "tier_width"):
            value, least = getattr(self, name), 0 if name == "min_dim" else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and least <= value <= self.dim):
                raise ValueError(
                    f"{name} must be a whole number in {least}..{self.dim} (embedding_dim), "
                    f"got {value!r}"
                )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Allowed sizes a_1 < ... < a_M = D."""
        step = self.granularity
        first = -(-self.min_dim // step) * step
        return (*range(first, self.dim, step), self.dim)

    @property
    def widest(self) -> int:
        """The largest stored width."""
        return self.dim - self.dim % self.whole

    def stored_width(self, size: int) -> int:
        """Width in which a row of this size is stored."""
        return min(-(-size // self.tier_width) * self.tier_width, self.widest)

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """Stored width of each allowed size."""
        return tuple(self.stored_width(size) for size in self.sizes)

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """Where rounding changes from a_m to a_{m+1}, M - 1 values."""
        return tuple((a + b) / 2 for a, b in zip(self.sizes, self.sizes[1:], strict=False))

    @cached_property
    def column_midpoints(self) -> tuple[float, ...]:
        """The size from which column j is kept, D values; j - 1/2 at granularity 1."""
        previous = 0
        columns: list[float] = []
        for size in self.sizes:
            columns += [(previous + size) / 2] * (size - previous)
            previous = size
        return tuple(columns)

    @cached_property
    def column_levels(self) -> tuple[int, ...]:
        """Index m of the smallest allowed size that keeps column j, D values."""
        previous = 0
        columns: list[int] = []
        for level, size in enumerate(self.sizes):
            columns += [level] * (size - previous)
            previous = size
        return tuple(columns)

    def check_budget(self, budget: float | None) -> None:
        """Raise unless `budget` is None or a fraction that the smallest size fits into.

        Raises:
            ValueError: budget outside (0, 1].
            BudgetError: even the smallest size stores more than the budget.
        """
        if budget is None:
            return
        check_share(budget)
        least = self.stored[0]
        if least > budget * self.dim * (1 + 1e-12):
            raise BudgetError(
                f"budget={budget} cannot be reached: the smallest row (min_dim={self.min_dim}, "
                f"granularity={self.granularity}, tier_width={self.tier_width}) stores {least} of "
                f"{self.dim} dimensions, {least / self.dim:.4g} of the table. Raise the budget to "
                f"at least {least / self.dim:.4g}, lower min_dim, granularity or tier_width to at "
                f"most {max(1, math.floor(budget * self.dim))}, or set min_dim=0."
            )


def capacity(grid: SizeGrid, num_rows: int, budget: float) -> float:
    """Weights that `num_rows` rows may store in total: floor(budget * N * D), exact below 2^53."""
    return float(math.floor(budget * num_rows * grid.dim * (1 + 1e-12)))


@torch.library.custom_op("amtl::fit_shift", mutates_args=())
def fit_shift(
    score: Tensor, rows: Tensor, thresholds: Tensor, steps: Tensor, capacity: float
) -> Tensor:
    """Largest c with `sum_g rows_g * sum_m steps_m [score_g >= thresholds_m - c] <= capacity`.

    Args:
        score: float64 [G], score of each group.
        rows: float64 [G], rows of each group.
        thresholds: float64 [M], ascending; a group that reaches thresholds_m - c costs
            steps_m more per row.
        steps: float64 [M], whole numbers >= 0.
        capacity: cost that must not be exceeded; >= 0.

    Returns:
        float64 scalar c; large enough that everybody reaches everything if that fits, 0 if M or
        G is 0. O(G log G) for the sort, then 10 rounds of 16 candidates each.
    """
    one = (x[None] for x in (score, rows, thresholds, steps, score.new_tensor(capacity)))
    return fit_shifts(*one).squeeze(0)


@fit_shift.register_fake
def _(score: Tensor, rows: Tensor, thresholds: Tensor, steps: Tensor, capacity: float) -> Tensor:
    return score.new_empty(())


def fit_shifts(
    score: Tensor, rows: Tensor, thresholds: Tensor, steps: Tensor, capacity: Tensor
) -> Tensor:
    """`fit_shift` of L tables at once: arguments [L, G], [L, G], [L, M], [L, M] and [L]."""
    if thresholds.numel() == 0 or score.numel() == 0:
        return score.new_zeros(len(score))
    found = fit(score, rows, thresholds, steps, capacity, tilts=False)
    if found is not None:
        return found
    ordered, order = score.sort(-1)
    # Whole numbers: a floating-point cumsum has no deterministic form on a GPU.
    below = rows.gather(-1, order).to(torch.int64).cumsum(-1)
    below = torch.cat([rows.new_zeros(len(rows), 1), below], -1)
    above = below[:, -1:] - below
    low, high = thresholds[:, :1] - ordered[:, -1:], thresholds[:, -1:] - ordered[:, :1]
    width = high - low
    margin = 1e-6 * (1 + width)
    # Small operations are what this takes, so each round has few: candidates are [L, 16, 1].
    ticks = torch.arange(_SHIFT_WAYS, dtype=torch.float64, device=score.device)
    ticks = (ticks * ((width + 2 * margin) / _SHIFT_WAYS))[..., None]
    low = (low - margin)[..., None]
    tables, levels = thresholds.shape
    thresholds, steps, capacity = thresholds[:, None], steps[..., None], capacity[:, None, None]
    for finer in range(_SHIFT_ROUNDS):
        candidates = torch.add(low, ticks, alpha=_SHIFT_WAYS**-finer)
        wanted = torch.sub(thresholds, candidates).view(tables, -1)
        reached = above.gather(-1, torch.searchsorted(ordered, wanted))
        costs = torch.bmm(reached.view(tables, _SHIFT_WAYS, levels), steps)
        # Costs grow along the candidates (exact sums of whole numbers), and the first one fits.
        low = torch.where(costs <= capacity, candidates, low).amax(1, keepdim=True)
    return low.view(tables)


@torch.library.custom_op("amtl::fit_tilt", mutates_args=())
def fit_tilt(
    logits: Tensor, rows: Tensor, sizes: Tensor, stored: Tensor, capacity: float
) -> Tensor:
    """Smallest tilt c such that the sizes `argmax_m logits[g, m] - c * sizes[m]` fit the capacity.

    Args:
        logits: float32 or float64 [G, M].
        rows: float64 [G], rows of each group.
        sizes: [M] of the type of `logits`, ascending, what the tilt is multiplied by.
        stored: float64 [M], whole numbers, stored weights per row.
        capacity: cost that must not be exceeded; >= sum(rows) * stored[0].

    Returns:
        Scalar c of the type of `logits`. O(40 * G * M).
    """
    room = stored.new_tensor([capacity])
    return fit_tilts(logits[None], rows[None], sizes, stored[None], room).squeeze(0)


@fit_tilt.register_fake
def _(logits: Tensor, rows: Tensor, sizes: Tensor, stored: Tensor, capacity: float) -> Tensor:
    return logits.new_empty(())


def fit_tilts(
    logits: Tensor, rows: Tensor, sizes: Tensor, stored: Tensor, capacity: Tensor
) -> Tensor:
    """`fit_tilt` of L tables at once: arguments [L, G, M], [L, G], [M], [L, M] and [L]."""
    if sizes.numel() < 2 or logits.numel() == 0:
        return logits.new_zeros(len(logits))
    found = fit(logits, rows, sizes, stored, capacity, tilts=True)
    if found is not None:
        return found
    spread = logits.amax((1, 2)) - logits.amin((1, 2))
    high = 2 * spread / (sizes[1:] - sizes[:-1]).min() + 1
    low = -high
    for _ in range(_TILT_ROUNDS):
        middle = (low + high) / 2
        level = (logits - middle[:, None, None] * sizes).argmax(-1)
        fits = (stored.gather(-1, level) * rows).sum(-1) <= capacity
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
    return high
