"""Laws: the real-valued size that the score of a group stands for.

A head gives each group a score, adds one shift shared by all groups so that the budget is met, and
a law turns the sum u into a size. So one solver (`budget.fit_shift`) serves every law: a law says
at which u each allowed size is reached.

    CapacityLaw      k = floor(D * 1/2 log2(1 + rho * count) / bits), the default
    PowerLaw         k = round(scale * (count + 1)^a)
    SigmoidPowerLaw  the same slope where sizes are in the middle, but never beyond D
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from amtl.layer.budget import SizeGrid


class SizeLaw(ABC):
    """From scores to sizes on one grid.

    Attributes:
        grid: allowed sizes.
        rounds_down: whether a real-valued size is cut to the grid or rounded to the nearest size.
        thresholds: u from which each size after the smallest is reached, ascending.
        columns: real-valued size from which each column is kept, D values.
    """

    rounds_down = False
    thresholds: tuple[float, ...]
    columns: tuple[float, ...]

    def __init__(self, grid: SizeGrid) -> None:
        self.grid = grid
        self.columns = grid.column_midpoints

    @abstractmethod
    def start(self, counts: Tensor, log_weights: Tensor) -> Tensor:
        """Scores that follow from the counts alone, float64 [G].

        Args:
            counts: float64 [G].
            log_weights: float64 [G], logarithm of what the counts are multiplied by.
        """

    @abstractmethod
    def log_size(self, u: Tensor) -> Tensor:
        """Logarithm of the real-valued size, of the shape and type of u."""

    @abstractmethod
    def log_slope(self, u: Tensor) -> Tensor:
        """Derivative of `log_size` by u."""

    @abstractmethod
    def slope(self, u: Tensor) -> Tensor:
        """Derivative of the size by u up to a factor, zero where it changes no memory."""


_LINEAR = -15.0
"""Below it `log(log(1 + e^u))` is u, as far as float32 tells."""


class CapacityLaw(SizeLaw):
    """A row seen c times is worth `D * 1/2 log2(1 + rho * c)` bits, a number `bits` bits.

    An embedding estimated from c noisy samples is known to about that many bits; more are wasted
    on it. u is `log(rho * c)`, so the shift is `log rho`. Many bits a number make sizes flat (every
    value that was seen gets the same), few make them proportional to the count.

    Rows never seen come last: they get numbers only when everybody else has D of them.

    Args:
        grid: allowed sizes.
        bits: what a number is worth, > 0.
    """

    rounds_down = True

    def __init__(self, grid: SizeGrid, bits: float) -> None:
        if not (math.isfinite(bits) and bits > 0):
            raise ValueError(f"capacity_bits must be a finite number > 0, got {bits!r}")
        super().__init__(grid)
        self.scale = grid.dim / (2 * bits * math.log(2))
        # log(2^(2 bits k / D) - 1) without its power, which overflows from 1024 bits on.
        reached = [self._reaches(size) for size in grid.sizes]
        self.thresholds = tuple(reached[1:])
        self.ends = reached[0], reached[-1]
        self.columns = tuple(float(grid.sizes[level]) for level in grid.column_levels)

    def _reaches(self, size: int) -> float:
        """The u from which a row keeps `size` numbers."""
        power = size / self.scale
        return power + math.log(-math.expm1(-power)) if size else -math.inf

    def start(self, counts: Tensor, log_weights: Tensor) -> Tensor:
        """See `SizeLaw.start`."""
        score = torch.log(counts.clamp(min=1)) + log_weights
        if not (self.thresholds and score.numel()):
            return score
        last = score.min() - (self.thresholds[-1] - self.thresholds[0]) - 1
        return torch.where(counts > 0, score, last)

    def log_size(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_size`; finite wherever u is."""
        above = torch.log(torch.nn.functional.softplus(u.clamp(min=_LINEAR)))
        return torch.where(u < _LINEAR, u, above) + math.log(self.scale)

    def log_slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_slope`."""
        above = u.clamp(min=_LINEAR)
        above = torch.sigmoid(above) / torch.nn.functional.softplus(above)
        return above.masked_fill(u < _LINEAR, 1.0)

    def slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.slope`."""
        least, most = self.ends
        counts = u < most
        if least > -math.inf:
            counts &= u > least
        return torch.sigmoid(u) * counts


class PowerLaw(SizeLaw):
    """`log k = u`, which starts at `a * log(count + 1)`.

    Args:
        grid: allowed sizes.
        exponent: a >= 0.
    """

    def __init__(self, grid: SizeGrid, exponent: float) -> None:
        _check_exponent(exponent)
        super().__init__(grid)
        self.exponent = exponent
        self.thresholds = tuple(_log(grid.midpoints).tolist())

    def start(self, counts: Tensor, log_weights: Tensor) -> Tensor:
        """See `SizeLaw.start`."""
        return self.exponent * (torch.log1p(counts) + log_weights)

    def log_size(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_size`."""
        return u

    def log_slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_slope`."""
        return torch.ones_like(u)

    def slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.slope`."""
        return torch.exp(u)


class SigmoidPowerLaw(SizeLaw):
    """`log k = low + (log D - low) * sigmoid(u)`, with `d log k / d log(count + 1) = a` at u = 0.

    `low` is 0 if a row keeps at least one number, else log(1/4), so that sizes can round to 0.

    Args:
        grid: allowed sizes.
        exponent: a >= 0.
    """

    def __init__(self, grid: SizeGrid, exponent: float) -> None:
        _check_exponent(exponent)
        super().__init__(grid)
        self.exponent = exponent
        self.low = 0.0 if grid.sizes[0] else math.log(0.25)
        self.span = math.log(grid.dim) - self.low
        shares = (_log(grid.midpoints) - self.low) / self.span if grid.midpoints else _log(())
        self.thresholds = tuple(torch.logit(shares).tolist())

    def start(self, counts: Tensor, log_weights: Tensor) -> Tensor:
        """See `SizeLaw.start`."""
        return 4 * self.exponent / max(self.span, 1e-9) * (torch.log1p(counts) + log_weights)

    def log_size(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_size`."""
        return self.low + self.span * torch.sigmoid(u)

    def log_slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.log_slope`."""
        share = torch.sigmoid(u)
        return self.span * share * (1 - share)

    def slope(self, u: Tensor) -> Tensor:
        """See `SizeLaw.slope`."""
        share = torch.sigmoid(u)
        return share * (1 - share) * torch.exp(self.low + self.span * share)


def make_law(
    parametrization: str, grid: SizeGrid, capacity_bits: float, init_exponent: float | None
) -> SizeLaw:
    """The law of capacity, or a power law if an exponent is given.

    Args:
        parametrization: "rule", or one whose sizes are learned from where the law starts.
        grid: allowed sizes.
        capacity_bits: see `CapacityLaw`.
        init_exponent: see `PowerLaw`; None for none.
    """
    if init_exponent is None:
        return CapacityLaw(grid, capacity_bits)
    kind = PowerLaw if parametrization == "rule" else SigmoidPowerLaw
    return kind(grid, init_exponent)


def _log(values: Sequence[float]) -> Tensor:
    return torch.log(torch.tensor(values, dtype=torch.float64))


def _check_exponent(exponent: float) -> None:
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(f"init_exponent must be a finite number >= 0 or None, got {exponent!r}")
