"""Medians, percentiles and bootstrap intervals. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["slower", "faster", "same"]


@dataclass(frozen=True)
class Summary:
    """Seconds of one contender: the median and the middle 80 %."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: ArrayLike) -> Summary:
        """Summarises samples ``[n]``."""
        values = np.asarray(samples, dtype=np.float64)
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), int(values.size))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its bootstrap interval."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def inverse(self) -> Ratio:
        """The ratio the other way round."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low, self.confidence)


def _resampled_medians(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    picks = generator.integers(0, values.size, (resamples, values.size))
    return np.median(values[picks], axis=1)


def paired_ratio(
    of: ArrayLike,
    against: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Median over rounds of ``of[i] / against[i]``, resampled by whole rounds: 95 % intervals.

    Both sides of a round ran within milliseconds of each other, so what slows the machine for a
    while slows both and leaves the ratio alone.

    Args:
        of: Seconds per round, ``[n]``.
        against: Seconds of the same rounds, ``[n]``.
        resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        ValueError: The two differ in length or are empty.
    """
    a = np.asarray(of, dtype=np.float64)
    b = np.asarray(against, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"rounds must pair up, got {a.shape} and {b.shape}")
    ratios = a / b
    medians = _resampled_medians(ratios, resamples, np.random.default_rng(seed))
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def change_between(old: ArrayLike, new: ArrayLike, *, confidence: float = 0.99) -> Ratio:
    """Ratio of medians ``new / old`` of two independent runs.

    Args:
        old: Samples of the earlier run, ``[n]``.
        new: Samples of the later one, ``[m]``.
        confidence: Coverage of the interval.
    """
    generator = np.random.default_rng(0)
    resamples = 4000
    a = np.asarray(old, dtype=np.float64)
    b = np.asarray(new, dtype=np.float64)
    ratios = _resampled_medians(b, resamples, generator) / _resampled_medians(
        a, resamples, generator
    )
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(float(np.median(b) / np.median(a)), float(low), float(high), confidence)


def verdict(change: Ratio, *, tolerance: float = 0.05) -> Verdict:
    """Judges a change by its interval: all of it must lie beyond the tolerance.

    Args:
        change: New over old.
        tolerance: Relative change that does not matter.
    """
    if change.low > 1 + tolerance:
        return "slower"
    if change.high < 1 / (1 + tolerance):
        return "faster"
    return "same"
