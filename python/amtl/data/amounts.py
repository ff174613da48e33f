"""How often whole numbers come, and where they lie: what tells amounts from ids."""

from __future__ import annotations

import polars as pl

_CROWDED_BELOW = 0.8
"""Share of distinct values in the lower half of their range from which they count as amounts."""
_SPARSE_BELOW = 0.3
"""Share of the whole numbers of a range that amounts have; ids are dense, or evenly spread."""
_FAVOURITES = 0.01
_FAVOURED_BELOW = 0.25
"""Share of the rows that amounts leave to the 1 % most frequent ones, but for round ones."""
_ALIKE_BELOW = 1.5
"""How much neighbours' counts differ among amounts, by chance alone 1 at most; ids, some of which
are popular, come to 3 and more."""


def thin_out(distinct: pl.Series) -> bool:
    """Whether distinct numbers are fewer and fewer upward."""
    return _spread(distinct)[0] >= _CROWDED_BELOW


def are_sparse(column: pl.Series) -> bool:
    """Whether a column has few of the whole numbers of its range."""
    return _spread(column.drop_nulls().unique().cast(pl.Float64))[1] < _SPARSE_BELOW


def are_alike(column: pl.Series) -> bool:
    """Whether neighbouring values are about as frequent as each other, where some ids are popular.

    O(n log n).
    """
    return _alike(_counts(column)["count"])


def cannot_be_ids(column: pl.Series) -> bool:
    """Whether whole numbers thin out upward, with gaps, are alike, and none is a favourite.

    O(n log n).
    """
    found = _counts(column)
    lower, filled = _spread(found["value"].cast(pl.Float64))
    if lower < _CROWDED_BELOW or filled >= _SPARSE_BELOW:
        return False
    counts = found["count"]
    # Amounts heap at round numbers, ids do not.
    favoured = counts.filter(_favourite(counts) & (found["value"] % 10 != 0)).sum()
    return favoured < _FAVOURED_BELOW * float(counts.sum()) and _alike(counts)


def _spread(distinct: pl.Series) -> tuple[float, float]:
    """Shares of numbers in the lower half of their range, and of its whole numbers that they are.

    The range is that from their 1st to their 99th percentile.
    """
    low, high = (float(distinct.quantile(q) or 0.0) for q in (0.01, 0.99))
    inside = distinct.filter((distinct >= low) & (distinct <= high))
    lower = float((inside <= (low + high) / 2).mean() or 0.0)  # type: ignore[arg-type]
    return lower, len(inside) / (high - low + 1)


def _counts(column: pl.Series) -> pl.DataFrame:
    """The values of a column, in their order, and the rows that each has."""
    found = column.drop_nulls().rename("value").value_counts(name="count").sort("value")
    return found.with_columns(pl.col("count").cast(pl.Float64))


def _favourite(counts: pl.Series) -> pl.Series:
    """Which values are the few most frequent ones."""
    return counts.rank("ordinal") > len(counts) * (1 - _FAVOURITES)


def _alike(counts: pl.Series) -> bool:
    others = counts.filter(~_favourite(counts))
    apart = float((others.diff().drop_nulls() ** 2).sum())
    return apart <= _ALIKE_BELOW * float((others[1:] + others[:-1]).sum())
