"""Points in one column, such as `41.88, -87.63`, as fields of their two numbers."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import Any

import polars as pl

from amtl.data import notation
from amtl.data.specs import TEXT, FieldSpec

PARTS = ("1", "2")
_NUMBER = r"([+-]?\d{1,3}\.\d+(?:[eE]-\d+)?)"
_POINT = rf"^(?:POINT\s?)?[(\[]?\s*{_NUMBER}(?:\s*[,;]\s*|\s+){_NUMBER}\s*[)\]]?$"
"""Also `POINT (-87.63 41.88)`, as databases write it. Without fractions it may be a list of ids."""
_FEWEST = 20
"""Points, of fewer of which each is a value."""


def parts(
    frame: pl.DataFrame, default_numeric: str, values: bool, skip: Collection[str] = ()
) -> list[FieldSpec]:
    """Two fields for each column of text in which all values are points.

    Args:
        frame: the data.
        default_numeric: what to do with numbers.
        values: whether numbers join their embeddings.
        skip: columns that are not looked at, and fields that are not wanted.

    Returns:
        Their fields, with a note; none where numbers are to be ids. O(n) a column of text.
    """
    found: list[FieldSpec] = []
    if default_numeric == "categorical":
        return found
    kind: Any = default_numeric
    for column in frame:
        if column.name in skip or column.dtype not in TEXT or not are_points(column):
            continue
        for part in PARTS:
            name = f"{column.name}.{part}"
            if name not in frame.columns and name not in skip:
                note = f"number {part} of the points in {column.name!r}; "
                note += f"--drop {shlex.quote(name)} leaves it out"
                value = values and kind == "bucket"
                found.append(
                    FieldSpec(name, kind, value=value, part=part, of=column.name, note=note)
                )
    return found


def take(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """The number of a column's points that a field is, float64; null for what is no point."""
    if column.dtype not in TEXT:
        return pl.Series(spec.name, [None], dtype=pl.Float64).new_from_index(0, len(column))
    cells = notation.texts(column)
    return cells.str.extract(_POINT, int(spec.part)).cast(pl.Float64)


def are_points(column: pl.Series) -> bool:
    """Whether all values of a column of text are points."""
    cells = notation.texts(column)
    known = cells.drop_nulls()
    if not len(known) or not known[:100].str.contains(_POINT).all():
        return False
    return bool(known.str.contains(_POINT).all()) and known.n_unique() > _FEWEST
