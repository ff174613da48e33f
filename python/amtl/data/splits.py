"""Training, validation and test rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from amtl.data import moments
from amtl.data.copies import together
from amtl.data.readers import listed
from amtl.errors import UserError, brief

_NAMES = (
    ("train", "training", "trn", "tr"),
    ("valid", "validation", "val", "dev", "va"),
    ("test", "testing", "tst", "te"),
)
"""What parts are called in a column that says where each row belongs, in any case."""

_ISO = (
    r"^(?:\d{4}-\d\d(?:-\d\d(?: \d\d:\d\d(?::\d\d(?:\.\d+)?)?)?)?|"
    r"\d\d:\d\d(?::\d\d(?:\.\d+)?)?)$"
)
_YEAR_FIRST = r"^\d{4}(?:[-/. ]?[WQ]?\d+){1,2}(?: \d\d:?\d\d(?::?\d\d(?:[.,]\d+)?)?)?$"
"""Of one length and one punctuation, this sorts as the moments do that it stands for."""


def split_column(how: str) -> str | None:
    """The column that a split goes by, which is no field."""
    kind, colon, column = how.partition(":")
    return column if colon and kind in ("order", "column") else None


def part_of(value: object) -> int | None:
    """0, 1 or 2 for a name of the training, validation or test part; None for anything else."""
    name = str(value).strip().lower()
    return next((part for part, names in enumerate(_NAMES) if name in names), None)


def names_parts(values: Iterable[object]) -> bool:
    """Whether these name parts, training and test among them, and nothing else."""
    parts = set(map(part_of, values))
    return None not in parts and {0, 2} <= parts


def split_rows(
    frame: pl.DataFrame, how: str, seed: int = 0, same: NDArray[np.int64] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the training, validation and test parts.

    Args:
        frame: the data.
        how: `"random"` (80, 10 and 10 %, shuffled by `seed`), `"order:COLUMN"` (the first 80 % in
            ascending order of that column train, the last 10 % test; ties stay in file order, text
            is sorted as the numbers, dates or times that it stands for, and rows without come
            first) or
            `"column:COLUMN"` (it names the part of each row: train, valid, test; without valid a
            tenth of the training rows, drawn by `seed`, validates).
        seed: of what is drawn.
        same: which rows are copies, see `amtl.data.copies`: `"random"` leaves them in one part.

    Returns:
        Three int64 tensors.

    Raises:
        UserError: for another `how`, an unknown column or part, text without a sure order, or
            fewer than ten rows.
    """
    n = frame.height
    if n < 10:
        raise UserError(f"the data has {n} rows; a train/validation/test split needs at least 10")
    column = split_column(how)
    if column is not None and column not in frame.columns:
        raise UserError(
            f"--split {how}: there is no column {column!r}; columns are {listed(frame.columns)}"
        )
    if how == "random":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    elif column is None:
        raise UserError(f"--split must be 'random', 'order:COLUMN' or 'column:COLUMN', not {how!r}")
    elif how.startswith("column:"):
        return _named_parts(frame[column], how, seed)
    else:
        keys = _in_order(frame[column], how).rename("key").to_frame().with_row_index("row")
        ordered = keys.sort("key", maintain_order=True)["row"]
        order = torch.from_numpy(ordered.to_numpy().astype("int64"))
    first, second = n * 8 // 10, n * 9 // 10
    if how == "random" and same is not None:
        order, starts = together(order, same)
        ends = torch.cat([starts, torch.tensor([n])])
        first, second = ends[torch.searchsorted(ends, torch.tensor([first, second]))].tolist()
    return order[:first], order[first:second], order[second:]


def split_note(frame: pl.DataFrame, how: str, fields: Collection[str] = ()) -> str:
    """What there is to say about a split of these rows; empty if nothing."""
    column = split_column(how)
    if not how.startswith("order:") or column not in frame.columns:
        return ""
    missing = _in_order(frame[column], how).null_count()
    notes = [f"{missing:,} rows have no {column}; they train"] if missing else []
    if column not in fields:
        notes.append("itself it is no field, for later rows have values of their own")
    return f"--split {how}: {'; '.join(notes)}" if notes else ""


def _in_order(column: pl.Series, how: str) -> pl.Series:
    """What to sort a column by, itself or what its text stands for; null where that is missing."""
    if column.dtype not in (pl.String, pl.Categorical):
        return column.fill_nan(None) if column.dtype.is_float() else column
    texts = moments.texts(column)
    distinct = texts.drop_nulls().unique(maintain_order=True)
    whole = distinct.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return texts.cast(pl.Int64)
    # Digits in the same places, whose most significant come first, sort as the text does.
    shapes = distinct.str.replace_all(r"\d", "0").unique()
    alike = len(shapes) == 1 and (
        shapes.str.contains(r"^(?:[^0]*[a-zA-Z_]-?)?0+$")[0]
        or distinct.str.contains(_YEAR_FIRST).all()
    )
    if alike or distinct.str.contains(_ISO).all():
        return texts
    if not distinct.cast(pl.Float64, strict=False).null_count():
        return texts.cast(pl.Float64)
    forms = moments.find(distinct, ordered=True)
    if len(forms) == 1:
        return moments.read(texts, forms[0])
    # One of each form, for the first may be as it should.
    form = distinct.str.replace_all(r"\d+", "0").str.replace_all(r"[A-Za-z]+", "a")
    shown = distinct.filter(form.is_first_distinct())[:3]
    told = f"--split {how}: column {column.name!r} holds text such as "
    told += ", ".join(brief(repr(text)) for text in shown)
    doubt = "is no number, date or time in one known notation"
    if forms:
        doubt = f"may be {forms[0]} or {forms[1]}"
    raise UserError(f"{told}, which {doubt}; {moments.REWRITE}, or as numbers")


def _named_parts(column: pl.Series, how: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    values = column.unique(maintain_order=True).to_list()
    if not names_parts(values):
        shown = ", ".join(brief(repr(value)) for value in values[:5]) + (
            ", ..." if len(values) > 5 else ""
        )
        parts = set(map(part_of, values))
        lacking = [name for part, name in ((0, "train"), (2, "test")) if part not in parts]
        none = f"; no row says {lacking[0]}" if len(lacking) == 1 else ""
        raise UserError(
            f"--split {how}: it has to say train, valid or test of each row (valid may be missing, "
            f"then a tenth of train validates), and holds {shown}{none}"
        )
    part_by_name = {value: part_of(value) for value in values}
    part = column.replace_strict(part_by_name, return_dtype=pl.Int8).to_numpy()
    train, val, test = (torch.from_numpy((part == p).nonzero()[0]) for p in range(3))
    if not len(val):
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        tenth = max(1, len(train) // 10)
        val, train = train[drawn[:tenth]].sort().values, train[drawn[tenth:]].sort().values
    return train, val, test
