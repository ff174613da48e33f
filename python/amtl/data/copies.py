"""Rows that are there several times: drawn again to balance classes, or multiplied by a join."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALONE = 0.99
"""Share of distinct values from which a column numbers rows, or shows that none is a copy."""
_FEWEST = 0.01
"""Share of the rows that are copies, below which they do no harm."""
_TOLD_BY = 0.5
"""Distinct numbers a distinct row, from which rows are not alike by chance."""
_MIXED, _EXPECTED = 0.05, 20.0
"""Rows that only look alike differ in their labels: so many of those that should by chance; and
how many should have to for that to be seen."""


def copies(frame: pl.DataFrame, label: str, labels: Tensor) -> NDArray[np.int64] | None:
    """Which rows are the same, by number; None where hardly any are, or by chance alone.

    Copies agree in all columns, whole numbers and text that number the rows aside, and in their
    labels; and there are fractions or moments among these, half as many as distinct rows, of which
    two are not the same by chance. Rows of few columns of few values are alike without being one.

    Args:
        frame: the data.
        label: its label column.
        labels: float32 [n], zeros and ones.

    Returns:
        int64 [n], equal for copies. O(n) a column.
    """
    columns = [column for column in frame.drop(label) if not column.dtype.is_nested()]
    exact = [column for column in columns if _is_exact(column.dtype)]
    distinct = {column.name: column.n_unique() for column in exact}
    most = max(distinct.values(), default=0)
    if not 0 < most <= _ALONE * frame.height:
        return None
    distinct |= {c.name: c.n_unique() for c in columns if c.name not in distinct}
    names = [name for name, values in distinct.items() if values <= _ALONE * frame.height]
    rows = frame.select(names).hash_rows()
    distinct_rows, group = np.unique(rows.to_numpy(), return_inverse=True)
    count = np.bincount(group)
    positive = np.bincount(group, labels.numpy())
    again = count > 1
    if most < _TOLD_BY * len(distinct_rows) or count[again].sum() < _FEWEST * len(group):
        return None
    rate = float(labels.mean())
    times = count[again].astype(np.float64)
    expected = float((1 - rate**times - (1 - rate) ** times).sum())
    mixed = int(((positive[again] > 0) & (positive[again] < times)).sum())
    return group if expected >= _EXPECTED and mixed <= _MIXED * expected else None


def _is_exact(dtype: pl.DataType) -> bool:
    """Whether values are fractions or moments, of which two are not the same by chance."""
    return dtype.is_float() or dtype.is_temporal() or dtype.is_decimal()


def number_of(group: NDArray[np.int64]) -> int:
    """How many rows are there besides one of each."""
    return len(group) - int(group.max()) - 1


def together(order: Tensor, group: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Rows in this order [n], copies after the first of them, and where other rows begin.

    Returns:
        Two int64 tensors: rows, and the places at which a row is no copy of the one before.
    """
    of = torch.from_numpy(group)[order]
    first = torch.full((int(of.max()) + 1,), len(of)).scatter_reduce(
        0, of, torch.arange(len(of)), "amin"
    )
    place = torch.sort(first[of], stable=True)
    starts = torch.ones(len(of), dtype=torch.bool)
    starts[1:] = place.values[1:] != place.values[:-1]
    return order[place.indices], starts.nonzero().squeeze(1)
