"""Dates and times as people write them: `31.1.2024`, `Jan 31, 2024 3:30 PM`.

Logs, mail and `date` have forms of their own. Times of day and durations stand without a date:
`20:24:53`, `8:05 PM`, `75:10` of minutes and seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import polars as pl

from amtl.data import notation

_DATES = (
    *("%Y-%m-%d", "%Y/%m/%d", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d.%m.%Y"),
    *("%m/%d/%y", "%d/%m/%y", "%d.%m.%y", "%d %B %Y", "%d. %B %Y", "%B %d, %Y", "%B %d %Y"),
    *("%d-%B-%Y", "%d-%B-%y"),
)
MONTHS = ("%Y-%m", "%Y/%m", "%m/%Y", "%m-%Y", "%B %Y", "%B, %Y", "%B-%Y", "%B-%y", "%Y %B", "%Y-%B")
"""Forms without a day, which is the first then."""
_FIRST_YEAR, _LAST_YEAR = 1900, 2100
"""Of months, where other numbers of four digits may be codes."""
_TIMES = ("%H:%M", "%H:%M:%S%.f", "%I:%M %p", "%I:%M:%S %p")
CLOCKS = (*_TIMES, "%M:%S")
"""Forms without a date. What may be hours and minutes is no minutes and seconds."""

_CLOCK = r"^(\d{1,9}):(\d\d)(?::(\d\d(?:\.\d+)?))?(?: ?([APap])[Mm])?$"
"""Not `3:1`, which may be a score."""

_FORMS = (
    *(date + time for date in _DATES for time in ("", *(f" {time}" for time in _TIMES))),
    *("%Y-%m-%d %H:%M%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%d %B %Y %H:%M:%S %#z"),
    *("%Y%m%dT%H%M%S", "%Y%m%dT%H%M%S%.f", "%Y:%m:%d %H:%M:%S"),
    *("%d %B %Y %I:%M:%S %p %#z", *CLOCKS, *MONTHS),
)
_WEEKDAY = "^(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)(?:, ?| )"
_ZONES = {
    "+0000": "UTC?|GMT|Z",
    "-0400": "EDT",
    "-0500": "EST|CDT",
    "-0600": "CST|MDT",
    "-0700": "MST|PDT",
    "-0800": "PST",
}
"""Those that mail may name (RFC 2822)."""
_IN_1990, _IN_2050 = 631_152_000, 2_524_608_000
"""Seconds since 1970."""
_UNITS = (1, 10**3, 10**6, 10**9)
DIGITS = {
    "YYYYMMDD": (8, ""),
    "YYMMDDHH": (8, "20"),
    "YYYYMMDDHH": (10, ""),
    "YYYYMMDDHHMM": (12, ""),
    "YYYYMMDDHHMMSS": (14, ""),
}
"""Whole numbers whose digits are a moment's: how many, and what stands before them."""
LEAST_DIGITS = 1_010_100
"""The first hour of 2001, of which `YYMMDDHH` has seven."""

ISO = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?$"
SOME_DIGITS = r"\d\D*\d"
_ODD, _MOST_ODD = 0.01, 20
"""Share of the rows, and number of texts, that may be no moments where all others are."""

_LIKE = {
    **dict.fromkeys("YmdHIMy", r"\s*[+-]?\d+"),
    "S": r"\s*[+-]?\d+(?:\.\d*)?",
    "B": r"\s*[A-Za-z]{3,}",
    "p": r"\s*[APap][Mm]",
    ".f": r"(?:\.\d*)?",
    "#z": ".*",
}
"""What parts of forms look like, at their widest."""

REWRITE = "write it as YYYY-MM-DD, with HH:MM:SS after that where there is a time"


def texts(column: pl.Series) -> pl.Series:
    """Text without what makes no difference, and nothing for what stands for a missing value."""
    cells = notation.texts(column)
    cells = cells.str.replace_all(r"\s+", " ").str.replace(r"^(\d{4}-\d\d-\d\d)T", "$1 ")
    if cells.str.contains(r"^\d{4}-.* [A-Z]+$").any():
        for offset, names in _ZONES.items():
            zoned = rf"^(\d{{4}}-\d\d-\d\d [\d:.]+) (?:{names})$"
            cells = cells.str.replace(zoned, f"$1{offset}")
    cells = _without_weekday(cells)
    cells = _with_months(cells).str.replace(r"(:\d\d),(\d{1,6})\b", "$1.$2")
    cells = cells.str.replace(r"(:\d\d(?:\.\d+)?) ?(?:Z|UTC|GMT)(?:\[UTC\])?$", "$1")
    cells = cells.str.replace(r"^(\d{4}-\d\d-\d\d \d\d)$", "$1:00")
    cells = cells.str.replace(r"^(\d{8}T\d{6}(?:\.\d+)?)Z$", "$1")
    cells = cells.str.replace(r"^(\d{4}-\d\d-\d\d [\d:.]+) ([+-]\d\d:?\d\d)$", "$1$2")
    cells = cells.str.replace(r"^(\d{4}-\d\d-\d\d)-(\d\d)\.(\d\d)\.(\d\d)", "$1 $2:$3:$4")
    cells = cells.str.replace(r"^(\d\d?)([A-Za-z]{3})(\d{4}):(\d\d:)", "$1 $2 $3 $4")
    cells = cells.str.replace(r"^[A-Z]\w\w (\w{3}) (\d\d?) ([\d:]{8}) (\d{4})$", "$2 $1 $4 $3")
    cells = cells.str.replace(r"^(\d\d?)/(\w{3})/(\d{4}):(\d\d:)", "$1 $2 $3 $4")
    return cells.str.replace(r"(\d{4}), (\d)", "$1 $2")


