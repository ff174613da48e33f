"""Delimited text: separator and header told by the first lines."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from amtl.errors import UserError

_SEPARATORS = (",", "\t", ";", "|")
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LINES = 100
MISSING = ("NA", "N/A", "n/a", "na", "#N/A", "NaN", "nan", "NULL", "null", "None", "?", ".", "\\N")
"""What stands for a missing number in text that other programs write."""


def read(
    source: Path | io.BytesIO, first: str, separator: str, where: str
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Parses delimited text.

    Args:
        source: the file, or its contents.
        first: its first lines.
        separator: the one to expect; another is taken if only that cuts the lines into columns.
        where: the file's name, for messages.

    Returns:
        The table, and notes on what was guessed. A column without a name is `c` and its position,
        from 0; one of numbers in which `NA` or its like stands for missing ones is one of numbers.

    Raises:
        UserError: for a header that names a column twice.
    """
    notes = []
    found = find_separator(first, separator)
    if found != separator:
        notes.append(f"columns are separated by {_NAMES[found]}")
    rows = _rows(first, found) or [[first.strip()]]
    header = has_header(rows)
    names = rows[0]
    if header:
        names = [name or f"c{i}" for i, name in enumerate(names)]
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise UserError(
                f"the header of {where!r} names {', '.join(map(repr, twice))} more than once; "
                "rename one of them"
            )
        unnamed = [names[i] for i, name in enumerate(rows[0]) if not name]
        if unnamed:
            notes.append(f"columns without a name: {', '.join(unnamed)}")
    else:
        notes.append(f"no header: the columns are c0 to c{len(rows[0]) - 1}")
    comma = found == ";" and bool(re.search(r"(^|;)-?\d+,\d+(;|\r?$)", first, re.M))
    frame = _parse(source, found, header, comma)
    if not header:
        names = [f"c{i}" for i in range(frame.width)]
    if len(names) == frame.width:
        frame.columns = names
    return _with_gaps(frame, notes), tuple(notes)


def _with_gaps(frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Makes numbers of text columns that hold numbers and what stands for missing ones."""
    columns: list[pl.Series] = []
    marks: list[str] = []
    for column in frame.get_columns():
        if column.dtype != pl.String:
            continue
        missing = column.is_in(MISSING)
        found = column.filter(missing).unique().sort().to_list()
        if not found:
            continue
        values = column.set(missing, None)
        for dtype in (pl.Int64, pl.Float64):
            numbers = values.cast(dtype, strict=False)
            if numbers.null_count() == values.null_count() < len(values):
                columns.append(numbers)
                marks += found
                break
    if columns:
        listed = ", ".join(column.name for column in columns[:8])
        more = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
        shown = ", ".join(map(repr, dict.fromkeys(marks)))
        notes.append(f"{shown} is a missing number in {listed}{more}")
    return frame.with_columns(columns)


def _parse(source: Path | io.BytesIO, separator: str, header: bool, comma: bool) -> pl.DataFrame:
    """Types come from the first 20,000 rows, or from all if a later one does not fit them."""
    options: dict[str, Any] = {
        "separator": separator,
        "has_header": header,
        "decimal_comma": comma,
        "glob": False,
    }
    try:
        return pl.read_csv(source, infer_schema_length=20_000, **options)
    except pl.exceptions.ComputeError:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return pl.read_csv(source, infer_schema_length=None, **options)


def find_separator(first: str, expected: str) -> str:
    """The separator that cuts every line into equally many columns, most of all; else `expected`.

    `expected` itself wins as soon as it cuts every line into two columns or more.
    """
    widths = {s: {len(row) for row in _rows(first, s)} for s in _SEPARATORS}
    wide = {s: min(w) for s, w in widths.items() if len(w) == 1 and min(w) > 1}
    if expected in wide or not wide:
        return expected
    return max(wide, key=lambda s: wide[s])


def has_header(rows: list[list[str]]) -> bool:
    """Whether the first row names columns: no number in it, or text over a column of numbers."""
    head, rest = rows[0], rows[1:]
    if not any(_is_number(cell) for cell in head):
        return True
    columns = zip(*(row for row in rest if len(row) == len(head)), strict=True)
    for name, cells in zip(head, columns, strict=False):
        filled = [cell for cell in cells if cell.strip()]
        if name.strip() and not _is_number(name) and filled and all(map(_is_number, filled)):
            return True
    return False


def decode(sample: bytes, where: str, *, whole: bool) -> str:
    """The whole lines of a sample as text.

    Args:
        sample: the first bytes of a file.
        where: the file's name, for messages.
        whole: whether that is the whole file.

    Raises:
        UserError: if it is not UTF-8.
    """
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where!r} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if not whole:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    try:
        return sample.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where!r} is not UTF-8 (byte {error.start}); convert it: iconv -f LATIN1 -t UTF-8"
        ) from error


def _rows(first: str, separator: str) -> list[list[str]]:
    """The first rows, less the last, which may be cut off, where there are others to judge by."""
    rows = []
    try:
        for row in csv.reader(io.StringIO(first), delimiter=separator):
            if row:
                rows.append(row)
            if len(rows) == _LINES:
                break
    except csv.Error:
        pass
    return rows[:-1] if len(rows) > 2 else rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell.strip().lower() not in ("nan", "inf", "infinity", "-inf", "+inf", "-infinity")
