"""Reading Parquet and CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from amtl.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": ","}


def read_table(path: Path | str, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Reads a Parquet, CSV or TSV file (the text ones also as `.gz`), or a folder of Parquet files.

    Args:
        path: the file; the kind is told by its suffix.
        columns: only these, in this order; by default all.

    Raises:
        UserError: if the file is missing, of an unknown kind, or cannot be parsed, or if a column
            does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; give a path to a Parquet or CSV file")
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    kind = suffixes[-1].lower() if suffixes else ""
    try:
        if path.is_dir():
            lazy = pl.scan_parquet(path / "*.parquet")
        elif kind in (".parquet", ".pq"):
            lazy = pl.scan_parquet(path)
        elif kind in _SEPARATORS:
            lazy = pl.read_csv(path, separator=_SEPARATORS[kind], infer_schema_length=20_000).lazy()
        else:
            raise UserError(
                f"{str(path)!r}: unknown kind {kind!r}; give a .parquet, .csv or .tsv file"
            )
        names = lazy.collect_schema().names()
        require_columns(names, columns or [], str(path))
        return (lazy.select(columns) if columns else lazy).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"cannot read {str(path)!r}: {str(error).splitlines()[0]}") from error


def require_columns(present: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raises a UserError naming the columns of `wanted` that are not `present`."""
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(
            f"{where} has no column {', '.join(map(repr, missing))}; "
            f"its columns are {', '.join(present)}"
        )
