"""The column of a field as the model reads it."""

from __future__ import annotations

import polars as pl

from amtl.data import calendar, places
from amtl.data.specs import TEXT, FieldSpec


def column_of(frame: pl.DataFrame, spec: FieldSpec) -> pl.Series:
    """The column of a field: as it is, with one spelling of a text, or a part of what it holds.

    Without the texts that stood for missing numbers in training: a file of few rows may hold more
    of them than of numbers, and be read as text.

    Raises:
        UserError: there should be moments, and none are to be read.
    """
    column = frame[spec.column]
    if spec.marks and column.dtype in TEXT:
        column = column.cast(pl.String)
        marked = column.str.strip_chars().is_in(spec.marks)
        column = column.set(marked.fill_null(False), None)
    if spec.part in places.PARTS:
        return places.take(column, spec).rename(spec.name)
    if spec.part:
        return calendar.take(column, spec).rename(spec.name)
    return fold(column) if spec.folded and column.dtype in TEXT else column


def fold(column: pl.Series) -> pl.Series:
    """Text in small letters, without spaces around."""
    return column.cast(pl.String).str.strip_chars().str.to_lowercase()
