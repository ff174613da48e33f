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


def write_rows(frame: pl.DataFrame, path: Path) -> None:
    """Writes a table as Parquet, CSV or TSV, whichever the suffix says; whole or not at all.

    Raises:
        FileWriteError: it cannot be written.
        UserError: text cannot hold a column, as one of lists, or the suffix is another.
    """
    require_kind(path)
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    if nested and path.suffix.lower() != ".parquet":
        raise UserError(
            f"column {nested[0]!r} holds lists, which {path.suffix} has no form for: write .parquet"
        )
    write_aside({path: lambda aside: _KINDS[path.suffix.lower()](frame, aside)})