def _with_months(cells: pl.Series) -> pl.Series:
    """Months of one digit with two, and quarters such as `2019Q3` as their first, `2019-07`."""
    cells = cells.str.replace(r"^(\d[/-]\d{4})$", "0$1")
    if cells.str.contains(r"Q[1-4]").any():
        for quarter, month in zip("1234", ("01", "04", "07", "10"), strict=True):
            cells = cells.str.replace(rf"^(\d{{4}})[ -]?Q{quarter}$", f"${{1}}-{month}")
            cells = cells.str.replace(rf"^Q{quarter}[ -/]?(\d{{4}})$", f"${{1}}-{month}")
    return cells


def _without_weekday(cells: pl.Series) -> pl.Series:
    """Moments of mail and of `date` as day, month, year, time and offset of the zone.

    `Fri, 03 Jan 2025 03:08:39 +0200 (EET)` and `Fri Jan 10 19:10:54 UTC 2025`.
    """
    if not cells.str.contains(_WEEKDAY).any():
        return cells
    cells = cells.str.replace(rf"{_WEEKDAY}(\d\d? \w{{3}} \d{{4}})\b", "$1")
    by_date = rf"{_WEEKDAY}(\w{{3}}) (\d\d?) ([\d:]{{8}}(?: [AP]M)?) (\S+) (\d{{4}})$"
    cells = cells.str.replace(by_date, "$2 $1 $5 $3 $4").str.replace(r" \([^()]*\)$", "")
    for offset, names in _ZONES.items():
        cells = cells.str.replace(rf"(:\d\d(?: [AP]M)?) (?:{names})$", f"$1 {offset}")
    return cells.str.replace(r"( \d\d:\d\d) ([+-]\d{4})$", "$1:00 $2")


def iso(column: pl.Series) -> pl.Series | None:
    """Moments of text that has year, month and day first throughout; None for other text."""
    cells = notation.texts(column)
    known = cells.drop_nulls()
    if not len(known) or not known.str.contains(ISO).all():
        return None
    try:
        found = cells.str.to_datetime(time_unit="us")
    except pl.exceptions.PolarsError:
        return None
    return found


