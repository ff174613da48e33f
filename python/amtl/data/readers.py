"""Reading files of any kind that is known: what it is is told by its suffix and its first lines."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from amtl.data import libsvm, packing, sheets, text
from amtl.data.arrow import of_arrow
from amtl.data.nested import flat
from amtl.data.vocabulary import as_series, exact_ids
from amtl.errors import INTO_ONE, UserError, brief

_PARQUET = (".parquet", ".pq")
_DELIMITED = (".csv", ".tsv", ".tab", ".txt")
_LIBSVM = (".libsvm", ".svm", ".libfm")
_NDJSON = (".ndjson", ".jsonl", ".json")
_ARROW = (".arrow", ".feather", ".ipc")
_SAMPLE = 1 << 16
_BEFORE = b"\xef\xbb\xbf \t\r\n"
"""What may stand before the first sign of a text: a byte order mark, and spaces."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks, with which Excel begins what it calls Unicode text."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_KINDS_OF_JSON = {bool: "booleans", list: "lists", dict: "objects"}


class ArrowStream(Protocol):
    """A table that hands out its columns as an Arrow stream: pandas from 2.2 on, and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Rows: TypeAlias = (
    "pl.DataFrame | pl.LazyFrame | pa.Table | ArrowStream | Mapping[str, Any] | "
    "Sequence[Mapping[str, Any]]"
)
"""A table of raw rows, see `as_frame`."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        frame: its columns.
        label: its label column, where its kind says so.
        notes: what was guessed about it, a line each.
        marks: column to the unusual texts that were taken as missing numbers in it.
        objects: whether rows are objects of JSON, any of which may lack a key.
        lacking: what files of a folder lack that others have, a line a column.
    """

    frame: pl.DataFrame
    label: str | None = None
    notes: tuple[str, ...] = ()
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    objects: bool = False
    lacking: tuple[str, ...] = ()


def read_file(path: Path | str) -> Contents:
    """Reads Parquet (a file or a folder of them), Arrow, text, libsvm, libfm, JSON or sheets.

    Files may be compressed (`.gz`, `.zst`, `.bz2`, `.xz`; all but bzip2 by any name) or alone in a
    zip archive, and text be UTF-8, UTF-16 with a byte order mark, or Windows-1252, which is noted.
    Parquet and Arrow may have any name, and what is piped in, or without a suffix, none: then JSON
    and text are told by their first sign, as they are in files of another suffix, where each line
    of text must have as many columns. The separator of text is told by
    its first lines, and so is whether it has a header, whether a `.txt` is libsvm, and whether JSON
    is an object a line or one list of them. The fields of structs are columns: see `flat`.

    Raises:
        UserError: if the file is missing, of an unknown kind, empty, or cannot be parsed; the
            message says what to do.
    """
    path = Path(path)
    return _partitioned(_read(path), path if path.is_dir() else path.parent)


def _read(path: Path) -> Contents:
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; give a path to a Parquet or CSV file")
    try:
        if path.is_dir():
            return _folder(path)
        kind = packing.kind_of(path)
        if not path.is_file():
            with packing.spooled(path) as copy:
                source = packing.plain(copy)
                return _contents(packing.kind_of(copy) or _kind_within(source), source, str(path))
        if packing.is_archive(path) and kind not in sheets.SUFFIXES:
            return _contents(*packing.alone(path, is_table), str(path))
        source = packing.plain(path)
        if not is_table(PurePath(f"a{kind}")):
            kind = _kind_within(source, kind)
        if is_table(PurePath(f"a{kind}")):
            return _contents(kind, source, str(path))
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {_first_line(error)}") from error
    named = (*_DELIMITED[:2], _DELIMITED[3], *_LIBSVM, *_NDJSON)
    known = ", ".join((_PARQUET[0], *_ARROW, *named, sheets.SUFFIXES[0]))
    raise UserError(
        f"{str(path)!r}: unknown kind {kind!r}; give one of {known} (text also as .gz, .zst, "
        ".bz2, .xz, .zip), or text of which each line has as many columns"
    )


def is_table(path: PurePath) -> bool:
    """Whether a file's name is that of a table, of a kind that is read."""
    kinds = (*_PARQUET, *_ARROW, *_DELIMITED, *_LIBSVM, *_NDJSON, *sheets.SUFFIXES)
    return packing.kind(path) in kinds


