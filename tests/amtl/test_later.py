"""Columns of which later rows hold other values."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from amtl.data.fields import infer_fields
from amtl.data.registry import Source
from amtl.run.config import TrainConfig
from amtl.run.preparation import prepare

ROWS = 6000


def log(seed=0) -> pl.DataFrame:
    """Sessions end, users stay; what is bought depends on days since, and not on what is shown."""
    g = np.random.default_rng(seed)
    time = np.arange(ROWS)
    since = (g.integers(0, 200, ROWS) * (1 + time / ROWS)).astype(int) + time // 100
    users = g.integers(0, 300, ROWS)
    rate = 1 / (1 + np.exp(since / 40 - 3)) * np.where(users % 2, 0.9, 0.3)
    return pl.DataFrame(
        {
            "time": time,
            "session": [f"s{i // 12}" for i in range(ROWS)],
            "since": since,
            "shown": g.integers(0, 150, ROWS) + time // 100,
            "user": users + 10_000,
            "label": (g.random(ROWS) < rate).astype(int),
        }
    )


def taken(frame, split, **changes) -> dict[str, tuple[str, bool, str]]:
    names = [name for name in frame.columns if name not in ("time", "label")]
    config = TrainConfig("log", "label", fields=names, split=split, **changes)
    task = prepare(config, Source("log", frame))
    return {f.name: (f.kind, f.value, f.note) for f in task.encoder.decisions}


def test_what_does_not_come_again_is_left_out_and_what_drifts_is_a_number():
    frame = log()
    by_chance = taken(frame, "random")
    assert by_chance["session"][0] == by_chance["user"][0] == "categorical"
    later = taken(frame, "order:time")
    kind, value, note = later["session"]
    assert kind == "unused" and not value and "--numeric session=categorical keeps it" in note
    assert "100.0% of the validation rows hold values that no row that trains has" in note
    kind, value, note = later["since"]
    assert kind == "bucket" and value and "--numeric since=categorical for ids" in note
    # Labels say nothing of their order.
    assert later["user"][:2] == by_chance["user"][:2]
    assert later["shown"][:2] == by_chance["shown"][:2] == ("categorical", True)


def test_what_ends_while_rows_are_held_out_is_left_out():
    """A week began while rows train: of the rows held out a quarter knows it, and none later."""
    week = (np.arange(ROWS) - 4950) // 600
    frame = log().with_columns(week=week, campaign=pl.format("c{}", pl.Series(week)))
    later = taken(frame, "order:time")
    for name in ("week", "campaign"):
        kind, value, note = later[name]
        assert kind == "unused" and not value, name
        assert "100.0% of the last half of the validation rows hold values that no row" in note
    by_part = frame.with_columns(
        part=pl.Series(["train"] * 4800 + ["valid"] * 600 + ["test"] * 600)
    )
    assert taken(by_part.drop("time"), "column:part")["campaign"][0] == "categorical"


def test_the_split_may_be_of_parts():
    frame = log().with_columns(part=pl.Series(["train"] * 4800 + ["valid"] * 600 + ["test"] * 600))
    assert (
        taken(frame.drop("time"), "column:part", default_numeric="bucket")["session"][0] == "unused"
    )


@pytest.mark.parametrize("told", [{"session": "categorical", "since": "categorical"}])
def test_what_somebody_has_said_stays(told):
    found = taken(log(), "order:time", numeric=told)
    assert found["session"][0] == found["since"][0] == "categorical"


def test_too_few_rows_say_nothing():
    few = log().head(900)
    assert taken(few, "order:time")["session"][0] == "categorical"
    specs = infer_fields(few, ["session"])
    assert specs[0].kind == "categorical"
