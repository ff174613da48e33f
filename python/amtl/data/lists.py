"""Text that holds several values: apart by a separator, as lists are written, or its words."""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress

import polars as pl

from amtl.data.specs import TEXT

WRITTEN_LISTS = "[]"
"""In the place of a separator: text is lists as Python or JSON writes them."""
_ITEM = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|-?\d+(?:\.0+)?"""
_NUMPY = rf"\bnp\.\w+\(({_ITEM})\)"
"""An item as lists of NumPy's numbers are written: `[np.int64(3), np.int64(2)]`."""
_MAY_BE_NONE = rf"(?:{_ITEM}|{_NUMPY}|None|null)"
_LIST = rf"(?s)^\s*\[\s*(?:{_MAY_BE_NONE}(?:\s*,\s*{_MAY_BE_NONE})*)?\s*\]\s*$"
_NOTHING = r"""(?:'\s*'|"\s*")"""
WORDS = "words"
"""In the place of a separator: text is its words, in small letters."""
FEWEST_TIMES = 3
"""That a word comes to have a row of its own."""
_WORD = r"\w+(?:['’]\w+)*"
_SIGNS = ("|", ";", ",", " ")
"""What else values may be joined by in the rows to score."""
_SEVERAL_WORDS = r"\p{L}{2}\S*[ /.:+&>#~-]+\S*\p{L}{2}"
"""Words of sentences, and those of paths, kinds of files and names of packages."""
_MOST_WORDS = 256
"""So many first words of a text say most of it."""


def split(texts: pl.Series, separator: str, *, trim: bool = True) -> pl.Series:
    """The values that each text holds, as lists; an empty text holds none.

    Args:
        texts: strings.
        separator: stands between values; or `WRITTEN_LISTS`, then items still have their quotes,
            or `WORDS`.
        trim: leave out spaces around values, and empty values.
    """
    text = pl.col("text")
    if separator == WRITTEN_LISTS:
        texts = texts.str.replace_all(_NUMPY, "$1")
        items = text.str.extract_all(_ITEM)
        if texts.str.contains(_NOTHING).any():
            empty = pl.element().str.contains(f"^{_NOTHING}$")
            items = items.list.eval(pl.element().filter(~empty))
        parts = pl.when(text.str.starts_with("[")).then(items).otherwise(pl.concat_list(text))
        texts = texts.str.strip_chars()
    elif separator == WORDS:
        parts = text.str.to_lowercase().str.extract_all(_WORD).list.head(_MOST_WORDS)
    else:
        parts = text.str.split(separator)
        if trim:
            sign, plain = re.escape(separator), separator.replace("$", "$$")
            texts = texts.str.strip_chars()
            if texts.str.contains(rf"\s{sign}|{sign}(?:\s|{sign}|$)|^{sign}").any():
                texts = texts.str.replace_all(rf"\s*(?:{sign}\s*)+", plain)
                texts = texts.str.strip_prefix(separator).str.strip_suffix(separator)
    nothing = pl.lit([], dtype=pl.List(pl.String))
    chosen = pl.when(text == "").then(nothing).when(text.is_not_null()).then(parts)
    return pl.DataFrame({"text": texts}).select(chosen.alias("text"))["text"]


def two_by_two(words: pl.Series) -> pl.Series:
    """Each list's neighbours as one value: `[a, b, c]` as `[a b, b c]`."""
    both = pl.element() + " " + pl.element().shift(-1)
    return words.to_frame().select(pl.all().list.eval(both.drop_nulls())).to_series()


def is_prose(column: pl.Series) -> bool:
    """Whether most of the first thousand values are text of several words, not of numbers."""
    if column.dtype not in TEXT:
        return False
    words = column.drop_nulls()[:1000].cast(pl.String).str.contains(_SEVERAL_WORDS)
    return float(words.mean() or 0.0) > 0.5  # type: ignore[arg-type]


def now_written(texts: pl.Series, separator: str, known: pl.Series) -> str:
    """How texts hold several values: as training's did, unless they are known by another way.

    Args:
        texts: strings, of rows to score.
        separator: of training.
        known: its values.
    """
    texts, known = texts.drop_nulls().unique(), known.cast(pl.String).drop_nulls()
    sign = "[" if separator == WRITTEN_LISTS else separator
    if are_written_lists(texts.filter(texts.str.strip_chars() != "")):
        return separator if known.str.starts_with("[").any() else WRITTEN_LISTS
    if not len(texts) or texts.str.contains(sign, literal=True).any():
        return separator
    seen, found = texts.str.strip_chars().is_in(known.implode()).mean(), separator
    for sign in _SIGNS:
        if known.str.contains(sign, literal=True).any():
            continue
        share = split(texts, sign).explode().drop_nulls().is_in(known.implode()).mean()
        if (share or 0.0) > (seen or 0.0):  # type: ignore[operator]
            seen, found = share, sign
    return found


def are_written_lists(texts: pl.Series) -> bool:
    """Whether all texts are lists of strings or whole numbers, as Python or JSON writes them."""
    texts = texts.drop_nulls()
    looks = texts[:100].str.contains(_LIST).all()
    return len(texts) > 0 and looks and bool(texts.str.contains(_LIST).all())


def unquoted(items: pl.Series) -> pl.Series:
    """Items of written lists as the values they stand for."""
    escaped = items.filter(items.str.contains("\\", literal=True)).unique()
    quoted = items.str.starts_with("'") | items.str.starts_with('"')
    plain = items.zip_with(~quoted, items.str.slice(1).str.head(-1))
    if len(escaped):
        read = pl.Series([_unescaped(item) for item in escaped], dtype=pl.String)
        found = items.replace_strict(escaped, read, default=None)
        plain = plain.zip_with(found.is_null(), found)
    return plain


def _unescaped(item: str) -> str:
    with suppress(ValueError):
        return str(json.loads(item))
    with suppress(ValueError, SyntaxError):
        return str(ast.literal_eval(item))
    return item[1:-1]
