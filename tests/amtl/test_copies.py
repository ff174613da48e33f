"""Rows that are there several times, and random splits that keep them together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.copies import copies, number_of, together
from amtl.data.splits import split_rows
from amtl.run.config import TrainConfig
from amtl.run.folders import load_run
from amtl.run.preparation import prepare
from amtl.run.training import start

DISTINCT = 1000


def distinct(rows: int = DISTINCT, rate: float = 0.3) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "price": rng.gamma(2.0, 10.0, rows),
            "shop": rng.integers(0, 20, rows),
            "y": (rng.random(rows) < rate).astype(np.int64),
        }
    )


def again(frame: pl.DataFrame, times: int = 4) -> pl.DataFrame:
    return pl.concat([frame] * times)


def found(frame: pl.DataFrame) -> int | None:
    labels = torch.tensor(frame["y"].cast(pl.Float32).to_numpy())
    group = copies(frame, "y", labels)
    if group is None:
        return None
    assert frame.with_columns(group=group).n_unique() == frame.n_unique() == int(group.max()) + 1
    return number_of(group)


def test_copies_are_found() -> None:
    frame = distinct()
    assert found(again(frame)) == 3 * DISTINCT
    assert found(again(frame, 2)) == DISTINCT
    # Positive rows that were drawn again, shuffled.
    positive = frame.filter(pl.col("y") == 1)
    balanced = pl.concat([frame, positive, positive]).sample(fraction=1.0, shuffle=True, seed=1)
    assert found(balanced) == 2 * len(positive)


def test_numbers_of_rows_and_lists_do_not_hide_them() -> None:
    frame = again(distinct())
    numbered = frame.with_columns(pl.int_range(len(frame)).alias("number"))
    labels = torch.tensor(frame["y"].cast(pl.Float32).to_numpy())
    for more in (
        numbered,
        numbered.with_columns(pl.format("row {}", "number").alias("text")),
        frame.with_columns(pl.concat_list("shop").alias("list")),
    ):
        group = copies(more, "y", labels)
        assert group is not None and number_of(group) == 3 * DISTINCT


def test_rows_that_are_alike_by_chance_are_none() -> None:
    frame, rng = distinct(), np.random.default_rng(1)
    assert found(frame) is None
    # The same prices and shops, other labels.
    other = again(frame).with_columns(y=pl.Series(rng.integers(0, 2, 4 * DISTINCT)))
    labels = torch.tensor(other["y"].cast(pl.Float32).to_numpy())
    assert copies(other, "y", labels) is None
    # Few columns of few values, whose labels follow from them.
    rules = pl.DataFrame({"a": rng.integers(0, 40, 4000), "b": rng.integers(0, 40, 4000)})
    rules = rules.with_columns(y=(pl.col("a") > pl.col("b")).cast(pl.Int64), c=pl.col("a") / 7)
    assert found(rules) is None
    # Of rare positives few groups would differ by chance.
    assert found(again(distinct(300, 0.01), 2)) is None
    few = pl.concat([frame, frame[:5]])
    assert found(few) is None
    assert found(pl.DataFrame({"t": ["a"] * 50, "y": [0, 1] * 25})) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_split_keeps_them_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 300, 2000)
    group = np.unique(group, return_inverse=True)[1]
    frame = pl.DataFrame({"x": np.arange(2000)})
    parts = split_rows(frame, "random", seed, group)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
    of = [set(group[part.numpy()].tolist()) for part in parts]
    assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])
    assert abs(len(parts[0]) - 1600) < 30 and abs(len(parts[1]) - 200) < 30
    # Without copies all is as it was.
    alone = split_rows(frame, "random", seed, np.arange(2000))
    assert all(map(torch.equal, alone, split_rows(frame, "random", seed)))


def test_copies_follow_the_first_of_them() -> None:
    order, starts = together(torch.tensor([4, 0, 3, 1, 2]), np.array([0, 1, 1, 0, 2]))
    assert order.tolist() == [4, 0, 3, 1, 2] and starts.tolist() == [0, 1, 3]


def test_runs_keep_copies_together_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "twice.parquet"
    again(distinct(300)).write_parquet(path)
    config = TrainConfig(str(path), "y", race=False, epochs=1)
    task = prepare(config)
    assert "900 rows are copies of others" in task.notes[0]
    start(config, tmp_path / "run").run()
    trained = load_run(tmp_path / "run")
    assert torch.equal(trained.test_split().labels, task.test.labels)
    assert torch.equal(trained.test_split().dense, task.test.dense)
    # Runs of before, whose copies went anywhere, are tested on the rows that they were.
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    del before["copies_together"], before["crc32"]
    old = TrainConfig.from_dict(before)
    assert not old.copies_together and not prepare(old).notes
    rows = split_rows(pl.read_parquet(path), "random")[2]
    assert len(prepare(old).test) == len(rows)
