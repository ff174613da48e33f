"""Tables of Arrow, and so of Parquet, as polars has them, with types that it does not read."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from amtl.errors import UserError, brief

_UNKNOWN = (
    pa.types.is_interval,
    pa.types.is_union,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def of_arrow(table: pa.Table | pa.RecordBatch) -> pl.DataFrame:
    """A table of Arrow: numbers of more than 38 digits as floats, encodings of its own undone.

    Raises:
        UserError: a column has a type that is not known; the message says which and what to do.
    """
    columns = []
    for column, field in zip(table.columns, table.schema, strict=True):
        if any(is_unknown(field.type) for is_unknown in _UNKNOWN):
            raise UserError(
                f"column {field.name!r} is of a type that is not read, {brief(field.type)}: write "
                "it as numbers, text or moments, or leave it out of the file"
            )
        columns.append(_plain(column))
    frame = pl.from_arrow(pa.Table.from_arrays(columns, table.schema.names))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _plain(column: Any) -> Any:
    """A column as a type of polars' has it."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = _stored(column)
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    known = _known(column.type)
    return column if known == column.type else column.cast(known)


def _stored(column: Any) -> Any:
    """What a column of a type that extends another one holds, of that type."""
    if isinstance(column, pa.ChunkedArray):
        kind = column.type.storage_type
        return pa.chunked_array([chunk.storage for chunk in column.chunks], kind)
    return column.storage


def _known(kind: Any) -> Any:
    """The type of polars' that has the values of one; panics of polars would end in a traceback."""
    if pa.types.is_decimal256(kind):
        return pa.float64()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_known(kind.value_type), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_known(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_known(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_known(field.type)) for field in kind])
    return kind