def _kind_within(source: Path | io.BytesIO, named: str = "") -> str:
    """What a file holds whose name does not say, or says `named`, which is not known.

    Then it is `named` unless it is JSON or text of which each line has as many columns. Empty if it
    is no table.
    """
    sample = _sample(source)
    if b"\0" in sample and sample[:2] not in _UTF16:
        return named
    if sample.lstrip(_BEFORE)[:1] in (b"{", b"["):
        return ".json"
    first = text.first_lines(sample, whole=len(sample) < _SAMPLE)
    return ".txt" if not named or text.is_table(first) or libsvm.looks_like(first) else named


def _contents(kind: str, source: Path | io.BytesIO, where: str) -> Contents:
    """What a file of a kind that is read holds, whose name is `where`."""
    if kind in _PARQUET + _ARROW:
        frame = flat(_parquet(source) if kind in _PARQUET else _arrow(source), repr(where))
        return (
            _of_cells(frame)
            if frame.width and set(frame.dtypes) == {pl.String}
            else Contents(frame)
        )
    if kind in sheets.SUFFIXES:
        frame, notes, marks = sheets.read(source, where)
        return Contents(frame, notes=notes, marks=marks)
    return _read_text(source, kind, where)


def as_frame(rows: Rows) -> pl.DataFrame:
    """A table that is in memory, as polars has it, the fields of structs as columns: see `flat`.

    Args:
        rows: a polars DataFrame or LazyFrame (which is collected), a pandas DataFrame, a pyarrow
            Table or RecordBatch, anything else that hands out an Arrow stream, a dict of columns
            of one length (lists, NumPy arrays, tensors, Series), or a list of dicts, a row each, as
            objects of JSON, where a key that some lack is missing.

    Raises:
        TypeError: for anything else, and for columns of mixed types.
        UserError: for columns of different lengths, and of the same name once structs are flat.
    """
    return flat(_as_frame(rows), "the data")


