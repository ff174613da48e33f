"""Weights of rows: a column of numbers, by which some rows count more than others."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from amtl.data import notation
from amtl.data.readers import require_columns
from amtl.data.specs import TEXT, numbers
from amtl.errors import UserError, brief


def weighed(
    frame: pl.DataFrame, column: str | None, trains: bool = True
) -> tuple[pl.DataFrame, Tensor | None]:
    """The data without the column that says what rows weigh, and these weights.

    Args:
        frame: the data.
        column: numbers of 0 or more, or text that stands for such as it does in fields; None: all
            rows weigh the same.
        trains: whether a model is to be trained on them, and not scored: then there are none where
            the column is missing.

    Returns:
        Weights as float32 `[n]`, the largest 1; None where all rows weigh the same.

    Raises:
        UserError: the column is missing, holds anything else, or 0 in all rows.
    """
    if column is None or not (trains or column in frame.columns):
        return frame, None
    require_columns(frame.columns, [column], "the data")
    found = _numbers(frame[column])
    remedy = (
        "each row needs a number of 0 or more, 0 if it is to count for nothing; write them so, or "
        + ("leave --weight out" if trains else "leave the column out: scores are unweighted then")
    )
    for what, rows in (
        ("missing", found.is_nan()),
        ("below 0", found < 0),
        ("infinite", found.is_infinite()),
        ("0", found == 0),
    ):
        many = int(rows.sum())
        if many == len(found) or (many and what != "0"):
            where = "every row" if many == len(found) else f"{many:,} row{'s' * (many > 1)}"
            raise UserError(f"weight {column!r} is {what} in {where}: {remedy}")
    # Sums of numbers as large as floats go are none.
    return frame.drop(column), torch.from_numpy((found / found.max()).to_numpy().copy()).float()


def _numbers(column: pl.Series) -> pl.Series:
    """A column's numbers, NaN where there is none; moments are none."""
    held = column.cast(pl.String) if column.dtype in TEXT else column
    known = held.dtype.is_numeric() or held.dtype in (pl.Boolean, pl.Null)
    if held.dtype == pl.String:
        found = notation.find(held)
        known = notation.plain(held) is not None or (found is not None and found.decimal != "")
    if known:
        return numbers(held)
    odd = [*notation.odd(held, "."), *held.drop_nulls()] if held.dtype == pl.String else []
    such = f" such as {brief(repr(odd[0]))}" if odd else ""
    raise UserError(
        f"weight {column.name!r} holds {brief(column.dtype)} values{such}, where numbers of 0 or "
        "more are needed: write them so, with a decimal point"
    )
