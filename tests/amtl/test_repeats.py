"""Columns that another one makes needless."""

import numpy as np
import polars as pl
import pytest
from amtl.data.fields import infer_fields
from amtl.data.repeats import without_repeats
from amtl.run.config import TrainConfig
from amtl.run.preparation import prepare

pytest.importorskip("sklearn")


def table(rows: int = 2000) -> pl.DataFrame:
    random = np.random.default_rng(0)
    user, price = random.integers(0, 60, rows), random.normal(size=rows)
    return pl.DataFrame(
        {
            "user": user,
            "price": price,
            "gaps": [None if x > 1 else x for x in price],
            "copy": user,
            "name": [f"u{i}" for i in user],
            "cents": price * 100,
            "again": [None if x > 1 else x for x in price],
            "city": random.integers(0, 60, rows).astype(str),
            "label": random.integers(0, 2, rows),
        }
    )


NAMES = ["user", "price", "gaps", "copy", "name", "cents", "again", "city"]


def taken(frame: pl.DataFrame, told=()) -> dict[str, tuple[str, str]]:
    specs = without_repeats(frame, infer_fields(frame, NAMES), told)
    return {spec.name: (spec.kind, spec.note) for spec in specs}


def test_a_copy_is_left_out():
    found = taken(table())
    assert found["copy"] == ("unused", "the same as 'user'")
    assert found["again"] == ("unused", "the same as 'gaps'")
    assert {n for n, (kind, _) in found.items() if kind == "unused"} == {"copy", "again"}


def test_values_that_come_and_go_together_are_noted():
    found = taken(table())
    assert found["name"][0] == "categorical"
    assert found["name"][1].endswith(
        "its values come and go with those of 'user': --drop name stores them once"
    )
    # Another unit has other neighbours at its ends, and may be meant.
    assert found["cents"] == ("bucket", "")
    assert "come and go" not in found["city"][1]


def test_the_last_rows_count():
    frame = table(12_000).with_row_index()
    last = pl.col("index") == 11_999
    frame = frame.with_columns(
        copy=pl.when(last).then(pl.col("user") + 1).otherwise("user"),
        name=pl.when(last).then(pl.lit("x")).otherwise("name"),
    )
    found = taken(frame)
    assert found["copy"][0] == "categorical" and "come and go" not in found["name"][1]


def test_what_somebody_has_said_stays():
    assert taken(table(), {"copy"})["copy"][0] == "categorical"


def test_few_rows_may_be_alike_by_chance():
    assert taken(table(900))["copy"][0] == "categorical"


def test_a_run_leaves_copies_out(tmp_path):
    table().write_csv(tmp_path / "log.csv")
    data = str(tmp_path / "log.csv")
    config = TrainConfig(data=data, label="label")
    kinds = {f.name: f.kind for f in prepare(config).encoder.decisions}
    assert kinds["copy"] == "unused" and kinds["user"] == "categorical"
    told = TrainConfig(data=data, label="label", numeric={"copy": "categorical"})
    kinds = {f.name: f.kind for f in prepare(told).encoder.decisions}
    assert kinds["copy"] == "categorical"