def _as_frame(rows: Rows) -> pl.DataFrame:
    if isinstance(rows, pl.DataFrame):
        return rows
    if isinstance(rows, pl.LazyFrame):
        return rows.collect()
    frame: Any = None
    try:
        if isinstance(rows, Mapping):
            frame = pl.DataFrame([_column(str(name), values) for name, values in rows.items()])
        elif isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            frame = pl.from_dicts([dict(row) for row in rows], infer_schema_length=None)
        elif type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "columns"):
            # Its own conversion takes columns that have no name of text, and older pandas.
            frame = pl.from_pandas(rows)
        elif isinstance(rows, (pa.Table, pa.RecordBatch)):
            frame = of_arrow(rows)
        elif hasattr(rows, "__arrow_c_stream__") and not hasattr(rows, "to_frame"):
            frame = pl.DataFrame(rows)
    except pl.exceptions.ShapeError as error:
        raise UserError(f"the columns have different lengths: {_first_line(error)}") from error
    except (
        pl.exceptions.PolarsError,
        pa.ArrowException,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise TypeError(f"no table can be made of the rows: {_first_line(error)}") from error
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(
            f"rows are {type(rows).__module__}.{type(rows).__qualname__}; give a DataFrame of "
            "polars or pandas, a LazyFrame, a pyarrow Table, a dict of columns or a list of dicts; "
            "of a single row df.iloc[[0]] or df[:1]"
        )
    return frame


def _column(name: str, values: Any) -> pl.Series:
    if isinstance(values, np.ndarray) and values.dtype == object:
        # What pandas hands out: text, lists as arrays, None and NaN for missing ones.
        values = pa.array(values, from_pandas=True)
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(
            f"column {name!r} is no list of values but {type(values).__name__}; write [VALUE] for "
            "that of a single row"
        )
    return as_series(values).alias(name)


def _first_line(error: Exception) -> str:
    return brief((str(error).strip().splitlines() or [type(error).__name__])[0], 300)


def _read_text(source: Path | io.BytesIO, kind: str, where: str) -> Contents:
    sample = _sample(source)
    if not sample.strip():
        raise UserError(f"{where!r} is empty")
    if sample[:2] in _UTF16:
        source = io.BytesIO(text.contents_of(source).decode("utf-16").encode())
        sample = source.getvalue()[:_SAMPLE]
    if kind in _NDJSON:
        with source if isinstance(source, io.BytesIO) else source.open("rb") as file:
            rows = _json(file, sample.lstrip(_BEFORE).startswith(b"["), where)
        return replace(_of_cells(flat(rows, repr(where))), objects=True)
    source, told = text.in_utf8(source, where)
    if told:
        sample = text.contents_of(source)[:_SAMPLE]
    first = text.first_lines(sample, whole=len(sample) < _SAMPLE)
    if kind in _LIBSVM or (kind == ".txt" and libsvm.looks_like(first)):
        frame, notes = libsvm.read(source, where)
        return Contents(frame, libsvm.LABEL, notes)
    separator = "\t" if kind in (".tsv", ".tab") else ","
    frame, notes, marks = text.read(source, first, separator, where)
    return Contents(frame, notes=told + notes, marks=marks)


def _sample(source: Path | io.BytesIO) -> bytes:
    """The first bytes of a file."""
    if isinstance(source, io.BytesIO):
        return bytes(source.getbuffer()[:_SAMPLE])
    with source.open("rb") as file:
        return file.read(_SAMPLE)


def _of_cells(frame: pl.DataFrame) -> Contents:
    """A table of programs that know text alone, as it is where text is all that there is."""
    notes: list[str] = []
    frame, marks = text.with_gaps(frame, False, notes)
    return Contents(frame, notes=tuple(notes), marks=marks)


def _json(file: io.BytesIO | io.BufferedReader, is_list: bool, where: str) -> pl.DataFrame:
    """All rows say what columns there are: polars drops those that the rows it looked at lack."""
    if not is_list and (told := _wrapped(file)):
        raise UserError(f"cannot read {where!r}: {told}")
    file.seek(0)
    try:
        return (pl.read_json if is_list else pl.read_ndjson)(file, infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        file.seek(0)
        if plain := _without_constants(file, is_list):
            return pl.read_ndjson(plain, infer_schema_length=None)
        file.seek(0)
        raise UserError(
            f"cannot read {where!r}: {(_odd_item if is_list else _odd_line)(file)}"
            f"{_first_line(error)}"
        ) from error


def _without_constants(file: io.BytesIO | io.BufferedReader, is_list: bool) -> bytes:
    """Objects with nothing for `NaN`, which Python writes and JSON lacks; empty without any."""
    found: list[str] = []
    try:
        lines = [file.read()] if is_list else filter(bytes.strip, file)
        rows = [json.loads(line, parse_constant=found.append) for line in lines]
    except ValueError:
        return b""
    rows = rows[0] if is_list else rows
    objects = all(isinstance(row, dict) for row in rows)
    return "\n".join(map(json.dumps, rows)).encode() if found and objects else b""


def _wrapped(file: io.BytesIO | io.BufferedReader) -> str:
    """What to do where all rows are in one object, or one is on several lines; else nothing."""
    first = next((line for line in file if line.strip(_BEFORE)), b"")
    whole = _parsed(first)
    several = whole is None
    if several:
        whole = _parsed(first + file.read())
    if not isinstance(whole, dict) or any(line.strip(_BEFORE) for line in file):
        return ""
    columns = list(whole.values())
    alike = all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns)
    nested = alike and any(isinstance(v, (list, dict)) for c in columns[:1] for v in c.values())
    if whole.keys() == {"columns", "index", "data"} or (columns and alike and not nested):
        return (
            "it is one object of columns, as pandas' df.to_json(FILE) writes; write an object a "
            "line: df.to_json(FILE, orient='records', lines=True)"
        )
    for name, rows in whole.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            taken = f'json.load(open("FILE"))[{json.dumps(brief(name))}]'
            if all(isinstance(row.get("properties"), dict) for row in rows):
                taken = f'[row["properties"] for row in {taken}]'
            code = f'import json; json.dump({taken}, open("rows.json", "w"))'
            return (
                f"it is one object whose {brief(repr(name))} is a list of objects; write that list "
                f"alone: python -c {shlex.quote(code)} (if all of it is one row, write it as "
                "[{...}], a list of one)"
            )
    return (
        "it is one object on several lines; write an object a line, or [{...}]" if several else ""
    )


def _parsed(text: bytes) -> Any:
    """What JSON holds; None for what is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _odd_line(file: io.BytesIO | io.BufferedReader) -> str:
    """Where lines of JSON end being that, or a column being of one kind, and what to do."""
    kinds: dict[str, str] = {}
    for number, line in enumerate(file, 1):
        if not line.strip(_BEFORE):
            continue
        row = _parsed(line)
        if not isinstance(row, dict):
            return f"line {number} is no JSON object; mend it or delete it: "
        for name, value in _items(row):
            kind = _KINDS_OF_JSON.get(type(value), "values")
            if value is not None and kinds.setdefault(name, kind) != kind:
                return (
                    f"column {name!r} holds {kinds[name]} and, in line {number}, {kind}; write "
                    "one kind of value on every line, or null: "
                )
    return ""


def _odd_item(file: io.BytesIO | io.BufferedReader) -> str:
    """Which item of a list is no object, and what to do; empty if all are."""
    items = _parsed(file.read())
    for number, item in enumerate(items if isinstance(items, list) else (), 1):
        if not isinstance(item, dict):
            return (
                f'item {number} of the list is no object such as {{"user": 7}}; write it as one: '
            )
    return ""


def _items(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What an object holds, and what the objects in it do, by the names of columns."""
    for name, value in row.items():
        yield before + name, value
        if isinstance(value, dict):
            yield from _items(value, f"{before}{name}.")


def _parquet(source: Path | io.BytesIO) -> pl.DataFrame:
    """By Arrow, which a damaged file makes raise; polars may end the process."""
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        return of_arrow(file.read())


def _folder(path: Path) -> Contents:
    """The Parquet files of a folder; or of those in it, with what these say (`day=1/a.parquet`).

    Without any, its files of one other kind, which have the same columns: what has others, as a
    file of rows to score, is none of them.
    """
    files = sorted(path.glob("*.parquet")) or sorted(path.rglob("*.parquet"))
    files = [file for file in files if not any(p[:1] in "._" for p in file.relative_to(path).parts)]
    if not files:
        return _tables(path)
    frames: list[pl.DataFrame] = []
    named: set[str] = set()
    for file in files:
        try:
            frame = flat(_parquet(file), repr(str(file)))
        except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
            raise UserError(
                f"cannot read {str(file)!r}: {_first_line(error).rstrip('.')}: write it anew, or "
                "move it away, and the others are read without it"
            ) from error
        frame, said = _with_said(frame, file.relative_to(path).parts[:-1])
        named |= said
        frames.append(frame)
    whole = _together(frames, files)
    notes = (_needed(named),) if named else ()
    lacking = _lacking(frames, [str(file.relative_to(path)) for file in files])
    return Contents(_numbered(whole, named), notes=notes, lacking=lacking)


def _partitioned(contents: Contents, folder: Path) -> Contents:
    """Contents with what a folder and those it is in say (`clicks/day=1`), up to one without."""
    parts = []
    for each in (folder, *folder.parents):
        if "=" not in each.name:
            break
        parts.append(each.name)
    frame, named = _with_said(contents.frame, parts[::-1])
    return replace(contents, frame=_numbered(frame, named))


def _with_said(frame: pl.DataFrame, folders: Sequence[str]) -> tuple[pl.DataFrame, set[str]]:
    """Rows with what folders say as Hive names them (`day=1`), and the columns that this made."""
    named: set[str] = set()
    for folder in folders:
        name, equals, value = folder.partition("=")
        if equals and name not in frame.columns:
            said = None if value == _HIVE_NULL else unquote(value)
            frame = frame.with_columns(pl.lit(said, pl.String).alias(name))
            named.add(name)
    return frame, named


def _numbered(frame: pl.DataFrame, named: set[str]) -> pl.DataFrame:
    """Columns of text that names of folders made, as integers where all of them are."""
    for name in named:
        numbers = frame[name].cast(pl.Int64, strict=False)
        if numbers.cast(pl.String).equals(frame[name], null_equal=True):
            frame = frame.with_columns(numbers)
    return frame


def _lacking(frames: Sequence[pl.DataFrame], files: Sequence[str]) -> tuple[str, ...]:
    """What some files lack that others have: from some day on, an upstream table may do without."""
    told = []
    for name in dict.fromkeys(name for frame in frames for name in frame.columns):
        without = [file for frame, file in zip(frames, files, strict=True) if name not in frame]
        if without:
            told.append(
                f"{len(without):,} of {len(files):,} files have no column {name!r}, which is "
                f"missing in their rows: {brief(without[0])}"
                + (f" to {brief(without[-1])}" if len(without) > 1 else "")
            )
    return tuple(told)


def _tables(path: Path) -> Contents:
    """The files of a folder, or of those in it, if all are of one kind and have the same columns.

    Objects of JSON may lack keys, in all of a file as in some.
    """
    files = _tables_in(path)
    names = [str(file.relative_to(path)) for file in files]
    shown = listed(names)
    if len({packing.kind(file) for file in files}) != 1:
        held = f", but {shown}, of several kinds: {INTO_ONE}, or name one of them" if files else ""
        raise UserError(f"the folder {str(path)!r} holds no .parquet file{held}")
    parts = [_read(file) for file in files]
    objects = any(part.objects for part in parts)
    for name, part in zip(names, parts, strict=True):
        odd = set(part.frame.columns) ^ set(parts[0].frame.columns)
        if odd and not objects:
            raise UserError(
                f"of {shown} in {str(path)!r} {names[0]} and {name} have other columns "
                f"({listed(sorted(odd))}), so that they are no parts of one table: name one of them"
            )
    frames = [p.frame.with_columns(pl.lit(None).alias(n) for n in _empty(p.frame)) for p in parts]
    marks: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for name, texts in part.marks.items():
            marks[name] = tuple(sorted({*marks.get(name, ()), *texts}))
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    notes.insert(0, f"{len(files)} files were read as one: {shown}")
    lacking, named = _lacking(frames, names), set[str]()
    for number, file in enumerate(files):
        frames[number], said = _with_said(frames[number], file.relative_to(path).parts[:-1])
        named |= said
    if named:
        notes.append(_needed(named))
    whole = _numbered(_together(frames, files), named)
    return Contents(whole, parts[0].label, tuple(notes), marks, objects, lacking)


def _tables_in(path: Path) -> list[Path]:
    """The tables of a folder, else of those in it that name columns as Hive does."""
    inside = sorted(each for each in path.iterdir() if each.name[0] not in "._")
    files = [each for each in inside if is_table(each) and each.is_file()]
    parts = [each for each in inside if "=" in each.name and each.is_dir()]
    return files or [file for part in parts for file in _tables_in(part)]


def _needed(named: set[str]) -> str:
    """What is told of columns that names of folders made."""
    return f"by the names of folders, and needed to score: {listed(sorted(named))}"


def _empty(frame: pl.DataFrame) -> list[str]:
    """Columns that hold nothing, of which a file does not say what they would hold."""
    return [name for name in frame.columns if frame[name].null_count() == frame.height]


def _together(frames: Sequence[pl.DataFrame], files: Sequence[Path]) -> pl.DataFrame:
    """Rows of several files, whose columns may lack in some and be narrower numbers there."""
    first: dict[str, tuple[Any, Path]] = {}
    for frame, file in zip(frames, files, strict=True):
        for name, dtype in frame.schema.items():
            known, other = first.get(name, (pl.Null, file))
            if known == pl.Null:
                first[name] = dtype, file
            elif dtype != pl.Null and _family(dtype) != _family(known):
                raise UserError(
                    f"column {name!r} is {brief(known)} in {str(other)!r} and {brief(dtype)} in "
                    f"{str(file)!r}; write it as one type"
                )
    integers = _ids_among_floats(frames)
    alike = [
        frame.with_columns(
            # NaN is what pandas has for a missing one.
            frame[name].fill_nan(None).cast(pl.Int64)
            for name, dtype in frame.schema.items()
            if dtype.is_float() and name in integers
        )
        for frame in frames
    ]
    return pl.concat(alike, how="diagonal_relaxed")


def _ids_among_floats(frames: Sequence[pl.DataFrame]) -> set[str]:
    """Columns of integers in some files and of whole numbers as floats in others.

    So pandas writes ids of which some are missing, day by day.
    """
    types = [item for frame in frames for item in frame.schema.items()]
    mixed = {name for name, dtype in types if dtype.is_integer()}
    mixed &= {name for name, dtype in types if dtype.is_float()}
    return {
        name
        for name in mixed
        if all(
            exact_ids(frame[name]).all()
            for frame in frames
            if name in frame.columns and frame.schema[name].is_float()
        )
    }


def _family(dtype: Any) -> Any:
    """Types of a family have one that holds the values of both."""
    if dtype.is_numeric():
        return "numbers"
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "text"
    if dtype == pl.Datetime:
        return dtype.base_type(), dtype.time_zone
    return dtype.base_type() if dtype.is_nested() or dtype.is_temporal() else dtype


def _arrow(source: Path | io.BytesIO) -> pl.DataFrame:
    """Feather, which is Arrow's file format, or a stream."""
    with pa.input_stream(source if isinstance(source, io.BytesIO) else str(source)) as stream:
        content = stream.read_buffer()
    try:
        table = pa.ipc.open_file(content).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    return of_arrow(table)


def require_columns(present: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raises a UserError naming the columns of `wanted` that are not `present`."""
    missing = [name for name in wanted if name not in present]
    if missing:
        if list(present) == [f"c{i}" for i in range(len(present))]:
            where += ", in which no header was found,"
        shown = ", ".join(brief(repr(name)) for name in missing[:5])
        shown += f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        folded = {name.strip().casefold(): name for name in reversed(present)}
        near = [m for n in missing for m in get_close_matches(n.strip().casefold(), folded, 1)]
        near = [folded[name] for name in near]
        # A struct is no column, its fields are.
        inside = [name for name in present if name.startswith(tuple(f"{n}." for n in missing))]
        meant = " and ".join(brief(repr(name)) for name in (inside or near)[:5])
        shown += f" ({'are' if len(inside) > 1 else 'is'} {meant} meant?)" if meant else ""
        one = len(present) == 1 and not re.fullmatch(r"[\w.-]*", present[0])
        also = f" (if that is several, write them {text.SEPARATED_BY})" if one else ""
        raise UserError(f"{where} has no column {shown}; its columns are {listed(present)}{also}")


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message, in quotes where a space would go unseen."""
    shown = [name if name == name.strip() else repr(name) for name in map(brief, names[:30])]
    text = ", ".join(shown)
    return brief(text, 300) if len(text) > 300 else text + (", …" if len(names) > 30 else "")
