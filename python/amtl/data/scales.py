"""Numbers as a model reads them beside their embeddings: as they are, and by their rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KNOTS = 32
_FARTHEST = 8.0
"""In standard deviations: one odd value is not to outweigh all else."""
_LARGEST = 3e38
"""That 32 bits hold."""


@dataclass(frozen=True)
class Scale:
    """Two inputs that a number becomes, each about 0 and of deviation 1 in training.

    A linear one, in which differences between columns are what they were, and the normal score of
    its rank, in which skewed numbers are spread out. Buckets alone lose the first, and ids both.

    Attributes:
        mean: of the training values, a number of 32 bits as all here.
        deviation: of them, 1 where they are all alike.
        knots: float32 `[k]`, ascending values from the least to the largest of training.
        scores: float32 `[k]`, the normal scores of their ranks.
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
        values = np.sort(np.clip(values[np.isfinite(values)], -_LARGEST, _LARGEST))
        if not len(values):
            return cls(0.0, 1.0, torch.zeros(1), torch.zeros(1))
        places = np.arange(_KNOTS + 1) * (len(values) - 1) // _KNOTS
        knots = np.unique(values[places])
        below = np.searchsorted(values, knots, side="left")
        ranks = (below + np.searchsorted(values, knots, side="right")) / 2 / len(values)
        knots, kept = np.unique(knots.astype(np.float32), return_index=True)
        scores = torch.special.ndtri(torch.from_numpy(ranks[kept])).float()
        deviation = float(np.float32(values.std())) or 1.0
        return cls(float(np.float32(values.mean())), deviation, torch.from_numpy(knots), scores)

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
        """All of it, float32 `[k + 1, 2]`."""
        first = torch.tensor([[self.mean, self.deviation]])
        return torch.cat([first, torch.stack([self.knots, self.scores], 1)])

    @classmethod
    def from_tensor(cls, stored: Tensor) -> Scale:
        """The inverse of `to_tensor`."""
        (mean, deviation), rest = stored[0].tolist(), stored[1:]
        return cls(mean, deviation, rest[:, 0].clone(), rest[:, 1].clone())
