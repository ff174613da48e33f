"""Numbers as a model reads them beside their embeddings: as they are, and by their rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KNOTS = 64
_FARTHEST = 8.0
"""In standard deviations: one odd value is not to outweigh all else."""


@dataclass(frozen=True)
class Scale:
    """Two inputs that a number becomes, each about 0 and of deviation 1 in training.

    A linear one, in which differences between columns are what they were, and the normal score of
    its rank, in which skewed numbers are spread out. Buckets alone lose the first, and ids both.

    Attributes:
        mean: of the training values.
        deviation: of them, 1 where they are all alike.
        knots: float64 `[k]`, ascending values from the least to the largest of training.
        scores: float64 `[k]`, the normal scores of their ranks.
    """

    mean: float
    deviation: float
    knots: Tensor
    scores: Tensor

    width = 2
    """Inputs a column becomes."""

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Scale:
        """The scale of training values `[n]`; those that are not finite are passed over."""
        values = np.sort(values[np.isfinite(values)])
        if not len(values):
            return cls(0.0, 1.0, torch.zeros(1, dtype=torch.float64), torch.zeros(1).double())
        places = np.arange(_KNOTS + 1) * (len(values) - 1) // _KNOTS
        knots = np.unique(values[places])
        below = np.searchsorted(values, knots, side="left")
        ranks = (below + np.searchsorted(values, knots, side="right")) / 2 / len(values)
        with np.errstate(over="ignore"):
            deviation = float(values.std())
        return cls(
            float(values.mean()),
            deviation if 0 < deviation < np.inf else 1.0,
            torch.from_numpy(knots),
            torch.special.ndtri(torch.from_numpy(ranks)),
        )

    def apply(self, values: NDArray[np.float64]) -> Tensor:
        """Float32 `[n, 2]` of values `[n]`, zeros where one is missing (NaN).

        Beyond what training had, all is as at its end: how it goes on there was not to be seen.
        """
        knots = self.knots.numpy()
        known = ~np.isnan(values)
        inside = np.clip(np.where(known, values, self.mean), knots[0], knots[-1])
        linear = np.clip((inside - self.mean) / self.deviation, -_FARTHEST, _FARTHEST)
        ranked = np.interp(inside, knots, self.scores.numpy())
        both = np.stack([linear, ranked], 1) * known[:, None]
        return torch.from_numpy(both.astype(np.float32))

    def to_tensor(self) -> Tensor:
        """All of it, float64 `[k + 1, 2]`."""
        first = torch.tensor([[self.mean, self.deviation]], dtype=torch.float64)
        return torch.cat([first, torch.stack([self.knots, self.scores], 1)])

    @classmethod
    def from_tensor(cls, stored: Tensor) -> Scale:
        """The inverse of `to_tensor`."""
        (mean, deviation), rest = stored[0].tolist(), stored[1:]
        return cls(mean, deviation, rest[:, 0].clone(), rest[:, 1].clone())
