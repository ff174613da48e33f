"""Delimited text: separator and header told by the first lines."""

from __future__ import annotations

import codecs
import csv
import io
import mmap
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from amtl.errors import UserError, brief, listed

_SEPARATORS = (",", "\t", ";", "|")
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
SEPARATED_BY = "separated by commas, tabs, semicolons or bars"
_OTHERS = {"::": "::", "\x01": "\\x01", "^": "^", "~": "~"}
"""What separates columns where none of these does, as in MovieLens' files and Hive's."""
_LINES = 100
_PADDED = r"^[+-]?0\d+$"
_LONG = r"^[+-]?\d{16,}$"
"""Integers that floats do not hold exactly."""
MISSING = (
    *(
        "NA",
        "N/A",
        "n/a",
        "na",
        "#N/A",
        "<NA>",
        "NaN",
        "nan",
        "NaT",
        "NULL",
        "null",
        "(null)",
        "None",
    ),
    *("none", "unknown", "Unknown", "missing", "Missing", "?", ".", "-", "--", "\\N"),
)
"""What stands for a missing number in text that other programs write."""
_MARKED_BELOW = 0.1
"""Share of the rows up to which one or two other texts stand for missing numbers."""
FEW_NUMBERS = 20
"""Whole numbers of a column up to which other texts beside them are values of their own."""
_TYPED = re.compile(r"(.+):(?:token|float)(_seq)?")
"""A name of a column in RecBole's files, which says what it holds, `_seq` of several by spaces."""
_SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?\r?\n', re.IGNORECASE)
"""By which Excel is told the separator."""
_MOST_TITLES = 10
"""Lines before the names of columns."""
_FEWEST_NAMES = 3
"""Columns, of fewer of which a line with a single cell may be short of one."""
_CELLS_BETWEEN_SPACES = re.compile(r'"(?:[^"\\]|\\.|"")*"|\S+')
"""Quoted ones may hold spaces, and quotation marks as R or CSV write them."""
_BLOCK = 1 << 20
_WESTERN = 0.8
"""Share of letters beyond ASCII that stand between those of ASCII, as they do not in other scripts
nor in UTF-8, from which on text that is not UTF-8 is taken as Windows-1252."""
_ICONV = "iconv -f ENCODING -t UTF-8 FILE > NEW.csv"


