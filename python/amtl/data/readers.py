"""Reading files of any kind that is known: what it is is told by its suffix and its first lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from amtl.data import libsvm, text
from amtl.errors import UserError

_PARQUET = (".parquet", ".pq")
_DELIMITED = (".csv", ".tsv", ".tab", ".txt")
_LIBSVM = (".libsvm", ".svm", ".libfm")
_NDJSON = (".ndjson", ".jsonl", ".json")
_ARROW = (".arrow", ".feather")
_PACKED = (".gz", ".zst", ".bz2")
_SAMPLE = 1 << 16
_BEFORE = b"\xef\xbb\xbf \t\r\n"
"""What may stand before the first sign of a text: a byte order mark, and spaces."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        frame: its columns.
        label: its label column, where its kind says so.
        notes: what was guessed about it, a line each.
    """

    frame: pl.DataFrame
    label: str | None = None
    notes: tuple[str, ...] = ()


def read_file(path: Path | str) -> Contents:
    """Reads Parquet (a file or a folder of them), Arrow, delimited text, libsvm, libfm or JSON.

    Text may be compressed (`.gz`, `.zst`, `.bz2`). Its separator is told by its first lines, and
    so is whether it has a header, whether a `.txt` is libsvm, and whether JSON is an object a line
    or one list of them.

    Raises:
        UserError: if the file is missing, of an unknown kind, empty, or cannot be parsed; the
            message says what to do.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; give a path to a Parquet or CSV file")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _PACKED]
    kind = suffixes[-1] if suffixes else ""
    try:
        if path.is_dir():
            parts = sorted(path.glob("*.parquet"))
            if not parts:
                raise UserError(f"the folder {str(path)!r} holds no .parquet file")
            return Contents(pl.concat([_parquet(part) for part in parts]))
        if kind in _PARQUET:
            return Contents(_parquet(_plain(path)))
        if kind in _ARROW:
            return Contents(_arrow(_plain(path)))
        if kind in _DELIMITED + _LIBSVM + _NDJSON:
            return _read_text(path, kind)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read {str(path)!r}: {reason[0]}") from error
    named = (*_DELIMITED[:2], _DELIMITED[3], *_LIBSVM, *_NDJSON)
    known = ", ".join((_PARQUET[0], *_ARROW, *named))
    raise UserError(
        f"{str(path)!r}: unknown kind {kind!r}; give one of {known} (text also as .gz, .zst, .bz2)"
    )


def _read_text(path: Path, kind: str) -> Contents:
    with pa.input_stream(str(path)) as stream:
        sample = stream.read(_SAMPLE)
    if not sample.strip():
        raise UserError(f"{str(path)!r} is empty")
    source = _plain(path)
    if kind in _NDJSON:
        read = pl.read_json if sample.lstrip(_BEFORE).startswith(b"[") else pl.read_ndjson
        with source if isinstance(source, io.BytesIO) else source.open("rb") as file:
            return Contents(read(file, infer_schema_length=20_000))
    first = text.decode(sample, str(path), whole=len(sample) < _SAMPLE)
    if kind in _LIBSVM or (kind == ".txt" and libsvm.looks_like(first)):
        frame, notes = libsvm.read(source, str(path))
        return Contents(frame, libsvm.LABEL, notes)
    frame, notes = text.read(source, first, "\t" if kind in (".tsv", ".tab") else ",", str(path))
    return Contents(frame, notes=notes)


def _parquet(source: Path | io.BytesIO) -> pl.DataFrame:
    """By Arrow, which a damaged file makes raise; polars may end the process."""
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        frame = pl.from_arrow(file.read())
    assert isinstance(frame, pl.DataFrame)
    return frame


def _arrow(source: Path | io.BytesIO) -> pl.DataFrame:
    """Feather, which is Arrow's file format, or a stream."""
    with pa.input_stream(source if isinstance(source, io.BytesIO) else str(source)) as stream:
        content = stream.read_buffer()
    try:
        table = pa.ipc.open_file(content).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _plain(path: Path) -> Path | io.BytesIO:
    """The path, or the contents of a compressed file."""
    if path.suffix.lower() not in _PACKED:
        return path
    with pa.input_stream(str(path)) as stream:
        return io.BytesIO(stream.read())


def require_columns(present: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raises a UserError naming the columns of `wanted` that are not `present`."""
    missing = [name for name in wanted if name not in present]
    if missing:
        listed = ", ".join(present[:30]) + (", …" if len(present) > 30 else "")
        raise UserError(
            f"{where} has no column {', '.join(map(repr, missing))}; its columns are {listed}"
        )
