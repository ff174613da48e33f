"""What labels say of whole numbers: whether they tell by their order, or each value by itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from amtl.data.specs import MOST_BUCKETS

_FOLDS = 5
_MOST_ROWS = 200_000
_PRIOR = 10.0
"""Rows that a bucket's rate counts for all."""
_PRIORS = (1.0, 4.0, 16.0, 64.0)
"""Rows that a value's rate counts for those near it: the best of these speaks for ids."""
_SURE = 3.0
"""Standard errors by which order, or single values, have to tell something of rows held out."""
_OWN = 0.1
"""Share of that which single values may tell beside it. In thirty files, of columns with few rows a
value, amounts came to .01 at most, and ids to .55 and more."""

_SURER, _FINER = 5.0, 0.3
"""The same for smaller parts of a bucket: of five files in which 256 told something beside 64 or
fewer, a full table gained by them on one (.09 of validation score; .46 of what order told) and lost
up to .02 on the others (.31 and less, or unsure)."""
_LITTLE_FINER = 0.03
"""The same, beside `_SURE`, for 64 parts where few rows make fewer buckets: of eight files of 2,100
to 10,900 rows that train models gained by that on four (up to .005 of AUC), lost .001 on one."""

_FINER_ROWS = 50_000
"""Enough for that: what few rows leave in doubt is no reason for more buckets."""

_ROWS_OF_LISTS = 20_000

Floats = NDArray[np.float64]


class Told(NamedTuple):
    """Mean rise of the log likelihood of held-out labels, and its standard error.

    Attributes:
        order, order_error: by a value's neighbours.
        own, own_error: by the value itself beside them.
        others, others_error: by its neighbours alone, without the rows that have the value itself:
            a popular id is most of what is near it.
    """

    order: float
    order_error: float
    own: float
    own_error: float
    others: float
    others_error: float

    @property
    def by_order(self) -> bool:
        """Whether neighbours predict labels, and single values next to nothing beside."""
        alike = self.order > _SURE * self.order_error and self.others > _SURE * self.others_error
        return alike and self.own < _OWN * self.order

    @property
    def of_single(self) -> bool:
        """Whether single values predict labels at all beside their neighbours."""
        return self.own > _SURE * self.own_error

    @property
    def by_itself(self) -> bool:
        """Whether single values predict labels, and more than their neighbours do."""
        return self.own > max(_SURE * self.own_error, self.order)


