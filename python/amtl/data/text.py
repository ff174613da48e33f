"""Delimited text: separator and header told by the first lines."""

from __future__ import annotations

import csv
import io
import mmap
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from amtl.errors import UserError

_SEPARATORS = (",", "\t", ";", "|")
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LINES = 100
_PADDED = r"^[+-]?0\d+$"
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
        from 0; one of numbers in which `NA` or its like stands for missing ones is one of numbers;
        one of integers some of which have leading zeros is text, as 7 and 007 are two ids.

    Raises:
        UserError: for a header that names a column twice, and lines that cannot be parsed; the
            message says which and what to do.
    """
    notes = []
    found = find_separator(first, separator)
    if found != separator:
        notes.append(f"columns are separated by {_NAMES[found]}")
    rows = _rows(first, found) or [[first.strip()]]
    if found in ",;" and _is_spaced(rows):
        source = _without_spaces(source, found, where)
        rows = [[cell.lstrip(" ") for cell in row] for row in rows]
        notes.append(f"spaces after {_NAMES[found]} are left out")
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
    comma = found == ";" and bool(re.search(r"(^|;) *-?\d+,\d+(;|\r?$)", first, re.M))
    try:
        frame, padded = _parse(source, found, header, comma)
    except pl.exceptions.PolarsError as error:
        told = _odd_line(_content(source), found, len(rows[0]))
        told = told or (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"cannot read {where!r}: {told}") from error
    if not header:
        names = [f"c{i}" for i in range(frame.width)]
    if len(names) == frame.width:
        frame.columns = names
    if padded:
        notes.append(f"integers with leading zeros are text: {_few(frame.columns, padded)}")
    return _with_gaps(frame, comma, notes), tuple(notes)


def _with_gaps(frame: pl.DataFrame, comma: bool, notes: list[str]) -> pl.DataFrame:
    """Makes numbers of text columns that hold numbers and what stands for missing ones.

    With `comma` they have decimal commas, unless a column has decimal points.
    """
    columns: list[pl.Series] = []
    marks: list[str] = []
    marked: list[int] = []
    for i, column in enumerate(frame.get_columns()):
        if column.dtype != pl.String:
            continue
        missing = column.is_in(MISSING)
        found = column.filter(missing).unique().sort().to_list()
        values = column.set(missing, None)
        with_comma = comma and not values.str.contains(".", literal=True).any()
        if with_comma and values.str.contains(",", literal=True).any():
            values = values.str.replace(",", ".", literal=True)
        elif not found:
            continue
        if values.str.contains(_PADDED).any():
            continue
        for dtype in (pl.Int64, pl.Float64):
            numbers = values.cast(dtype, strict=False)
            if numbers.null_count() == values.null_count() < len(values):
                columns.append(numbers)
                marks += found
                marked += [i] * bool(found)
                break
    if marks:
        shown = ", ".join(map(repr, dict.fromkeys(marks)))
        notes.append(f"{shown} is a missing number in {_few(frame.columns, marked)}")
    return frame.with_columns(columns)


def _few(names: list[str], places: list[int]) -> str:
    """The first of these columns, and how many more there are."""
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return ", ".join(names[i] for i in places[:8]) + more


def _parse(
    source: Path | io.BytesIO, separator: str, header: bool, comma: bool
) -> tuple[pl.DataFrame, list[int]]:
    """The table, and which of its columns are text for the leading zeros of integers.

    Types come from the first 20,000 rows, or from all if a later one does not fit them.
    """
    options: dict[str, Any] = {
        "separator": separator,
        "has_header": header,
        "decimal_comma": comma,
        "glob": False,
    }
    try:
        frame = pl.read_csv(source, infer_schema_length=20_000, **options)
    except pl.exceptions.ComputeError:
        frame = pl.read_csv(_rewound(source), infer_schema_length=None, **options)
    ints = [name for name, dtype in frame.schema.items() if dtype.is_integer()]
    if not ints or not _holds_padded(source, separator):
        return frame, []
    texts = pl.read_csv(_rewound(source), columns=ints, infer_schema_length=0, **options)
    padded = [column for column in texts if column.str.contains(_PADDED).any()]
    places = [frame.get_column_index(column.name) for column in padded]
    return frame.with_columns(padded), places


def _odd_line(content: bytes, separator: str, width: int) -> str:
    """Which line of a file is none of `width` columns, and what to do; empty if all seem to be."""
    if content.startswith(b"#"):
        return "it begins with a comment; leave such lines out: sed '/^#/d' FILE > FILE.csv"
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        return f"line {number} is not UTF-8; convert the file: iconv -f LATIN1 -t UTF-8"
    quote = "has a quotation mark without its other half; delete it: tr -d '\"' < FILE > FILE.csv"
    rows, start = csv.reader(lines, delimiter=separator), 1
    try:
        for row in rows:
            if len(row) > width and rows.line_num == start:
                return (
                    f"line {start} has {len(row)} columns, the first {width}; put a value that "
                    f"holds {_NAMES[separator]} in quotation marks, or mend the line"
                )
            if len(row) > width:
                return f"line {start} {quote}"
            start = rows.line_num + 1
    except csv.Error:
        return f"line {start} {quote}"
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.count(b'"') % 2:
            return f"line {number} {quote}"
    return ""


def _content(source: Path | io.BytesIO) -> bytes:
    return source.getvalue() if isinstance(source, io.BytesIO) else source.read_bytes()


def _rewound(source: Path | io.BytesIO) -> Path | io.BytesIO:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return source


def _holds_padded(source: Path | io.BytesIO, separator: str) -> bool:
    """Whether a cell seems to be an integer with a leading zero.

    A look for each of two bytes that may begin one is several times faster than one look for all.
    """
    sign = re.escape(separator.encode())
    form = rb'0\d+(?:[\r\n"]|\Z|' + sign + b")"

    def holds(content: Any) -> bool:
        looks = (re.search(before + form, content) for before in (sign, b"\n", b'"'))
        return bool(re.match(form, content)) or any(looks)

    if isinstance(source, io.BytesIO):
        return holds(source.getbuffer())
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return holds(content)


def _is_spaced(rows: list[list[str]]) -> bool:
    """Whether each name but the first begins with a space, or all of their values do."""
    head, *rest = (row[1:] for row in rows)
    cells = [cell for row in rest for cell in row if cell]
    return any(part and all(cell.startswith(" ") for cell in part) for part in (head, cells))


def _without_spaces(source: Path | io.BytesIO, separator: str, where: str) -> io.BytesIO:
    """The file without the spaces after separators, by which a quoted value is none to polars."""
    lines = io.StringIO(_content(source).decode("utf-8-sig"), newline="")
    result = io.StringIO(newline="")
    try:
        rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        csv.writer(result, delimiter=separator, lineterminator="\n").writerows(rows)
    except csv.Error as error:
        raise UserError(
            f"cannot read {where!r}: {error}; leave out spaces after {separator!r}"
        ) from error
    return io.BytesIO(result.getvalue().encode())


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
