"""What labels say of whole numbers: whether they tell by their order, or each value by itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

_FOLDS = 5
_MOST_ROWS = 200_000
_BUCKETS = 64
_PRIOR = 10.0
"""Rows that a bucket's rate counts for all."""
_PRIORS = (1.0, 4.0, 16.0, 64.0)
"""Rows that a value's rate counts for those near it: the best of these speaks for ids."""
_SURE = 3.0
"""Standard errors by which order, or single values, have to tell something of rows held out."""
_OWN = 0.1
"""Share of that which single values may tell beside it. In thirty files, of columns with few rows a
value, amounts came to .01 at most, and ids to .55 and more."""

Floats = NDArray[np.float64]


class Told(NamedTuple):
    """Mean rise of the log likelihood of held-out labels, and its standard error.

    Attributes:
        order, order_error: by a value's neighbours.
        own, own_error: by the value itself beside them.
    """

    order: float
    order_error: float
    own: float
    own_error: float

    @property
    def by_order(self) -> bool:
        """Whether neighbours predict labels, and single values next to nothing beside."""
        return self.order > _SURE * self.order_error and self.own < _OWN * self.order

    @property
    def of_single(self) -> bool:
        """Whether single values predict labels at all beside their neighbours."""
        return self.own > _SURE * self.own_error

    @property
    def by_itself(self) -> bool:
        """Whether single values predict labels, and more than their neighbours do."""
        return self.own > max(_SURE * self.own_error, self.order)


_NOTHING = Told(0.0, 0.0, 0.0, 0.0)


class Labels:
    """What labels say of columns, each asked once.

    Args:
        labels: of the rows that train, 0 or 1; NaN for the others, which are not looked at.

    Attributes:
        rows: how many train.
    """

    def __init__(self, labels: Floats) -> None:
        self._labels = labels
        self.rows = int((~np.isnan(labels)).sum())
        self._said: dict[str, Told] = {}

    def of(self, column: pl.Series) -> Told:
        """Of a column of numbers, by its name; nothing where there is not enough to tell."""
        if column.name not in self._said:
            self._said[column.name] = told(column, self._labels) or _NOTHING
        return self._said[column.name]


def told(values: pl.Series, labels: Floats) -> Told | None:
    """What buckets of neighbours tell of labels, and single values beside that.

    Log likelihoods of rows that were held out: of each bucket's rate, against that of all, and of
    each value's, drawn towards its bucket's, against the bucket's. An id that was popular or liked
    is so by itself, whatever the ids near it are. Values that have a bucket to themselves say
    nothing of their neighbours, and are passed over.

    Args:
        values: numbers.
        labels: of the rows that train, 0 or 1; NaN for the others, which are not looked at.

    Returns:
        None where there is not enough to tell. O(n log n) of 200,000 rows at most.
    """
    x = values.cast(pl.Float64).to_numpy()
    known = ~np.isnan(labels) & np.isfinite(x)
    x, y = x[known], labels[known]
    if len(x) > _MOST_ROWS:
        some = _some(x)
        x, y = x[some], y[some]
    if len(x) < _FOLDS or not 0 < y.mean() < 1:
        return None
    distinct, value = np.unique(x, return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    order, own = np.full(len(x), np.nan), np.full((len(_PRIORS), len(x)), np.nan)
    for f in range(_FOLDS):
        train = fold != f
        mean = y[train].mean()
        edges = np.unique(np.quantile(x[train], np.arange(1, _BUCKETS) / _BUCKETS))
        of_value = np.searchsorted(edges, distinct, side="right")
        bucket = of_value[value]
        held = ~train & (np.bincount(of_value)[bucket] > 1)
        sums, rows = _per_group(bucket, train, y, _BUCKETS)
        near = ((sums + _PRIOR * mean) / (rows + _PRIOR))[bucket[held]]
        by_order = _likelihood(near, y[held])
        order[held] = by_order - _likelihood(np.full(len(near), mean), y[held])
        sums, rows = (part[value[held]] for part in _per_group(value, train, y, len(distinct)))
        for i, prior in enumerate(_PRIORS):
            rate = (sums + prior * near) / (rows + prior)
            own[i, held] = _likelihood(rate, y[held]) - by_order
    shared = ~np.isnan(order)
    if shared.sum() < _FOLDS:
        return None
    order, own = order[shared], own[:, shared]
    own = own[own.mean(1).argmax()]
    root = len(order) ** 0.5
    return Told(
        float(order.mean()), float(order.std()) / root, float(own.mean()), float(own.std()) / root
    )


def _some(x: Floats) -> NDArray[np.intp]:
    """About 200,000 rows: where values are many all those of some, so that they come again."""
    distinct, value = np.unique(x, return_inverse=True)
    if len(distinct) * _FOLDS < _MOST_ROWS:
        return np.arange(_MOST_ROWS) * len(x) // _MOST_ROWS
    chosen = np.random.default_rng(0).random(len(distinct)) < _MOST_ROWS / len(x)
    return np.flatnonzero(chosen[value])


def _per_group(
    group: NDArray[np.intp], train: NDArray[np.bool_], labels: Floats, groups: int
) -> tuple[Floats, Floats]:
    """Sum of the labels of the rows that train, and their number, of each group."""
    mine = group[train]
    sums = np.bincount(mine, labels[train], groups).astype(np.float64)
    return sums, np.bincount(mine, minlength=groups).astype(np.float64)


def _likelihood(rate: Floats, labels: Floats) -> Floats:
    rate = np.clip(rate, 1e-6, 1 - 1e-6)
    return np.asarray(np.where(labels > 0, np.log(rate), np.log1p(-rate)), dtype=np.float64)