def read(
    source: Path | io.BytesIO, first: str, separator: str, where: str
) -> tuple[pl.DataFrame, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Parses delimited text.

    Args:
        source: the file, or its contents.
        first: its first lines.
        separator: the one to expect; another is taken if only that cuts the lines into columns. A
            first line `sep=;`, as for Excel, names the one to expect, and is no row, nor is a title
            above the names, see `titles`.
        where: the file's name, for messages.

    Returns:
        The table, notes on what was guessed, and column to the unusual texts that were taken as
        missing numbers in it. Blank lines are left out. A column without a name
        is `c` and its position, from 0; one of numbers in which `NA` or its like stands for missing
        ones is one of numbers, and so is one of which up to 10 % are one or two other texts,
        without digits, that recur, beside more than 20 different numbers; one of integers some of
        which have leading zeros is text, as 7 and 007 are two ids.

    Raises:
        UserError: for a header that names a column twice, and lines that cannot be parsed; the
            message says which and what to do.
    """
    notes = []
    if "\r" in first and "\n" not in first:
        source = io.BytesIO(contents_of(source).replace(b"\r", b"\n"))
        first = first.replace("\r", "\n")
    if line := _SEPARATOR_LINE.match(first):
        source = io.BytesIO(contents_of(source).removeprefix(b"\xef\xbb\xbf")[line.end() :])
        first, separator, where = first[line.end() :], line[1], f"{where} without line 1"
        notes.append(f"line 1 says what separates columns, and is left out: {_NAMES[separator]}")
    if first[:1] in ("\r", "\n"):
        source = io.BytesIO(contents_of(source).removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n"))
        first = first.lstrip("\r\n")
    if other := _other_separator(first):
        source = io.BytesIO(contents_of(source).replace(other.encode(), b"\t"))
        first, separator = first.replace(other, "\t"), "\t"
        notes.append(f"columns are separated by {_OTHERS[other]}")
    elif _by_spaces(first):
        source = io.BytesIO(_with_tabs(contents_of(source).decode("utf-8-sig")).encode())
        first, separator = _with_tabs(first), "\t"
        notes.append("columns are separated by spaces")
    if before := _before_names(first, separator):
        lines, above = before
        first = first.split("\n", lines)[lines]
        source = io.BytesIO(contents_of(source).split(b"\n", lines)[lines])
        where = f"{where} from line {lines + 1} on"
        notes.append(without_titles(above))
    if gap := _unnamed(first, separator):
        head = re.compile(r"^(.*?)(?=\r?\n)")
        whole = contents_of(source).removeprefix(b"\xef\xbb\xbf").decode()
        source = io.BytesIO(head.sub(gap, whole, count=1).encode())
        first = head.sub(gap, first, count=1)
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
    several: list[str] = []
    typed = [match for name in names if (match := _TYPED.fullmatch(name))]
    if len(typed) == len(names):
        header = True
        names = [match[1] for match in typed]
        several = [match[1] for match in typed if match[2]]
        notes.append("what the names of columns say of their types is left out: name:token")
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
        told = _odd_line(contents_of(source), found, len(rows[0]))
        told = told or (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"cannot read {where!r}: {told}") from error
    if not header:
        names = [f"c{i}" for i in range(frame.width)]
    if len(names) == frame.width:
        frame.columns = names
    if frame.width > 1 and frame.height and frame[:, -1].null_count():
        content = contents_of(source)
        if told := _short_lines(content, found, frame.width):
            raise UserError(f"cannot read {where!r}: {told}")
        if b"\n\n" in content or b"\n\r\n" in content:
            frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    if padded:
        notes.append(
            f"integers with leading zeros are text: {listed([frame.columns[i] for i in padded])}"
        )
    lists = [pl.col(name).cast(pl.String).str.split(" ") for name in several]
    frame, marks = with_gaps(frame.with_columns(lists), comma, notes)
    return frame, tuple(notes), marks


def with_gaps(
    frame: pl.DataFrame, comma: bool, notes: list[str]
) -> tuple[pl.DataFrame, dict[str, tuple[str, ...]]]:
    """Makes numbers of text columns that hold numbers and what stands for missing ones.

    What was taken as missing is added to `notes`. With `comma` numbers have decimal commas, unless
    a column has decimal points. Also returns, by column, which unusual texts stand for missing
    ones.
    """
    unusual: dict[str, tuple[str, ...]] = {}
    columns: list[pl.Series] = []
    marks: list[str] = []
    marked: list[int] = []
    for i, column in enumerate(frame.get_columns()):
        if column.dtype != pl.String:
            continue
        values = column.str.strip_chars()
        missing = values.is_in(["", *MISSING])
        found = values.filter(missing & (values != "")).unique().sort().to_list()
        values = values.set(missing, None)
        if comma and not values.str.contains(".", literal=True).any():
            values = values.str.replace(",", ".", literal=True)
        sample = values.drop_nulls()[:100]
        if sample.cast(pl.Float64, strict=False).null_count() > len(sample) / 2:
            continue
        others = _other_marks(values)
        if others and _few_numbers(values):
            continue
        found += others
        values = values.set(values.is_in(others), None)
        if values.str.contains(_PADDED).any():
            continue
        for dtype in (pl.Int64, pl.Float64):
            numbers = values.cast(dtype, strict=False)
            if numbers.null_count() == values.null_count() < len(values):
                columns.append(numbers)
                marks += found
                marked += [i] * bool(found)
                if others:
                    unusual[column.name] = tuple(others)
                break
            if values.str.contains(_LONG).any():
                break
    if marks:
        shown = [repr(mark) for mark in dict.fromkeys(marks)]
        are = "is a missing number" if len(shown) == 1 else "are missing numbers"
        notes.append(f"{', '.join(shown)} {are} in {listed([frame.columns[i] for i in marked])}")
    return frame.with_columns(columns), unusual


def _other_marks(values: pl.Series) -> list[str]:
    """The one or two texts that keep a column from being one of numbers, if they are few rows."""
    values = values.drop_nulls()
    odd = values.filter(values.cast(pl.Float64, strict=False).is_null())
    if not 0 < len(odd) <= _MARKED_BELOW * len(values) or odd.str.contains(r"\d").any():
        return []
    times = odd.value_counts(name="times").sort("times", descending=True)
    recur = len(times) <= 2 and bool((times["times"] > 1).all())
    return times[values.name].sort().to_list() if recur else []


def _few_numbers(values: pl.Series) -> bool:
    """Whether a column's numbers are so few, and whole, that they are ids as well as texts are.

    So they are in answers to questions, beside codes for a refusal and for not knowing, which are
    no answers but say something.
    """
    numbers = values.cast(pl.Float64, strict=False).drop_nulls().unique()
    return len(numbers) <= FEW_NUMBERS and bool((numbers == numbers.floor()).all())


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
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    quote = "has a quotation mark without its other half; delete it: tr -d '\"' < FILE > FILE.csv"
    rows, start = csv.reader(lines, delimiter=separator), 1
    try:
        for row in rows:
            if len(row) > width and rows.line_num == start:
                if width == 1:
                    return _unseparated(content, separator, start, len(row))
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


def _unseparated(content: bytes, separator: str, line: int, columns: int) -> str:
    """What to do about a file whose first line holds no separator, while this line does."""
    how = ""
    if sign := _unknown_separator(content.decode("utf-8-sig").splitlines()[:_LINES]):
        if len(sign) > 1 or not sign.isascii():
            found = re.sub(r"([][\\/.*^$])", r"\\\1", sign)
            how = f": sed 's/{found}/\\t/g' FILE > FILE.tsv"
        else:
            found = sign if sign.isprintable() and sign != "\\" else f"\\{ord(sign):03o}"
            how = f": tr '{found}' '\\t' < FILE > FILE.tsv"
    return (
        f"line {line} has {columns} columns, the first 1, and columns are {SEPARATED_BY}: write "
        f"the file with one of these{how}; or, if there is one column, put a value that holds "
        f"{_NAMES[separator]} in quotation marks"
    )


def _unknown_separator(lines: list[str]) -> str:
    """What else seems to separate columns: the first line has it, others as often; or nothing."""
    lines = [line for line in lines if line]
    signs = sorted(set(re.findall(r"[^\w\"'().-]+", lines[0])), key=lambda sign: sign == " ")
    even = (s for s in signs if all(line.count(s) == lines[0].count(s) for line in lines))
    return next(even, "")


def _short_lines(content: bytes, separator: str, width: int) -> str:
    """Which line of a file has fewer than `width` columns, and what to do; empty if none has."""
    if b'"' in content:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=separator)
        counts = ((rows.line_num, len(row)) for row in rows)
    else:
        sign = separator.encode()
        lines = enumerate(content.split(b"\n"), 1)
        counts = ((n, line.count(sign) + 1 if line.strip(b"\r") else 0) for n, line in lines)
    try:
        short = [(number, columns) for number, columns in counts if 0 < columns < width]
    except csv.Error:
        return ""
    if not short:
        return ""
    also = f" ({len(short):,} lines are too short)" if len(short) > 1 else ""
    return (
        f"line {short[0][0]} has {short[0][1]} columns, the first {width}{also}; delete it, or "
        f"end it with {_NAMES[separator]} where values are missing"
    )


def contents_of(source: Path | io.BytesIO) -> bytes:
    """All bytes of a file."""
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
    lines = io.StringIO(contents_of(source).decode("utf-8-sig"), newline="")
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
    wide = _even_widths(first)
    if expected in wide or not wide:
        return expected
    return max(wide, key=lambda s: wide[s])


def _even_widths(first: str) -> dict[str, int]:
    """Each sign that cuts every line into equally many columns, two at least, and how many."""
    widths = {sign: {len(row) for row in _rows(first, sign)} for sign in _SEPARATORS}
    return {sign: min(w) for sign, w in widths.items() if len(w) == 1 and min(w) > 1}


def _other_separator(first: str) -> str:
    """The one of `_OTHERS` that cuts every line into equally many columns where no sign does."""
    if "\t" in first or _even_widths(first):
        return ""
    lines = [line for line in first.splitlines() if line][: _LINES + 1]
    lines = lines[:-1] if len(lines) > 2 else lines
    for sign in _OTHERS:
        if len(times := {line.count(sign) for line in lines}) == 1 and min(times):
            return sign
    return ""


def is_table(first: str) -> bool:
    """Whether the first lines of a file are rows of columns, whatever separates these."""
    return bool(first.strip()) and (
        bool(_even_widths(first)) or bool(_other_separator(first)) or _by_spaces(first)
    )


def _by_spaces(first: str) -> bool:
    """Whether runs of spaces, and no known separator, cut all lines into as many cells.

    Three at least, for names of people have two words. R writes none for the names of rows.
    """
    if any(min(map(len, _rows(first, sign)), default=0) > 1 for sign in _SEPARATORS):
        return False
    lines = [line for line in first.splitlines()[: _LINES + 1] if line.strip()]
    head, *rest = [len(_CELLS_BETWEEN_SPACES.findall(line)) for line in lines]
    rest = rest[:-1] if len(rest) > 1 else rest
    short = head + 1 if lines[0].startswith('"') else head
    return head >= _FEWEST_NAMES and len(set(rest)) == 1 and rest[0] in (head, short)


def _with_tabs(spaced: str) -> str:
    """Lines of cells between spaces with a tab between two."""
    return "\n".join("\t".join(_CELLS_BETWEEN_SPACES.findall(r)) for r in spaced.splitlines())


def _before_names(first: str, expected: str) -> tuple[int, list[list[str]]] | None:
    """How many lines come before that of the names, see `titles`, and their cells."""
    for separator in (expected, *_SEPARATORS):
        reader = csv.reader(io.StringIO(first), delimiter=separator)
        rows: list[list[str]] = []
        ends = [0]
        try:
            while len(rows) < _LINES:
                rows.append(next(reader))
                ends.append(reader.line_num)
        except (StopIteration, csv.Error):
            # The last line may be cut off.
            rows = rows[:-1] if len(rows) > _FEWEST_NAMES else rows
        if count := titles(rows):
            return ends[count], rows[:count]
    return None


def _unnamed(first: str, expected: str) -> str:
    r"""How the first line, as \1, has as many names as there are columns; empty if it has.

    R writes none for the names of rows, each of which has its own, and other programs end each line
    but the first with a separator.
    """
    for separator in (expected, *_SEPARATORS):
        names, *rows = _rows(first, separator) or [[]]
        short = min(len(names), len(rows)) > 1 and all(len(row) == len(names) + 1 for row in rows)
        if not short or any(map(_is_number, names)):
            continue
        if not any(row[-1] for row in rows):
            return rf"\1{separator}"
        # Quoted they are, numbers too, and other numbers are not: else a name may lack elsewhere.
        quoted = all(line.startswith('"') for line in first.splitlines() if line)
        numbers = re.search(rf"^.+[{separator}]-?[\d.]", first.partition("\n")[2], re.M)
        if quoted and numbers and len({row[0] for row in rows}) == len(rows):
            return rf"{separator}\1"
    return ""


def titles(rows: Sequence[Sequence[str]]) -> int:
    """How many rows come before that of the names: those with a cell at most, as reports have them.

    Names have no gaps, no numbers and no two alike, and all rows beneath them as many cells. Where
    these are two, one with a single cell may be short of the other.
    """
    filled = [sum(bool(cell.strip()) for cell in row) for row in rows]
    count = next((i for i, cells in enumerate(filled) if cells > 1), 0)
    if not 0 < count <= _MOST_TITLES or not any(filled[:count]):
        return 0
    names, below = rows[count], [row for row in rows[count + 1 :] if row]
    wide = len(names) >= _FEWEST_NAMES and all(len(row) == len(names) for row in below)
    named = len(set(names)) == len(names) == filled[count] and not any(map(_is_number, names))
    return count if wide and named and below else 0


def without_titles(before: Sequence[Sequence[str]]) -> str:
    """What is said of the rows before the names."""
    shown = next(cell.strip() for row in before for cell in row if cell.strip())
    return f"what is above the names of the columns is left out: {brief(repr(shown))}"


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


def in_utf8(source: Path | io.BytesIO, where: str) -> tuple[Path | io.BytesIO, tuple[str, ...]]:
    """A file of text in UTF-8, made so if it is in Windows-1252, which is noted.

    Raises:
        UserError: it is in neither; the message says what to do.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as f:
            while block := f.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        content = contents_of(source)
    else:
        return source, ()
    letters = [run for run in re.findall(rb"[\x80-\xff]+", content) if max(run) >= 0xC0]
    try:
        if sum(len(run) == 1 for run in letters) < _WESTERN * len(letters):
            raise UnicodeError
        text = content.decode("cp1252")
    except UnicodeError as error:
        line = _line_out_of_utf8(content)
        raise UserError(
            f"cannot read {where!r}: line {line} is not UTF-8, nor is the file Windows-1252; "
            f"convert it from what it is: {_ICONV}"
        ) from error
    example = re.search(r"\w{0,20}[^\x00-\x7f]\w{0,20}", text)
    assert example, "all of ASCII is UTF-8"
    return io.BytesIO(text.encode()), (
        f"it is not UTF-8 and was read as Windows-1252, so that it holds {example[0]!r}; if that "
        f"is wrong: {_ICONV}",
    )


def _line_out_of_utf8(content: bytes) -> int:
    """The number of the first line that is not UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    raise AssertionError("the text is UTF-8")


def first_lines(sample: bytes, *, whole: bool) -> str:
    """The whole lines of a sample of UTF-8 as text.

    Args:
        sample: the first bytes of a file.
        whole: whether that is the whole file.
    """
    if not whole:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    # The first line may be longer than the sample, which then ends within a character.
    return sample.decode("utf-8-sig", "ignore")


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
