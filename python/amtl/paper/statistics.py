"""Means with intervals, paired differences, and many of them at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % t-interval of a mean, None of fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return None
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(values) / math.sqrt(len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean of ours minus theirs over the seeds that both have.

    Args:
        ours: values by seed.
        theirs: likewise.

    Returns:
        `mean`, `half` of its 95 % t-interval, `seeds`, and `p` of a two-sided paired t-test; `half`
        and `p` are None with one seed. None without any.
    """
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gains = [ours[s] - theirs[s] for s in seeds]
    mean, half, p = statistics.fmean(gains), half_width(gains), None
    if half is not None:
        spread = statistics.stdev(gains) / math.sqrt(len(gains))
        p = float(mean == 0)
        if spread > 0:
            p = float(2 * stats.t.sf(abs(mean) / spread, len(gains) - 1))
    return {"mean": mean, "half": half, "seeds": len(seeds), "p": p}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for being many, by Holm's step-down; None stays, and does not count."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected
