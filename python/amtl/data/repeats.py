"""Columns that say nothing which another one does not say."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from amtl.data.columns import column_of
from amtl.data.specs import FieldSpec

_FEWEST_ROWS = 1000
"""Fewer may be alike by chance."""
_FIRST_ROWS = 10_000
"""Which most columns differ in already."""


def without_repeats(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], told: Collection[str] = ()
) -> list[FieldSpec]:
    """Leaves out columns that are copies of an earlier one, and notes those that tell rows alike.

    A model learns the same of both, and stores it twice. Lists are passed over. Parts of moments
    that a column has already are none of the result.

    Args:
        frame: the data.
        fields: how its columns enter the model.
        told: columns that somebody has said how to take: they stay as they are.

    Returns:
        As `fields`. O(n) a column.
    """
    if frame.height < _FEWEST_ROWS:
        return list(fields)
    seen: dict[bytes, list[FieldSpec]] = {}
    result: list[FieldSpec] = []
    for field in fields:
        column = column_of(frame, field)
        if field.kind == "unused" or column.dtype.is_nested():
            result.append(field)
            continue
        earlier = seen.setdefault(_parts(column[:_FIRST_ROWS]), [])
        compared = field if field.name in told else _compared(frame, field, column, earlier)
        if compared is field or not field.part:
            result.append(compared)
        earlier.append(field)
    return result


def _compared(
    frame: pl.DataFrame, field: FieldSpec, column: pl.Series, earlier: Sequence[FieldSpec]
) -> FieldSpec:
    """The field of a column, held against those whose first rows fall into the same parts."""
    for before in earlier:
        other, name = column_of(frame, before), before.name
        if column.dtype == other.dtype and column.equals(other, null_equal=True):
            return replace(field, kind="unused", value=False, note=f"the same as {name!r}")
        # Numbers may be near others in another order.
        if field.kind == "categorical" and _parts(column) == _parts(other):
            drop = f"--drop {shlex.quote(field.name)} stores them once"
            note = f"its values come and go with those of {name!r}: {drop}"
            return replace(field, note="; ".join(filter(None, [field.note, note])))
    return field


def _parts(column: pl.Series) -> bytes:
    """Which rows have the same value, whatever it is: equal for columns that agree in that."""
    distinct = column.unique(maintain_order=True)
    place = pl.DataFrame({"value": distinct, "place": np.arange(len(distinct), dtype=np.int32)})
    rows = column.to_frame("value").join(
        place, on="value", how="left", nulls_equal=True, maintain_order="left"
    )
    return rows["place"].to_numpy().tobytes()
