"""Numbers as people write them: thousands apart, a decimal comma, a currency or per cent sign.

Thousands, millions and billions may be K, M and B behind, or words: `€4.1M`, `2.5 Lakh`. Units may
be, see `amtl.data.units`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import polars as pl

from amtl.data import units
from amtl.data.text import FEW_NUMBERS, MISSING

_CODES = "USD|EUR|GBP|JPY|CHF|CAD|AUD|NZD|CNY|INR|KRW|SEK|NOK|DKK|PLN|CZK|HUF|TRY|BRL|MXN|ZAR|SGD"
_SIGNS = rf"[$€£¥₹₽₩₺฿₴₪₫]|US\$|[ACR]\$|Rs\.?|zł|kr\.?|Kč|Ft|{_CODES}"
_NUMBER = (
    rf"^(?P<open>\(?)(?P<minus>[+-]?)\s?(?P<before>(?:{_SIGNS})?)\s?"
    r"(?P<digits>[+-]?[.,]?\d[\d.,]*(?:[eE][+-]?\d+)?)"
    rf"(?P<scale>[KMBkm]?)\s?(?P<after>(?:{_SIGNS}|%)?)(?P<close>-?\)?)$"
)
_BELOW = r"^\(.*\)$|-$"
"""How accountants write what is below zero."""
_FORMS = {
    ".": r"^[+-]?(?:\d*|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d*)?(?:[eE][+-]?\d+)?$",
    ",": r"^[+-]?(?:\d*|[1-9]\d{0,2}(?:\.\d{3})+)(?:,\d*)?(?:[eE][+-]?\d+)?$",
}
"""By decimal mark; the other one stands between thousands."""
_NO_LIST = r"^[+-]|[.eE]|,0\d"
"""What a number has and a list of ids with commas has not: a sign, a fraction, a group like 012."""
_APART = r"(\d)(?:['’\x{a0}\x{202f}](\d{3})| (\d{3}(?: \d{3})*[.,]\d))"
"""Thousands set apart by what is nothing else between digits, or by spaces before a fraction."""
_POWERS = {
    "e3": "thousand|tsd",
    "e5": "lakhs?|lacs?",
    "e6": "millions?|mio|mn",
    "e7": "crores?|cr",
    "e9": "billions?|bn|mrd",
}
_POWER = rf"(?i)(\d)\s?(?:{'|'.join(_POWERS.values())})\b"
"""Words that stand for thousands and more."""
_NO_NUMBER = r"(?i)^(?:null|nan|none|n/?a|-|\?)\s?[^\d\s][^\d]{0,11}$"
"""A missing number before a unit, as in `null bhp`."""
_SURELY_MARKED = 20
"""Distinct numbers with a mark from which it is told what it is."""
_SCALES = {"K": "e3", "k": "e3", "M": "e6", "m": "e6", "B": "e9"}
_SCALED = {"K": "thousands as ", "M": "millions as ", "B": "billions as "}


class _Parts(NamedTuple):
    """What texts consist of, each [n] of text: null where they are no numbers.

    Attributes:
        digits: the numbers as they are written.
        scale: K, M or B, or k or m, or nothing.
        sign: of a currency or per cent, or nothing.
    """

    digits: pl.Series
    scale: pl.Series
    sign: pl.Series


@dataclass(frozen=True)
class Notation:
    """How the text of a column writes numbers.

    Attributes:
        decimal: the decimal mark, `.` or `,`; empty where it may be either.
        scaled: whether K, M and B stand behind numbers, and k and m, for thousands and so on.
        unit: what stands behind all numbers, or its kind where they have several; see
            `amtl.data.units`.
        marks: what makes it text, such as `thousands separators`; empty for plain numbers.
        doubt: a value and what else it may be; empty where that is sure.
    """

    decimal: str
    scaled: bool = False
    unit: str = ""
    marks: str = ""
    doubt: str = ""


def texts(column: pl.Series) -> pl.Series:
    """Without spaces around, and nothing for what stands for a missing number."""
    cells = column.cast(pl.String).str.strip_chars()
    return cells.set(cells.is_in(["", *MISSING]), None)


def plain(column: pl.Series) -> pl.Series | None:
    """The numbers of text that holds plain ones alone; None for other text."""
    cells = texts(column)
    found = cells.cast(pl.Float64, strict=False)
    return found if found.null_count() == cells.null_count() else None


def _joined(cells: pl.Series) -> pl.Series:
    """Texts without what sets thousands apart, unless that may be a decimal mark."""
    while cells.str.contains(_APART).any():
        cells = cells.str.replace_all(_APART, "$1$2$3")
    return cells


def _in_digits(cells: pl.Series) -> pl.Series:
    """Texts with powers of ten for words such as `million` and `Lakh` behind their numbers."""
    if cells.str.contains(_POWER).any():
        for power, words in _POWERS.items():
            cells = cells.str.replace(rf"(?i)(\d)\s?(?:{words})\b\.?", f"${{1}}{power}")
    return cells


def find(column: pl.Series, padded: bool = False) -> Notation | None:
    """The one notation in which all values of a column are numbers, or None.

    With `padded`, also where integers have leading zeros, which are texts else.

    Values carry the same currency (a sign or a code such as USD) or per cent sign, or all of them
    none; what is below zero may stand in parentheses, or before its minus sign. Thousands, millions
    and billions may be K, M and B; also k and m, where a currency or one of those makes it clear
    that these are no units.
    """
    spelled = texts(column).drop_nulls().unique(maintain_order=True)
    written = _in_digits(spelled)
    joined = _joined(written)
    values = joined.filter(_infinite(joined).is_null())
    found = _find(values, padded)
    known = values.filter(~values.str.contains(_NO_NUMBER)) if found is None else values
    if found is None and (unit := units.find(known)):
        found = _find(units.taken_off(known, unit)[0].unique(maintain_order=True), padded)
        if found is None:
            return None
        with_units = f"units, converted to {unit}" if unit in units.KINDS else f"the unit {unit}"
        marks = " and ".join(filter(None, [found.marks, with_units]))
        # Lists have none; what is left to doubt is the decimal mark.
        found = replace(found, unit=unit, marks=marks, doubt="" if found.decimal else found.doubt)
    if found and (written != joined).any():
        marks = " and ".join(filter(None, ["thousands separators", found.marks]))
        found = replace(found, marks=marks)
    if found and (spelled != written).any():
        # Of lists, none has such words.
        marks = " and ".join(filter(None, ["words for thousands or more", found.marks]))
        found = replace(found, marks=marks, doubt="" if found.decimal else found.doubt)
    return found


def has_fractions(values: pl.Series, found: Notation) -> bool:
    """Whether distinct texts are plain numbers, many and some with a fraction, as no ids have."""
    plain = found.decimal == "." and not (found.marks or found.doubt)
    return plain and len(values) > FEW_NUMBERS and bool(values.str.contains(r"\d\.\d").any())


def _find(values: pl.Series, padded: bool) -> Notation | None:
    """`find` of distinct values without units."""
    if not len(values) or not values[:100].str.contains(_NUMBER).all():
        return None
    digits, scale, sign = _parts(values)
    below = values.str.contains(_BELOW)
    if below.all():
        # Amounts below zero come with others; alone, parentheses number a list.
        return None
    if digits.null_count() or sign.n_unique() > 1:
        return None
    zeros = digits.str.contains(r"^[+-]?0\d")
    if zeros.any() and not (padded and digits.str.contains(r"^[+-]?\d+$").all()):
        return None
    scaled = scale != ""
    if scaled.any() and not _are_scales(digits, scale, sign):
        return None
    fits = [mark for mark, form in _FORMS.items() if digits.str.contains(form).all()]
    if not fits:
        return None
    commas = digits.str.contains(",", literal=True)
    points = digits.str.contains(".", literal=True)
    marked = values.filter(commas | points)
    if len(fits) > 1 and _are_thousands(digits, commas, points, sign[0]):
        fits = ["." if commas.any() else ","]
    if len(fits) > 1 and len(marked):
        shown = str(marked[0])
        plain = [read(marked[:1], mark, bool(scaled.any()))[0] for mark in _FORMS]
        doubt = f"{shown!r} may be {plain[0]:g} or {plain[1]:g}"
        return Notation("", False, "", "thousands separators or a decimal comma", doubt)
    apart = points if fits[0] == "," else commas
    marks = ["thousands separators"] if apart.any() else []
    marks += ["a decimal comma"] if fits[0] == "," and commas.any() else []
    found = [sorted(scale.filter(scale.str.to_uppercase() == one).unique()) for one in _SCALED]
    marks += [
        what + " or ".join(some) for what, some in zip(_SCALED.values(), found, strict=True) if some
    ]
    marks += [f"the sign {sign[0]}"] if sign[0] else []
    enclosed = values.str.starts_with("(")
    marks += ["parentheses for what is below zero"] if enclosed.any() else []
    marks += ["the minus sign behind"] if (below & ~enclosed).any() else []
    doubt = ""
    if (
        commas.any()
        and not sign[0]
        and not scaled.any()
        and not digits.str.contains(_NO_LIST).any()
    ):
        doubt = f"{values.filter(commas)[0]!r} may be one number or several"
    return Notation(fits[0], bool(scaled.any()), "", " and ".join(marks), doubt)


def _are_thousands(digits: pl.Series, commas: pl.Series, points: pl.Series, sign: str) -> bool:
    """Whether a mark before three digits, which may be a decimal one, sets thousands apart.

    A number below 1,000 has none then, and one above has, where a decimal mark would be in most of
    either; and amounts of money, of one digit to three before it, have no three decimals.
    """
    marked = commas | points
    if (commas.any() and points.any()) or int(marked.sum()) < _SURELY_MARKED:
        return False
    below = digits.filter(~marked).cast(pl.Float64, strict=False).abs()
    if not (below < 1000).all():
        return False
    before = digits.filter(marked).str.extract(r"^[+-]?(\d+)").str.len_bytes().n_unique()
    return len(below) > 0 or (before > 1 and sign not in ("", "%"))


def _are_scales(digits: pl.Series, scale: pl.Series, sign: pl.Series) -> bool:
    """Whether letters behind distinct numbers, which may be units, or of ids, are scales."""
    if sign[0]:
        return bool(sign[0] != "%")
    scaled = scale != ""
    kinds = scale.filter(scaled).str.to_uppercase().n_unique()
    # Of houses and seats some have a letter: 12, 14, 14B.
    amounts = kinds > 1 or digits.filter(scaled).str.contains("[.,]").any()
    return scale.is_in(["K", "M", "B"]).any() and bool(scaled.all() or amounts)


def mixed(column: pl.Series) -> str:
    """Values of numbers that carry different signs or units, for a message; empty for others."""
    values = texts(column).drop_nulls().unique(maintain_order=True)
    if not values[:100].str.contains(_NUMBER).all():
        values = values.filter(~values.str.contains(_NO_NUMBER))
        shown = [repr(text) for text in units.differ(values)[:3]]
        if len(values) <= FEW_NUMBERS or not shown:
            return ""
        return (
            f"numbers with different units, such as {', '.join(shown[:-1])} and {shown[-1]}, "
            "cannot be compared, so they stay text; convert all to one"
        )
    digits, _, sign = _parts(values)
    shown = [repr(text) for text in values.filter(sign.is_first_distinct())[:3]]
    if digits.null_count() or len(shown) < 2:
        return ""
    return (
        f"numbers with different currency or per cent signs, such as {', '.join(shown[:-1])} and "
        f"{shown[-1]}, cannot be compared, so they stay text; convert all to one sign"
    )


def read(column: pl.Series, decimal: str, scaled: bool = False, unit: str = "") -> pl.Series:
    """The numbers that text stands for, as `Notation` has them; what is none is missing."""
    # Earlier models took such a word for a unit.
    cells = texts(column) if re.search(_POWER, f"0 {unit}") else _in_digits(texts(column))
    cells = _joined(cells)
    if unit:
        cells, factors = units.taken_off(cells, unit)
        return read(cells, decimal, scaled).alias(column.name) * factors
    digits, scale, _ = _parts(cells)
    if not scaled:
        digits = digits.set(scale != "", None)
    digits = digits.set(~digits.str.contains(_FORMS[decimal]), None)
    digits = digits.str.replace_all("." if decimal == "," else ",", "", literal=True)
    digits = digits.str.replace(",", ".", literal=True) + scale.replace(_SCALES)
    numbers = digits.cast(pl.Float64, strict=False)
    infinite = _infinite(cells)
    return numbers.zip_with(infinite.is_null(), infinite).alias(column.name)


def odd(column: pl.Series, decimal: str, scaled: bool = False, unit: str = "") -> pl.Series:
    """The values that are neither numbers in that notation nor missing."""
    cells = texts(column)
    none = cells.is_not_null() & read(column, decimal, scaled, unit).is_null()
    # Without a unit to stand before, such text is no missing number.
    return column.filter(none & ~cells.str.contains(_NO_NUMBER) if unit else none)


def _infinite(cells: pl.Series) -> pl.Series:
    """`inf` and its like as the numbers they are, in any notation; missing otherwise."""
    spelled = cells.str.contains(r"(?i)^[+-]?inf(?:inity)?$")
    return cells.set(~spelled, None).cast(pl.Float64, strict=False)


def _parts(cells: pl.Series) -> _Parts:
    parts = cells.str.extract_groups(_NUMBER).struct
    opened, minus, before, digits, scale, after, closed = (
        parts.field(name)
        for name in ("open", "minus", "before", "digits", "scale", "after", "close")
    )
    numbers = (minus + digits).zip_with(opened + closed == "", "-" + digits)
    # Of one parenthesis, or two signs, it is none.
    odd = (opened + closed).is_in(["(", ")", "-)", "(-)"])
    odd |= (opened + closed != "") & ((minus != "") | digits.str.contains("^[+-]"))
    odd |= (scale != "") & digits.str.contains("[eE]")
    return _Parts(numbers.set(odd, None), scale, before + after)
