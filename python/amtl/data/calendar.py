"""Hours, weekdays, days and months of moments, as fields of their own where labels follow them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import polars as pl

from amtl.data import moments, notation
from amtl.data.ordered import Floats
from amtl.data.specs import TEXT, FieldSpec, is_amount, numbers
from amtl.errors import UserError, brief


class Part(NamedTuple):
    """What of a moment comes again.

    Attributes:
        of: its numbers, of moments.
        period: the numbers of the periods after each of which it does.
        again: the same in words.
        reach: how many neighbours on either side are like it.
        called: what it is in words, where its name does not say so.
    """

    of: Callable[[pl.Series], pl.Series]
    period: Callable[[pl.Series], pl.Series]
    again: str
    reach: int = 0
    called: str = ""


def _days(when: pl.Series) -> pl.Series:
    return when.dt.date().to_physical().cast(pl.Int64)


def _months(when: pl.Series) -> pl.Series:
    return when.dt.year().cast(pl.Int64) * 12 + when.dt.month()


PARTS = {
    "hour": Part(lambda when: when.dt.hour(), _days, "day to day", 3),
    # 1970 began on a Thursday.
    "weekday": Part(
        lambda when: when.dt.weekday(), lambda when: (_days(when) + 3) // 7, "week to week"
    ),
    # Wages and rents come on days of the month, and so do feasts.
    "day": Part(lambda when: when.dt.day(), _months, "month to month", 3, "day of the month"),
    "month": Part(lambda when: when.dt.month(), lambda when: when.dt.year(), "year to year"),
}
_FEWEST = 4
"""Periods, of fewer of which nothing is said to come again."""
_SURE = 3.0
"""Standard errors, from period to period, by which a part has to tell something of labels."""
_PRIOR = 20.0
"""Rows that the rate of a part counts for all."""
_MOSTLY = 0.9
"""Share of numbers that are times since 1970 from which the others are taken as missing."""


def take(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """The part of a column's moments that a field is, int8; null for what is none.

    Args:
        column: in whatever form there is, preferably that of training.
        spec: of the field.

    Raises:
        UserError: text is no moment.
    """
    when = _moments(column, spec.moment, spec.zone)
    if spec.part == "hour" and _are_dates(column):
        when = when.clear(len(when))
    return PARTS[spec.part].of(when).cast(pl.Int8)


def parts(
    frame: pl.DataFrame,
    labels: Floats,
    skip: Collection[str] = (),
    marks: Mapping[str, tuple[str, ...]] | None = None,
) -> list[FieldSpec]:
    """Fields for hours, weekdays, days of the month and months, where labels follow these.

    They do where the rates of an hour on other days predict its labels on a day better than these
    days' rate alone, beyond three standard errors between days, of which there must be four: what
    comes once, such as a campaign of an hour, is none. The same for weekdays and weeks, days and
    months, months and years.

    Args:
        frame: the data.
        labels: 0 or 1 of each row that trains, NaN of the others.
        skip: columns that are not looked at, and fields that are not wanted.
        marks: column to texts of its file that were taken as missing.

    Returns:
        One field, with a note, for each that is found. O(n) a column of moments.
    """
    trains = np.flatnonzero(~np.isnan(labels))
    found = []
    for name in frame.columns:
        if name in skip:
            continue
        form, zone = _form(frame[name]), _zone(frame[name])
        if form is None:
            continue
        when = _moments(frame[name].gather(trains), form or None, zone)
        for part, known in PARTS.items():
            field = f"{name}.{part}"
            if field in frame.columns or field in skip:
                continue
            if form in moments.MONTHS and part != "month":
                continue
            value, period = known.of(when), known.period(when)
            near = range(known.reach + 1)
            if any(_follows(value, period, labels[trains], reach) for reach in near):
                what = known.called or part
                note = f"labels follow the {what} of {name!r} from {known.again}; "
                note += f"--drop {shlex.quote(field)} leaves it out"
                spec = FieldSpec(
                    field, moment=form or None, part=part, of=name, zone=zone, note=note
                )
                found.append(replace(spec, marks=(marks or {}).get(name, ())))
    return found


def called(frame: pl.DataFrame, name: str) -> FieldSpec | None:
    """The field that a name such as `when.hour` stands for, None for a column's name and others.

    Raises:
        UserError: the column that it names holds no moments.
    """
    column, _, part = name.rpartition(".")
    if part not in PARTS or name in frame.columns or column not in frame.columns:
        return None
    form, zone = _form(frame[column]), _zone(frame[column])
    if form is None:
        raise UserError(
            f"--fields {name}: column {column!r} ({brief(frame[column].dtype)}) has no dates "
            f"or times in one known notation; {moments.REWRITE}"
        )
    if part == "hour" and _are_dates(frame[column]):
        raise UserError(f"--fields {name}: column {column!r} has dates without a time")
    return FieldSpec(name, moment=form or None, part=part, of=column, zone=zone)


def has_moments(column: pl.Series) -> bool:
    """Whether a column holds dates or times in one known notation."""
    return _form(column) is not None


def _are_dates(column: pl.Series) -> bool:
    """Whether moments have no times, so that their hours are unknown."""
    if column.dtype in TEXT:
        timed = column.cast(pl.String).str.contains(r"\d[:T h]\d\d|-\d\d\.\d\d\.\d\d").any()
        return notation.plain(column) is None and not timed
    return column.dtype == pl.Date


def _zone(column: pl.Series) -> str:
    """The zone whose hours a column of moments has; empty for UTC, and where none is named."""
    zone = getattr(column.dtype, "time_zone", None) or ""
    try:
        pl.Series([0]).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(zone)
    except pl.exceptions.PolarsError:
        return ""
    return "" if zone == "UTC" else zone


def _form(column: pl.Series) -> str | None:
    """How a column's moments are written, empty where that is plain; None if it has none."""
    dtype = column.dtype
    if dtype in (pl.Date, pl.Datetime):
        return ""
    if column.null_count() == len(column) or not (dtype in TEXT or _is_number(column)):
        return None
    if dtype in TEXT:
        column = column.cast(pl.String)
        known = notation.texts(column).drop_nulls()
        if not len(known) or not re.search(moments.SOME_DIGITS, known[0]):
            return None
        if (plain := notation.plain(column)) is not None:
            return _form(plain)
        forms = [""] if is_amount(column) else moments.find(column)
        return forms[0] if len(forms) == 1 and forms[0] not in moments.CLOCKS else None
    return _digits(column) or ("" if _unit(column) is not None else None)


