"""Criteo, Avazu and Taobao from a local copy in their official layouts."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl

from amtl.data.readers import read_file, require_columns
from amtl.errors import UserError

CRITEO_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
AVAZU_FIELDS = (
    "C1",
    "banner_pos",
    "site_id",
    "site_domain",
    "site_category",
    "app_id",
    "app_domain",
    "app_category",
    "device_id",
    "device_ip",
    "device_model",
    "device_type",
    "device_conn_type",
    *(f"C{i}" for i in range(14, 22)),
    "hour_of_day",
    "weekday",
)
TAOBAO_FIELDS = (
    "user",
    "adgroup_id",
    "pid",
    "cate_id",
    "campaign_id",
    "customer",
    "brand",
    "price",
    "cms_segid",
    "cms_group_id",
    "final_gender_code",
    "age_level",
    "pvalue_level",
    "shopping_level",
    "occupation",
    "new_user_class_level",
    "hour_of_day",
)


def load_criteo(argument: str | None) -> pl.DataFrame:
    """Reads `train.txt`: tab-separated, no header, label, 13 counts, 26 hashed categories.

    A column `order` keeps the file's order, which is chronological.
    """
    path = _path(argument, "criteo", "train.txt", "the Criteo display advertising challenge")
    columns = ["label", *CRITEO_NUMBERS, *CRITEO_CATEGORIES]
    schema = {name: pl.String if name in CRITEO_CATEGORIES else pl.Int64 for name in columns}
    try:
        frame = pl.read_csv(path, separator="\t", has_header=False, schema=schema, quote_char=None)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path} is not in Criteo's layout (40 tab-separated columns, no header): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return frame.with_row_index("order")


def load_avazu(argument: str | None) -> pl.DataFrame:
    """Reads `train.csv` or `train.gz`; `hour` (YYMMDDHH) also as hour of day and weekday."""
    path = _path(argument, "avazu", "train.csv", "the Avazu click-through rate competition")
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            frame = pl.read_csv(file.read(), schema_overrides={"id": pl.String})
    else:
        frame = pl.read_csv(path, schema_overrides={"id": pl.String})
    require_columns(frame.columns, ["click", "hour", *AVAZU_FIELDS[:-2]], str(path))
    minutes = pl.col("hour").cast(pl.String) + "00"
    when = minutes.str.to_datetime("%y%m%d%H%M", strict=False)
    return frame.with_columns(
        hour_of_day=when.dt.hour().cast(pl.Int64), weekday=when.dt.weekday().cast(pl.Int64)
    )


def load_taobao(argument: str | None) -> pl.DataFrame:
    """Joins `raw_sample.csv` with `ad_feature.csv` and `user_profile.csv` of one folder."""
    folder = _path(argument, "taobao", "", "the Taobao display advertising data (Tianchi)")

    def table(name: str, wanted: list[str]) -> pl.DataFrame:
        frame = read_file(folder / name).frame
        frame = frame.rename({column: column.strip() for column in frame.columns})
        require_columns(frame.columns, wanted, str(folder / name))
        return frame

    samples = table("raw_sample.csv", ["user", "time_stamp", "adgroup_id", "pid", "clk"])
    ads = table("ad_feature.csv", ["adgroup_id", "price"])
    price = pl.col("price").cast(pl.Float64, strict=False)
    users = table("user_profile.csv", ["userid"])
    when = pl.from_epoch("time_stamp") + pl.duration(hours=8)
    return (
        samples.join(ads.with_columns(price), on="adgroup_id", how="left", maintain_order="left")
        .join(users, left_on="user", right_on="userid", how="left", maintain_order="left")
        .with_columns(hour_of_day=when.dt.hour().cast(pl.Int64))
    )


def _path(argument: str | None, name: str, default: str, owner: str) -> Path:
    if not argument:
        raise UserError(
            f"{name} needs a local copy of {owner}: write {name}:PATH"
            + (f" to {default}" if default else " to its folder")
        )
    path = Path(argument)
    if path.is_dir() and default:
        path = path / default
    if not path.exists():
        raise UserError(f"there is no {str(path)!r}; write {name}:PATH to {owner}")
    return path
