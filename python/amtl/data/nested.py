"""Nested columns: the fields of a struct, as JSON has objects, are columns of their own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import polars as pl

from amtl.errors import UserError, brief


def flat(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    """A table with a column `user.id` in the place of field `id` of struct `user`, to any depth.

    Where the struct is missing, its fields are. One without fields is a column that holds nothing.

    Args:
        frame: any table.
        where: what it is, for the message.

    Raises:
        UserError: another column has the name of a field.
    """
    if pl.Struct not in frame.dtypes:
        return frame
    columns = [part for column in frame.get_columns() for part in _parts(column)]
    twice = [name for name, times in Counter(c.name for c in columns).items() if times > 1]
    if twice:
        raise UserError(
            f"{where} has a column {brief(repr(twice[0]))} and a struct with a field of that name; "
            "rename one of them"
        )
    return pl.DataFrame(columns)


def _parts(column: pl.Series) -> Iterator[pl.Series]:
    if column.dtype != pl.Struct:
        yield column
        return
    names = column.struct.fields
    if not names:
        yield pl.Series(column.name, [None], dtype=pl.Null).new_from_index(0, len(column))
    for name in names:
        yield from _parts(column.struct.field(name).alias(f"{column.name}.{name}"))


def advice(column: pl.Series) -> str:
    """How lists of structs become lists of values; empty for other columns."""
    dtype = column.dtype
    if not isinstance(dtype, (pl.List, pl.Array)) or not isinstance(dtype.inner, pl.Struct):
        return ""
    plain = [field.name for field in dtype.inner.fields if not field.dtype.is_nested()]
    if not plain:
        return ""
    lists = f"pl.col({_quoted(column.name)}){'.arr.to_list()' * isinstance(dtype, pl.Array)}"
    code = f"frame.with_columns({lists}.list.eval(pl.element().struct.field({_quoted(plain[0])})))"
    return f"lists of structs; write lists of one of their fields, by polars: {code}"


def _quoted(name: str) -> str:
    return json.dumps(brief(name), ensure_ascii=False)
