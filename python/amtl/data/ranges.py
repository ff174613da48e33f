"""Ranges of numbers as the number in their middle: `10-15`, `$50K-$75K`, `65+`, `(39,49]`.

What is open on one side, or about a number, is that number: `< 5`, `75 years and over`, `~3 km`.
Text without digits among them, such as `negotiable`, is a missing one.
"""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from amtl.data import notation

_NUMBER = r"[^\d\s(\[]{0,4}?\s?\d[\d.,]*"
_TWO = (
    rf"^({_NUMBER}\s?[A-Za-z%]{{0,5}}?)\s*(?:-|–|—|\bto\b|\bbis\b|\.\.+)\s*"
    rf"({_NUMBER})(\s?[^\d\s(]\D*)?$"
)
_BEFORE = (
    r"(?i)^(?:[<>≤≥~≈]=?|=[<>]|ca\.?|about|around|approx\.?|approximately|under|over|up to|below|"
    r"above|at (?:least|most)|(?:less|more|fewer|greater|older|younger|higher|lower) than)\s*"
)
_BEHIND = (
    r"(?i)\s*(?:\+|(?:and|or|&) (?:over|under|above|below|up|more|less|fewer|greater|higher|lower|"
    r"older|younger))$"
)
_MORE = r"^(\D{0,4}?\d[\d.,]*)\+(\s?[^\d\s]\D*)$"
"""As in `10+ years`."""
_INTERVAL = r"^[(\[]\s*([^,;\[\]()]+?)\s*[,;]\s*([^,;\[\]()]+?)\s*[)\]]$"
"""As R and pandas cut numbers."""
_REMARK = r"\s*\([^()\d]*\)$"
"""Such as `(estimated)`."""
_MOST_WORDS = 2
"""Distinct texts without digits that may be among ranges."""


class _Ends(NamedTuple):
    """Texts of the numbers that a range lies between: twice the same where it is one number."""

    low: pl.Series
    high: pl.Series


def find(column: pl.Series) -> notation.Notation | None:
    """The notation of the numbers in a column's text, some of which are ranges, or None."""
    values = notation.texts(column).drop_nulls().unique(maintain_order=True)
    words = (~_has_digits(values[:100])).sum()
    if words > _MOST_WORDS or (~_has_digits(values)).sum() > _MOST_WORDS:
        return None
    values = values.filter(_has_digits(values))
    if not len(values):
        return None
    low, high = _ends(values)
    if not (low != values).any():
        return None
    found = notation.find(pl.concat([low, high]).unique(maintain_order=True))
    if found is None or not found.decimal:
        return None
    first, last = (
        notation.read(end, found.decimal, found.scaled, found.unit) for end in (low, high)
    )
    return found if (first <= last).all() else None


def read(column: pl.Series, decimal: str, scaled: bool = False, unit: str = "") -> pl.Series:
    """The middle of each range, and numbers as they are; what is neither is missing."""
    ends = _ends(notation.texts(column))
    low, high = (notation.read(end, decimal, scaled, unit) for end in ends)
    low, high = low.zip_with(~low.is_infinite(), high), high.zip_with(~high.is_infinite(), low)
    return ((low + high) / 2).alias(column.name)


def odd(column: pl.Series, decimal: str, scaled: bool = False, unit: str = "") -> pl.Series:
    """The values that are neither ranges or numbers in that notation nor missing."""
    none = _has_digits(notation.texts(column)) & read(column, decimal, scaled, unit).is_null()
    return column.filter(none)


def _has_digits(values: pl.Series) -> pl.Series:
    return values.str.contains(r"\d")


def _ends(cells: pl.Series) -> _Ends:
    """What each text lies between; the unit, scale or currency of one end is the other's, too."""
    cells = cells.str.replace(_REMARK, "")
    cut = cells.str.extract_groups(_INTERVAL).struct.unnest()
    two = cells.str.extract_groups(_TWO).struct.unnest()
    low, high, behind = two["1"].str.strip_chars_end(), two["2"], two["3"].fill_null("")
    bare = low.str.contains(r"\d$").fill_null(False)
    low = low.zip_with(~bare, low + behind)
    before = low.str.extract(r"^([^\d\s+-]+)").fill_null("")
    high = high.zip_with(~high.str.contains(r"^\d").fill_null(False), before + high) + behind
    one = cells.str.replace(_BEFORE, "").str.replace(_BEHIND, "").str.replace(_MORE, "$1$2")
    low, high = (
        end.zip_with(end.is_not_null(), one)
        for end in (
            cut["1"].zip_with(cut["1"].is_not_null(), low),
            cut["2"].zip_with(cut["2"].is_not_null(), high),
        )
    )
    return _Ends(low, high)
