"""Training, validation and test rows."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
import torch
from torch import Tensor

from amtl.data.readers import listed
from amtl.data.text import MISSING
from amtl.errors import UserError

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
_DATES = (
    *("%Y-%m-%d", "%Y/%m/%d", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d.%m.%Y"),
    *("%m/%d/%y", "%d/%m/%y", "%d.%m.%y", "%d %B %Y", "%d. %B %Y", "%B %d, %Y", "%B %d %Y"),
    *("%d-%B-%Y", "%d-%B-%y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S%.f", " %I:%M %p", " %I:%M:%S %p")
_FORMATS = (
    *(date + clock for date in _DATES for clock in _CLOCKS),
    *("%Y-%m-%d %H:%M%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%d %B %Y %H:%M:%S %#z"),
)


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


def split_rows(frame: pl.DataFrame, how: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
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
        keys = _in_order(frame[column], how).to_frame().with_row_index("row")
        ordered = keys.sort(column, maintain_order=True)["row"]
        order = torch.from_numpy(ordered.to_numpy().astype("int64"))
    first, second = n * 8 // 10, n * 9 // 10
    return order[:first], order[first:second], order[second:]


def split_note(frame: pl.DataFrame, how: str) -> str:
    """What there is to say about a split of these rows; empty if nothing."""
    column = split_column(how)
    if not how.startswith("order:") or column not in frame.columns:
        return ""
    missing = _in_order(frame[column], how).null_count()
    return f"--split {how}: {missing:,} rows have no {column}; they train" if missing else ""


def _in_order(column: pl.Series, how: str) -> pl.Series:
    """What to sort a column by, itself or what its text stands for; null where that is missing."""
    if column.dtype not in (pl.String, pl.Categorical):
        return column.fill_nan(None) if column.dtype.is_float() else column
    texts = column.cast(pl.String).str.strip_chars()
    texts = texts.set(texts.is_in(["", *MISSING]), None)
    texts = texts.str.replace_all(r"\s+", " ").str.replace(r"^(\d{4}-\d\d-\d\d)T", "$1 ")
    texts = texts.str.replace(r"(:\d\d(?:\.\d+)?) ?(?:Z|UTC)$", "$1")
    texts = texts.str.replace(r"^[A-Z]\w\w (\w{3}) (\d\d?) ([\d:]{8}) (\d{4})$", "$2 $1 $4 $3")
    texts = texts.str.replace(r"^(\d\d?)/(\w{3})/(\d{4}):(\d\d:)", "$1 $2 $3 $4")
    texts = texts.str.replace(r"(\d{4}), (\d)", "$1 $2")
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
    # Most notations fail on a few values; all values tell days from months.
    readings = {
        form: keys
        for form in _FORMATS
        if _moments(distinct[:100], form) is not None
        and (keys := _moments(distinct, form)) is not None
    }
    told = f"--split {how}: column {column.name!r} holds text such as {distinct[0]!r}"
    remedy = "write it as YYYY-MM-DD, with HH:MM:SS after that where there is a time, or as numbers"
    if not readings:
        raise UserError(f"{told}, which is no number, date or time in a known notation; {remedy}")
    form, keys = readings.popitem()
    for other, others in readings.items():
        if not others.rank("dense").equals(keys.rank("dense")):
            raise UserError(f"{told}, which may be {other} or {form}; {remedy}")
    return texts.str.to_datetime(form, time_unit="us")


def _moments(texts: pl.Series, form: str) -> pl.Series | None:
    """What all of these texts are in that notation, whose years have four digits if it says so."""
    moments = texts.str.to_datetime(form, strict=False, time_unit="us")
    if moments.null_count() or ("%Y" in form and bool((moments.dt.year() < 1000).any())):
        return None
    return moments


def _named_parts(column: pl.Series, how: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    values = column.unique(maintain_order=True).to_list()
    if not names_parts(values):
        shown = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
        raise UserError(
            f"--split {how}: it has to say train, valid or test of each row (valid may be missing, "
            f"then a tenth of train validates), and holds {shown}"
        )
    parts = {value: part_of(value) for value in values}
    part = column.replace_strict(parts, return_dtype=pl.Int8).to_numpy()
    train, val, test = (torch.from_numpy((part == p).nonzero()[0]) for p in range(3))
    if not len(val):
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        tenth = max(1, len(train) // 10)
        val, train = train[drawn[:tenth]].sort().values, train[drawn[tenth:]].sort().values
    return train, val, test