def odd_ones(column: pl.Series) -> list[str]:
    """Texts that are none of the moments which all others are in one form, if these are few.

    So are `2024-02-30` and `0000-00-00`: in 1 % of the rows at most, and no more than 20.
    """
    # Most columns are told by a few of their texts.
    few = texts(notation.texts(column).drop_nulls()[:100]).drop_nulls()
    if not len(few) or float(few.str.contains(SOME_DIGITS).mean() or 0.0) < 0.5:  # type: ignore[arg-type]
        return []
    dated = (form for form in _FORMS if form not in CLOCKS)
    forms = [form for form in dated if _reads(few, form, len(few) // 10)]
    cells = texts(column) if forms else few
    for form in forms:
        odd = column.filter(cells.is_not_null() & _read(cells, form).is_null())
        distinct = odd.unique(maintain_order=True)
        if len(odd) and len(odd) <= _ODD * len(cells) and len(distinct) <= _MOST_ODD:
            kept = column.set(column.is_in(distinct.to_list()).fill_null(False), None)
            if len(find(kept)) == 1:
                return distinct.to_list()
    return []


def without_odd(frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, tuple[str, ...]]]:
    """A table in which such texts are missing, and what they are, by column: see `odd_ones`."""
    found = {}
    for column in frame:
        if column.dtype == pl.String and (odd := odd_ones(column)):
            found[column.name] = tuple(odd)
            missing = column.is_in(odd).fill_null(False)
            frame = frame.with_columns(column.set(missing, None))
    return frame, found


def find(column: pl.Series, *, ordered: bool = False) -> list[str]:
    """Forms in which all text of a column is dates or times, one of those that agree.

    Args:
        column: text.
        ordered: forms agree that put moments in the same order; else those that have the same ones.
            Without a date there is none.

    Returns:
        One form where that is sure, several where days and months cannot be told, and none where
        some of the text is no moment in any.
    """
    # Most forms fail on a few values; all values tell days from months.
    few = texts(column.drop_nulls()[:100]).drop_nulls()
    forms = [form for form in _FORMS if _reads(few, form)]
    distinct = texts(column).drop_nulls().unique(maintain_order=True) if forms else few
    found: dict[str, pl.Series] = {}
    for form in forms if len(distinct) else ():
        if form in CLOCKS and (ordered or "%H:%M" in found):
            continue
        keys = _read(distinct, form)
        if keys.null_count():
            continue
        keys = keys.rank("dense") if ordered else keys
        if not any(keys.equals(others) for others in found.values()):
            found[form] = keys
    return list(found)


def read(column: pl.Series, form: str) -> pl.Series:
    """Microseconds since 1970, or midnight, that text stands for; null for what is no moment."""
    return _read(texts(column), form)


def unit(low: float, high: float) -> int | None:
    """Parts of a second since 1970 that numbers of this range count; None for other numbers."""
    fits = (u for u in _UNITS if _IN_1990 * u <= low and high <= _IN_2050 * u)
    return next(fits, None)


def in_range(numbers: pl.Series, unit: int) -> pl.Series:
    """Which numbers are moments since 1970 in that unit."""
    return numbers.is_between(_IN_1990 * unit, _IN_2050 * unit)


def of_digits(column: pl.Series, form: str) -> pl.Series:
    """The moments of whole numbers in a form of `DIGITS`; null for what is none."""
    count, century = DIGITS[form]
    cells = column.cast(pl.Int64, strict=False).cast(pl.String).str.zfill(count)
    fits = (cells.str.len_bytes() == count) & (column >= 0)
    cells = (century + cells).str.pad_end(14, "0")
    found = cells.str.to_datetime("%Y%m%d%H%M%S", strict=False, time_unit="us")
    fits &= found.dt.year().is_between(1990, 2050)
    return found.set(~fits.fill_null(False), None)


def as_in_training(values: pl.Series, low: float, high: float) -> pl.Series:
    """Moments in the unit in which training had them; other numbers as they are.

    Args:
        values: float64.
        low: where the range of training begins, or that of most of it.
        high: where it ends.
    """
    wanted, known = unit(low, high), values.drop_nans().drop_nulls()
    if wanted is None or not len(known):
        return values
    found = unit(*(float(x) for x in (known.min(), known.max())))  # type: ignore[arg-type]
    return values if found in (None, wanted) else values * (wanted / found)


def odd(column: pl.Series, form: str) -> pl.Series:
    """The values that are neither moments in that form nor missing."""
    cells = texts(column)
    return column.filter(cells.is_not_null() & _read(cells, form).is_null())


def _reads(few: pl.Series, form: str, but: int = 0) -> bool:
    """Whether a form reads some texts, but for so many of them at most."""
    # Reading takes a millisecond each of more than a hundred forms, of every column of text.
    return _looks_like(few.to_list(), form, but) and _read(few, form).null_count() <= but


def _looks_like(few: Sequence[str], form: str, but: int) -> bool:
    """Whether so many texts look as those that a form reads do, which may be others, too."""
    pattern, odd = _pattern(form), 0
    for text in few:
        odd += not pattern.match(text)
        if odd > but:
            return False
    return True


@cache
def _pattern(form: str) -> re.Pattern[str]:
    parts = re.findall(r"%(\.f|#z|\w)|([^ ])", form)
    return re.compile("".join(_LIKE[p] if p else r"\s*" + re.escape(c) for p, c in parts) + r"\s*$")


def _read(cells: pl.Series, form: str) -> pl.Series:
    """`read` of text as `texts` has it; years have four digits where the form says so."""
    if form in CLOCKS:
        return _read_clock(cells, form)
    found = cells.str.to_datetime(form, strict=False, time_unit="us")
    year = found.dt.year()
    early = (year < 1000).fill_null(False) & ("%Y" in form)
    if form in MONTHS:
        early |= ~year.is_between(_FIRST_YEAR, _LAST_YEAR).fill_null(True)
    return found.to_physical().set(early, None)


def _read_clock(cells: pl.Series, form: str) -> pl.Series:
    """`_read` of a form without a date: a duration may have more hours or minutes than a day."""
    parts = cells.str.extract_groups(_CLOCK).struct.unnest()
    first, second, third = (parts[str(i)].cast(pl.Float64, strict=False) for i in (1, 2, 3))
    half = parts["4"].str.to_uppercase()
    fits = (second < 60) & (third.is_null() | (third < 60))
    fits &= third.is_not_null() if form.count(":") == 2 else third.is_null()
    if form.startswith("%I"):
        fits &= half.is_not_null() & (first >= 1) & (first <= 12)
        first = first % 12 + (half == "P").cast(pl.Float64) * 12
    else:
        fits &= half.is_null()
    if form == "%H:%M":
        fits &= first < 24
    seconds = first * 60 + second
    if form != "%M:%S":
        seconds = seconds * 60 + third.fill_null(0.0)
    return (seconds * 10**6).round().cast(pl.Int64).set(~fits.fill_null(False), None)
