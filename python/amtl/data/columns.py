"""The column of a field as the model reads it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from amtl.data import calendar, hosts, names, pairs, places
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
    if spec.part in names.PARTS:
        return column.rename(spec.name)
    if spec.part in hosts.PARTS:
        return hosts.take(column, spec).rename(spec.name)
    if spec.part in pairs.PARTS:
        return pairs.take(column, spec)
    if spec.part:
        return calendar.take(column, spec).rename(spec.name)
    return fold(column) if spec.folded and column.dtype in TEXT else column


def called(
    frame: pl.DataFrame, name: str, numeric: str = "bucket", values: bool = False
) -> FieldSpec | None:
    """The part of a column that a name such as `when.hour` or `site.host` stands for, if any.

    Args:
        frame: the data.
        name: perhaps of a part; None is returned for a column's name, and others.
        numeric: what to do with numbers.
        values: whether numbers join their embeddings.

    Raises:
        UserError: the column that it names holds no moments.
    """
    if found := calendar.called(frame, name):
        return found
    column = name.rpartition(".")[0]
    if name in frame.columns or column not in frame.columns:
        return None
    alone = frame.select(column)
    known = [*places.parts(alone, numeric, values), *hosts.parts(alone)]
    known += [*names.parts(frame[column]), *pairs.parts(frame[column])]
    return next((replace(spec, note="") for spec in known if spec.name == name), None)


def fold(column: pl.Series) -> pl.Series:
    """Text in small letters, without spaces around."""
    return column.cast(pl.String).str.strip_chars().str.to_lowercase()


def numbered(column: pl.Series) -> NDArray[np.int64]:
    """Which rows have the same value: its place among those of the column, -1 where it is missing.

    Args:
        column: of single values.
    """
    return column.rank("dense").fill_null(0).to_numpy().astype(np.int64) - 1
