"""Tables of rows as files, of the kinds that are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from amtl.errors import UserError
from amtl.store.files import write_aside

_KINDS: dict[str, Callable[[pl.DataFrame, Path], Any]] = {
    ".parquet": pl.DataFrame.write_parquet,
    ".csv": pl.DataFrame.write_csv,
    ".tsv": lambda frame, path: frame.write_csv(path, separator="\t"),
}


def require_kind(path: Path) -> None:
    """Refuses a file that `write_rows` would not know how to write.

    Raises:
        UserError: the suffix is another.
    """
    if path.suffix.lower() not in _KINDS:
        raise UserError(f"{str(path)!r}: name a file that ends in {', '.join(_KINDS)}")


def require_other(path: Path, data: str) -> None:
    """Refuses a file to write that is the one rows are read from, or in a folder of such.

    Args:
        path: the file to write.
        data: a path, or a named set with one (`criteo:PATH`).

    Raises:
        UserError: it is, through whatever links.
    """
    if not path.exists():
        return
    for source in filter(Path.exists, (Path(data), Path(data.partition(":")[2] or data))):
        # Of a folder, Parquet files alone are read.
        files = [source] if source.is_file() else source.rglob("*.parquet")
        if any(file.is_file() and path.samefile(file) for file in files):
            what = "the file" if source.is_file() else "one of the files"
            raise UserError(f"{str(path)!r} is {what} of rows itself: name another one with -o")


def write_rows(frame: pl.DataFrame, path: Path) -> None:
    """Writes a table as Parquet, CSV or TSV, whichever the suffix says; whole or not at all.

    Raises:
        FileWriteError: it cannot be written.
        UserError: text cannot hold a column, as one of lists, or the suffix is another.
    """
    require_kind(path)
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    if nested and path.suffix.lower() != ".parquet":
        what = "structs" if frame.schema[nested[0]] == pl.Struct else "lists"
        raise UserError(
            f"column {nested[0]!r} holds {what}, which {path.suffix} has no form for: "
            "write .parquet"
        )
    write_aside({path: lambda aside: _KINDS[path.suffix.lower()](frame, aside)})
