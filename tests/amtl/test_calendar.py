"""Hours, weekdays, days of the month and months of moments as fields of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.calendar import called, parts
from amtl.data.columns import column_of
from amtl.data.registry import Source
from amtl.data.specs import numbers
from amtl.errors import UserError
from amtl.run.config import TrainConfig
from amtl.run.folders import load_run
from amtl.run.preparation import prepare
from amtl.run.training import start
from amtl.settings import make_config

DAY = 86_400
FIRST = 1_704_067_200
"""2024-01-01, a Monday."""


def moments(days: int = 60, rows: int = 2000) -> pl.Series:
    """Seconds of some days, in no order."""
    seconds = FIRST + np.random.default_rng(0).integers(0, days * DAY, rows)
    return pl.Series("when", seconds * 10**6).cast(pl.Datetime("us"))


def labels(rate: pl.Series, seed: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(seed).random(len(rate)) < rate.cast(pl.Float64).to_numpy()
    return drawn.astype(np.float64)


def found(when: pl.Series, y: np.ndarray, **more: object) -> list[str]:
    frame = pl.DataFrame([when.rename("when"), pl.Series("x", np.arange(len(when)))])
    return [field.name for field in parts(frame, y, **more)]  # type: ignore[arg-type]


def by_hour(when: pl.Series) -> np.ndarray:
    return labels(0.2 + 0.3 * (when.dt.hour() >= 18))


WRITTEN: dict[str, Callable[[pl.Series], pl.Series]] = {
    "datetime": lambda when: when,
    "milliseconds": lambda when: when.cast(pl.Datetime("ms")),
    "zone": lambda when: when.dt.replace_time_zone("Asia/Tokyo"),
    "seconds": lambda when: when.dt.epoch("s"),
    "seconds, some 0": lambda when: when.dt.epoch("s").scatter(range(0, 2000, 50), 0),
    "seconds as text, some NA": lambda when: (
        when.dt.epoch("s").cast(pl.String).scatter(range(0, 2000, 50), "NA")
    ),
    "YYYYMMDDHH as text": lambda when: when.dt.to_string("%Y%m%d%H"),
    "microseconds as floats": lambda when: when.dt.epoch("us").cast(pl.Float64),
    "ISO, some NA": lambda when: when.dt.to_string("%Y-%m-%d %H:%M:%S").scatter(
        range(0, 2000, 50), "NA"
    ),
    "ISO": lambda when: when.dt.to_string("%Y-%m-%dT%H:%M:%S"),
    "German": lambda when: when.dt.to_string("%d.%m.%Y %H:%M"),
    "a log's": lambda when: when.dt.to_string("%d/%b/%Y:%H:%M:%S +0000"),
    "categories": lambda when: when.dt.to_string("%Y-%m-%d %H:%M").cast(pl.Categorical),
    "YYYYMMDDHH": lambda when: when.dt.to_string("%Y%m%d%H").cast(pl.Int64),
    "YYMMDDHH": lambda when: when.dt.to_string("%y%m%d%H").cast(pl.Int64),
    "YYYYMMDDHHMM, some missing": lambda when: (
        when.dt.to_string("%Y%m%d%H%M").cast(pl.Float64).scatter(range(0, 2000, 50), None)
    ),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_an_hour_that_labels_follow_is_found_however_it_is_written(written: str) -> None:
    when = moments()
    column = WRITTEN[written](when)
    frame = pl.DataFrame([column.rename("when")])
    (field,) = parts(frame, by_hour(when))
    assert (field.name, field.part, field.column) == ("when.hour", "hour", "when")
    assert "--drop when.hour" in field.note
    hours, there = column_of(frame, field), column.is_not_null().to_numpy().copy()
    if "some" in written:
        there[::50] = False
    assert hours.filter(pl.Series(there)).equals(
        when.dt.hour().filter(pl.Series(there)).rename("when.hour")
    )
    assert not hours.filter(pl.Series(~there)).count()
    # Few rows to score, in whatever form they come.
    assert column_of(frame[1:2], field).to_list() == [when.dt.hour()[1]]
    scored = column_of(pl.DataFrame([in_utc(column, when)]), field)
    assert scored.equals(when.dt.hour().rename("when.hour"))


def test_a_moment_is_read_in_another_notation_than_training_had() -> None:
    when = moments()
    for trained in WRITTEN.values():
        column = trained(when).rename("when")
        (field,) = parts(pl.DataFrame([column]), by_hour(when))
        same = in_utc(column, when)
        for scored in (
            *(WRITTEN[name](same) for name in ("seconds", "ISO", "microseconds as floats")),
            same.dt.replace_time_zone("UTC").dt.convert_time_zone("America/New_York"),
            same.dt.to_string("%m/%d/%Y %H:%M:%S"),
            same.dt.epoch("ms").cast(pl.String),
            same.dt.to_string("%Y-%m-%dT%H:%M:%S+00:00"),
        ):
            hours = column_of(pl.DataFrame([scored.rename("when")]), field)
            assert hours.equals(when.dt.hour().rename("when.hour"))


def in_utc(column: pl.Series, when: pl.Series) -> pl.Series:
    """The instants of a column, without a zone, which means UTC."""
    if getattr(column.dtype, "time_zone", None):
        return column.dt.convert_time_zone("UTC").dt.replace_time_zone(None).rename("when")
    return when


def test_days_have_no_hours() -> None:
    when = moments()
    (field,) = parts(pl.DataFrame([when]), by_hour(when))
    days = when.dt.date()
    for held in (days, days.dt.to_string("%Y-%m-%d"), days.dt.to_string("%d.%m.%Y")):
        assert column_of(pl.DataFrame([held]), field).null_count() == len(when)
        with pytest.raises(UserError, match="has dates without a time"):
            called(pl.DataFrame([held]), "when.hour")
        assert called(pl.DataFrame([held]), "when.weekday") is not None


@pytest.mark.parametrize("form", ["%Y-%m", "%b %Y", "%b-%y", "%m/%Y"])
def test_months_have_neither_days_nor_hours(form: str) -> None:
    """The weekday of their first days is none that anything follows."""
    months = pl.date_range(pl.date(2001, 1, 1), pl.date(2020, 12, 1), "1mo", eager=True)
    when = months.sample(8000, with_replacement=True, seed=0).rename("when")
    y = labels(0.2 + 0.5 * ((when.dt.month() == 12) | (when.dt.weekday() == 7)))
    assert found(when.dt.to_string(form), y) == ["when.month"]
    (field,) = parts(pl.DataFrame([when.dt.to_string(form)]), y)
    scored = column_of(pl.DataFrame([when.cast(pl.Datetime("us"))]), field)
    assert scored.equals(when.dt.month().rename("when.month"))


ODD = {"typo": "2024-02-30 10:00", "zeros": "0000-00-00 00:00:00", "word": "soon", "NaT": "NaT"}


@pytest.mark.parametrize("odd", ODD)
def test_a_few_texts_that_are_no_moments_are_missing(odd: str, tmp_path: Path) -> None:
    frame = shop()
    texts = frame["when"].dt.to_string("%Y-%m-%d %H:%M:%S").scatter([3, 700], ODD[odd])
    frame = frame.with_columns(when=texts)
    for split, kind in (("random", "bucket"), ("order:when", None)):
        fields = prepared(frame, split=split)
        assert fields.get("when") == kind and fields["when.hour"] == "categorical"
    # Text that only begins so is text.
    noted = frame.with_columns(when=frame["when"] + " - " + frame["user"].cast(pl.String))
    assert prepared(noted)["when"] in ("unused", "categorical")


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "form",
    [
        *("%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %H:%M:%S GMT", "%Y-%m-%dT%H:%M:%SZ[UTC]"),
        *("%Y-%m-%d %H:%M:%S,000", "%Y%m%dT%H%M%SZ", "%Y:%m:%d %H:%M:%S"),
        *("%d%b%Y:%H:%M:%S", "%Y-%m-%d-%H.%M.%S", "%Y-%m-%d %H", "%Y-%m-%d %H:%M:%S +0000"),
    ],
)
def test_notations_of_programs(form: str) -> None:
    when = moments()
    texts = when.dt.to_string(form)
    (field,) = parts(pl.DataFrame([texts]), by_hour(when))
    hours = column_of(pl.DataFrame([texts]), field)
    assert hours.equals(when.dt.hour().rename("when.hour"))
    assert prepared(shop(when=texts))["when"] == "bucket"


def test_zones_by_name_are_those_of_mail() -> None:
    when = moments()
    texts = when.dt.to_string("%Y-%m-%d %H:%M:%S EST")
    (field,) = parts(pl.DataFrame([texts]), by_hour(when))
    hours = column_of(pl.DataFrame([texts]), field).cast(pl.Int64)
    assert hours.equals((when.dt.hour().cast(pl.Int64) + 5) % 24, check_names=False)


def test_a_value_that_is_no_moment_is_named() -> None:
    texts = moments().dt.to_string("%Y-%m-%d %H:%M:%S").scatter(5, "2024-13-01 00:00:00")
    with pytest.raises(UserError, match=r"'2024-13-01 00:00:00' where dates or times are needed"):
        numbers(texts)


def test_weekdays_and_months_come_again_after_weeks_and_years() -> None:
    when = moments(days=2000, rows=20_000)
    assert found(when, labels(0.2 + 0.3 * (when.dt.weekday() >= 6))) == ["when.weekday"]
    # A month of five years has its own days.
    assert "when.month" in found(when, labels(0.2 + 0.3 * (when.dt.month() >= 11)))
    days = when.dt.date()
    assert found(days, labels(0.2 + 0.3 * (when.dt.weekday() >= 6))) == ["when.weekday"]
    assert found(days.dt.to_string("%Y%m%d").cast(pl.Int64), labels(0.5 * (when.dt.weekday() >= 6)))


def test_days_of_the_month_come_again_after_months() -> None:
    when = moments(days=500, rows=20_000)
    paid = (when.dt.day() <= 2) | (when.dt.day() >= 30)
    assert found(when, labels(0.2 + 0.15 * paid)) == ["when.day"]
    # Of few rows, with those beside them: the last days of a month are next to its first.
    some = when[:4000]
    assert found(some, labels(0.2 + 0.15 * paid[:4000], seed=0)) == ["when.day"]
    assert found(some, labels(0.2 + 0.15 * paid[:4000], seed=0), skip=["when.day"]) == []
    assert found(when.dt.date(), labels(0.2 + 0.15 * paid)) == ["when.day"]
    (field,) = parts(pl.DataFrame([when]), labels(0.2 + 0.15 * paid))
    assert "labels follow the day of the month of 'when' from month to month" in field.note
    assert column_of(pl.DataFrame([when.dt.epoch("ms")]), field).equals(
        when.dt.day().rename("when.day")
    )
    for months, expected in ((3, []), (4, ["when.day"])):
        when = moments(days=round(30.4 * months), rows=20_000)
        paid = (when.dt.day() <= 2) | (when.dt.day() >= 30)
        assert found(when, labels(0.2 + 0.3 * paid)) == expected
    # One feast is no day of the month.
    feast = (when.dt.day() == 14) & (when.dt.month() == 2)
    assert found(when, labels(0.2 + 0.7 * feast)) == []


def test_of_few_rows_an_hour_is_asked_for_with_those_beside_it() -> None:
    """Single hours of so few rows say too little, and those around midnight are neighbours."""
    when = moments(days=90, rows=2200)
    day = when.dt.hour().cast(pl.Float64) * np.pi / 12
    assert found(when, labels(0.1 + 0.07 * day.cos(), seed=0)) == ["when.hour"]
    # Two kinds of hours that take turns are told apart.
    turns = labels(0.2 + 0.3 * (moments().dt.hour() % 2))
    assert found(moments(), turns) == ["when.hour"]
    even = labels(pl.Series([0.1]).new_from_index(0, len(when)))
    assert found(when, even) == []


def test_nothing_is_made_of_what_does_not_come_again() -> None:
    when = moments()
    chance = labels(pl.Series([0.3]).new_from_index(0, len(when)))
    assert found(when, chance) == []
    trend = (when.dt.epoch("s") - FIRST) / (60 * DAY)
    assert found(when, labels(0.1 + 0.8 * trend)) == []
    # A campaign of an evening is many labels, and one day.
    once = (when.dt.date() == when.dt.date()[0]) & (when.dt.hour() >= 12)
    assert found(when, labels(0.1 + 0.9 * once)) == []
    few = moments(days=3)
    assert found(few, by_hour(few)) == []
    assert found(moments(days=4), by_hour(moments(days=4))) == ["when.hour"]
    for weeks, expected in ((3, []), (4, ["when.weekday"])):
        when = moments(days=7 * weeks)
        assert found(when, labels(0.2 + 0.4 * (when.dt.weekday() >= 5))) == expected


def test_only_rows_that_train_are_asked() -> None:
    when = moments()
    y = by_hour(when)
    later = (when.dt.epoch("s") > FIRST + 3 * DAY).to_numpy()
    assert found(when, np.where(later, np.nan, y)) == []
    assert found(when, np.where(~later, np.nan, y)) == ["when.hour"]


@pytest.mark.parametrize(
    "column",
    [
        np.random.default_rng(0).integers(0, 2**40, 2000),
        np.random.default_rng(0).integers(10**7, 10**8, 2000),
        np.random.default_rng(0).integers(0, 3_000_000_000, 2000),
        [f"{i % 24}:{i % 60:02}" for i in range(2000)],
        ["a 1 b"] * 2000,
        [None] * 2000,
        [[1]] * 2000,
        [float("nan")] * 2000,
    ],
)
def test_what_is_no_moment_is_passed_over(column: object) -> None:
    frame = pl.DataFrame({"when": column})
    assert parts(frame, by_hour(moments())) == []
    with pytest.raises(UserError, match=r"--fields when.hour: column 'when' .* has no dates"):
        called(frame, "when.hour")
    assert called(frame, "when") is called(frame, "what.hour") is called(frame, "when.days") is None


def shop(**more: pl.Series) -> pl.DataFrame:
    when = moments()
    user = pl.Series("user", np.random.default_rng(2).integers(0, 50, len(when)))
    return pl.DataFrame([when, user, pl.Series("y", by_hour(when))]).with_columns(**more)


def prepared(frame: pl.DataFrame, **more: object) -> dict[str, str]:
    source = Source("shop", frame)
    names = {"fields": [], "drop": [], "numeric": {}, "options": [], "laws": {}, "method": "amtl"}
    config = make_config(source, {}, label="y", **{**names, "options": {}, **more})
    encoder = prepare(config, source).encoder
    return {field.name: field.kind for field in encoder.decisions}


def test_runs_have_them_unless_told_otherwise() -> None:
    frame = shop()
    plain = {"when": "bucket", "user": "categorical", "when.hour": "categorical"}
    assert prepared(frame) == plain
    assert "when.hour" not in prepared(frame, drop=["when.hour"])
    assert prepared(frame, drop=["when"]) == {"user": "categorical"}
    assert prepared(frame, numeric={"when": "standardise"}) == {**plain, "when": "standardise"}
    assert prepared(frame, fields=["user", "when"]) == {"user": "categorical", "when": "bucket"}
    named = prepared(frame, fields=["user", "when.weekday"])
    assert named == {"user": "categorical", "when.weekday": "categorical"}
    with pytest.raises(UserError, match="no column"):
        prepared(frame, fields=["when.hour"], drop=["when.hour"])
    with pytest.raises(UserError, match=r"when\.days"):
        prepared(frame, drop=["when.days"])


def test_a_split_by_time_leaves_its_hours() -> None:
    assert prepared(shop(), split="order:when") == {
        "user": "categorical",
        "when.hour": "categorical",
    }


def test_hours_that_a_column_has_already_are_not_made_again() -> None:
    hour = moments().dt.hour()
    assert "when.hour" not in prepared(shop(hour=hour))
    assert "when.hour" not in prepared(shop(at=(hour.cast(pl.Int64) + 7) % 24))
    own = shop().rename({"user": "when.hour"})
    assert prepared(own)["when.hour"] == "categorical"


def test_a_run_reads_them_again(tmp_path: Path) -> None:
    frame = shop()
    frame.write_parquet(tmp_path / "shop.parquet")
    config = TrainConfig(
        str(tmp_path / "shop.parquet"), "y", split="order:when", race=False, epochs=8, batch_size=64
    )
    start(config, tmp_path / "run").run()
    trained = load_run(tmp_path / "run")
    assert trained.encoder.columns == ["user", "when"]
    scores = trained.probabilities(frame)
    seconds = frame.with_columns(when=frame["when"].dt.epoch("ms"))
    assert torch.equal(trained.probabilities(seconds), scores)
    evening = (frame["when"].dt.hour() >= 18).to_torch()
    assert scores[evening].mean() > scores[~evening].mean() + 0.15
    with pytest.raises(UserError, match="when"):
        trained.probabilities(frame.drop("when"))