def _digits(column: pl.Series) -> str | None:
    """The form of `moments.DIGITS` in which all whole numbers of a column are moments."""
    known = column.drop_nans() if column.dtype.is_float() else column
    known = known.drop_nulls()
    if float(known.max() or 0) < moments.LEAST_DIGITS:  # type: ignore[arg-type]
        return None
    forms = list(moments.DIGITS)
    for some in (known[:100], known):
        forms = [f for f in forms if not moments.of_digits(some, f).null_count()]
        if not forms:
            return None
    return forms[0]


def _is_number(column: pl.Series) -> bool:
    return column.dtype.is_integer() or column.dtype.is_float()


def _moments(column: pl.Series, form: str | None, zone: str = "") -> pl.Series:
    """Moments as clocks have them in a zone, or in UTC; null for what is none.

    What names no zone is taken to be in UTC.

    Raises:
        UserError: text is none.
    """
    found = _in_utc(column, form)
    if zone:
        found = found.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    return found.dt.replace_time_zone(None)


def _in_utc(column: pl.Series, form: str | None) -> pl.Series:
    if column.dtype == pl.Datetime and column.dtype.time_zone:  # type: ignore[attr-defined]
        column = column.dt.convert_time_zone("UTC")
    if column.dtype == pl.Datetime:
        return column.dt.replace_time_zone(None)
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("us"))
    if column.dtype in TEXT:
        if (plain := notation.plain(column)) is not None:
            return _in_utc(plain, form)
        form = form or _form(column) or None
        read = numbers(column, FieldSpec(column.name, moment=form)).fill_nan(None)
        return read.cast(pl.Int64).cast(pl.Datetime("us"))
    if form not in moments.DIGITS or not moments.of_digits(column, form).count():
        form = _form(column)
    if form in moments.DIGITS:
        return moments.of_digits(column, form)
    unit = _unit(column) or 1
    read = column.cast(pl.Float64, strict=False).fill_nan(None)
    read = read.set(~moments.in_range(read, unit).fill_null(False), None)
    return (read * (10**6 / unit)).round().cast(pl.Int64).cast(pl.Datetime("us"))


def _unit(column: pl.Series) -> int | None:
    """Parts of a second since 1970 that nearly all numbers of a column count, or None."""
    if not _is_number(column):
        return None
    known = column.cast(pl.Float64).drop_nulls().drop_nans()
    middle = known.median()
    unit = None if middle is None else moments.unit(middle, middle)  # type: ignore[arg-type]
    if unit is None or float(moments.in_range(known, unit).mean() or 0.0) < _MOSTLY:  # type: ignore[arg-type]
        return None
    return unit


def _follows(value: pl.Series, period: pl.Series, labels: Floats, reach: int) -> bool:
    """Whether the rates of a part's values in other periods predict the labels of a period.

    The rates are those of a value and so many before and after it, where the last comes before the
    first: of few rows, single hours say little.
    """
    there = value.is_not_null().to_numpy()
    labels = labels[there]
    _, c = np.unique(period.drop_nulls().to_numpy(), return_inverse=True)
    distinct, v = np.unique(value.drop_nulls().to_numpy(), return_inverse=True)
    if len(distinct) < 2 or c.max() + 1 < _FEWEST:
        return False
    shape = int(c.max()) + 1, len(distinct)
    cell = c * shape[1] + v
    rows = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    hits = np.bincount(cell, labels, minlength=rows.size).reshape(shape)
    others = (rows.sum(0) - rows, hits.sum(0) - hits)
    near = range(-reach, reach + 1)
    other_rows, other_hits = (sum(np.roll(each, k, 1) for k in near) for each in others)
    base = (other_hits.sum(1) + 1) / (other_rows.sum(1) + 2)
    rate = (other_hits + _PRIOR * base[:, None]) / (other_rows + _PRIOR)
    base = base[:, None]
    gain = (hits * np.log(rate / base) + (rows - hits) * np.log((1 - rate) / (1 - base))).sum(1)
    return bool(gain.sum() > _SURE * gain.std(ddof=1) * len(gain) ** 0.5)
