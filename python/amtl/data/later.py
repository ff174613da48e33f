"""Columns whose values don't come again in rows of a later time, or of another part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from amtl.data.columns import column_of
from amtl.data.ordered import Floats, Labels
from amtl.data.specs import FieldSpec, as_typed

_FEWEST_ROWS = 100
"""Fewer held out say little of those to come."""
_NEARLY_ALL = 0.9
"""Share of held out rows of unseen values from which on a column is left out."""
_SOME = 0.01
"""The same from which on whole numbers that have an embedding a value may be only numbers."""


def for_later_rows(
    frame: pl.DataFrame,
    fields: Sequence[FieldSpec],
    labels: Floats,
    held_out: NDArray[np.int64],
    *,
    latest: NDArray[np.int64] | None = None,
    ordered: str = "",
    told: Collection[str] = (),
    default_numeric: str = "bucket",
) -> list[FieldSpec]:
    """Leaves out ids of which held out rows have new ones, and takes ids that drift as numbers.

    Sessions and orders are over when the later rows come: a model that has learnt them by heart
    knows nothing there, and less of all else. Days since and counts until then outgrow what there
    was; as numbers they are read all the same, if labels follow their order and single values tell
    nothing beside it. Lists are passed over.

    Args:
        frame: the data.
        fields: how its columns enter the model.
        labels: 0 or 1 of each row that trains, NaN of the others.
        held_out: places of rows that stand for those to come.
        latest: of these the last in time, if that is known: weeks and campaigns that begin while
            rows train are known in the first ones, and in none to come.
        ordered: by which column that is known, which is a field only where somebody asks for it.
        told: columns that somebody has said how to take: they stay as they are.
        default_numeric: what numbers are taken as.

    Returns:
        As `fields`. O(n) a column.
    """
    if len(held_out) < _FEWEST_ROWS or default_numeric == "categorical":
        return list(fields)
    says, trains = Labels(labels), np.flatnonzero(~np.isnan(labels))
    result = []
    for field in fields:
        column = column_of(frame, field)
        asked = field.kind == "categorical" and not column.dtype.is_nested()
        new = _new(column, trains, held_out) if asked and field.name not in told else 0.0
        rows = "validation rows"
        if latest is not None and field.name != ordered and _SOME <= new < _NEARLY_ALL:
            lasting = _new(column, trains, latest)
            if lasting >= _NEARLY_ALL:
                new, rows = lasting, "last half of the validation rows"
        note = f"{new:.1%} of the {rows} hold values that no row that trains has"
        ids = as_typed(field.name, "categorical")
        if field.value and new >= _SOME and says.of(column).by_order:
            note += f", near which labels are alike: a number; {ids} for ids"
            field = replace(field, kind=default_numeric, note=note)  # type: ignore[arg-type]
        elif new >= _NEARLY_ALL:
            note = "; ".join(filter(None, [field.note, f"{note}: nothing lasts; {ids} keeps it"]))
            field = replace(field, kind="unused", value=False, note=note)
        result.append(field)
    return result


def _new(column: pl.Series, trains: NDArray[np.int64], held_out: NDArray[np.int64]) -> float:
    """Share of held out rows, of those that hold anything, with a value that no row trains."""
    found = column.gather(held_out).drop_nulls()
    known = found.is_in(column.gather(trains).unique().implode())
    return 1.0 - float(known.mean() or 0.0) if len(found) else 0.0  # type: ignore[arg-type]