_NOTHING = Told(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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

    def tell_apart(self, values: pl.Series, groups: pl.Series) -> bool:
        """Whether values tell anything of labels beside the groups that they are in."""
        value, group = (
            each.cast(pl.Categorical).to_physical().cast(pl.Float64) for each in (values, groups)
        )
        return _apart(value.to_numpy(), group.to_numpy(), self._labels)

    def follow(self, lists: pl.Series) -> bool:
        """Whether the values that lists hold tell anything of labels: words of texts."""
        rows, labels = self._of_lists()
        said = told(_evidence(lists.gather(rows), labels), labels)
        return said is not None and said.order > _SURE * said.order_error

    def follow_rather(self, texts: pl.Series, lists: pl.Series) -> bool:
        """Whether labels follow texts, or other lists, rather than the values that lists hold."""
        rows, labels = self._of_lists()
        if len(rows) < _FOLDS or not 0 < labels.mean() < 1:
            return False
        if not texts.dtype.is_nested():
            text = pl.col("text")
            whole = pl.when(text.is_not_null()).then(pl.concat_list(text)).alias("text")
            texts = pl.DataFrame({"text": texts}).select(whole)["text"]
        ours, theirs = (_by_evidence(each.gather(rows), labels) for each in (texts, lists))
        gain = ours - theirs
        return bool(gain.mean() > _SURE * gain.std() / len(gain) ** 0.5)

    def _of_lists(self) -> tuple[NDArray[np.intp], Floats]:
        """Rows that train, of which lists are looked at, and their labels."""
        rows = np.flatnonzero(~np.isnan(self._labels))
        rows = rows[_spaced(len(rows), min(len(rows), _ROWS_OF_LISTS))]
        return rows, self._labels[rows]

    def want_finer(self, column: pl.Series, buckets: int, parts: int) -> bool:
        """Whether so many parts of a column of numbers tell of labels beside fewer buckets."""
        said = told(column, self._labels, buckets, parts)
        sure, share = (_SURER, _FINER) if parts > MOST_BUCKETS else (_SURE, _LITTLE_FINER)
        return said is not None and said.own > max(sure * said.own_error, share * said.order)


def told(
    values: pl.Series, labels: Floats, buckets: int = MOST_BUCKETS, parts: int | None = None
) -> Told | None:
    """What buckets of neighbours tell of labels, and single values, or small parts, beside that.

    Log likelihoods of rows that were held out: of each bucket's rate, against that of all, and of
    each value's, drawn towards its bucket's, against the bucket's. An id that was popular or liked
    is so by itself, whatever the ids near it are. Values that have a bucket to themselves say
    nothing of their neighbours, and are passed over.

    Args:
        values: numbers.
        labels: of the rows that train, 0 or 1; NaN for the others, which are not looked at.
        buckets: how many.
        parts: held against them in place of single values, as many rows in each.

    Returns:
        None where there is not enough to tell. O(n log n) of 200,000 rows at most, for parts of
        50,000.
    """
    x = values.cast(pl.Float64).to_numpy()
    known = ~np.isnan(labels) & np.isfinite(x)
    x, y = x[known], labels[known]
    if parts is not None and len(x) > _FINER_ROWS:
        x, y = (each[_spaced(len(x), _FINER_ROWS)] for each in (x, y))
    elif len(x) > _MOST_ROWS:
        some = _some(x)
        x, y = x[some], y[some]
    if len(x) < _FOLDS or not 0 < y.mean() < 1:
        return None
    distinct, value = np.unique(x, return_inverse=True)
    part = value if parts is None else np.searchsorted(_edges(x, parts), x, side="right")
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    order, others = np.full((2, len(x)), np.nan)
    own = np.full((len(_PRIORS), len(x)), np.nan)
    for f in range(_FOLDS):
        train = fold != f
        mean = y[train].mean()
        of_value = np.searchsorted(_edges(x[train], buckets), distinct, side="right")
        bucket = of_value[value]
        held = ~train & (np.bincount(of_value)[bucket] > 1)
        sums, rows = _per_group(bucket, train, y, buckets)
        near = ((sums + _PRIOR * mean) / (rows + _PRIOR))[bucket[held]]
        by_order, base = (_likelihood(rate, y[held]) for rate in (near, np.full(len(near), mean)))
        order[held] = by_order - base
        own_sums, own_rows = _per_group(value, train, y, len(distinct))
        sums, rows = sums[bucket] - own_sums[value], rows[bucket] - own_rows[value]
        near_alone = ((sums + _PRIOR * mean) / (rows + _PRIOR))[held]
        others[held] = _likelihood(near_alone, y[held]) - base
        own[:, held] = _beside(part, train, held, y, near) - by_order
    shared = ~np.isnan(order)
    if shared.sum() < _FOLDS:
        return None
    own = own[:, shared]
    found = (order[shared], own[own.mean(1).argmax()], others[shared])
    root = len(found[0]) ** 0.5
    return Told(*(float(part) for each in found for part in (each.mean(), each.std() / root)))


def _evidence(lists: pl.Series, labels: Floats) -> pl.Series:
    """What the values of each list say for a label of 1, by rows of other folds: naive Bayes."""
    lengths = lists.list.len().fill_null(0).to_numpy()
    flat = lists.filter(lists.list.len() > 0).explode().cast(pl.Categorical).to_physical()
    value, row = flat.to_numpy(), np.repeat(np.arange(len(lists)), lengths)
    fold = np.random.default_rng(1).permutation(len(lists)) % _FOLDS
    result = np.zeros(len(lists))
    for f in range(_FOLDS if len(value) else 0):
        train = fold != f
        mean = np.clip(labels[train].mean(), 1e-6, 1 - 1e-6)
        known, held = train[row], ~train[row]
        sums, rows = _per_group(value, known, labels[row], int(value.max()) + 1)
        rate = (sums + _PRIOR * mean) / (rows + _PRIOR)
        says = np.log(rate / (1 - rate)) - np.log(mean / (1 - mean))
        result += np.bincount(row[held], says[value[held]], len(lists))
    return pl.Series(lists.name, result)


def _by_evidence(lists: pl.Series, labels: Floats) -> Floats:
    """Log likelihoods of held-out labels by the rate of rows with evidence like theirs."""
    evidence = _evidence(lists, labels).to_numpy()
    fold = np.random.default_rng(0).permutation(len(labels)) % _FOLDS
    result = np.empty(len(labels))
    for f in range(_FOLDS):
        train, held = fold != f, fold == f
        bucket = np.searchsorted(_edges(evidence[train], MOST_BUCKETS), evidence, side="right")
        found = _per_group(bucket, train, labels, MOST_BUCKETS)
        sums, rows = (each[bucket[held]] for each in found)
        rate = (sums + _PRIOR * labels[train].mean()) / (rows + _PRIOR)
        result[held] = _likelihood(rate, labels[held])
    return result


def _apart(value: Floats, group: Floats, labels: Floats) -> bool:
    """Whether the rate of a value, drawn towards its group's, predicts rows held out better."""
    known = ~np.isnan(labels) & np.isfinite(value) & np.isfinite(group)
    y = labels[known]
    if len(y) < _FOLDS:
        return False
    v, g = (np.unique(each[known], return_inverse=True)[1] for each in (value, group))
    fold = np.random.default_rng(0).permutation(len(y)) % _FOLDS
    gain = np.zeros((len(_PRIORS), len(y)))
    for f in range(_FOLDS):
        train, held = fold != f, fold == f
        sums, rows = (each[g[held]] for each in _per_group(g, train, y, g.max() + 1))
        near = (sums + _PRIOR * y[train].mean()) / (rows + _PRIOR)
        gain[:, held] = _beside(v, train, held, y, near) - _likelihood(near, y[held])
    best = gain[gain.mean(1).argmax()]
    return bool(best.mean() > _SURE * best.std() / len(best) ** 0.5)


def _beside(
    part: NDArray[np.intp],
    train: NDArray[np.bool_],
    held: NDArray[np.bool_],
    labels: Floats,
    near: Floats,
) -> Floats:
    """Likelihoods of held rows by the rate of their part, drawn towards one by each prior."""
    sums, rows = (each[part[held]] for each in _per_group(part, train, labels, part.max() + 1))
    rates = ((sums + prior * near) / (rows + prior) for prior in _PRIORS)
    return np.stack([_likelihood(rate, labels[held]) for rate in rates])


def _some(x: Floats) -> NDArray[np.intp]:
    """About 200,000 rows: where values are many all those of some, so that they come again."""
    distinct, value = np.unique(x, return_inverse=True)
    if len(distinct) * _FOLDS < _MOST_ROWS:
        return _spaced(len(x), _MOST_ROWS)
    chosen = np.random.default_rng(0).random(len(distinct)) < _MOST_ROWS / len(x)
    return np.flatnonzero(chosen[value])


def _spaced(rows: int, count: int) -> NDArray[np.intp]:
    """So many rows at equal distances."""
    return np.arange(count) * rows // count


def _edges(x: Floats, count: int) -> Floats:
    """Between so many parts of as many rows each."""
    edges: Floats = np.unique(np.quantile(x, np.arange(1, count) / count))
    return edges


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
