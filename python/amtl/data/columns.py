"""The column of a field as the model reads it."""

from __future__ import annotations

import polars as pl

from amtl.data import calendar
from amtl.data.specs import TEXT, FieldSpec


def column_of(frame: pl.DataFrame, spec: FieldSpec) -> pl.Series:
    """The column of a field: as it is, with one spelling of a text, or a part of its moments.

    Raises:
        UserError: there should be moments, and none are to be read.
    """
    column = frame[spec.column]
    if spec.part:
        return calendar.take(column, spec.part, spec.moment).rename(spec.name)
    return fold(column) if spec.folded and column.dtype in TEXT else column


def fold(column: pl.Series) -> pl.Series:
    """Text in small letters, without spaces around."""
    return column.cast(pl.String).str.strip_chars().str.to_lowercase()
